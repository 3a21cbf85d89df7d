"""Several audio sources as one, each with a weight.

A weight says how many times each utterance of the source comes in an epoch: 1 is once, 3 three times (each with a crop
of its own), 0.4 in two of five epochs, 2.5 twice and in every other epoch once more. So the share of a source in the
audio that a run hears is in proportion to its weight times its hours.
"""

import json
import math
import zlib
from collections.abc import Sequence

import numpy as np

from ..configuration_spidr import SAMPLING_RATE
from ..system.errors import ManifestError
from ..system.messages import counted, duration
from .audio import AudioFile
from .sources import AudioSource, Skipped


class MixedSource:
    """Audio sources side by side; a source of weight 3 stands there three times.

    Args:
        sources: the sources.
        names: what each is called; fileids begin with it, so that those of two sources cannot be taken for each other.
        weights: times that each utterance of a source comes in an epoch (all 1 by default).

    `num_samples` and `shares` have an entry for every time that an utterance comes: `shares` is the share of the epochs
    in which it does, 1 for all but the last time of a weight that is no whole number.

    Raises `ManifestError` where numbers or names do not fit.
    """

    def __init__(self, sources: Sequence[AudioSource], names: Sequence[str], weights: Sequence[float] | None = None):
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not len(sources) == len(names) == len(weights) or not sources:
            raise ManifestError(
                f"{counted(len(names), 'source', 'has', 'have')} {counted(len(weights), 'weight')}: each needs one."
            )
        if twice := [name for name in names if list(names).count(name) > 1]:
            raise ManifestError(f"{twice[0]} is named twice among the sources: give it once, with a weight of 2.")
        if bad := [weight for weight in weights if not 0 < weight < math.inf]:
            raise ManifestError(f"The weight of a source is a positive number, got {bad[0]}: leave the source out.")
        self.sources, self.names, self.weights = list(sources), list(names), weights
        self.skipped = [
            Skipped(f"{name}:{entry.fileid}", entry.reason)
            for source, name in zip(sources, names, strict=True)
            for entry in source.skipped
        ]
        times = [math.ceil(weight) for weight in weights]
        # One block for each time that a source stands in the epoch.
        self._owner = np.repeat(np.arange(len(sources)), times)
        self._starts = np.cumsum([0, *(len(sources[int(owner)]) for owner in self._owner)])
        self.num_samples = np.concatenate([sources[int(owner)].num_samples for owner in self._owner])
        self.shares: np.ndarray | None = None
        if any(weight != count for weight, count in zip(weights, times, strict=True)):
            last = [weight - count + 1 for weight, count in zip(weights, times, strict=True)]
            shares = [[1.0] * (count - 1) + [share] for count, share in zip(times, last, strict=True)]
            self.shares = np.repeat(np.concatenate(shares).astype(np.float32), np.diff(self._starts))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def fingerprint(self) -> str:
        """Changes with the sources, their order and their weights."""
        parts = [[source.fingerprint, weight] for source, weight in zip(self.sources, self.weights, strict=True)]
        return f"{len(self)}-{zlib.crc32(json.dumps(parts).encode()):08x}"

    def fileid(self, index: int) -> str:
        """The source's name, a colon, and the name that the utterance has there."""
        owner, inner = self._place(index)
        return f"{self.names[owner]}:{self.sources[owner].fileid(inner)}"

    def read(self, index: int) -> np.ndarray:
        """Waveform: S samples, float32, mono, 16 kHz. Raises `AudioError` where it cannot be had."""
        owner, inner = self._place(index)
        return self.sources[owner].read(inner)

    def recording(self, index: int) -> AudioFile:
        """The same, to be decoded in parts."""
        owner, inner = self._place(index)
        return self.sources[owner].recording(inner)

    def describe(self) -> list[str]:
        """A line for each source: its weight, and its share of the audio in an epoch."""
        seconds = [float(source.num_samples.sum()) / SAMPLING_RATE for source in self.sources]
        total = sum(weight * size for weight, size in zip(self.weights, seconds, strict=True))
        return [
            f"{name}: {counted(len(source), 'utterance')}, {duration(size)}, weight {weight:g}, "
            f"so {weight * size / total:.1%} of all"
            for name, source, size, weight in zip(self.names, self.sources, seconds, self.weights, strict=True)
        ]

    def _place(self, index: int) -> tuple[int, int]:
        """The source, and the utterance's index in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        block = int(np.searchsorted(self._starts, index, side="right")) - 1
        return int(self._owner[block]), int(index - self._starts[block])


__all__ = ["MixedSource"]
