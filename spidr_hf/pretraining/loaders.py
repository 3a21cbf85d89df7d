"""What a pretraining loop takes its batches from: a sampler over known utterances, or streams.

Both kinds of loader are iterated for this process's batches, without end (`AudioError` where there is no audio left to
make one of); `state` is what a checkpoint needs beside the position that each batch's key carries.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..configuration_spidr import SAMPLING_RATE, SpidrConfig, frame_lengths
from ..data.batches import (
    Batch,
    BatchBuilder,
    PretrainingBatches,
    SkippedFiles,
    make_loader,
    make_sampler,
    min_samples,
    shared_memory,
    too_short,
)
from ..data.batching import BucketSampler, Position
from ..data.masking import masked_frames
from ..data.mixture import MixedSource
from ..data.sections import DataSection
from ..data.sources import AudioSource, Skipped, StreamedSource, commonest
from ..data.streaming import StreamedBatches
from ..system.errors import AudioError, BatchingError
from ..system.messages import counted, duration
from ..system.processes import gather_all
from ..system.shared_memory import free_shared_memory, local_processes, shortage
from ..training.checkpoints import TrainerState
from ..training.planning import NOTE, PROBLEM, Line, size
from .config import PretrainingConfig

# What is looked at of a run that has not begun.
_SAMPLED_FILES = 16
_BATCHES_LOOKED_AT = 50

# Utterances of data that an epoch is looked at of, and the share of the audio that is about all of it.
_SMALL, _MOST = 100_000, 0.8


class EpochLoader:
    """Batches of utterances whose lengths are known: see `batching`.

    Args:
        source: the audio.
        config: the run's configuration.
        model: for the arithmetic of its convolutions.
        state: where the run stands.
        pin_memory: whether there is a GPU to copy to.
        layout: rank, world_size and accumulation, see `BucketSampler`.
    """

    def __init__(
        self,
        source: AudioSource,
        config: PretrainingConfig,
        model: SpidrConfig,
        state: TrainerState,
        *,
        pin_memory: bool = False,
        **layout: int,
    ):
        self.sampler = make_sampler(source, config.data, model, **layout)
        self.sampler.position = Position(state.epoch, state.batch)
        batches = PretrainingBatches(source, config.data, config.masking, model, config.run.random_seed)
        self._loader = make_loader(batches, self.sampler, config.data, pin_memory=pin_memory)
        self.notes = source.describe() if isinstance(source, MixedSource) else []
        if note := heard_note(self.sampler, source.num_samples, config.data):
            self.notes.append(note)
        # What was left out before any batch, of how many.
        self.scanned: tuple[Sequence[Skipped], int] = unusable(source, config.data, model)
        self.amount = f"{duration(self.sampler.seconds)} of audio"

    def __iter__(self) -> Iterator[Batch]:
        return map(_usable, self._loader)

    def __str__(self) -> str:
        return str(self.sampler)

    def state(self) -> dict[str, Any]:
        """Nothing: the position says all."""
        return {}


class StreamLoader:
    """Batches of streamed audio: see `streaming`. The arguments are those of `EpochLoader`.

    Raises `BatchingError` where the run stood in other streams: with another number of processes or workers.
    """

    def __init__(
        self,
        source: StreamedSource,
        config: PretrainingConfig,
        model: SpidrConfig,
        state: TrainerState,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        pin_memory: bool = False,
    ):
        self._workers = max(1, config.data.num_workers)
        # Of other audio, the places mean nothing.
        before = state.stream if state.stream.get("data") == source.fingerprint else {}
        processes, workers = len(before.get("ranks", ())), before.get("workers", 0)
        if before and (processes, workers) != (world_size, self._workers):
            raise BatchingError(
                f"This run streams its audio with {counted(processes, 'process')} of {counted(workers, 'worker')} and "
                f"cannot resume with {world_size} of {self._workers}: the order of the utterances depends on them. "
                "Start it as it was (`data.num_workers` sets the workers), or begin another run from its weights "
                "(`run.init_ckpt`)."
            )
        own: dict[str, Any] = before["ranks"][rank] if before else {"taken": 0, "places": [None] * self._workers}
        self._taken, self._places = own["taken"], list(own["places"])
        builder = BatchBuilder(config.data, config.masking, model, config.run.random_seed)
        batches = StreamedBatches(source, builder, rank=rank, world_size=world_size, **own)
        self._loader = make_loader(batches, None, config.data, pin_memory=pin_memory)
        self._source, self._streams = source, world_size * self._workers
        self.notes: list[str] = []
        if source.num_shards % self._streams:
            self.notes.append(
                f"{source.name} has {counted(source.num_shards, 'shard')} for {counted(self._streams, 'stream')}, so "
                "some hear theirs more often than others. Numbers of processes and workers that divide the shards "
                "avoid it."
            )
        self.scanned: tuple[Sequence[Skipped], int] = ((), 0)
        self.amount = f"the streamed data set {source.name}"

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if batch.place is not None:
                self._places[self._taken % self._workers] = batch.place
                self._taken += 1
            yield _usable(batch)

    def __str__(self) -> str:
        shards = counted(self._source.num_shards, "shard")
        return f"{self._source.name}: streamed, {shards}, {counted(self._streams, 'stream')}"

    def state(self) -> dict[str, Any]:
        """Where the streams of all processes stand. Every process must call it."""
        ranks = gather_all([{"taken": self._taken, "places": list(self._places)}])
        return {"data": self._source.fingerprint, "workers": self._workers, "ranks": ranks}


def unusable(source: AudioSource, data: DataSection, model: SpidrConfig) -> tuple[list[Skipped], int]:
    """What a run leaves out before any batch, unreadable or too short; and of how many utterances."""
    lengths, lowest = np.asarray(source.num_samples), max(data.min_sample_size, min_samples(model))
    short = [too_short(source.fileid(int(i)), int(lengths[i]), lowest) for i in np.flatnonzero(lengths < lowest)]
    return [*source.skipped, *short], len(source) + len(source.skipped)


def make_data_loader(
    source: AudioSource | StreamedSource, *arguments: Any, **options: Any
) -> EpochLoader | StreamLoader:
    """The loader that fits the source."""
    if isinstance(source, StreamedSource):
        return StreamLoader(source, *arguments, **options)
    return EpochLoader(source, *arguments, **options)


@dataclass(frozen=True)
class ExpectedBatches:
    """The batches that a run begins with.

    Attributes:
        sampler: who makes them.
        samples, row: samples in the largest, and in each of its rows.
        utterances, masked, seconds: means over batches: rows, masked frames, and seconds of audio.
    """

    sampler: BucketSampler
    samples: int
    row: int
    utterances: float
    masked: float
    seconds: float


def expected_batches(
    source: AudioSource | StreamedSource, config: PretrainingConfig, world_size: int
) -> ExpectedBatches | None:
    """By lengths alone; None for streamed audio. Raises `BatchingError` where there are no batches."""
    if isinstance(source, StreamedSource):
        return None
    data, accumulation = config.data, config.optimizer.gradient_accumulation_steps
    sampler = make_sampler(source, data, config.model, world_size=world_size, accumulation=accumulation)
    lengths = np.minimum(np.asarray(source.num_samples), data.max_sample_size)
    shapes = []
    for utterances in sampler.epoch_batches(0)[:_BATCHES_LOOKED_AT]:
        rows = lengths[np.asarray(utterances)]
        shapes.append((len(rows), int(rows.max() if data.enable_padding else rows.min())))
    spans, rng, masked = config.masking.spans(), np.random.default_rng(0), []
    for rows, samples in shapes:
        frames = np.full(rows, frame_lengths(config.model, samples))
        masked.append(masked_frames(frames, spans, rng).size if spans else int(frames.sum()))
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    return ExpectedBatches(
        sampler,
        largest[0] * largest[1],
        largest[1],
        float(np.mean([rows for rows, _ in shapes])),
        float(np.mean(masked)),
        float(np.mean([rows * samples / SAMPLING_RATE for rows, samples in shapes])),
    )


def heard_note(sampler: BucketSampler, lengths: np.ndarray, data: DataSection) -> str | None:
    """What share of the audio an epoch hears, and what to do about it, where recordings are longer than crops.

    Those are as long as the shortest of a batch, without padding: in small data it may be much shorter than the others.
    """
    longer = int((np.asarray(lengths) > data.max_sample_size).sum())
    if not longer:
        if data.enable_padding or len(lengths) > _SMALL or (share := sampler.heard_share) > _MOST:
            return None
        return (
            f"an epoch hears {share:.1%} of the audio: the utterances of a batch are cropped to the shortest of them. "
            "To hear more, set `data.enable_padding`, raise `data.num_buckets` or `data.min_sample_size`, or train for "
            "more epochs."
        )
    return (
        f"an epoch hears {sampler.heard_share:.1%} of the audio: {counted(longer, 'recording', 'is', 'are')} longer "
        f"than `data.max_sample_size` ({data.max_sample_size / SAMPLING_RATE:g} s), and of each an epoch takes one "
        "crop. To hear more, cut them into utterances, raise `data.max_sample_size`, or train for more epochs."
    )


def source_plan(source: AudioSource | StreamedSource, config: PretrainingConfig) -> Iterator[Line]:
    """What audio there is, and whether it can be read."""
    if isinstance(source, StreamedSource):
        yield Line("data", f"{config.data.manifest}, streamed: how much it is shows while it is read")
        return
    yield from decoding_plan(source, config.data.max_skipped_share, "data")
    skipped, _ = unusable(source, config.data, config.model)
    if skipped:
        how_many, first = commonest(skipped)
        yield Line(NOTE, f"{counted(len(skipped), 'file')} cannot be used; {how_many}the first: {first.reason}")


def workers_plan(data: DataSection) -> Iterator[Line]:
    """What workers take of shared memory."""
    if not data.num_workers:
        return
    processes, needed, free = local_processes(), shared_memory(data), free_shared_memory()
    yield Line(
        "workers",
        f"{counted(processes, 'process')} x {counted(data.num_workers, 'worker')} x "
        f"{counted(data.prefetch_factor, 'batch')}: "
        f"{size(needed)} of shared memory at most" + ("" if free is None else f", {size(free)} free"),
    )
    if problem := shortage(needed):
        yield Line(PROBLEM, problem)


def plan(
    source: AudioSource | StreamedSource, config: PretrainingConfig, batches: ExpectedBatches | None, world_size: int
) -> Iterator[Line]:
    """How the audio becomes updates."""
    if batches is None or isinstance(source, StreamedSource):
        return
    sampler, optimizer = batches.sampler, config.optimizer
    accumulation = optimizer.gradient_accumulation_steps
    yield Line("data", f"{sampler}")
    if note := heard_note(sampler, source.num_samples, config.data):
        yield Line(NOTE, note)
    per_update = world_size * accumulation
    masked = per_update * batches.masked
    yield Line(
        "update",
        f"{counted(world_size, 'process')} x {counted(accumulation, 'batch')} of {duration(batches.seconds)} "
        f"({counted(round(batches.utterances), 'utterance')}): {duration(per_update * batches.seconds)} of audio, "
        f"{masked:.0f} masked frames, {masked / config.model.codebook_size:.1f} for each codeword of a codebook",
    )
    yield Line(
        "schedule",
        f"{counted(optimizer.max_steps, 'update')} = {optimizer.max_steps / sampler.updates_per_epoch():.1f} epochs = "
        f"{duration(optimizer.max_steps * per_update * batches.seconds)} of audio heard; lr {optimizer.lr:g}, "
        f"{optimizer.scheduler}",
    )
    SkippedFiles(None, config.data.max_skipped_share).add(*unusable(source, config.data, config.model))


def decoding_plan(source: AudioSource, max_share: float, topic: str) -> Iterator[Line]:
    """Reads a few utterances from all over the source; too many that cannot be read are a problem."""
    indices = np.unique(np.linspace(0, len(source) - 1, _SAMPLED_FILES).astype(int))
    failures, samples, start = [], 0, time.perf_counter()
    for index in indices:
        try:
            samples += len(source.read(int(index)))
        except AudioError as error:
            failures.append(str(error))
    seconds = time.perf_counter() - start
    if failures:
        too_many = len(failures) > max_share * len(indices) or len(failures) == len(indices)
        text = f"{counted(len(failures), 'file', of=len(indices))} tried cannot be used. The first: {failures[0]}"
        yield Line(PROBLEM if too_many else NOTE, text)
    if samples:
        yield Line(
            topic,
            f"{counted(len(indices) - len(failures), 'file', of=len(indices))} tried can be read, "
            f"{samples / SAMPLING_RATE / seconds:.0f} s of audio per second in one process",
        )


def _usable(batch: Batch) -> Batch:
    if batch.failure:
        raise AudioError(batch.failure)
    return batch


__all__ = [
    "EpochLoader",
    "ExpectedBatches",
    "StreamLoader",
    "decoding_plan",
    "expected_batches",
    "heard_note",
    "make_data_loader",
    "plan",
    "source_plan",
    "unusable",
    "workers_plan",
]
