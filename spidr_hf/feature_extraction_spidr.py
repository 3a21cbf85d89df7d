"""Feature extractor of the SpidR and DinoSR model family: waveforms in, standardised and padded batches out."""

import os
from collections.abc import Sequence
from numbers import Number
from typing import Any

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, TensorType, logging

from .hub_spidr import AUTO_MAP, save_code_files

logger = logging.get_logger(__name__)

# Full scale and silence of the integer PCM types. Other integers carry no known scale.
_PCM = {
    np.dtype(np.uint8): (2.0**7, 128.0),
    np.dtype(np.int8): (2.0**7, 0.0),
    np.dtype(np.int16): (2.0**15, 0.0),
    np.dtype(np.int32): (2.0**31, 0.0),
}
# The channel axis of audio arrays that come as samples x channels is never longer than this.
_MAX_CHANNELS = 8


class SpidrFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Standardises each utterance over its own samples, `(x - mean) / sqrt(var + norm_eps)` with the biased variance, and
    pads the batch on the right.

    The epsilon is part of the model: with that of `Wav2Vec2FeatureExtractor` (1e-7) quiet recordings reach the model
    at another level than in pretraining. The statistics are those of the samples the model gets: with `truncation`
    they are taken after cutting. (To standardise a whole recording and crop it afterwards, as pretraining does, call
    the extractor on the recording and crop its output.)

    Args:
        feature_size (`int`, *optional*, defaults to 1):
            Values per sample; always 1.
        sampling_rate (`int`, *optional*, defaults to 16000):
            Sampling rate of the audio, in Hz.
        padding_value (`float`, *optional*, defaults to 0.0):
            Value of the padded samples.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Whether to standardise.
        norm_eps (`float`, *optional*, defaults to 1e-5):
            Added to the variance.
        return_attention_mask (`bool`, *optional*, defaults to `True`):
            Whether to return an `attention_mask`. Also without padding, since pipelines pad what they collect later.
        padding_side (`str`, *optional*, defaults to `"right"`):
            Always `"right"`.
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        norm_eps: float = 1e-5,
        return_attention_mask: bool = True,
        padding_side: str = "right",
        **kwargs,
    ):
        if not norm_eps > 0:
            raise ValueError(f"`norm_eps` must be a positive number, got {norm_eps!r}: silence has no variance.")
        if padding_side != "right":
            raise ValueError(
                f"`padding_side` must be 'right', got {padding_side!r}: the models read a row's first samples."
            )
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        self.do_normalize = do_normalize
        self.norm_eps = norm_eps

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str | PaddingStrategy = False,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """
        Prepare one utterance or a batch of utterances for the model.

        Args:
            raw_speech (`np.ndarray`, `torch.Tensor`, `list`):
                One mono waveform (1-D array or tensor, list of floats; also samples x 1), or a batch of them (2-D
                array or tensor of shape B x S, list of waveforms of any lengths). Floats are taken as they are;
                integer PCM of 8, 16 or 32 bits is scaled to [-1, 1).
            padding (`bool`, `str` or `PaddingStrategy`, *optional*, defaults to `False`):
                `True` or `"longest"` pads to the longest utterance, `"max_length"` to `max_length` samples.
            max_length (`int`, *optional*):
                Length in samples for `padding="max_length"` and `truncation`.
            truncation (`bool`, *optional*, defaults to `False`):
                Whether to cut utterances to their first `max_length` samples.
            pad_to_multiple_of (`int`, *optional*):
                Pads (and cuts) to a multiple of this many samples.
            return_attention_mask (`bool`, *optional*):
                Whether to return `attention_mask`; the extractor's own setting by default.
            return_tensors (`str` or `TensorType`, *optional*):
                `"pt"` or `"np"` for one tensor of shape B x S; lists of numpy arrays otherwise.
            sampling_rate (`int`, *optional*):
                Sampling rate of `raw_speech` in Hz. Always pass it: unchecked, a wrong rate gives wrong features.

        Returns:
            `BatchFeature` with `input_values` (B x S, float32) and `attention_mask` (B x S, int32, 1 = audio).

        Raises:
            `ValueError` for a wrong sampling rate, several channels, empty or non-finite audio, and integers without a
            known scale.
        """
        self._check_sampling_rate(sampling_rate)
        strategy = self._get_padding_strategies(padding, max_length=max_length)
        padded = strategy is not PaddingStrategy.DO_NOT_PAD
        if return_attention_mask is None:
            return_attention_mask = self.return_attention_mask

        waveforms = []
        for position, utterance in enumerate(_as_utterances(raw_speech)):
            waveform = self._truncate(
                {"input_values": _as_floats(utterance, position)},
                max_length=max_length,
                pad_to_multiple_of=pad_to_multiple_of,
                truncation=truncation,
            )["input_values"]
            waveforms.append(self.standardize(waveform) if self.do_normalize else waveform.astype(np.float32))
        lengths = np.array([len(waveform) for waveform in waveforms])

        row_lengths = lengths
        if padded:
            target = int(max(lengths)) if strategy is PaddingStrategy.LONGEST else int(max_length or 0)
            if pad_to_multiple_of is not None:
                target += -target % pad_to_multiple_of
            row_lengths = np.maximum(lengths, target)
        # One allocation for the batch: `self.pad` would copy every utterance several times.
        input_values = np.full((len(waveforms), max(row_lengths)), self.padding_value, dtype=np.float32)
        for row, waveform in zip(input_values, waveforms, strict=True):
            row[: len(waveform)] = waveform
        batch: dict[str, Any] = {"input_values": input_values}
        if return_attention_mask:
            batch["attention_mask"] = (np.arange(input_values.shape[1]) < lengths[:, None]).astype(np.int32)
        if return_tensors is None or len(set(row_lengths)) > 1:
            batch = {
                name: [row[:length] for row, length in zip(rows, row_lengths, strict=True)]
                for name, rows in batch.items()
            }
        return BatchFeature(batch, tensor_type=return_tensors)

    def standardize(self, waveform: np.ndarray) -> np.ndarray:
        """
        The waveform (S samples) with zero mean and unit variance, in float32.

        Statistics and division are in float64: a mean over millions of samples drifts in float32, and where the
        variance is tiny the division by `sqrt(norm_eps)` magnifies what is left of an offset.
        """
        centred = waveform.astype(np.float64)
        centred -= centred.mean()
        scale = 1.0 / np.sqrt(np.dot(centred, centred) / len(centred) + self.norm_eps)
        return np.multiply(centred, scale, out=centred).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved, with the `auto_map` that lets them load without this package."""
        return super().to_dict() | {"auto_map": {"AutoFeatureExtractor": AUTO_MAP["AutoFeatureExtractor"]}}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Saves `preprocessor_config.json` and beside it the code files that let the folder load anywhere."""
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; give the folder to save into.")
        os.makedirs(save_directory, exist_ok=True)
        save_code_files(save_directory)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning(
                f"It is strongly recommended to pass the `sampling_rate` argument to `{type(self).__name__}()`. "
                "Failing to do so can result in silent errors that might be hard to debug."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The model was trained on audio of {self.sampling_rate} Hz and got audio of {sampling_rate} Hz: "
                f"resample it first, for example with `torchaudio.functional.resample(audio, {sampling_rate}, "
                f"{self.sampling_rate})` or `dataset.cast_column('audio', Audio(sampling_rate={self.sampling_rate}))`."
            )


def _as_utterances(raw_speech: Any) -> Sequence[Any]:
    """The utterances of a batch, or of a batch of one."""
    if _is_array(raw_speech):
        if raw_speech.ndim == 1:
            return [raw_speech]
        if raw_speech.ndim != 2:
            raise ValueError(
                f"Expected mono audio of shape (samples,) or (batch, samples), got {tuple(raw_speech.shape)}: keep one "
                "channel or average them."
            )
        rows, columns = raw_speech.shape
        if columns == 1 < rows:
            return [raw_speech]  # samples x one channel
        if rows > columns and 0 < columns <= _MAX_CHANNELS:
            raise ValueError(
                f"An array of shape {(rows, columns)} looks like samples x channels, where a 2-D array is a batch "
                "(batch, samples): pass mono audio, for example `audio.mean(1)`."
            )
        utterances: Sequence[Any] = raw_speech
    elif isinstance(raw_speech, (list, tuple, np.ndarray)):
        is_single = len(raw_speech) > 0 and (
            isinstance(raw_speech[0], Number) or getattr(raw_speech[0], "ndim", 1) == 0
        )
        utterances = [raw_speech] if is_single else raw_speech  # type: ignore[assignment]  # arrays are sequences here
    else:
        raise ValueError(_not_audio("The input", raw_speech))
    if len(utterances) == 0:
        raise ValueError("The input is empty: pass at least one utterance.")
    return utterances


def _as_floats(utterance: Any, position: int) -> np.ndarray:
    """One utterance as a finite 1-D float array of S samples; integer PCM scaled to [-1, 1)."""
    if _is_tensor(utterance):
        utterance = utterance.detach().cpu()
        # numpy knows no bfloat16
        utterance = (
            utterance.float() if utterance.is_floating_point() and utterance.itemsize < 4 else utterance
        ).numpy()
    elif not isinstance(utterance, (list, tuple, np.ndarray)):
        raise ValueError(_not_audio(f"Utterance {position}", utterance))
    try:
        waveform = np.asarray(utterance)
    except ValueError:  # nested lists of different lengths
        waveform = np.asarray(utterance, dtype=object)
    if waveform.size == 0:
        raise ValueError(f"Utterance {position} is empty (shape {waveform.shape}): leave it out.")
    if waveform.ndim == 2 and 1 in waveform.shape:
        waveform = waveform.reshape(-1)  # one channel
    if waveform.ndim != 1 or waveform.dtype == object:
        raise ValueError(
            f"Utterance {position} must be mono audio of shape (samples,), got {waveform.shape}: keep one channel or "
            "average them."
        )
    waveform = scale_pcm(waveform, f"Utterance {position}")
    finite = np.isfinite(waveform)
    if not finite.all():
        raise ValueError(
            f"Utterance {position} has non-finite samples (NaN or infinity), the first at sample {finite.argmin()}: "
            "repair the recording or leave it out."
        )
    return waveform


def scale_pcm(waveform: np.ndarray, name: str) -> np.ndarray:
    """Samples of any shape as floats: integer PCM of 8, 16 or 32 bits, of either byte order, scaled to [-1, 1).

    Raises `ValueError`, naming the audio, for values of a kind whose scale is unknown.
    """
    waveform = waveform.astype(waveform.dtype.newbyteorder("="), copy=False)
    if waveform.dtype in _PCM:
        scale, silence = _PCM[waveform.dtype]
        # float64 holds every int32, float32 every int16
        samples: Any = waveform.astype(np.float32 if waveform.itemsize < 4 else np.float64)
        return (samples - silence) / scale
    if not np.issubdtype(waveform.dtype, np.floating):
        raise ValueError(
            f"{name} has values of type {waveform.dtype}, whose scale is unknown: pass floats in [-1, 1) or PCM of 16 "
            "or 32 bits, for example `np.asarray(audio, dtype=np.int16)`."
        )
    return waveform


def _is_tensor(value: Any) -> bool:
    # By its methods, so that torch is not imported for numpy users.
    return hasattr(value, "detach") and hasattr(value, "is_floating_point")


def _is_array(value: Any) -> bool:
    return _is_tensor(value) or (isinstance(value, np.ndarray) and value.dtype != object)


def _not_audio(what: str, value: Any) -> str:
    hint = (
        "its samples, `audio['array']`"
        if isinstance(value, dict)
        else "samples, not a file or an object that holds them"
    )
    return f"{what} is a {type(value).__name__}, expected an array, a tensor or a list of floats: pass {hint}."


__all__ = ["SpidrFeatureExtractor", "scale_pcm"]
