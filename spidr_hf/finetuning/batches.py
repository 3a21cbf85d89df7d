"""Labelled batches for fine-tuning, in the order and with the random numbers that pretraining's are made with.

Batches are of similar length (`batching.BucketSampler`) and padded, and depend on nothing but the seed, the epoch and
their number, so that a run can go on at any of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..configuration_spidr import SpidrConfig, frame_lengths, receptive_field
from ..data.batching import BatchKey, Position
from ..data.sources import AudioSource, Skipped
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..system.errors import AudioError

NO_LABEL = -100
# What a random number is drawn for, part of its seed; those before are pretraining's.
_CROP, _REPLACEMENT = 4, 5
_MAX_REPLACEMENTS = 100
# oneDNN compiles for every shape anew, and a GPU's matrix units take multiples of 8.
_FRAME_MULTIPLE = 16
_SHORTER = 0.9  # a file shorter than this share of what its manifest says is cut off

# Labels of an utterance, by its index: one number; or one per token or frame.
LabelFunction = Callable[[int], np.ndarray]


@dataclass
class Part:
    """Utterances of a source that serve one purpose (training, validation, a held-out speaker).

    Attributes:
        name: what reports call it.
        indices: which utterances of the source (int64).
        labels: the labels of each, by its index.
    """

    name: str
    source: AudioSource
    indices: np.ndarray
    labels: LabelFunction

    def __len__(self) -> int:
        return len(self.indices)


@dataclass
class LabelledBatch:
    """One batch of one process.

    Attributes:
        input_values: B x S, standardised waveforms.
        attention_mask: B x S (bool), True on audio; None when nothing is padded.
        labels: B for utterances' labels; B x U for tokens, B x T for frames (-100 pads).
        key: which batch it is.
        utterances: which utterances its rows are; those that cannot be read are missing.
        frames: frames of each row (B, on the CPU).
        audio_samples: valid samples in it.
        skipped: what could not be read, and why.
    """

    input_values: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    key: BatchKey
    utterances: list[int]
    frames: list[int]
    audio_samples: int
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model takes."""
        names = ("input_values", "attention_mask", "labels")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> "LabelledBatch":
        """The batch with its tensors on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> "LabelledBatch":
        """The batch with its tensors in page-locked memory (called by the data loader)."""
        return dataclasses.replace(self, **{name: tensor.pin_memory() for name, tensor in self.inputs.items()})


class LabelledBatches(Dataset[LabelledBatch]):
    """Batches by key.

    Args:
        part: the utterances and their labels.
        config: for the arithmetic of the convolutions.
        feature_extractor: standardises waveforms.
        max_samples: longer utterances are cropped to this, at a random place; None: never.
        frames: whether labels are one per frame, and are cropped with the audio.
        seed: of the crops.
        replace: a batch of which nothing can be read is of another utterance, since training goes by updates;
            otherwise `AudioError` says so.
    """

    def __init__(
        self,
        part: Part,
        config: SpidrConfig,
        feature_extractor: SpidrFeatureExtractor,
        *,
        max_samples: int | None = None,
        frames: bool = False,
        seed: int = 0,
        replace: bool = False,
    ):
        self.replace = replace
        self.part = part
        self.config = config
        self.feature_extractor = feature_extractor
        self.max_samples = max_samples
        self.frames = frames
        self.seed = seed

    def __getitem__(self, key: BatchKey) -> LabelledBatch:
        rows: list[np.ndarray] = []
        labels, utterances, skipped = [], [], []
        for index in self._candidates(key):
            if rows and index not in key.utterances:
                break  # one in place of all
            try:
                waveform = self._read(index)
            except AudioError as error:
                skipped.append(Skipped(self.part.source.fileid(index), str(error)))
                continue
            row, label = self._crop(waveform, self.part.labels(index), key.epoch, index)
            rows.append(row)
            labels.append(label)
            utterances.append(index)
        if not rows:
            raise AudioError(f"None of the {len(skipped)} utterances of a batch can be used: {skipped[-1].reason}")
        lengths = np.array([len(row) for row in rows])
        input_values = torch.zeros(len(rows), self._width(int(lengths.max())))
        for target, row in zip(input_values.numpy(), rows, strict=True):
            target[: len(row)] = row
        valid = torch.from_numpy(lengths)[:, None]
        padded = lengths.min() < input_values.shape[1]
        frames = frame_lengths(self.config, torch.from_numpy(lengths)).tolist()
        most = frame_lengths(self.config, input_values.shape[1]) if self.frames else max(label.size for label in labels)
        return LabelledBatch(
            input_values,
            torch.arange(input_values.shape[1]) < valid if padded else None,
            _stack(labels, most),
            key,
            utterances,
            frames,
            int(lengths.sum()),
            skipped,
        )

    def _candidates(self, key: BatchKey) -> Iterator[int]:
        """The utterances of a batch, and then those that may stand in for all of them."""
        yield from map(int, key.utterances)
        if self.replace:
            rng = np.random.default_rng([self.seed, key.epoch, key.index, _REPLACEMENT])
            yield from map(int, rng.permutation(self.part.indices)[:_MAX_REPLACEMENTS])

    def _width(self, samples: int) -> int:
        """Samples of a batch whose longest row has this many: few different numbers of frames."""
        frames = -(-frame_lengths(self.config, samples) // _FRAME_MULTIPLE) * _FRAME_MULTIPLE
        return max(samples, (frames - 1) * self.config.inputs_to_logits_ratio + receptive_field(self.config))

    def _read(self, index: int) -> np.ndarray:
        source = self.part.source
        waveform, expected = source.read(index), int(source.num_samples[index])
        if len(waveform) < max(receptive_field(self.config), _SHORTER * expected):
            raise AudioError(
                f"{source.fileid(index)}: has {len(waveform)} samples at 16 kHz, {expected} were expected. It is cut "
                "off, or its manifest is out of date."
            )
        return self.feature_extractor.standardize(waveform) if self.feature_extractor.do_normalize else waveform

    def _crop(self, waveform: np.ndarray, label: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        length = len(waveform) if self.max_samples is None else min(len(waveform), self.max_samples)
        start = 0
        if length < len(waveform):
            rng = np.random.default_rng([self.seed, epoch, index, _CROP])
            hop = self.config.inputs_to_logits_ratio  # in whole frames, so that their labels stay theirs
            start = hop * int(rng.integers((len(waveform) - length) // hop, endpoint=True))
        if self.frames:
            first = start // self.config.inputs_to_logits_ratio
            label = label[first : first + int(frame_lengths(self.config, length))]
        return waveform[start : start + length], label


def evaluation_keys(part: Part, max_samples: int, rank: int = 0, world_size: int = 1) -> Iterator[BatchKey]:
    """This process's share of a part, in batches of similar length, each utterance once in all processes."""
    lengths = part.source.num_samples[part.indices]
    batch: list[int] = []
    number = 0
    for place in np.argsort(-lengths, kind="stable"):
        # The first of a batch is its longest.
        if batch and (len(batch) + 1) * int(part.source.num_samples[batch[0]]) > max_samples:
            if number % world_size == rank:
                yield BatchKey(0, number, np.array(batch), Position())
            batch, number = [], number + 1
        batch.append(int(part.indices[place]))
    if batch and number % world_size == rank:
        yield BatchKey(0, number, np.array(batch), Position())


def _stack(labels: Sequence[np.ndarray], width: int) -> Tensor:
    if labels[0].ndim == 0:
        return torch.tensor([int(label) for label in labels])
    stacked = torch.full((len(labels), width), NO_LABEL)
    for row, label in zip(stacked, labels, strict=True):
        row[: len(label)] = torch.from_numpy(label)
    return stacked


__all__ = ["NO_LABEL", "LabelFunction", "LabelledBatch", "LabelledBatches", "Part", "evaluation_keys"]
