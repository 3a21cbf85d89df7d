"""`pipeline("speech-to-units", model=...)`: files, arrays or a datasets column in, units out."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForAudioTokenization, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

from ..data.audio import read_audio, resample_audio
from ..feature_extraction_spidr import scale_pcm
from ..system.errors import AudioError
from .extractor import CONTEXT_SECONDS, WINDOW_SECONDS, Extractor, unit_layers, unit_outputs
from .unit_files import deduplicate as collapse_repeats

logger = logging.get_logger(__name__)

TASK = "speech-to-units"
# The layer of the paper's units (arXiv 2512.20308).
_PAPER_LAYER = 6


class SpeechToUnitsPipeline(Pipeline):
    """
    Speech to units, one per 20 ms or without repeats.

    ```python
    pipe = pipeline("speech-to-units", model="path/or/name", layer=6, deduplicate=True)
    pipe("speech.flac")                                        # {"units": [17, 203, ...], "durations": [2, 1, ...]}
    pipe(["a.wav", "b.wav"], batch_size=8)                     # a list of them
    pipe({"array": waveform, "sampling_rate": 16_000})
    pipe(dataset["audio"], batch_size=8)                       # a column of a data set
    ```

    An input is a file (path, content or open binary file), a mono array of samples at 16 kHz, a dictionary with
    `array` (or `raw`) and `sampling_rate`, one with `path` or `bytes` (`Audio(decode=False)`), or what `Audio()`
    decodes to. Generators and torch data sets give an iterator.

    Sampling rates: an array alone counts as 16 kHz. Files and dictionaries say their rate; where it is another, the
    audio is resampled to 16 kHz (soxr), with one warning. Channels of files are averaged; arrays must be
    mono.

    Args:
        layer: Layer whose units are wanted, counted from 1; 6 by default, or the last one of a model without a codebook
            there. Of several, `layer=[5, 6]`, each result is `{5: {"units": ...}, 6: {"units": ...}}`, in one pass.
        deduplicate: Collapse repeats. `durations` are in frames of 20 ms; without it they are all 1.
        batch_size: Recordings read at a time. Units do not depend on it.
        window_seconds, context_seconds: How recordings longer than a window are computed (see `extraction`).
    """

    _load_processor = False
    _load_image_processor = False
    _load_feature_extractor = True
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.feature_extractor is None:
            raise ValueError("The pipeline needs the model's feature extractor: pass `feature_extractor=`.")
        unit_layers(self.model.config, self._layers(self._forward_params.get("layer")))
        if missing := sorted(name for name in self.model.missing_weights if name.startswith("heads.")):
            raise ValueError(
                f"The model {self.model.name_or_path} lacks weights that predict units, for example {missing[0]}: it "
                "is not a pretraining checkpoint, or not the whole of one."
            )

    def _sanitize_parameters(
        self,
        layer: int | Sequence[int] | None = None,
        deduplicate: bool | None = None,
        window_seconds: float | None = None,
        context_seconds: float | None = None,
        **unknown: Any,
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise TypeError(
                f"{TASK} knows no argument {next(iter(unknown))!r}, only layer, deduplicate, batch_size, "
                "window_seconds and context_seconds."
            )
        forward = {"layer": layer, "window_seconds": window_seconds, "context_seconds": context_seconds}
        forward = {name: value for name, value in forward.items() if value is not None}
        return {}, forward, {} if deduplicate is None else {"deduplicate": deduplicate}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        """Units of one input (a dictionary) or of several (a list; an iterator for generators and torch data sets)."""
        if isinstance(inputs, tuple) or _is_column(inputs):
            return list(super().__call__((item for item in inputs), **kwargs))
        return super().__call__(inputs, **kwargs)

    def run_single(self, inputs, preprocess_params, forward_params, postprocess_params) -> dict[str, list[int]]:
        (units,) = self._forward([self.preprocess(inputs, **preprocess_params)], **forward_params)
        return self.postprocess(units, **postprocess_params)

    def get_iterator(
        self, inputs, num_workers: int, batch_size: int, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[dict[str, list[int]]]:
        position = 0
        for batch in _batched(inputs, batch_size):
            waveforms = []
            for item in batch:
                try:
                    waveforms.append(self.preprocess(item, **preprocess_params))
                except ValueError as error:
                    raise type(error)(f"Input {position}: {error}") from error
                position += 1
            for units in self._forward(waveforms, **forward_params):
                yield self.postprocess(units, **postprocess_params)

    def preprocess(self, inputs: Any) -> np.ndarray:
        """The standardised waveform (S samples) of one input."""
        rate = self.feature_extractor.sampling_rate
        waveform, sampling_rate = _waveform(inputs, rate)
        if sampling_rate != rate:
            logger.warning_once(f"Audio of {sampling_rate} Hz is resampled to {rate} Hz.")
            waveform = resample_audio(scale_pcm(waveform, "The audio").astype(np.float32), int(sampling_rate))
        return self._extractor(self._layers(None)).standardize(waveform)

    def _forward(
        self,
        waveforms: Sequence[np.ndarray],
        layer: int | Sequence[int] | None = None,
        window_seconds: float = WINDOW_SECONDS,
        context_seconds: float = CONTEXT_SECONDS,
    ) -> list[torch.Tensor] | list[dict[int, torch.Tensor]]:
        layers = self._layers(layer)
        results = self._extractor(layers, window=window_seconds, context=context_seconds)(waveforms)
        if layer is None or isinstance(layer, int):
            return [result[layers[0]] for result in results]
        return [{number: result[number] for number in layers} for result in results]

    def postprocess(self, units: torch.Tensor | dict[int, torch.Tensor], deduplicate: bool = False) -> dict:
        """Units of T frames as lists, with their durations in frames; of several layers by layer."""
        if isinstance(units, dict):
            return {layer: self.postprocess(of_layer, deduplicate) for layer, of_layer in units.items()}
        if deduplicate:
            kept, durations = collapse_repeats(units)
        else:
            kept, durations = units.tolist(), [1] * len(units)
        return {"units": kept, "durations": durations}

    def _layers(self, layer: int | Sequence[int] | None) -> list[int]:
        if layer is None:
            last = self.model.config.num_hidden_layers
            return [_PAPER_LAYER if _PAPER_LAYER in unit_layers(self.model.config) else last]
        layers = [layer] if isinstance(layer, int) else list(layer)
        if not layers:
            raise ValueError("`layer` is an empty list: name a layer, or leave it out.")
        return layers

    def _extractor(self, layers: Sequence[int], **options: float) -> Extractor:
        outputs = unit_outputs(self.model, layers)
        return Extractor(self.model, self.feature_extractor, outputs, **options)


def _waveform(inputs: Any, rate: int) -> tuple[np.ndarray, int]:
    """Samples of one input, and their rate."""
    if hasattr(inputs, "get_all_samples"):  # torchcodec's decoder, which `Audio()` gives
        samples = inputs.get_all_samples()
        return samples.data.mean(0).numpy(), int(samples.sample_rate)
    if isinstance(inputs, dict):
        samples = inputs.get("array", inputs.get("raw"))
        if samples is None:
            source = inputs.get("bytes") or inputs.get("path")
            if source is None:
                raise ValueError(
                    f"A dictionary holds `array` and `sampling_rate`, or `path` or `bytes`; got {sorted(inputs)}."
                )
            return _read(source), rate
        if inputs.get("sampling_rate") is None:
            raise ValueError("A dictionary with `array` needs its `sampling_rate`, too.")
        return _mono(samples), int(inputs["sampling_rate"])
    if isinstance(inputs, (str, Path, bytes, bytearray, memoryview)) or hasattr(inputs, "read"):
        return _read(inputs), rate
    return _mono(inputs), rate


def _read(source: Any) -> np.ndarray:
    if not isinstance(source, (str, Path)):
        source = source.read() if hasattr(source, "read") else bytes(source)
        if not isinstance(source, bytes):
            raise ValueError("The file is open as text: open it in binary mode, `open(path, 'rb')`.")
    try:
        return read_audio(source)
    except AudioError:
        waveform = read_audio(source, resample=True)
    logger.warning_once("Files of another rate than 16 kHz or with several channels are resampled and averaged.")
    return waveform


def _mono(samples: Any) -> np.ndarray:
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().cpu()
        samples = samples.float() if samples.dtype == torch.bfloat16 else samples  # numpy knows no bfloat16
    waveform = np.asarray(samples)
    if waveform.ndim == 2 and 1 in waveform.shape:
        waveform = waveform.reshape(-1)
    if waveform.ndim != 1:
        raise ValueError(
            f"Audio must be mono, of shape (samples,), got {waveform.shape}: average its channels, and pass several "
            "recordings as a list."
        )
    return waveform


def _is_column(inputs: Any) -> bool:
    """A lazy column of a `datasets` data set; such objects are no lists."""
    return type(inputs).__module__.startswith("datasets.") and hasattr(inputs, "__iter__")


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for item in _items(items):
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _items(items: Any) -> Iterator[Any]:
    # Map-style torch data sets end by their length, not by IndexError.
    if hasattr(items, "__getitem__") and hasattr(items, "__len__"):
        return (items[i] for i in range(len(items)))
    return iter(items)


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=SpeechToUnitsPipeline, pt_model=AutoModelForAudioTokenization, type="audio"
)

__all__ = ["TASK", "SpeechToUnitsPipeline"]
