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

**Shares.** An utterance of share 0.4 takes part in two of five epochs, evenly spaced; which ones depends on the seed.
Every epoch has about that share of all such utterances.
"""

import heapq
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Sampler

from ..configuration_spidr import SAMPLING_RATE
from ..system.errors import BatchingError
from ..system.messages import counted, duration

BUCKET_METHODS = ("uniform", "percentile")
_BATCHES_AHEAD = 3

Read = TypeVar("Read")


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


class EpochBatches(Sequence[np.ndarray]):
    """Batches as stretches of one array of utterances: ten million utterances take two arrays, not a million objects.

    Args:
        utterances: indices of utterances, batch after batch.
        bounds: where batches begin in it, and the end of the last.
        order: which of these batches, in which order.
        tail: batches to follow them.
    """

    def __init__(self, utterances: np.ndarray, bounds: np.ndarray, order: np.ndarray, tail: Sequence[np.ndarray] = ()):
        self._utterances, self._bounds, self._order, self._tail = utterances, bounds, order, tuple(tail)

    def __len__(self) -> int:
        return len(self._order) + len(self._tail)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index >= len(self._order):
            return self._tail[index - len(self._order)]
        place = self._order[index]
        return self._utterances[self._bounds[place] : self._bounds[place + 1]]

    def part(self, start: int, stop: int, tail: Sequence[np.ndarray] = ()) -> "EpochBatches":
        """The batches from `start` to before `stop` of those without tail, followed by others."""
        return EpochBatches(self._utterances, self._bounds, self._order[start:stop], tail)


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
        shares: for every utterance, the share in (0, 1] of the epochs that it takes part in; None: all of them.

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
        shares: np.ndarray | None = None,
    ):
        if bucket_method not in BUCKET_METHODS:
            raise ValueError(f"`bucket_method` must be one of {', '.join(BUCKET_METHODS)}, got {bucket_method!r}.")
        num_samples = np.asarray(num_samples)
        self._whole, self._all_shares = num_samples, shares
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
        longest = max_sample_size or int(self.lengths.max())
        self._buckets = length_buckets(self.lengths, bucket_method, num_buckets, min_sample_size, longest)
        self._shares = None if shares is None else np.asarray(shares, dtype=np.float64)[self.utterances]
        if self._shares is not None:
            # Evenly spaced, so that every epoch has the same number of them, give or take one.
            partial = np.flatnonzero(self._shares < 1)
            self._phases = np.zeros(len(self.utterances))
            spaced = (np.arange(len(partial)) + 0.5) / max(1, len(partial))
            self._phases[partial] = np.random.default_rng([seed, len(partial)]).permutation(spaced)
        self._cached: tuple[int, EpochBatches] | None = None
        if drop_last and len(self._epoch(0)) < self.batches_per_update:
            raise BatchingError(
                f"The data has {counted(len(self._epoch(0)), 'batch')} of at most {max_batch_length} samples, an "
                f"update takes {self.batches_per_update} ({counted(world_size, 'process')} x {accumulation} "
                "accumulated), and `drop_last` leaves out the rest, so there is no update. Make `max_batch_length` "
                "smaller or turn `drop_last` off."
            )

    def epoch_batches(self, epoch: int, start: int = 0) -> EpochBatches:
        """The global list of an epoch's batches (indices of utterances) from `start` on, in whole updates."""
        batches, size = self._epoch(epoch), self.batches_per_update
        # With another number of processes so far, `start` need not be a whole number of updates.
        first = start if start % size else 0
        count = len(batches) - first
        tail = count % size
        if not tail:
            return batches.part(start, len(batches))
        if self.drop_last:
            return batches.part(start, max(start, len(batches) - tail))
        while sum(map(len, batches[-tail:])) < tail + size - tail % size and tail + size <= count:
            tail += size
        spread = self._spread(batches[-tail:], tail + size - tail % size)
        kept = len(batches) - tail
        return batches.part(start, kept, spread[max(0, start - kept) :])

    def updates_per_epoch(self, epoch: int = 0) -> int:
        """Number of updates that an epoch makes from its first batch on."""
        count = len(self._epoch(epoch))
        return count // self.batches_per_update if self.drop_last else -(-count // self.batches_per_update)

    @property
    def seconds(self) -> float:
        """Audio in an epoch, in seconds."""
        samples = self.lengths.sum() if self._shares is None else self.lengths @ self._shares
        return float(samples) / SAMPLING_RATE

    @property
    def heard_share(self) -> float:
        """Share of all audio (too short and cropped away included) that the first epoch puts into its batches.

        Crops are drawn anew in every epoch, so more epochs hear more of long recordings.
        """
        lengths, batches = np.zeros(len(self._whole), dtype=np.int64), self._epoch(0)
        lengths[self.utterances] = self.lengths
        heard = 0
        for batch in batches:
            inside = lengths[batch]
            heard += int(inside.sum()) if self.padding else len(batch) * int(inside.min())
        weights = 1.0 if self._all_shares is None else self._all_shares
        return heard / float((self._whole * weights).sum())

    def __str__(self) -> str:
        dropped = f", {self.num_dropped} too short" if self.num_dropped else ""
        size = f"{counted(len(self.utterances), 'utterance')}{dropped}, {duration(self.seconds)}"
        return f"{size}; {counted(self.updates_per_epoch(), 'update')} per epoch"

    def __iter__(self) -> Iterator[BatchKey]:
        """This process's batches from `position` on, epoch after epoch, without end."""
        epoch, start = self.position
        while True:
            batches = self.epoch_batches(epoch, start)
            for first in range(0, len(batches), self.batches_per_update):
                last = first + self.batches_per_update >= len(batches)
                following = Position(epoch + 1, 0) if last else Position(epoch, start + first + self.batches_per_update)
                for micro_batch in range(self.accumulation):
                    index = first + micro_batch * self.world_size + self.rank
                    yield BatchKey(epoch, start + index, batches[index], following)
            epoch, start = epoch + 1, 0

    def _epoch(self, epoch: int) -> EpochBatches:
        """All batches of an epoch, shuffled; it knows nothing of processes."""
        if self._cached is None or self._cached[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            utterances, lengths, buckets = self.utterances, self.lengths, self._buckets
            if self._shares is not None:
                before, after = (np.floor(self._shares * count + self._phases) for count in (epoch, epoch + 1))
                members = np.flatnonzero(after > before)
                utterances, lengths, buckets = utterances[members], lengths[members], buckets[members]
            self._cached = None  # lets go of the epoch before, so that there are never two
            order, bounds, shuffled = shuffled_batches(lengths, buckets, self.max_batch_length, self.padding, rng)
            self._cached = (epoch, EpochBatches(utterances[order], bounds, shuffled))
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


def length_buckets(
    lengths: np.ndarray, method: str, num_buckets: int, min_sample_size: int, max_sample_size: int
) -> np.ndarray:
    """The bucket of each length (int32); see `BucketSampler` for `method`."""
    if method == "uniform":
        edges = np.linspace(min_sample_size, max_sample_size, num_buckets + 1)
    else:
        edges = np.quantile(lengths, np.linspace(0, 1, num_buckets + 1))
    return np.searchsorted(edges[1:-1], lengths, side="right").astype(np.int32)


def shuffled_batches(
    lengths: np.ndarray, buckets: np.ndarray, max_batch_length: int, padding: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Batches of similar length at random: the order of the utterances, the batches' bounds in it, their order."""
    # Sorted by bucket, and by chance within it.
    order = np.argsort(buckets + rng.random(len(lengths)))
    bounds = _pack(lengths[order], max_batch_length, padding)
    return order, bounds, rng.permutation(len(bounds) - 1)


def batches_by_length(lengths: Sequence[int] | np.ndarray, max_samples: int) -> list[list[int]]:
    """Indices grouped from the longest to the shortest, so that a batch's padded size fits `max_samples`."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches: list[list[int]] = []
    for i in order.tolist():
        if batches and (len(batches[-1]) + 1) * int(lengths[batches[-1][0]]) <= max_samples:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def read_ahead(
    batches: Iterable[Sequence[int] | np.ndarray], read: Callable[[int], Read], threads: int
) -> Iterator[list[Read]]:
    """What `read` gives for the items of each batch, in order; threads read the batches after it meanwhile."""
    waiting: deque[list[Future[Read]]] = deque()
    upcoming = iter(batches)
    with ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                while len(waiting) < _BATCHES_AHEAD and (batch := next(upcoming, None)) is not None:
                    waiting.append([pool.submit(read, int(index)) for index in batch])
                if not waiting:
                    return
                yield [future.result() for future in waiting.popleft()]
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()


def _pack(lengths: np.ndarray, max_batch_length: int, padding: bool) -> np.ndarray:
    """Bounds of the batches when utterances are taken in order: a batch is closed by the first that does not fit."""
    pack = _pack_padded if padding else _pack_cropped
    return np.frombuffer(pack(lengths, max_batch_length), dtype=np.int64)


def _pack_cropped(lengths: np.ndarray, max_batch_length: int) -> array:
    ends = memoryview(np.cumsum(lengths, dtype=np.int64))
    bounds, start, before = array("q", [0]), 0, 0
    while start < len(ends):
        # An utterance that alone is too long makes a batch of its own.
        start = max(start + 1, bisect_right(ends, before + max_batch_length, start))
        before = ends[start - 1]
        bounds.append(start)
    return bounds


def _pack_padded(lengths: np.ndarray, max_batch_length: int) -> array:
    bounds, count, longest = array("q", [0]), 0, 0
    for index, length in enumerate(memoryview(np.ascontiguousarray(lengths, dtype=np.int64))):
        longest = max(longest, length)
        if count and (count + 1) * longest > max_batch_length:
            bounds.append(index)
            count, longest = 0, length
        count += 1
    if len(lengths):
        bounds.append(len(lengths))
    return bounds


__all__ = [
    "BUCKET_METHODS",
    "BatchKey",
    "BucketSampler",
    "EpochBatches",
    "Position",
    "batches_by_length",
    "length_buckets",
    "read_ahead",
    "shuffled_batches",
]
