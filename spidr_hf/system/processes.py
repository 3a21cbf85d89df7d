"""Processes: those of a launch, the lock on a folder, and who dies with whom."""

import atexit
import ctypes
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .errors import RunFolderError
from .messages import warn_once

_PR_SET_PDEATHSIG = 1
Result = TypeVar("Result")


class RunLock:
    """Keeps a second run out of a folder. Held until `release`, or until the process ends, however it ends.

    Of a folder in which nothing was done, what was made for the lock goes again, the folder included.

    Raises `RunFolderError` when another run holds it for longer than `patience` seconds (one that was just told to stop
    may still be saving). `name` is that of the file; runs with locks of other names may share the folder.
    """

    def __init__(self, folder: str | Path, patience: float = 10.0, *, name: str = ".lock"):
        self.path = Path(folder) / name
        self._file = self._opened()
        deadline = time.monotonic() + patience
        while not (lock(self._file) and self._is_there()):
            if time.monotonic() > deadline:
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise RunFolderError(
                    f"{folder} is in use by another run ({holder}). Stop it first, or choose another folder."
                )
            time.sleep(0.1)
            self._file.close()
            self._file = self._opened()
        atexit.register(self.release)
        with suppress(OSError):  # who holds it is a courtesy; a full disk is for those to tell who need it
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()

    def release(self) -> None:
        """Let the next run in."""
        atexit.unregister(self.release)
        if self._file.closed:
            return
        with suppress(OSError):
            if self._made and list(self.path.parent.iterdir()) == [self.path]:
                self.path.unlink()
                for folder in self._made[1:]:
                    folder.rmdir()
        with suppress(OSError):  # of a disk that was full, again
            self._file.close()

    def _opened(self) -> IO[str]:
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open(self.path, "a+")

    def _is_there(self) -> bool:
        """Whether the file is the one that others find: who let go last may have removed it."""
        return self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())


def lock(file: IO[Any], *, wait: bool = False) -> bool:
    """Lock an open file until it is closed. False: another process has it, and this one does not `wait`.

    It is a POSIX record lock: children do not inherit it, and network file systems know it. Those that do not are
    warned about once, and the answer is True.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        folder = Path(file.name).parent
        warn_once(
            "lock", f"The disk of {folder} knows no locks ({error.strerror}): see to it that no two runs write there."
        )
    return True


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

    A process that was started by hand continues without its shell, as always.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        die_with_parent(signal.SIGTERM)


def kill_workers_at_exit() -> None:
    """When this process ends, by an error too, the processes that decode audio for it are killed.

    They ignore SIGTERM, since the whole job may be sent it; Python would send it to them and wait for them forever.
    Who starts such processes calls this, once or more often.
    """
    atexit.unregister(kill_workers)
    atexit.register(kill_workers)


def kill_workers() -> None:
    """Kill the processes that decode audio for this one, so that no one waits for what they are at."""
    for worker in multiprocessing.active_children():
        worker.kill()


def contact_lost(error: RuntimeError) -> str | None:
    """What to tell the user where an error means that another process is gone; None for any other error."""
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and "gloo/transport" not in text:
        return None
    return (
        f"contact with the other processes is lost ({text[:300]}). Their output, or that of their machines, says why. "
        "The same command resumes from the newest checkpoint."
    )


def gather_all(values: Sequence[Any]) -> list[Any]:
    """The items of all processes' lists, on every process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return list(values)
    gathered: list[Sequence[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, list(values))
    return [value for part in gathered for value in part]


def from_first(make: Callable[[], Result]) -> Result:
    """What the first process makes, on every process. Each calls it; an error of the first one is raised on all."""
    made: list[Result | Exception] = []
    if not PartialState().process_index:
        try:
            made = [make()]
        except (OSError, RuntimeError, ValueError) as error:
            made = [error]
    (result,) = gather_all(made)
    if isinstance(result, Exception):
        raise result
    return result


def start_processes() -> PartialState:
    """The processes of `accelerate launch`, or this one alone. They wait for each other for as long as it takes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState()
    # Without being told, PartialState would start several lone processes on a machine without a GPU.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one, this process's. Raises `ValueError` for what is none, or not here."""
    if name is None:
        return PartialState().device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device: cpu, cuda or cuda:1, for example.") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own
        no_gpu = device.type == "cuda" and not torch.cuda.is_available()
        reason = "there is no CUDA GPU" if no_gpu else str(error).splitlines()[0]
        raise ValueError(f"The device {name!r} cannot be used here: {reason}.") from error
    return device


__all__ = [
    "RunLock",
    "contact_lost",
    "device_of",
    "die_with_launcher",
    "die_with_parent",
    "gather_all",
    "kill_workers",
    "kill_workers_at_exit",
    "lock",
    "start_processes",
]
