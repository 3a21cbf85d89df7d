"""What lets a run be killed at any moment and go on: checkpoints, the lock on its folder, signals.

A checkpoint is a folder `checkpoints/step_N` with the model (loadable by `from_pretrained`), the optimizer, and
`trainer_state.json`, which also holds a checksum of every file. It is written under another name, synced, and renamed,
so that a folder of that name is always complete; one damaged later is recognised by its checksums and passed over.
"""

import _thread
import atexit
import ctypes
import dataclasses
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..system.files import is_writing, replaced_folder
from .sharding import is_sharded, shard_like, whole_tensor
from .transfers import HostCopy

logger = logging.getLogger(__name__)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"
# How long a signalled process may take to stop before it is ended, and how much longer where files are being written
# all that time: what they come to, a disk does not say before they are there.
_GRACE_SECONDS = 120
_WRITING_SECONDS = 1800
_LOOK_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


class RunFolderError(RuntimeError):
    """A run folder that cannot be used or written to; the message says why."""


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
        stream: where streamed audio stands (`feeds.StreamFeed`).
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
        folder: made when the first one is written.
        keep_latest: how many to keep; -1: all.
        writes: only one process may; the others of a sharded model take part in `save` with what they hold.

    Writing happens in a thread while training goes on; its errors come out of `wait`.
    """

    def __init__(self, folder: str | Path, keep_latest: int = -1, writes: bool = True):
        self.folder = Path(folder)
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
        """The newest undamaged checkpoint; damaged ones are named in a warning."""
        for step in reversed(self.steps()):
            folder = self.folder / f"step_{step}"
            try:
                return Checkpoint(folder, _read_state(folder))
            except (OSError, ValueError, TypeError, KeyError) as error:
                logger.warning("%s is damaged (%s) and is passed over.", folder, error)
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
                "removed, the same command goes on from the newest complete one."
            ) from error

    def remove_partial(self) -> None:
        """Remove what a killed process left half-written."""
        for path in self.folder.glob(".step_*"):
            shutil.rmtree(path, ignore_errors=True)

    def _write(self, state: TrainerState, tensors: dict[str, dict[str, Tensor]], config: str | None) -> None:
        folder = self.folder / f"step_{state.step}"
        with replaced_folder(folder) as partial:
            for name, values in tensors.items():
                save_file(values, partial / name, metadata={"format": "pt"})
            if config is not None:
                (partial / "config.json").write_text(config, encoding="utf-8")
            files = {path.name: _checksum(path) for path in sorted(partial.iterdir())}
            content = {"version": 1, **dataclasses.asdict(state), "files": files}
            (partial / STATE_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
        if self.on_written is not None:
            self.on_written(folder)
        if self.keep_latest > 0:
            for step in self.steps()[: -self.keep_latest]:
                if step != state.step:
                    shutil.rmtree(self.folder / f"step_{step}", ignore_errors=True)


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


class RunLock:
    """Keeps a second run out of a folder. Held until `release`, or until the process ends, however it ends.

    Raises `RunFolderError` when another run holds it for longer than `patience` seconds (one that was just told to stop
    may still be saving).
    """

    def __init__(self, folder: str | Path, patience: float = 10.0):
        self.path = Path(folder) / ".lock"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A POSIX record lock: children do not inherit it, and network file systems know it.
        self._file = open(self.path, "a+")  # noqa: SIM115 (open as long as the lock is held)
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    holder = self._file.read().strip() or "another process"
                    self._file.close()
                    raise RunFolderError(
                        f"{folder} is in use by another run ({holder}). Stop it first, or choose another --output-dir."
                    ) from error
                time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let the next run in."""
        self._file.close()


class StopSignal:
    """SIGTERM and SIGUSR1 (what SLURM sends before a time limit) ask the run to save and stop.

    `agreed` tells every process at the same update, so that they stop together. A process that does not get there is
    ended after two minutes, but not while a folder is written, by itself or by the process that all wait for: a slow
    disk has half an hour.

    Args:
        device: where processes exchange messages.
        folders: where `replaced_folder` writes; shared by all processes.
    """

    def __init__(self, device: torch.device | str = "cpu", folders: Sequence[str | Path] = ()):
        self.received: str | None = None
        self._device = device
        self._folders = [Path(folder) for folder in folders]
        self._pending: tuple[Any, HostCopy | Tensor] | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def agreed(self) -> bool:
        """Whether to stop now: whether any process had been asked to when this was called the last time.

        One update late, so that no update waits for an answer. Every process must call it once per update.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.received is not None
        stop = False
        if self._pending is not None:
            work, answer = self._pending
            work.wait()
            stop = bool(answer.tolist()[0])
        flag = torch.full((1,), float(self.received is not None), device=self._device)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        if flag.is_cuda:
            work.wait()  # the GPU does, and then copies; Python asks for the copy next time
        self._pending = (work, HostCopy(flag) if flag.is_cuda else flag)
        return stop

    def finish(self) -> None:
        """Leave no question open: processes must not part while one is under way."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _handle(self, number: int, _: Any) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
            # If the others are gone, nothing in this process may ever return, Python's signal handlers included:
            # SIGALRM, which has none, then ends it.
            signal.alarm(_GRACE_SECONDS)
            if self._folders:
                # Not a `threading.Thread`, which takes locks: this handler may have interrupted one who holds them.
                _thread.start_new_thread(self._put_off, ())

    def _put_off(self) -> None:
        """Put the end off for as long as something is written."""
        limit = time.monotonic() + _WRITING_SECONDS
        while time.monotonic() < limit:
            time.sleep(_LOOK_SECONDS)
            if any(is_writing(folder) for folder in self._folders) and signal.alarm(_GRACE_SECONDS) == 0:
                signal.alarm(0)  # there was none any more: it was called off
                return


def die_with_parent(number: int) -> None:
    """Have this process sent a signal when its parent dies (Linux; elsewhere nothing happens)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), number)


def die_with_launcher() -> None:
    """When `accelerate launch` or `torchrun` dies, its processes get SIGTERM: they save and stop.

    A process that was started by hand goes on without its shell, as always.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        die_with_parent(signal.SIGTERM)


def kill_workers_at_exit() -> None:
    """When this process ends, by an error too, the processes that decode audio for it are killed.

    They ignore SIGTERM, since the whole job may be sent it; Python would send it to them and wait for them forever.
    """

    def kill() -> None:
        for worker in multiprocessing.active_children():
            worker.kill()

    atexit.register(kill)


def contact_lost(error: RuntimeError) -> str | None:
    """What to tell the user where an error means that another process is gone; None for any other error."""
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and "gloo/transport" not in text:
        return None
    return (
        f"contact with the other processes is lost ({text[:300]}). Their output, or that of their machines, says why. "
        "The same command goes on from the newest checkpoint."
    )


def _read_state(folder: Path) -> TrainerState:
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    for name, expected in content.pop("files").items():
        if _checksum(folder / name) != expected:
            raise ValueError(f"{name} does not have the checksum it was written with")
    content.pop("version")
    return TrainerState(**content)


def _checksum(path: Path) -> str:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}-{path.stat().st_size}"


__all__ = [
    "Checkpoint",
    "Checkpoints",
    "RunFolderError",
    "RunLock",
    "StopSignal",
    "TrainerState",
    "contact_lost",
    "die_with_launcher",
    "die_with_parent",
    "kill_workers_at_exit",
    "load_optimizer_tensors",
    "optimizer_tensors",
    "whole_copies",
]
