"""What a pretraining loop takes its batches from: a sampler over known utterances, or streams.

Both kinds of loader are iterated for this process's batches, without end (`AudioError` where there is no audio left to
make one of); `state` is what a checkpoint needs beside the position that each batch's key carries.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..configuration_spidr import SpidrConfig
from ..data.batches import Batch, BatchBuilder, PretrainingBatches, make_loader, make_sampler, min_samples, too_short
from ..data.batching import Position
from ..data.mixture import MixedSource
from ..data.sections import DataSection
from ..data.sources import AudioSource, Skipped, StreamedSource
from ..data.streaming import StreamedBatches
from ..system.errors import AudioError, BatchingError
from ..system.processes import gather_all
from ..training.checkpoints import TrainerState
from .config import PretrainingConfig


class EpochLoader:
    """Batches of utterances whose lengths are known: see `batching`.

    Args:
        source: the audio.
        config: the run's configuration.
        model: for the arithmetic of its convolutions.
        state: where the run stands.
        rank, world_size, accumulation: see `BucketSampler`.
        pin_memory: whether there is a GPU to copy to.
    """

    def __init__(
        self,
        source: AudioSource,
        config: PretrainingConfig,
        model: SpidrConfig,
        state: TrainerState,
        *,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        pin_memory: bool = False,
    ):
        self.sampler = make_sampler(
            source, config.data, model, rank=rank, world_size=world_size, accumulation=accumulation
        )
        self.sampler.position = Position(state.epoch, state.batch)
        batches = PretrainingBatches(source, config.data, config.masking, model, config.run.random_seed)
        self._loader = make_loader(batches, self.sampler, config.data, pin_memory=pin_memory)
        self.notes = source.describe() if isinstance(source, MixedSource) else []
        # What was left out before any batch, of how many.
        self.scanned: tuple[Sequence[Skipped], int] = unusable(source, config.data, model)
        self.amount = f"{self.sampler.hours:.1f} h of audio"

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
        processes, workers = len(before.get("ranks", ())), before.get("workers")
        if before and (processes, workers) != (world_size, self._workers):
            raise BatchingError(
                f"This run streams its audio with {processes} processes of {workers} workers and cannot resume with "
                f"{world_size} of {self._workers}: the order of the utterances depends on them. Start it as it was "
                "(`data.num_workers` sets the workers), or begin another run from its weights (`run.init_ckpt`)."
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
                f"{source.name} has {source.num_shards} shards for {self._streams} streams, so some hear theirs more "
                "often than others. Numbers of processes and workers that divide the shards avoid it."
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
        return f"{self._source.name}: streamed, {self._source.num_shards} shards, {self._streams} streams"

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
    return (StreamLoader if isinstance(source, StreamedSource) else EpochLoader)(source, *arguments, **options)


def _usable(batch: Batch) -> Batch:
    if batch.failure:
        raise AudioError(batch.failure)
    return batch


__all__ = ["EpochLoader", "StreamLoader", "make_data_loader", "unusable"]
