"""From an audio source to the batches that a pretraining step takes.

A worker gets the key of a batch (`BatchKey`) and returns all of it: files decoded, whole utterances standardised, then
cropped, stacked, and their masks drawn. Every random number comes from the seed and the names of what it is drawn for
(epoch and utterance for crops, epoch and batch for masks), so batches do not depend on the number of workers, on the
process that asks for them, or on what was asked for before.
"""

import dataclasses
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..configuration_spidr import SpidrConfig, frame_lengths, receptive_field
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..system.errors import AudioError
from ..system.files import write_text
from ..system.messages import counted
from ..system.processes import die_with_parent, kill_workers_at_exit
from ..system.shared_memory import WorkerError, check_shared_memory, local_processes, no_room, shared_bytes
from ..system.tables import json_lines
from .audio import AudioFile
from .batching import BatchKey, BucketSampler
from .masking import masked_frames
from .sections import DataSection, MaskingSection
from .sources import AudioSource, Skipped

# What a random number is drawn for; part of its seed.
_CROP, _MASK, _REPLACEMENT, _DROPOUT = range(4)
_MAX_REPLACEMENTS = 100
_LONG = 1 << 22  # samples: longer recordings (4.4 minutes) are not decoded whole where a crop of them is wanted
# A decoder may count a few samples differently from the header; a file this much shorter is cut off.
_SHORTER = 0.9
# Below this many utterances a share says nothing.
_MIN_TRIED = 20


class LongRecording:
    """An utterance like an array of its samples, of which only the slice that is asked for is decoded and kept.

    Args:
        file: the recording.
        standardize: the whole of it is standardised: decoded once, block by block, for its mean and variance, as
            `SpidrFeatureExtractor.standardize` has them. Otherwise its header alone is read.
        known: length, mean and scale of an earlier time.
    """

    def __init__(self, file: AudioFile, standardize: bool, known: tuple[int, float, float] | None = None):
        self._file = file
        if known is None:
            known = self._statistics() if standardize else (file.num_samples, 0.0, 1.0)
        self.known, self._standardize = known, standardize

    def __len__(self) -> int:
        return self.known[0]

    def __getitem__(self, place: slice) -> np.ndarray:
        """Samples `start` to before `stop`. Raises `AudioError` where they cannot be decoded."""
        start, stop, _ = place.indices(len(self))
        part = self._file.part(start, stop)
        _, mean, scale = self.known
        return ((part - np.float64(mean)) * scale).astype(np.float32) if self._standardize else part

    def _statistics(self) -> tuple[int, float, float]:
        count, mean, squares = 0, 0.0, 0.0
        for block in self._file.blocks():
            if not len(block):
                continue
            centred = block.astype(np.float64)
            own = float(centred.mean())
            centred -= own
            # Sums of blocks around their own means: nothing cancels, however long the recording.
            total, apart = count + len(block), own - mean
            squares += float(np.dot(centred, centred)) + apart * apart * count * len(block) / total
            mean, count = mean + apart * len(block) / total, total
        return count, mean, 1.0 / math.sqrt(squares / max(1, count) + SpidrFeatureExtractor().norm_eps)


# What an utterance is until it is cropped.
Waveform = np.ndarray | LongRecording


@dataclass
class ModelBatch:
    """A batch of which some fields, those named in `TENSORS`, are what the model takes."""

    TENSORS: ClassVar[tuple[str, ...]] = ("input_values", "attention_mask")

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model takes."""
        return {name: tensor for name in self.TENSORS if (tensor := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device; copies from pinned memory do not wait."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return dataclasses.replace(self, **moved)

    def pin_memory(self) -> Self:
        """The batch with its tensors in page-locked memory (called by the data loader)."""
        return dataclasses.replace(self, **{name: tensor.pin_memory() for name, tensor in self.inputs.items()})


@dataclass
class Batch(ModelBatch):
    """One batch of one process.

    Attributes:
        input_values: B x S, standardised waveforms (float32).
        mask_time_indices: masked frames, B x M frame numbers (int64), or B x T (bool) where all are; None: no mask.
        attention_mask: B x S (bool), True on audio; None when nothing is padded.
        key: which batch it is.
        audio_samples: valid samples in it.
        skipped: utterances that could not be used, and why.
        failure: why there is no audio at all in it, after many replacements were tried; else None.
        place: of a streamed batch, where its stream stands after it (`streaming.Stream`).
    """

    TENSORS = ("input_values", "mask_time_indices", "attention_mask")

    input_values: Tensor
    mask_time_indices: Tensor | None
    attention_mask: Tensor | None
    key: BatchKey
    audio_samples: int
    skipped: list[Skipped] = field(default_factory=list)
    failure: str | None = None
    place: dict[str, Any] | None = None


class CropError(Exception):
    """The utterance at `place` of a batch cannot be decoded after all; `error` says why."""

    def __init__(self, place: int, error: AudioError):
        super().__init__(place, error)
        self.place, self.error = place, error


class BatchBuilder:
    """Waveforms to a batch: standardised, cropped or padded, masked.

    Args:
        data: `[data]`: how utterances become rows.
        masking: `[masking]`: how masks are drawn.
        model: for the arithmetic of its convolutions.
        mask_seed: seed of the masks (`[data]`'s own seeds the crops).
    """

    def __init__(self, data: DataSection, masking: MaskingSection, model: SpidrConfig, mask_seed: int = 0):
        self.data = data
        self.spans = masking.spans()
        self.model = model
        self.mask_seed = mask_seed
        self.min_samples = max(data.min_sample_size, min_samples(model))
        self._standardize = SpidrFeatureExtractor().standardize if data.normalize else None

    def is_long(self, expected: int) -> bool:
        """Whether so little of an utterance of `expected` samples is heard that it should not be decoded whole."""
        return expected > max(_LONG, self.data.max_sample_size)

    def prepare_long(self, file: AudioFile, expected: int, fileid: str, known: Any = None) -> LongRecording:
        """`prepare` of a recording that is never held whole; `known` is what an earlier one has found out."""
        recording = LongRecording(file, self._standardize is not None, known)
        self._check_length(len(recording), expected, fileid)
        return recording

    def prepare(self, waveform: np.ndarray, expected: int, fileid: str) -> np.ndarray:
        """A whole utterance, standardised. Raises `AudioError` where much less is there than was expected."""
        self._check_length(len(waveform), expected, fileid)
        return waveform if self._standardize is None else self._standardize(waveform)

    def _check_length(self, length: int, expected: int, fileid: str) -> None:
        check_length(fileid, length, min(expected, self.data.max_sample_size), self.min_samples, expected)

    def build(
        self, utterances: Sequence[tuple[tuple[int, ...], int, Waveform]], key: BatchKey, skipped: list[Skipped]
    ) -> Batch:
        """The batch of (name, length that was reckoned with, prepared waveform); names seed the crops.

        Long recordings are decoded here: raises `CropError` where one of them cannot be.
        """
        usable = [min(len(waveform), expected, self.data.max_sample_size) for _, expected, waveform in utterances]
        lengths = np.array(usable if self.data.enable_padding else [min(usable)] * len(usable))
        crops = []
        for place, (length, (name, _, waveform)) in enumerate(zip(lengths.tolist(), utterances, strict=True)):
            try:
                crops.append(self.crop(waveform, length, key.epoch, name))
            except AudioError as error:
                raise CropError(place, error) from error
        rows, attention_mask = padded(crops)
        frames = frame_lengths(self.model, torch.from_numpy(lengths)).numpy()
        mask = self._mask(frames, key)
        return Batch(rows, mask, attention_mask, key, int(lengths.sum()), skipped)

    def crop(self, waveform: Waveform, length: int, epoch: int, name: tuple[int, ...]) -> np.ndarray:
        """`length` samples of a waveform, from a place that depends on seed, epoch and the utterance's name."""
        spare = len(waveform) - length
        if spare == 0 or not self.data.rand_crop:
            return waveform[:length]
        rng = np.random.default_rng([self.data.random_seed, epoch, *name, _CROP])
        start = int(rng.integers(spare, endpoint=True))
        return waveform[start : start + length]

    def _mask(self, frames: np.ndarray, key: BatchKey) -> Tensor | None:
        if self.spans is None:
            return None
        rng = np.random.default_rng([self.mask_seed, key.epoch, key.index, _MASK])
        indices = masked_frames(frames, self.spans, rng)
        if indices.shape[1] == frames.max():
            # T integers per row would read as a mask of 0 and 1.
            return torch.ones(indices.shape, dtype=torch.bool)
        return torch.from_numpy(indices)


class PretrainingBatches(Dataset[Batch]):
    """Batches by key.

    Args:
        source: the audio.
        data, masking, model, mask_seed: see `BatchBuilder`.
    """

    def __init__(
        self, source: AudioSource, data: DataSection, masking: MaskingSection, model: SpidrConfig, mask_seed: int = 0
    ):
        self.source = source
        self.seed = data.random_seed
        self.builder = BatchBuilder(data, masking, model, mask_seed)
        self._known: dict[int, tuple[int, float, float]] = {}  # of long recordings that were decoded before

    def __getitem__(self, key: BatchKey) -> Batch:
        utterances, skipped = self._read(key.utterances)
        # Every process must have a batch: where nothing of it can be used, one utterance takes its place.
        batch = self._build(utterances, key, skipped) or self._replacement(key, skipped)
        if batch is None:
            failure = f"{_MAX_REPLACEMENTS} utterances in a row cannot be used. The last: {skipped[-1].reason}"
            return empty_batch(key, skipped, failure)
        return batch

    def _build(
        self, utterances: list[tuple[tuple[int], int, Waveform]], key: BatchKey, skipped: list[Skipped]
    ) -> Batch | None:
        """The batch of what can be decoded to its end; the others join `skipped`. None where nothing is left."""
        while utterances:
            try:
                return self.builder.build(utterances, key, skipped)
            except CropError as failed:
                (index,), *_ = utterances.pop(failed.place)
                skipped.append(Skipped(self.source.fileid(index), str(failed.error)))
        return None

    def _read(
        self, utterances: Sequence[int] | np.ndarray
    ) -> tuple[list[tuple[tuple[int], int, Waveform]], list[Skipped]]:
        """(name, length, prepared waveform) of what can be read, and what cannot."""
        read, skipped = [], []
        for index in map(int, utterances):
            expected = int(self.source.num_samples[index])
            try:
                waveform = self._prepared(index, expected)
            except AudioError as error:
                skipped.append(Skipped(self.source.fileid(index), str(error)))
            else:
                read.append(((index,), expected, waveform))
        return read, skipped

    def _prepared(self, index: int, expected: int) -> Waveform:
        fileid = self.source.fileid(index)
        recording = getattr(self.source, "recording", None)
        if recording is None or not self.builder.is_long(expected):
            return self.builder.prepare(self.source.read(index), expected, fileid)
        long = self.builder.prepare_long(recording(index), expected, fileid, self._known.get(index))
        self._known[index] = long.known
        return long

    def _replacement(self, key: BatchKey, skipped: list[Skipped]) -> Batch | None:
        """A batch of one utterance at random; what is tried in vain joins `skipped`."""
        rng = np.random.default_rng([self.seed, key.epoch, key.index, _REPLACEMENT])
        for _ in range(_MAX_REPLACEMENTS):
            index = int(rng.integers(len(self.source)))
            if self.source.num_samples[index] < self.builder.min_samples:
                continue
            utterances, more = self._read([index])
            skipped += more
            if batch := self._build(utterances, key, skipped):
                return batch
        return None


class SkippedFiles:
    """The list of utterances that could not be used, `skipped.jsonl`, and the point where there are too many.

    Args:
        path: the file; entries of an earlier start of the run stay until they are used again. None: keep no file.
        max_share: largest share of the utterances tried that may be skipped.
        limit: what messages call it.
        writes: whether this process keeps the file; the others only know what is in it.
    """

    def __init__(
        self,
        path: str | Path | None,
        max_share: float,
        limit: str = "`data.max_skipped_share`",
        *,
        writes: bool = True,
    ):
        self.path = None if path is None else Path(path)
        self.max_share, self.limit, self._writes = max_share, limit, writes
        self.tried = 0
        self.skipped = 0
        self._listed: set[str] = set()
        self._kinds: Counter[str] = Counter()  # of reasons, without the names of files
        self._examples: dict[str, str] = {}
        if self.path is not None and self.path.exists():
            # A line may have been cut off when the run was killed.
            self._listed = {name for _, name in json_lines(self.path, lambda row: str(row["file"]))}
        self._earlier = set(self._listed)  # by another start, and not again by this one

    def used_again(self, utterances: Sequence[int] | np.ndarray, skipped: Sequence[Skipped], source: Any) -> list[str]:
        """Which utterances of a batch an earlier start has listed, and this one can use."""
        if not self._earlier or not hasattr(source, "fileid"):  # streams do not know names by numbers
            return []
        names = {source.fileid(int(index)) for index in utterances}
        return sorted(names & self._earlier - {entry.fileid for entry in skipped})

    def add(self, skipped: Sequence[Skipped], tried: int, used_again: Collection[str] = ()) -> None:
        """Count utterances, list those skipped for the first time, and take those off the list that are used again.

        Raises `AudioError` when too many were skipped so far.
        """
        self.tried += tried
        self.skipped += len(skipped)
        for entry in skipped:
            self._kinds[entry.kind] += 1
            self._examples.setdefault(entry.kind, entry.reason)
        new = {entry.fileid: entry for entry in skipped if entry.fileid not in self._listed}
        self._earlier -= {entry.fileid for entry in skipped}
        if gone := self._earlier.intersection(used_again):
            self._earlier -= gone
            self._listed -= gone
            if self.path is not None and self._writes:
                kept = [row for _, row in json_lines(self.path, dict) if row.get("file") not in gone]
                write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        if new and self.path is not None and self._writes:
            text = "".join(json.dumps({"file": name, "reason": entry.reason}) + "\n" for name, entry in new.items())
            with open(self.path, "a+b") as file:
                if file.tell() > 0:
                    file.seek(-1, os.SEEK_END)
                    text = text if file.read(1) == b"\n" else "\n" + text
                file.write(text.encode())
        self._listed |= set(new)
        if self.skipped > self.max_share * max(self.tried, _MIN_TRIED):
            raise AudioError(
                f"{counted(self.skipped, 'utterance', of=self.tried)} cannot be used, more than {self.limit} "
                f"({self.max_share:g}){f'; {self.path} lists them' if self.path else ''}. "
                f"{self._commonest()}"
            )

    def _commonest(self) -> str:
        """The reason of which there are most, with an example."""
        if not self._kinds:
            return ""
        kind, count = self._kinds.most_common(1)[0]
        return f"The commonest of the reasons ({counted(count, 'time')}), for one: {self._examples[kind]}"


def make_sampler(source: AudioSource, data: DataSection, model: SpidrConfig, **layout: int) -> BucketSampler:
    """Sampler of a `[data]` section; `layout`: rank, world_size and accumulation, as `BucketSampler` has them.

    Utterances too short for two frames are dropped whatever `min_sample_size` is.
    """
    return BucketSampler(
        source.num_samples,
        max_batch_length=data.max_batch_length,
        min_sample_size=max(data.min_sample_size, min_samples(model)),
        max_sample_size=data.max_sample_size,
        padding=data.enable_padding,
        num_buckets=data.num_buckets,
        bucket_method=data.bucket_method,
        seed=data.random_seed,
        drop_last=data.drop_last,
        shares=getattr(source, "shares", None),
        **layout,
    )


def make_loader(
    batches: Dataset[Any], sampler: BucketSampler | None, data: DataSection, *, pin_memory: bool = False
) -> DataLoader[Any]:
    """Endless loader of this process's batches, from the sampler's position on. Streamed batches have no sampler.

    Its workers end with this process, however that ends. Every process makes its own at the same time. Raises
    `ConfigError` where shared memory cannot hold what workers prepare, and `WorkerError` out of the loader where it
    turns out to be full.
    """
    workers: dict[str, Any] = {}
    if data.num_workers:
        kill_workers_at_exit()
        workers = {"prefetch_factor": data.prefetch_factor, "worker_init_fn": _start_worker}
        check_shared_memory(shared_memory(data))
    return _Loader(
        batches,
        batch_size=None,  # the data set returns whole batches
        sampler=sampler,
        collate_fn=_handed_over,
        num_workers=data.num_workers,
        pin_memory=pin_memory and data.pin_memory,
        **workers,
    )


def shared_memory(data: DataSection) -> int:
    """Bytes of shared memory that workers of this machine's processes take at most."""
    per_sample = 4 + (1 if data.enable_padding else 0)  # a float, and whether it is one of the utterance's
    size = data.max_batch_length * per_sample
    return shared_bytes(data.num_workers, data.prefetch_factor, size, local_processes())


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return map(_checked, super().__iter__())


def dropout_seed(seed: int, key: BatchKey) -> int:
    """Seed of the random numbers that the model draws for a batch (dropout, layer drop)."""
    state = np.random.SeedSequence([seed, key.epoch, key.index, _DROPOUT]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def min_samples(model: SpidrConfig) -> int:
    """Fewest samples an utterance needs: those of two frames, since from one alone nothing can be predicted."""
    return receptive_field(model) + model.inputs_to_logits_ratio


def padded(rows: Sequence[np.ndarray], width: int | None = None, value: float = 0) -> tuple[Tensor, Tensor | None]:
    """Rows of different lengths as one tensor, B x S, which is `value` behind them; and which places are theirs.

    Args:
        rows: of one type.
        width: S; None: the longest row's.

    Returns:
        The tensor, and B x S (bool), True on a row; None where all of them fill it.
    """
    lengths = np.array([len(row) for row in rows])
    width = int(lengths.max()) if width is None else width
    filled = torch.full((len(rows), width), value, dtype=torch.from_numpy(np.empty(0, rows[0].dtype)).dtype)
    for target, row in zip(filled.numpy(), rows, strict=True):
        target[: len(row)] = row
    return filled, torch.arange(width) < torch.from_numpy(lengths)[:, None] if lengths.min() < width else None


def check_length(fileid: str, samples: int, expected: int, lowest: int, told: int | None = None) -> None:
    """Raises `AudioError` for an utterance that has much less than was expected, or fewer than `lowest` samples.

    `told`: what the message says was expected.
    """
    if samples < max(lowest, _SHORTER * expected):
        raise AudioError(
            f"{fileid}: has {samples} samples at 16 kHz, {told or expected} were expected. It is cut off, or its "
            "manifest is out of date."
        )


def too_short(fileid: str, samples: int, lowest: int) -> Skipped:
    """An utterance of fewer than the `lowest` samples that a run takes."""
    return Skipped(fileid, f"{fileid}: has {samples} samples at 16 kHz, at least {lowest} are needed.")


def empty_batch(key: BatchKey, skipped: list[Skipped], failure: str) -> Batch:
    """A batch that says why there is none."""
    return Batch(torch.empty(0, 0), None, None, key, 0, skipped, failure)


@dataclass
class _NoRoom:
    message: str


def _handed_over(batch: Any) -> Any:
    """The batch as it is, in a worker with its tensors in shared memory. What goes wrong with that is the batch then.

    Left to the queue's own thread, where nobody hears of it, the batch would never come.
    """
    if get_worker_info() is None:
        return batch
    try:
        for value in getattr(batch, "__dict__", {}).values():
            if isinstance(value, Tensor):
                value.share_memory_()
    except (RuntimeError, OSError) as error:
        if (message := no_room(error)) is None:
            raise
        return _NoRoom(message)
    return batch


def _checked(batch: Any) -> Any:
    if isinstance(batch, _NoRoom):
        raise WorkerError(batch.message)
    return batch


def _start_worker(_: int) -> None:
    # SLURM and terminals signal every process of a job: the training process decides, its workers go with it.
    for stop in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(stop, signal.SIG_IGN)
    die_with_parent(signal.SIGKILL)


__all__ = [
    "Batch",
    "BatchBuilder",
    "CropError",
    "LongRecording",
    "ModelBatch",
    "PretrainingBatches",
    "SkippedFiles",
    "Waveform",
    "check_length",
    "dropout_seed",
    "empty_batch",
    "make_loader",
    "make_sampler",
    "min_samples",
    "padded",
    "shared_memory",
    "too_short",
]
