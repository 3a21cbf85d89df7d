"""Labelled batches for fine-tuning, in the order and with the random numbers that pretraining's are made with.

Batches are of similar length (`batching.BucketSampler`) and padded, and depend on nothing but the seed, the epoch and
their number, so that a run can resume at any of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..configuration_spidr import SpidrConfig, frame_lengths, receptive_field
from ..data.batches import ModelBatch, check_length, padded
from ..data.batching import BatchKey, Position, batches_by_length
from ..data.sources import AudioSource, Skipped
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..system.errors import AudioError
from ..system.messages import counted

NO_LABEL = -100
# What a random number is drawn for, part of its seed; those before are pretraining's.
_CROP, _REPLACEMENT = 4, 5
_MAX_REPLACEMENTS = 100
# oneDNN compiles for every shape anew, and a GPU's matrix units take multiples of 8.
_FRAME_MULTIPLE = 16

# Labels of an utterance, by its index: one number; or one per token or frame.
LabelFunction = Callable[[int], np.ndarray]


@dataclass
class Split:
    """Utterances of a source that serve one purpose (training, validation, a held-out speaker).

    Attributes:
        name: what reports call it.
        indices: which utterances of the source (int64).
        labels: the labels of each as numbers, by its index.
        values: the labels of each as they are given, by its index; what scores are computed with.
    """

    name: str
    source: AudioSource
    indices: np.ndarray
    labels: LabelFunction
    values: Mapping[int, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)


@dataclass
class LabelledBatch(ModelBatch):
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

    TENSORS = ("input_values", "attention_mask", "labels")

    input_values: Tensor
    attention_mask: Tensor | None
    labels: Tensor
    key: BatchKey
    utterances: list[int]
    frames: list[int]
    audio_samples: int
    skipped: list[Skipped] = field(default_factory=list)


class NoAudioError(AudioError):
    """A batch of which no utterance can be used; `skipped` has all of them, except where a worker raises it."""

    def __init__(self, message: str, skipped: Sequence[Skipped] = ()):
        super().__init__(message)
        self.skipped = skipped


class LabelledBatches(Dataset[LabelledBatch]):
    """Batches by key.

    Args:
        split: the utterances and their labels.
        config: for the arithmetic of the convolutions.
        feature_extractor: standardises waveforms.
        max_samples: longer utterances are cropped to this, at a random place; None: never.
        frames: whether labels are one per frame, and are cropped with the audio.
        seed: of the crops.
        replace: a batch of which nothing can be read is of another utterance, since training goes by updates;
            otherwise `NoAudioError` says so.
    """

    def __init__(
        self,
        split: Split,
        config: SpidrConfig,
        feature_extractor: SpidrFeatureExtractor,
        *,
        max_samples: int | None = None,
        frames: bool = False,
        seed: int = 0,
        replace: bool = False,
    ):
        self.replace = replace
        self.split = split
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
                skipped.append(Skipped(self.split.source.fileid(index), str(error)))
                continue
            row, label = self._crop(waveform, self.split.labels(index), key.epoch, index)
            rows.append(row)
            labels.append(label)
            utterances.append(index)
        if not rows:
            reason = f"{counted(0, 'utterance', of=len(skipped))} of a batch can be used: {skipped[-1].reason}"
            raise NoAudioError(reason, skipped)
        lengths = np.array([len(row) for row in rows])
        input_values, attention_mask = padded(rows, self._width(int(lengths.max())))
        frames = frame_lengths(self.config, torch.from_numpy(lengths)).tolist()
        return LabelledBatch(
            input_values,
            attention_mask,
            self._stack(labels, input_values.shape[1]),
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
            yield from map(int, rng.permutation(self.split.indices)[:_MAX_REPLACEMENTS])

    def _width(self, samples: int) -> int:
        """Samples of a batch whose longest row has this many: few different numbers of frames."""
        frames = -(-frame_lengths(self.config, samples) // _FRAME_MULTIPLE) * _FRAME_MULTIPLE
        return max(samples, (frames - 1) * self.config.inputs_to_logits_ratio + receptive_field(self.config))

    def _read(self, index: int) -> np.ndarray:
        source = self.split.source
        waveform, expected = source.read(index), int(source.num_samples[index])
        check_length(source.fileid(index), len(waveform), expected, receptive_field(self.config))
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

    def _stack(self, labels: Sequence[np.ndarray], samples: int) -> Tensor:
        """Labels of a batch whose rows have this many samples."""
        if labels[0].ndim == 0:
            return torch.from_numpy(np.array(labels, dtype=np.int64))
        return padded(labels, frame_lengths(self.config, samples) if self.frames else None, NO_LABEL)[0]


def evaluation_keys(split: Split, max_samples: int, rank: int = 0, world_size: int = 1) -> Iterator[BatchKey]:
    """This process's share of a split, in batches of similar length, each utterance once in all processes."""
    batches = batches_by_length(split.source.num_samples[split.indices], max_samples)
    for number in range(rank, len(batches), world_size):
        yield BatchKey(0, number, split.indices[batches[number]], Position())


__all__ = ["NO_LABEL", "LabelFunction", "LabelledBatch", "LabelledBatches", "NoAudioError", "Split", "evaluation_keys"]
