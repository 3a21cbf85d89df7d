"""Batches of similar length, in an order that can be resumed at any of them and that every process agrees on.

The order of an epoch depends on the seed and the epoch alone. Utterances are put into buckets by length, shuffled
inside their bucket, and packed into batches in that order, running on from one bucket into the next; the list of
batches is then shuffled. An update takes `world_size * accumulation` consecutive batches of this one global list, so
that any number of processes that makes the same updates sees the same ones.

**Size of a batch.** Where batches are padded, a batch of n utterances counts n times its longest one. Where they are
cropped to their shortest, it counts the sum of its utterances before that, as SpidR does (after it, a batch has a few
per cent less). Utterances longer than `max_sample_size` count as cropped to it. No batch exceeds `max_batch_length`,
unless one utterance alone does.

**The end of an epoch.** When fewer batches are left than an update takes, the largest of them are cut in two until
there are enough; where they have too few utterances for that, the updates before are drawn in. So each utterance still
comes once, and all processes have the same number of batches. (Some repeat only where a whole epoch has too few
utterances.) With `drop_last` the remainder is left out instead.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from .audio import SAMPLING_RATE

BUCKET_METHODS = ("uniform", "percentile")


class BatchingError(ValueError):
    """Audio of which no batches can be made; the message says why."""


class Position(NamedTuple):
    """Where a run stands in its data: the epoch, counted from 0, and how many of its batches are behind."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class BatchKey:
    """One batch of one process.

    Attributes:
        epoch: counted from 0.
        index: place in the epoch's global list; (epoch, index) names the batch, whatever the number of processes.
        utterances: indices into the data source (int64).
        following: where the data stands after the update that this batch belongs to.
    """

    epoch: int
    index: int
    utterances: np.ndarray
    following: Position


class BucketSampler(Sampler[BatchKey]):
    """Endless, rank-aware, resumable sampler of batches of similar length.

    Args:
        num_samples: length of every utterance, in samples.
        max_batch_length: samples that a batch of one process holds at most.
        min_sample_size: shorter utterances are dropped.
        max_sample_size: longer utterances count as cropped to this.
        padding: batches are padded to their longest utterance, not cropped to their shortest.
        num_buckets: buckets by length.
        bucket_method: `"uniform"`: buckets of equal width, from `min_sample_size` to `max_sample_size`;
            `"percentile"`: buckets of equally many utterances.
        seed: with the epoch, determines the order.
        drop_last: leave out what is left of an epoch when it does not fill an update.
        rank, world_size: this process, and how many there are.
        accumulation: batches of each process in an update.

    Raises `BatchingError` where no utterance is left, and where an epoch has no update.
    """

    def __init__(
        self,
        num_samples: np.ndarray,
        *,
        max_batch_length: int,
        min_sample_size: int = 0,
        max_sample_size: int | None = None,
        padding: bool = False,
        num_buckets: int = 1000,
        bucket_method: str = "uniform",
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
    ):
        if bucket_method not in BUCKET_METHODS:
            raise ValueError(f"`bucket_method` must be one of {', '.join(BUCKET_METHODS)}, got {bucket_method!r}.")
        num_samples = np.asarray(num_samples)
        self.utterances = np.flatnonzero(num_samples >= min_sample_size)
        if len(self.utterances) == 0:
            longest = num_samples.max() if len(num_samples) else 0
            raise BatchingError(
                f"No utterance has the {min_sample_size} samples of `min_sample_size`; the longest of "
                f"{len(num_samples)} has {longest}."
            )
        lengths = num_samples[self.utterances]
        self.lengths = lengths if max_sample_size is None else np.minimum(lengths, max_sample_size)
        self.num_dropped = len(num_samples) - len(self.utterances)
        self.max_batch_length = max_batch_length
        self.padding = padding
        self.seed = seed
        self.drop_last = drop_last
        self.rank, self.world_size, self.accumulation = rank, world_size, accumulation
        self.batches_per_update = world_size * accumulation
        self.position = Position()
        if bucket_method == "uniform":
            edges = np.linspace(min_sample_size, max_sample_size or self.lengths.max(), num_buckets + 1)
        else:
            edges = np.quantile(self.lengths, np.linspace(0, 1, num_buckets + 1))
        self._buckets = np.searchsorted(edges[1:-1], self.lengths, side="right")
        self._cached: tuple[int, list[np.ndarray]] | None = None
        if drop_last and len(self._epoch(0)) < self.batches_per_update:
            raise BatchingError(
                f"The data has {len(self._epoch(0))} batches of at most {max_batch_length} samples, an update takes "
                f"{self.batches_per_update} ({world_size} processes x {accumulation} accumulated), and `drop_last` "
                "leaves out the rest, so there is no update. Make `max_batch_length` smaller or turn `drop_last` off."
            )

    def epoch_batches(self, epoch: int, start: int = 0) -> list[np.ndarray]:
        """The global list of an epoch's batches (indices of utterances) from `start` on, in whole updates."""
        batches, size = self._epoch(epoch), self.batches_per_update
        if start % size:  # so far, another number of processes made the updates
            batches, start = batches[start:], 0
        tail = len(batches) % size
        if tail and self.drop_last:
            batches = batches[:-tail]
        elif tail:
            while sum(map(len, batches[-tail:])) < tail + size - tail % size and tail + size <= len(batches):
                tail += size
            batches = batches[:-tail] + self._spread(batches[-tail:], tail + size - tail % size)
        return batches[start:]

    def updates_per_epoch(self, epoch: int = 0) -> int:
        """Number of updates that an epoch makes from its first batch on."""
        count = len(self._epoch(epoch))
        return count // self.batches_per_update if self.drop_last else -(-count // self.batches_per_update)

    @property
    def hours(self) -> float:
        """Audio in an epoch, in hours."""
        return float(self.lengths.sum()) / SAMPLING_RATE / 3600

    def __str__(self) -> str:
        dropped = f", {self.num_dropped} too short" if self.num_dropped else ""
        size = f"{len(self.utterances)} utterances{dropped}, {self.hours:.2f} h"
        return f"{size}; {self.updates_per_epoch()} updates per epoch"

    def __iter__(self) -> Iterator[BatchKey]:
        """This process's batches from `position` on, epoch after epoch, without end."""
        epoch, start = self.position
        while True:
            batches = self.epoch_batches(epoch, start)
            for first in range(0, len(batches), self.batches_per_update):
                last = first + self.batches_per_update >= len(batches)
                following = Position(epoch + 1, 0) if last else Position(epoch, start + first + self.batches_per_update)
                for turn in range(self.accumulation):
                    index = first + turn * self.world_size + self.rank
                    yield BatchKey(epoch, start + index, batches[index], following)
            epoch, start = epoch + 1, 0

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """All batches of an epoch, shuffled; it knows nothing of processes."""
        if self._cached is None or self._cached[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            order = np.lexsort((rng.random(len(self.utterances)), self._buckets))
            bounds = _pack(self.lengths[order], self.max_batch_length, self.padding)
            utterances = self.utterances[order]
            shuffled = rng.permutation(len(bounds) - 1)
            self._cached = (epoch, [utterances[bounds[i] : bounds[i + 1]] for i in shuffled])
        return self._cached[1]

    @staticmethod
    def _spread(batches: list[np.ndarray], count: int) -> list[np.ndarray]:
        """`count` batches out of fewer: the largest are cut in two, and where all have one utterance they repeat."""
        heap = [(-len(batch), place, batch) for place, batch in enumerate(batches)]
        heapq.heapify(heap)
        while len(heap) < count and -heap[0][0] > 1:
            _, place, batch = heapq.heappop(heap)
            half = len(batch) // 2
            heapq.heappush(heap, (half - len(batch), place, batch[half:]))
            heapq.heappush(heap, (-half, count + len(heap), batch[:half]))
        spread = [batch for _, _, batch in sorted(heap, key=lambda entry: entry[1])]
        return [spread[index % len(spread)] for index in range(count)]


def _pack(lengths: np.ndarray, max_batch_length: int, padding: bool) -> np.ndarray:
    """Bounds of the batches when utterances are taken in order: a batch is closed by the first that does not fit."""
    bounds = [0]
    count, total, longest = 0, 0, 0
    for index, length in enumerate(lengths.tolist()):
        size = (count + 1) * max(longest, length) if padding else total + length
        if count and size > max_batch_length:
            bounds.append(index)
            count, total, longest = 0, 0, 0
        count, total, longest = count + 1, total + length, max(longest, length)
    return np.array([*bounds, len(lengths)])


__all__ = ["BUCKET_METHODS", "BatchKey", "BatchingError", "BucketSampler", "Position"]
