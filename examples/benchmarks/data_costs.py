"""What `examples/benchmark_data.py` measures: the cost of manifests, epochs, decoding and masks on this machine."""

import statistics
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import soundfile
from torch.utils.data import Dataset

from spidr_hf.configuration_spidr import SAMPLING_RATE, SpidrConfig
from spidr_hf.data.audio import read_audio, read_window
from spidr_hf.data.batches import PretrainingBatches, make_loader, make_sampler
from spidr_hf.data.batching import BatchKey, BucketSampler, Position
from spidr_hf.data.manifests import Manifest, open_manifest, scan_folder
from spidr_hf.data.sections import DataSection, MaskingSection

# LibriSpeech's utterances, roughly: what a manifest made here says of its lengths.
_MEAN_SECONDS, _SPREAD_SECONDS = 12.3, 3.8


@dataclass(frozen=True)
class ManifestCost:
    """What a manifest of so many rows costs; times in seconds, memory in MiB.

    Attributes:
        rows: utterances.
        first_start: reading, checking and caching it, then the first batch's key.
        next_start: the same from the cache.
        epoch: shuffling and packing one epoch.
        main_memory: what the training process holds for it (beside the mapped file, which all processes share).
        worker_memory: what each worker holds of its own more than with a manifest of one row.
    """

    rows: int
    first_start: float
    next_start: float
    epoch: float
    main_memory: float
    worker_memory: float


def write_made_manifest(path: str | Path, rows: int) -> None:
    """A CSV manifest of files that do not exist, with lengths like LibriSpeech's."""
    numbers = pa.array(np.arange(rows)).cast(pa.string())
    paths = pc.binary_join_element_wise("train/", numbers, ".flac", "")
    lengths = _made_lengths(rows)
    pyarrow.csv.write_csv(pa.table({"fileid": numbers, "path": paths, "num_samples": lengths}), path)


def manifest_cost(path: str | Path, workers: int = 2) -> ManifestCost:
    """Cost of a manifest file, in a fresh process each for the first and the next start."""
    path = Path(path)
    tiny = path.with_name("tiny.csv")
    write_made_manifest(tiny, 64)
    first = _in_process(_start, path, 0)
    following = _in_process(_start, path, workers)
    base = _in_process(_start, tiny, workers)
    return ManifestCost(
        rows=following["rows"],
        first_start=first["start"],
        next_start=following["start"],
        epoch=following["epoch"],
        main_memory=following["memory"] - base["memory"],
        worker_memory=following["worker"] - base["worker"],
    )


@dataclass(frozen=True)
class EpochsCost:
    """Attributes: epochs and batches gone through, seconds for them, growth of the process's memory in MiB."""

    epochs: int
    batches: int
    seconds: float
    growth: float


def simulated_run(rows: int = 281_241, batches: int = 4_320_000) -> EpochsCost:
    """A sampler asked for the batches of a whole run: by default three days of LibriSpeech at 60 ms an update."""
    data = DataSection()
    sampler = BucketSampler(
        _made_lengths(rows),
        max_batch_length=data.max_batch_length,
        min_sample_size=data.min_sample_size,
        max_sample_size=data.max_sample_size,
        num_buckets=data.num_buckets,
    )
    keys = iter(sampler)
    per_epoch = len(sampler.epoch_batches(0))
    last: Any = None
    for last in islice(keys, min(batches, 2 * per_epoch)):  # noqa: B007 (the last one is looked at below)
        pass
    before, start = private_memory(), time.perf_counter()
    for last in islice(keys, max(0, batches - 2 * per_epoch)):  # noqa: B007
        pass
    return EpochsCost(last.epoch + 1, batches, time.perf_counter() - start, private_memory() - before)


@dataclass(frozen=True)
class DecodingSpeed:
    """Audio seconds per second of one core (of its time: what else the machine does is not counted)."""

    flac: float
    tar: float
    batches: float


def decoding_speed(folder: str | Path, waveforms: list[np.ndarray], repeats: int = 3) -> DecodingSpeed:
    """How fast one core decodes FLAC files, members of a tar by offset, and makes whole batches of them.

    Args:
        folder: an empty folder to write into.
        waveforms: recordings at 16 kHz; speech, since noise decodes more slowly.
        repeats: times that everything is read; the median counts.
    """
    folder = Path(folder)
    files = folder / "files"
    files.mkdir()
    for index, waveform in enumerate(waveforms):
        soundfile.write(files / f"{index:04d}.flac", waveform, SAMPLING_RATE)
    archive = folder / "all.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(files, ".")
    with tarfile.open(archive) as tar:
        members = [(member.offset_data, member.size) for member in tar if member.isreg()]
    seconds = sum(map(len, waveforms)) / SAMPLING_RATE
    source = scan_folder(files, progress=False)
    data, model = DataSection(), SpidrConfig()
    batches = PretrainingBatches(source, data, MaskingSection(), model)
    keys = make_sampler(source, data, model).epoch_batches(0)

    def read_batches() -> None:
        for index, utterances in enumerate(keys):
            batches[BatchKey(0, index, utterances, Position(0, 0))]

    tasks: tuple[Callable[[], Any], ...] = (
        lambda: [read_audio(path) for path in sorted(files.iterdir())],
        lambda: [read_window(archive, offset, size) for offset, size in members],
        read_batches,
    )
    return DecodingSpeed(*(seconds / core_seconds(task, repeats) for task in tasks))


def core_seconds(task: Callable[[], Any], repeats: int) -> float:
    """Median time of this thread's core that a task takes, after one run that does not count."""
    task()
    times = []
    for _ in range(repeats):
        start = time.thread_time()
        task()
        times.append(time.thread_time() - start)
    return statistics.median(times)


def private_memory() -> float:
    """Memory of this process that it shares with no other and no file, in MiB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kibibytes = [int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:")]
    return kibibytes[0] / 1024


class _Touched(Dataset[float]):
    """Looks up all that reading a batch needs, short of the files, and returns the process's memory."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def __getitem__(self, key: BatchKey) -> float:
        for index in map(int, key.utterances):
            self.manifest.fileid(index), self.manifest.describe(index), self.manifest.num_samples[index]
        return private_memory()


def _start(path: Path, workers: int) -> dict[str, float]:
    begin, before = time.perf_counter(), private_memory()
    manifest = open_manifest(path, cache=path.with_suffix(".arrow"), progress=False)
    data = DataSection(num_workers=workers)
    sampler = make_sampler(manifest, data, SpidrConfig())
    next(iter(sampler))
    start = time.perf_counter() - begin
    begin = time.perf_counter()
    sampler.epoch_batches(1)
    epoch = time.perf_counter() - begin
    memory = private_memory() - before
    worker = 0.0
    if workers:
        loader = make_loader(_Touched(manifest), sampler, data)
        worker = max(islice(loader, 20 * workers))
    return {"rows": len(manifest), "start": start, "epoch": epoch, "memory": memory, "worker": worker}


def _in_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a task in a process of its own, which begins with nothing but the imports."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, task, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender: Any, task: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(task(*arguments))


def _made_lengths(rows: int) -> np.ndarray:
    seconds = np.random.default_rng(0).normal(_MEAN_SECONDS, _SPREAD_SECONDS, rows)
    return (np.clip(seconds, 1, 35) * SAMPLING_RATE).astype(np.int64)


__all__ = [
    "DecodingSpeed",
    "EpochsCost",
    "ManifestCost",
    "core_seconds",
    "decoding_speed",
    "manifest_cost",
    "private_memory",
    "simulated_run",
    "write_made_manifest",
]
