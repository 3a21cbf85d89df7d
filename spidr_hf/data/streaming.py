"""Pretraining on streamed data sets: too large to store, lengths not known beforehand, read in the order they come.

A data set of `datasets` consists of shards (files). They are dealt once, by the seed, to as many streams as there are
decoding workers on all processes; where there are fewer shards than streams, streams share a shard row by row. A stream
goes through its shards epoch after epoch, in an order drawn anew, so that it hears each of its utterances once per
epoch of its own, and every process has batches without end.

A stream reads a block of `shuffle_buffer` utterances as they are stored, learns their lengths from their headers, makes
shuffled batches of similar length (as `BucketSampler` does of a whole epoch), and decodes them; meanwhile it reads the
block after it. Where a stream stands is the place where its block begins (which `datasets` finds again without reading
what lies before it in other shards) and the number of batches made of it. So a run that was stopped reads its blocks
once more and continues at the very next batch.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec.asyn
import numpy as np
import torch.utils.data

from ..system.errors import AudioError, ManifestError
from .audio import read_audio, read_info
from .batches import Batch, BatchBuilder, empty_batch, too_short
from .batching import BatchKey, Position, length_buckets, shuffled_batches
from .datasets_source import audio_column, load_dataset, row_name, stored_audio
from .sources import Skipped, StreamedSource

# What the numbers of a stream are drawn for; part of their seeds.
_DEAL, _ORDER, _BLOCK = range(3)
# A block also ends when what it stores has this many bytes: long recordings must not fill the memory.
_BLOCK_BYTES = 256 * 2**20


class StreamingSource:
    """The shards of an `IterableDataset` with an `Audio` column.

    Args:
        dataset: A `datasets.IterableDataset`, without a shuffle of its own.
        resample: take audio of any rate and number of channels.
        name: what error messages call it.

    Raises `ManifestError` where there is no audio column, and for a data set that cannot continue where it stopped.
    """

    skipped: tuple[Skipped, ...] = ()

    def __init__(self, dataset: Any, *, resample: bool = False, name: str = "data set"):
        from datasets import Audio

        if _has_shuffle_buffer(dataset._ex_iterable):
            raise ManifestError(
                f"{name}: has a shuffle buffer, whose content would be lost when a run is resumed. Leave out "
                "`.shuffle(...)`, also in what is interleaved or concatenated: pretraining shuffles by itself."
            )
        if dataset.features is None:
            raise ManifestError(f"{name}: its columns have no types. Give them: `features=...`, after `.map` too.")
        self.column, self.name, self.resample = audio_column(dataset, name), name, resample
        self.dataset = dataset.cast_column(self.column, Audio(decode=False)).with_format(None)
        self.num_shards = int(dataset.num_shards)

    @property
    def fingerprint(self) -> str:
        """Changes with the data set's name, its columns and its number of shards."""
        text = f"{self.name} {sorted(self.dataset.features)}"
        return f"stream-{self.num_shards}-{zlib.crc32(text.encode()):08x}"

    def row_name(self, row: dict[str, Any]) -> str:
        """What a row says that its utterance is called; empty where it does not."""
        return row_name(row, self.column)

    def stored(self, row: dict[str, Any], name: str) -> bytes | str:
        """Audio as it is stored. Raises `AudioError` where there is none in the row."""
        return stored_audio(row[self.column], name)

    def rows(
        self, shard: int, state: dict[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
        """Rows of a shard, from a state on, each with what tells the state after it."""
        part = self.dataset.shard(self.num_shards, shard)
        if state is not None:
            part.load_state_dict(deepcopy(state))
        # `iter` of the data set itself would, in a worker process, give each worker a part of this part.
        for row in part.iter(batch_size=1):
            yield {column: values[0] for column, values in row.items()}, part.state_dict


def can_stream(data: str | Path) -> bool:
    """Whether DATA may be a data set; manifests and tars are read where they lie."""
    return Path(str(data)).suffix not in (".csv", ".jsonl", ".tsv", ".tar")


def _has_shuffle_buffer(part: Any) -> bool:
    """Whether rows pass a shuffle buffer on their way, in any of the data sets that this one is made of."""
    if type(part).__name__ == "BufferShuffledExamplesIterable":
        return True
    inner = [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
    return any(_has_shuffle_buffer(each) for each in inner if each is not None)


def open_stream(data: str | Path, *, resample: bool = False) -> StreamingSource:
    """The data set `name:config:split`, read as a stream: nothing is downloaded beforehand."""
    return StreamingSource(load_dataset(data, streaming=True), resample=resample, name=str(data))


@dataclass
class Place:
    """Where a stream stands; `vars` of it is what a checkpoint holds.

    Attributes:
        epoch: of this stream, counted from 0.
        shards: how many of the epoch's shards are behind, when the block begins.
        row: rows read from the shard after them.
        shard_state: the same, as `datasets` notes it.
        batches: batches that the stream made before this block.
        done: batches made of this block.
    """

    epoch: int = 0
    shards: int = 0
    row: int = 0
    shard_state: dict[str, Any] | None = None
    batches: int = 0
    done: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> "Place":
        """The place that a checkpoint holds, also of versions that had `shards` under another name."""
        return cls(**{"shards" if name == "turn" else name: value for name, value in saved.items()})


@dataclass
class Block:
    """What a stream has read at a time; the lists have one entry per utterance.

    Attributes:
        begin: where it begins.
        audio: stored audio: content or path.
        names: fileids.
        places: shard and row, which name the utterance for random numbers.
        lengths: samples at 16 kHz by the header.
        skipped: what could not be read.
        failure: why reading broke off, if it did.
    """

    begin: Place
    audio: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failure: str | None = None


class Stream:
    """Endless batches of one stream, from a place on.

    Args:
        source: the shards.
        builder: makes batches of waveforms.
        index, count: this stream, and how many there are on all processes.
        place: where to resume.
    """

    def __init__(
        self, source: StreamedSource, builder: BatchBuilder, index: int, count: int, place: Place | None = None
    ):
        self.source, self.builder, self.data = source, builder, builder.data
        self.index, self.count = index, count
        self.place = place or Place()
        dealt = np.random.default_rng([self.data.random_seed, _DEAL]).permutation(source.num_shards)
        if source.num_shards >= count:
            self.shards, self.part, self.parts = dealt[index::count], 0, 1
        else:
            share = index % source.num_shards
            self.shards, self.part = dealt[share : share + 1], index // source.num_shards
            self.parts = -(-(count - share) // source.num_shards)

    def __iter__(self) -> Iterator[Batch]:
        made, done, heard = self.place.batches, self.place.done, self.place.epoch
        skipped: list[Skipped] = []
        tried = 0
        blocks = self._blocks()
        # A thread reads the block that follows while this one is decoded.
        with ThreadPoolExecutor(1, thread_name_prefix="stream") as reader:
            reading = reader.submit(next, blocks)
            while True:
                block = reading.result()
                epoch = block.begin.epoch
                if epoch > heard + 1 and not block.failure:
                    last = f" The last: {skipped[-1].reason}" if skipped else ""
                    block.failure = (
                        f"{self.source.name}: stream {self.index} of {self.count} went through its shards and found no "
                        f"audio that can be used.{last}"
                    )
                if block.failure:
                    yield empty_batch(self._key(epoch, made, tried), skipped + block.skipped, block.failure)
                    return
                reading = reader.submit(next, blocks)
                batches = self._batches(block)
                if not done:
                    skipped += block.skipped
                    tried += len(block.skipped)
                for number in range(done, len(batches)):
                    utterances, more = self.decode(block, batches[number])
                    skipped += more
                    tried += len(batches[number])
                    if utterances:
                        heard = epoch
                        batch = self.builder.build(utterances, self._key(epoch, made + number, tried), skipped)
                        batch.place = {**vars(block.begin), "batches": made, "done": number + 1}
                        yield batch
                        skipped, tried = [], 0
                made, done = made + len(batches), 0

    def _key(self, epoch: int, number: int, tried: int) -> BatchKey:
        """(epoch, index) is the batch's own among those of all streams."""
        return BatchKey(epoch, number * self.count + self.index, np.arange(tried), Position(epoch, 0))

    def _batches(self, block: Block) -> list[np.ndarray]:
        """Batches of similar length, in an order that seed, stream and block decide."""
        if not block.lengths:
            return []
        data, begin = self.data, block.begin
        lengths = np.minimum(np.array(block.lengths), data.max_sample_size)
        lowest = self.builder.min_samples
        buckets = length_buckets(lengths, data.bucket_method, data.num_buckets, lowest, data.max_sample_size)
        rng = np.random.default_rng([data.random_seed, _BLOCK, self.index, begin.epoch, begin.shards, begin.row])
        order, bounds, shuffled = shuffled_batches(lengths, buckets, data.max_batch_length, data.enable_padding, rng)
        return [order[bounds[i] : bounds[i + 1]] for i in shuffled]

    def decode(
        self, block: Block, members: np.ndarray
    ) -> tuple[list[tuple[tuple[int, int], int, np.ndarray]], list[Skipped]]:
        """(name, length, prepared waveform) of what can be decoded, and what cannot."""
        decoded, skipped = [], []
        for i in members:
            try:
                waveform = read_audio(block.audio[i], name=block.names[i], resample=self.source.resample)
                waveform = self.builder.prepare(waveform, block.lengths[i], block.names[i])
            except AudioError as error:
                skipped.append(Skipped(block.names[i], str(error)))
            else:
                decoded.append((block.places[i], block.lengths[i], waveform))
        return decoded, skipped

    def _blocks(self) -> Iterator[Block]:
        """What is read, block by block, epoch after epoch."""
        place = self.place
        epoch, shards, row, state = place.epoch, place.shards, place.row, place.shard_state
        while True:
            block = Block(Place(epoch, shards, row, state))
            stored = 0
            order = np.random.default_rng([self.data.random_seed, _ORDER, self.index, epoch]).permutation(self.shards)
            try:
                while shards < len(order):
                    shard = int(order[shards])
                    for example, state_after in self.source.rows(shard, state):
                        number, row = row, row + 1
                        if number % self.parts != self.part:
                            continue
                        stored += self._take(block, example, shard, number)
                        if len(block.lengths) >= self.data.shuffle_buffer or stored >= _BLOCK_BYTES:
                            yield block
                            block, stored = Block(Place(epoch, shards, row, state_after())), 0
                    shards, row, state = shards + 1, 0, None
            except Exception as error:  # a data set's readers and the network raise whatever they raise
                reason = (str(error).strip().splitlines() or [repr(error)])[0]
                block.failure = (
                    f"{self.source.name}: the stream broke off ({reason}). The same command resumes from the newest "
                    "checkpoint."
                )
            yield block
            epoch, shards = epoch + 1, 0

    def _take(self, block: Block, example: Any, shard: int, row: int) -> int:
        """Add a row of a shard to a block; returns how many bytes it keeps in memory."""
        name = f"{self.source.name}, {self.source.row_name(example) or f'shard {shard}, row {row}'}"
        try:
            audio = self.source.stored(example, name)
            length = read_info(audio, name=name, resample=self.source.resample).num_samples_16k
        except AudioError as error:
            block.skipped.append(Skipped(name, str(error)))
            return 0
        if length < self.builder.min_samples:
            block.skipped.append(too_short(name, length, self.builder.min_samples))
            return 0
        block.audio.append(audio)
        block.names.append(name)
        block.places.append((shard, row))
        block.lengths.append(length)
        return len(audio) if isinstance(audio, bytes) else 0


class StreamedBatches(torch.utils.data.IterableDataset):
    """Batches of one process's streams: as many as its data loader has workers, asked one after the other.

    Args:
        source: the shards.
        builder: makes batches of waveforms.
        rank, world_size: this process, and how many there are.
        taken: batches that this process has had.
        places: where its streams stand, one for each worker; None: at the beginning.
    """

    def __init__(
        self,
        source: StreamedSource,
        builder: BatchBuilder,
        *,
        rank: int = 0,
        world_size: int = 1,
        taken: int = 0,
        places: list[dict[str, Any] | None] | None = None,
    ):
        self.source, self.builder = source, builder
        self.workers = max(1, builder.data.num_workers)
        self.rank, self.world_size, self.taken = rank, world_size, taken
        self.places = places or [None] * self.workers

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        if info is not None:
            fsspec.asyn.reset_lock()  # locks of the process that this one was forked from
        # The loader asks its workers one after the other, beginning with the first: it is that stream's number.
        own = ((info.id if info else 0) + self.taken) % self.workers
        place = self.places[own]
        index, count = self.rank * self.workers + own, self.world_size * self.workers
        return iter(Stream(self.source, self.builder, index, count, Place.of(place) if place else None))


__all__ = ["Block", "Place", "Stream", "StreamedBatches", "StreamingSource", "can_stream", "open_stream"]
