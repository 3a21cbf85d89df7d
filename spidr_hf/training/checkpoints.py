"""What lets a run be killed at any moment and resume: checkpoints, the lock on its folder, signals.

A checkpoint is a folder `checkpoints/step_N` with the model (loadable by `from_pretrained`), the optimizer, and
`trainer_state.json`, which also holds a checksum of every file. It is written under another name, synced, and renamed,
so that a folder of that name is always complete; one damaged later is recognised by its checksums and passed over.
Where there are checkpoints and none of them can be read, nothing begins again unasked.
"""

import dataclasses
import errno
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..system.errors import RunFolderError
from ..system.files import replaced_folder, write_text
from ..system.messages import one_line, shown
from ..system.processes import gather_all
from .sharding import is_sharded, shard_like, whole_tensor

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
_VERSION = 1
# What says that a file is not there or is another kind of thing. Any other error is the disk's, and may pass.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_READS, _PAUSE_SECONDS = 3, 2.0
_BEGIN_ANEW = "begin anew with --fresh, which moves what is there into a folder of its own"
# Which job began anew in a folder; and what a run leaves there that a new one can use.
_FRESH_FILE = ".fresh"
_REUSABLE = {".lock", _FRESH_FILE, "data.arrow", "compiled"}


@dataclass
class TrainerState:
    """Where a run stands after an update; the part of a checkpoint that is not tensors.

    Attributes:
        step: updates made.
        epoch, batch: position in the data (`batching.Position`).
        world_size, accumulation: how many batches made an update.
        data: fingerprint of the audio source.
        loss_scale: state of `pretraining.LossScale`.
        metrics: sums since the last row of metrics.jsonl.
        collapse: state of `pretraining.CollapseWatch`.
        nonfinite_in_a_row, skipped_steps: updates skipped for a non-finite loss or gradient, in a row and in all.
        stream: where streamed audio stands (`loaders.StreamLoader`).
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    world_size: int = 1
    accumulation: int = 1
    data: str = ""
    loss_scale: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    collapse: dict[str, Any] = field(default_factory=dict)
    nonfinite_in_a_row: int = 0
    skipped_steps: int = 0
    stream: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: TrainerState

    def load_model(self, model: nn.Module) -> None:
        """Put student, heads, codebooks, teacher and step into the model."""
        model.load_state_dict(load_file(self.folder / MODEL_FILE))

    def load_optimizer(self, optimizer: Optimizer, names: Mapping[Tensor, str]) -> None:
        """Put the moments into the optimizer; `names` are the parameters' names in the model."""
        load_optimizer_tensors(optimizer, names, load_file(self.folder / OPTIMIZER_FILE))


class Checkpoints:
    """The checkpoints of a run: `folder/step_N`.

    Args:
        folder: made when the first one is written, in the run's folder.
        keep_latest: how many to keep; -1: all.
        writes: only one process may; the others of a sharded model take part in `save` with what they hold.
        beside: texts of small files that every checkpoint gets, by their names: what else makes it a MODEL.

    Writing happens in a thread while training continues; its errors come out of `wait`.
    """

    def __init__(
        self, folder: str | Path, keep_latest: int = -1, writes: bool = True, beside: Mapping[str, str] | None = None
    ):
        self.folder = Path(folder)
        self.beside = dict(beside or {})
        self.keep_latest = keep_latest
        self.writes = writes
        self.on_written: Callable[[Path], None] | None = None  # gets the folder of every complete checkpoint
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = [path.name.removeprefix("step_") for path in self.folder.glob("step_*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; damaged ones are named in a warning. None: there is none at all.

        Raises `RunFolderError` where there are some and none is whole, or where the disk does not say what is there:
        a run that began again would write over what it can no longer read.
        """
        damaged: dict[str, str] = {}
        for step in reversed(self.steps()):
            folder = self.folder / f"step_{step}"
            try:
                found = Checkpoint(folder, _read_state(folder))
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                damaged[folder.name] = _what_is_wrong(error)
                continue
            for name, reason in damaged.items():
                logger.warning("%s is damaged (%s) and is passed over.", self.folder / name, reason)
            return found
        if damaged:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
            raise RunFolderError(
                f"None of the checkpoints in {self.folder} can be read ({one_line(reasons)}). Nothing was changed. "
                f"Restore one of them, or {_BEGIN_ANEW}."
            )
        return None

    def save(self, state: TrainerState, model: nn.Module, optimizer: Optimizer, *, wait: bool = False) -> None:
        """Take a copy of everything now and write it in the background. Every process calls it.

        Raises `RunFolderError` when the checkpoint before this one could not be written.
        """
        self.wait()
        if not self.writes and not is_sharded(model):
            return
        moments = optimizer_tensors(optimizer, {p: name for name, p in model.named_parameters()})
        tensors = {
            MODEL_FILE: whole_copies(model.state_dict(), self.writes),
            OPTIMIZER_FILE: whole_copies(moments, self.writes),
        }
        if not self.writes:
            return
        config = model.config.to_json_string() if hasattr(model, "config") else None
        self._writer = self._writer or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending = self._writer.submit(self._write, dataclasses.replace(state), tensors, config)
        if wait:
            self.wait()

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises `RunFolderError` when it failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:  # safetensors' errors, for one, are neither OSError nor RuntimeError
            raise RunFolderError(
                f"Cannot write a checkpoint into {self.folder}: {str(error) or repr(error)}. Once the cause is "
                "removed, the same command resumes from the newest complete one."
            ) from error

    def remove_partial(self) -> None:
        """Remove what a killed process left half-written."""
        for path in self.folder.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)

    def _write(self, state: TrainerState, tensors: dict[str, dict[str, Tensor]], config: str | None) -> None:
        folder = self.folder / f"step_{state.step}"
        if not self.folder.parent.is_dir():
            raise RunFolderError(f"{self.folder.parent} was removed")
        with replaced_folder(folder) as partial:
            for name, values in tensors.items():
                save_file(values, partial / name, metadata={"format": "pt"})
            for name, text in (self.beside if config is None else {"config.json": config, **self.beside}).items():
                (partial / name).write_text(text, encoding="utf-8")
            files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
            content = {"version": _VERSION, **dataclasses.asdict(state), "files": files}
            (partial / STATE_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        if self.on_written is not None:
            self.on_written(folder)
        if self.keep_latest > 0:
            for step in self.steps()[: -self.keep_latest]:
                if step != state.step:
                    shutil.rmtree(self.folder / f"step_{step}", ignore_errors=True)


def agree(checkpoint: Checkpoint | None, folder: str | Path) -> None:
    """Raises `RunFolderError` unless all processes found the same checkpoint in a run's folder. Each calls it."""
    found = gather_all([checkpoint.state.step if checkpoint else 0])
    if len(set(found)) > 1:
        raise RunFolderError(f"The processes find different checkpoints in {folder}: {found}. Do they share it?")


def begins_anew(folder: str | Path, fresh: bool) -> bool:
    """Whether a run that is asked to begin anew does: not where its job, which was started again, has done so.

    SLURM (after a preemption, or when a job requeues itself) and torchrun (after an error) start the same command once
    more, `--fresh` included.
    """
    restarted = any(
        int(os.environ.get(name) or 0) > 0 for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    )
    mark = Path(folder) / _FRESH_FILE
    return fresh and not (restarted and mark.is_file() and mark.read_text(encoding="utf-8") == _job())


def set_aside(folder: str | Path, names: Collection[str] | None = None) -> Path | None:
    """Move what earlier starts left in a run's folder into `folder/earlier-N`; returns that, or None: there is nothing.

    A run in that folder then begins anew, once in a job (`begins_anew`). One process calls it, which holds the folder's
    lock. `names`: of what; None: of all but what a new run can use.
    """
    folder = Path(folder)
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    left = [path for path in found if path.name not in _REUSABLE and not path.name.startswith("earlier-")]
    left = [path for path in left if names is None or path.name in names]
    numbers = [path.name.removeprefix("earlier-") for path in found if path.name.startswith("earlier-")]
    target = folder / f"earlier-{1 + max([int(number) for number in numbers if number.isdecimal()], default=0)}"
    for path in left:
        target.mkdir(exist_ok=True)
        path.rename(target / path.name)
    write_text(folder / _FRESH_FILE, _job())
    return target if left else None


def _job() -> str:
    """What tells the job that this process belongs to from others."""
    return " ".join(os.environ.get(name, "-") for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"))


def optimizer_tensors(optimizer: Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The optimizer's state by `<moment>:<parameter name>`, which survives a change of its groups."""
    return {
        f"{moment}:{names[parameter]}": value
        for parameter, moments in optimizer.state.items()
        for moment, value in moments.items()
    }


def load_optimizer_tensors(optimizer: Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Moments of parameters that the optimizer does not have are left out."""
    moments: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        moment, _, name = key.partition(":")
        moments.setdefault(name, {})[moment] = value
    content = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in content["param_groups"] for index in group["params"]]
    content["state"] = {
        index: {moment: shard_like(value, parameter) for moment, value in moments[names[parameter]].items()}
        for index, parameter in zip(indices, parameters, strict=True)
        if names[parameter] in moments
    }
    optimizer.load_state_dict(content)


def whole_copies(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Copies in main memory, independent of what training does next. Shards are put together: every process of a
    sharded model calls this, in which those that do not `keep` get nothing."""
    copies = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        if keep:
            copies[name] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


def _read_state(folder: Path) -> TrainerState:
    """The state in a checkpoint, all of whose files are as they were written.

    Raises `RunFolderError` for one of another version, and where the disk does not answer; other errors are damage.
    """
    for number in range(_READS):
        try:
            return _state_of(folder)
        except OSError as error:
            if error.errno is None or error.errno in _ABSENT:
                raise
            if number == _READS - 1:
                raise RunFolderError(
                    f"{folder} cannot be read: {one_line(error)} ({_READS} times tried). Nothing was changed. The same "
                    "command continues once it can; with that folder moved away, from an older checkpoint."
                ) from error
            time.sleep(_PAUSE_SECONDS)
    raise AssertionError("there is at least one try")


def _state_of(folder: Path) -> TrainerState:
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    for name, expected in content.pop("files").items():
        if _checksum(folder / name) != expected:
            raise ValueError(f"{name} does not have the checksum it was written with")
    version, known = content.pop("version"), {entry.name for entry in dataclasses.fields(TrainerState)}
    if version != _VERSION or not known >= content.keys():
        what = f"format {shown(version)}" if version != _VERSION else f"with {shown(min(content.keys() - known))}"
        raise RunFolderError(
            f"{folder} was written by another version of this package ({what}). Use that one, or {_BEGIN_ANEW}."
        )
    return TrainerState(**content)


def _what_is_wrong(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{Path(error.filename).name} is missing"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"{STATE_FILE} is no JSON"
    return one_line(error)


def _checksum(path: Path) -> str:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}-{path.stat().st_size}"


__all__ = [
    "Checkpoint",
    "Checkpoints",
    "TrainerState",
    "agree",
    "begins_anew",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "set_aside",
    "whole_copies",
]
