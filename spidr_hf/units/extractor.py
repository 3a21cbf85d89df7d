"""Features and units of speech by a trained model: ragged batches, long recordings, many files.

Layers are counted from 1; representations are those before the residual unless asked otherwise (arXiv 2512.20308).

Long recordings are cut into windows. A recording that fits into one window (60 s by default) is computed whole. A
longer one is standardised whole and then computed in overlapping windows, of which the outer part (2 s of context on
either side that has a neighbour) is discarded. Convolutions reach less than 1.5 s, so for them there is no seam;
attention sees a window of 60 s, and of it at least 2 s on either side, instead of the whole recording (models are
pretrained on at most 20 s). Windows are up to a twentieth longer where one less then does: a recording of 62 s is
computed whole, too. So 60 s are computed for every 56 s of a long recording, however long
it is. A group-norm extractor takes its statistics per window.
"""

import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, SequenceFeatureExtractor

from ..configuration_spidr import SpidrConfig, frame_lengths, receptive_field
from ..data.batches import padded
from ..data.batching import batches_by_length, read_ahead
from ..data.sources import AudioSource, Skipped
from ..objectives_spidr import get_objective
from ..system.errors import AudioError, NonFiniteError
from ..system.messages import counted, duration

WINDOW_SECONDS = 60.0
CONTEXT_SECONDS = 2.0
# Padding included. On CPU larger batches are no faster; a GPU wants more.
BATCH_SECONDS = 60.0
BATCH_SECONDS_GPU = 600.0
_SAMPLING_RATE = 16_000
_NO_UNIT = -1  # where there is nothing to choose from
BLOCK = 1 << 22  # samples standardised at a time

# (input_values B x S, attention_mask B x S or None) -> for each layer a tensor of B x T, or B x T x H
Outputs = Callable[[Tensor, Tensor | None], Mapping[int, Tensor]]


def check_layers(layers: Sequence[int], first: int, last: int, what: str) -> list[int]:
    """The layers, each once, in order. Raises `ValueError` for those outside `first` ... `last`."""
    for layer in layers:
        if not first <= layer <= last:
            raise ValueError(
                f"Layer {layer} has no {what}: this model has one for each of the layers {first} to {last} "
                "(counted from 1)."
            )
    return sorted(set(layers))


def feature_outputs(model: PreTrainedModel, layers: Sequence[int], *, before_residual: bool = True) -> Outputs:
    """Representations of the layers, B x T x H each (float32). Layers above the highest are not computed.

    `model` is a `SpidrModel` or a model that holds one.
    """
    encoder = model.base_model
    layers = check_layers(layers, 1, model.config.num_hidden_layers, "representation")

    def outputs(input_values: Tensor, attention_mask: Tensor | None) -> dict[int, Tensor]:
        features = encoder.get_intermediate_outputs(
            input_values, attention_mask, before_residual=before_residual, num_layers=layers[-1]
        )
        return {layer: features[layer - 1].float() for layer in layers}

    return outputs


def unit_layers(config: SpidrConfig, layers: Sequence[int] | None = None) -> list[int]:
    """The layers asked for that have a codebook; all of those by default."""
    first, last = config.first_codebook_layer, config.num_hidden_layers
    if config.num_codebooks == 0:
        raise ValueError("This model has no codebooks (`num_codebooks` is 0), so it predicts no units.")
    return check_layers(range(first, last + 1) if layers is None else layers, first, last, "codebook")


def prediction_outputs(model: PreTrainedModel, layers: Sequence[int] | None = None) -> Outputs:
    """Probabilities that the layers' heads predict for each codeword, B x T x V each (float32).

    `model` is a `SpidrForPretraining` or `SpidrForAudioTokenization`. SpidR's heads read their own layer, so layers
    above the highest are not computed; DinoSR's all read the final output.
    """
    logits = _logits(model, unit_layers(model.config, layers))

    def outputs(input_values: Tensor, attention_mask: Tensor | None) -> dict[int, Tensor]:
        return {layer: x.softmax(-1) for layer, x in logits(input_values, attention_mask).items()}

    return outputs


def unit_outputs(model: PreTrainedModel, layers: Sequence[int] | None = None) -> Outputs:
    """Units of the layers, B x T each: the most probable codeword of `prediction_outputs`; -1 where that is NaN."""
    logits = _logits(model, unit_layers(model.config, layers))

    def outputs(input_values: Tensor, attention_mask: Tensor | None) -> dict[int, Tensor]:
        return {layer: _where_finite(x.argmax(-1), x) for layer, x in logits(input_values, attention_mask).items()}

    return outputs


def _logits(model: PreTrainedModel, layers: Sequence[int]) -> Outputs:
    config = model.config

    def outputs(input_values: Tensor, attention_mask: Tensor | None) -> dict[int, Tensor]:
        if get_objective(config.objective).reads_own_layer:
            inputs = model.base_model.get_intermediate_outputs(input_values, attention_mask, num_layers=layers[-1])
        else:
            inputs = [model.base_model(input_values, attention_mask).last_hidden_state] * layers[-1]
        first = config.first_codebook_layer
        logits = model.heads([inputs[n - 1] for n in layers], [n - first for n in layers])
        return dict(zip(layers, logits.float(), strict=True))

    return outputs


def _where_finite(units: Tensor, values: Tensor) -> Tensor:
    """Units (...) of values (... x V); -1 where one of the values is not finite: the largest of NaN is no unit."""
    return units.masked_fill(~values.sum(-1).isfinite(), _NO_UNIT)


def teacher_outputs(model: PreTrainedModel, layers: Sequence[int] | None = None) -> Outputs:
    """Labels that teacher and codebooks of a `SpidrForPretraining` assign, B x T each (normalised per window).

    They are -1 where the teacher gives NaN or infinity.
    """
    layers = unit_layers(model.config, layers)
    if not hasattr(model, "get_teacher_labels"):
        raise ValueError("Teacher labels need the whole pretraining checkpoint: load it as SpidrForPretraining.")

    if not torch.isfinite(model.codebooks.sums / model.codebooks.counts.unsqueeze(-1)).all():
        raise NonFiniteError("The model's codebooks hold NaN or infinity: its checkpoint is damaged, get it again.")

    def outputs(input_values: Tensor, attention_mask: Tensor | None) -> dict[int, Tensor]:
        targets: list[Tensor] = []
        watching = model.codebooks.register_forward_pre_hook(lambda _, inputs: targets.append(inputs[0]))
        try:
            labels = model.get_teacher_labels(input_values, attention_mask)
        finally:
            watching.remove()
        finite = targets[0].sum(-1).isfinite().view(-1, *labels[:, 0].shape).transpose(0, 1)
        labels = labels.masked_fill(~finite, _NO_UNIT)
        return {layer: labels[:, layer - model.config.first_codebook_layer] for layer in layers}

    return outputs


def cluster_outputs(model: PreTrainedModel, layer: int, centroids: Tensor, *, before_residual: bool = True) -> Outputs:
    """Units of one layer, B x T: the nearest of the centroids (clusters x H, Euclidean) to its representation."""
    if centroids.shape[-1] != model.config.hidden_size:
        raise ValueError(
            f"The centroids have {centroids.shape[-1]} dimensions, the model's features {model.config.hidden_size}: "
            "train the k-means on features of this model."
        )
    features = feature_outputs(model, [layer], before_residual=before_residual)
    centroids = centroids.to(model.device, torch.float32)
    squares = centroids.square().sum(-1)

    def outputs(input_values: Tensor, attention_mask: Tensor | None) -> dict[int, Tensor]:
        x = features(input_values, attention_mask)[layer]
        distances = squares - 2 * x @ centroids.t()
        return {layer: _where_finite(distances.argmin(-1), distances)}

    return outputs


class Window(NamedTuple):
    """A stretch of a recording that is computed at once, in frames: `first` ... `last` of which `keep` are kept."""

    first: int
    last: int
    keep: slice


def plan_windows(frames: int, window: int, context: int) -> list[Window]:
    """Windows over `frames` frames, of which at least `context` frames beside every neighbour are discarded.

    Each has `window` frames, or up to a twentieth more where that saves one. Frames that are kept follow one another
    without gap or overlap.
    """
    overlap = 2 * context
    if window <= overlap:
        raise ValueError(f"A window of {window} frames has no room for {context} frames of context on both sides.")
    number = -(-(frames - overlap) // (window - overlap))
    if number > 1:
        longer = -(-(frames - overlap) // (number - 1)) + overlap
        window = longer if longer <= window + window // 20 else window
    if frames <= window:
        return [Window(0, frames, slice(0, frames))]
    windows, start = [], 0
    while start < frames:
        # The last window is as long as the others, so its context is longer. Sides without a neighbour are kept.
        first = max(0, min(start - context, frames - window))
        last = first + window
        end = last if last == frames else last - context
        windows.append(Window(first, last, slice(start - first, end - first)))
        start = end
    return windows


class Extractor:
    """Runs a model over waveforms of any lengths; results do not depend on what shares a batch.

    Args:
        model: In eval mode it is left so; its device and dtype are used.
        feature_extractor: Standardises whole recordings.
        outputs: What to compute: `feature_outputs`, `prediction_outputs`, `unit_outputs`, `teacher_outputs` or
            `cluster_outputs`.
        window: What is computed at once, in seconds; up to a twentieth more where that saves a window.
        context: What is discarded beside every neighbouring window, in seconds.
        max_batch_seconds: Audio in one batch, padding included (by default 60, on a GPU 600). A window that is
            longer is a batch alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        feature_extractor: SequenceFeatureExtractor,
        outputs: Outputs,
        *,
        window: float = WINDOW_SECONDS,
        context: float = CONTEXT_SECONDS,
        max_batch_seconds: float | None = None,
    ):
        self.model, self.feature_extractor, self.outputs = model, feature_extractor, outputs
        self.stride = model.config.inputs_to_logits_ratio
        self.receptive_field = receptive_field(model.config)
        self.window = int(window * _SAMPLING_RATE) // self.stride
        self.context = -(-int(context * _SAMPLING_RATE) // self.stride)
        if self.context < 0 or self.window <= 2 * self.context:
            raise ValueError(
                f"A window of {window:g} s with {context:g} s of context on both sides has nothing left to keep: "
                "make the window longer than twice the context."
            )
        if max_batch_seconds is None:
            max_batch_seconds = BATCH_SECONDS if model.device.type == "cpu" else BATCH_SECONDS_GPU
        self.max_batch_samples = int(max_batch_seconds * _SAMPLING_RATE)

    def frames(self, num_samples: int) -> int:
        """Frames that `num_samples` samples give."""
        return frame_lengths(self.model.config, int(num_samples))

    def standardize(self, waveform: np.ndarray) -> np.ndarray:
        """The waveform (S samples) as the model gets it, float32. Raises `ValueError` for what cannot be used."""
        if len(waveform) < self.receptive_field:
            raise AudioError(
                f"{counted(len(waveform), 'sample', 'is', 'are')} too short: one frame needs {self.receptive_field}. "
                "Leave it out."
            )
        if len(waveform) <= BLOCK or waveform.dtype != np.float32 or not self.feature_extractor.do_normalize:
            values = self.feature_extractor(waveform, sampling_rate=_SAMPLING_RATE)["input_values"][0]
            return np.asarray(values, dtype=np.float32)
        # The same in blocks: hours of audio in float64 would need three times the memory of the recording.
        starts = range(0, len(waveform), BLOCK)
        mean = sum(waveform[i : i + BLOCK].sum(dtype=np.float64) for i in starts) / len(waveform)
        squares = sum(float(np.square(waveform[i : i + BLOCK] - mean).sum()) for i in starts)
        if not np.isfinite(squares):
            raise AudioError("It has non-finite samples (NaN or infinity): repair the recording or leave it out.")
        scale = 1.0 / np.sqrt(squares / len(waveform) + self.feature_extractor.norm_eps)
        standardized = np.empty_like(waveform)
        for i in starts:
            standardized[i : i + BLOCK] = (waveform[i : i + BLOCK] - mean) * scale
        return standardized

    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[dict[int, Tensor]]:
        """
        Args:
            waveforms: Standardised (see `standardize`), S samples each, of any lengths.

        Returns:
            For each waveform and layer a CPU tensor: T units, or T x H features.

        Raises `NonFiniteError` where they are NaN or infinite.
        """
        results = self.results(waveforms)
        for result in results:
            if reason := self.not_finite(result):
                raise NonFiniteError(reason)
        return results

    def not_finite(self, result: Mapping[int, Tensor]) -> str | None:
        """Why a waveform's results cannot be used, and what to do; None where all of them are finite."""
        for layer, x in result.items():
            frames = ~x.sum(-1).isfinite() if x.is_floating_point() else x < 0
            if bad := int(frames.sum()):
                advice = "the model's weights or the centroids are damaged: get them again."
                if self.model.dtype == torch.float16:
                    advice = "float16 has no such large numbers: --dtype bfloat16 has (or the weights are damaged)."
                return f"Layer {layer} is not finite (NaN or infinity) in {counted(bad, 'frame', of=len(x))}: {advice}"
        return None

    def results(self, waveforms: Sequence[np.ndarray]) -> list[dict[int, Tensor]]:
        """The same, without a look at what they are: units are -1 where there are none."""
        pieces: list[tuple[int, Window]] = [
            (i, window)
            for i, waveform in enumerate(waveforms)
            for window in plan_windows(self.frames(len(waveform)), self.window, self.context)
        ]
        results: list[dict[int, Tensor]] = [{} for _ in waveforms]
        stretches = [self._samples(len(waveforms[i]), window) for i, window in pieces]
        lengths = [stretch.stop - stretch.start for stretch in stretches]
        for batch in batches_by_length(lengths, self.max_batch_samples):
            rows = [waveforms[pieces[p][0]][stretches[p]] for p in batch]
            for p, outputs in zip(batch, self._run(rows), strict=True):
                i, (first, _, keep) = pieces[p]
                for layer, x in outputs.items():
                    # Into its place at once: an hour of features would be there twice while pieces are put together.
                    if layer not in results[i]:
                        results[i][layer] = x.new_empty(self.frames(len(waveforms[i])), *x.shape[1:])
                    results[i][layer][first + keep.start : first + keep.stop] = x[keep]
        return results

    def _samples(self, num_samples: int, window: Window) -> slice:
        """The samples that a window's frames see; the last window takes what is left over at the end."""
        last = num_samples
        if window.last < self.frames(num_samples):
            last = (window.last - 1) * self.stride + self.receptive_field
        return slice(window.first * self.stride, last)

    @torch.inference_mode()
    def _run(self, rows: Sequence[np.ndarray]) -> list[dict[int, Tensor]]:
        lengths = [len(row) for row in rows]
        inputs, valid = padded(rows)
        mask = None if valid is None else valid.long().to(self.model.device)
        was_training = self.model.training
        self.model.eval()
        try:
            outputs = self.outputs(inputs.to(self.model.device, self.model.dtype), mask)
        finally:
            self.model.train(was_training)
        on_cpu = {layer: x.cpu() for layer, x in outputs.items()}
        return [
            {layer: x[row, : self.frames(length)] for layer, x in on_cpu.items()} for row, length in enumerate(lengths)
        ]


@dataclass
class Extracted:
    """Results of one batch of a source.

    Attributes:
        results: for each utterance its index in the source and its tensors by layer.
        skipped: utterances that could not be used.
        not_finite: those whose results are NaN or infinite.
        lengths: for utterances of another length than the source says: fileid, samples it says, samples that are there.
        seconds: audio in it.
        planned_seconds: audio that the source's lengths had promised; for progress.
    """

    results: list[tuple[int, dict[int, Tensor]]]
    skipped: list[Skipped]
    not_finite: list[Skipped]
    lengths: list[tuple[str, int, int]]
    seconds: float
    planned_seconds: float


def plan_batches(source: AudioSource, extractor: Extractor) -> list[list[int]]:
    """All utterances of a source in batches, from the longest to the shortest."""
    return batches_by_length(source.num_samples, extractor.max_batch_samples)


def extract(
    source: AudioSource,
    extractor: Extractor,
    batches: Sequence[Sequence[int]] | None = None,
    *,
    wanted: Container[int] | None = None,
    threads: int = 2,
) -> Iterator[Extracted]:
    """
    Results of a source's utterances, batch by batch.

    Files are read and standardised in threads while the model computes; at most two batches wait. What cannot be read
    is skipped and named. Memory holds the recordings of three batches (an hour of audio takes 230 MB, twice that while
    it is standardised), one batch of activations, and the results of a batch.

    Args:
        source: See `manifests.open_manifest`.
        extractor: What to compute.
        batches: Utterances computed together; by default all, as `plan_batches` has them.
        wanted: Of which utterances there is something to tell; None: of all. The others are computed beside them, since
            the last bits of a row depend on its batch. A batch of which nothing wanted can be read is not computed.
        threads: How many files are decoded at a time.
    """
    batches = plan_batches(source, extractor) if batches is None else batches

    def load(index: int) -> np.ndarray | Skipped:
        try:
            return extractor.standardize(source.read(index))
        except ValueError as error:  # AudioError, and what the feature extractor refuses
            return Skipped(source.fileid(index), str(error))

    for batch, loaded in zip(batches, read_ahead(batches, load, threads), strict=True):
        good = [(i, entry) for i, entry in zip(batch, loaded, strict=True) if not isinstance(entry, Skipped)]
        told = {i for i in batch if wanted is None or i in wanted}
        skipped = [e for i, e in zip(batch, loaded, strict=True) if isinstance(e, Skipped) and i in told]
        good = good if any(i in told for i, _ in good) else []
        results = extractor.results([waveform for _, waveform in good]) if good else []
        found = [(index, result) for (index, _), result in zip(good, results, strict=True) if index in told]
        good = [(index, waveform) for index, waveform in good if index in told]
        reasons = {index: reason for index, result in found if (reason := extractor.not_finite(result))}
        there = [(source.fileid(i), int(source.num_samples[i]), len(waveform)) for i, waveform in good]
        yield Extracted(
            [(index, result) for index, result in found if index not in reasons],
            skipped,
            [Skipped(source.fileid(index), reason) for index, reason in reasons.items()],
            [entry for entry in there if entry[1] != entry[2]],
            sum(len(waveform) for _, waveform in good) / _SAMPLING_RATE,
            float(np.asarray(source.num_samples)[batch].sum()) / _SAMPLING_RATE,
        )


class Throughput:
    """Audio seconds per second since it was made."""

    def __init__(self) -> None:
        self.start, self.seconds = time.perf_counter(), 0.0

    def __str__(self) -> str:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        return f"{duration(self.seconds)} of audio in {duration(elapsed)}: {self.seconds / elapsed:.0f} s per second"


__all__ = [
    "BATCH_SECONDS",
    "BATCH_SECONDS_GPU",
    "CONTEXT_SECONDS",
    "WINDOW_SECONDS",
    "Extracted",
    "Extractor",
    "Outputs",
    "Throughput",
    "Window",
    "check_layers",
    "cluster_outputs",
    "extract",
    "feature_outputs",
    "plan_batches",
    "plan_windows",
    "prediction_outputs",
    "teacher_outputs",
    "unit_layers",
    "unit_outputs",
]
