"""What every kind of audio source offers."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Skipped(NamedTuple):
    """An utterance that was left out, and why."""

    fileid: str
    reason: str


class AudioSource(Protocol):
    """Utterances by index: what pretraining, feature extraction and evaluation read from.

    `num_samples` (int64, one entry per utterance) is known without decoding anything. `fingerprint` tells one set of
    utterances from another. `skipped` lists what was left out on opening.
    """

    num_samples: np.ndarray

    @property
    def skipped(self) -> Sequence[Skipped]: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def fileid(self, index: int) -> str:
        """Unique name of the utterance."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Waveform: S samples, float32, mono, 16 kHz. Raises `AudioError` where it cannot be had."""
        ...


__all__ = ["AudioSource", "Skipped"]
