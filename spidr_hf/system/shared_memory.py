"""Shared memory, in which worker processes hand over what they make: how much there is, and what happens without."""

import os
import re
from pathlib import Path

from .errors import ConfigError
from .processes import gather_all

_PLACE = Path("/dev/shm")
# What torch says where it found no room; and in the process whose worker the system killed.
_NO_ROOM = re.compile(r"shared memory|/torch_\d+|Bus error|No space left on device")
_LOST = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (is killed by signal: (.*?)\.|exited unexpectedly)")
_ADVICE = (
    "give the container more (docker run --shm-size=2g, or --ipc=host), or lower num_workers or prefetch_factor "
    "(num_workers 0 needs none)"
)


class WorkerError(RuntimeError):
    """A process that prepares batches ended, or cannot hand them over; the message is one line that says what to do."""


def free_shared_memory() -> int | None:
    """Bytes that processes of this machine can still share; None where it has no such limit."""
    try:
        found = os.statvfs(_PLACE)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def local_processes() -> int:
    """Training processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shared_bytes(num_workers: int, prefetch_factor: int, batch_bytes: int, processes: int = 1) -> int:
    """Shared memory that batches take at most: of every process those of its workers, and the one that it works on."""
    return processes * (num_workers * prefetch_factor + 1) * batch_bytes if num_workers else 0


def shortage(needed: int) -> str | None:
    """What to tell the user where so many bytes are not free; else None."""
    free = free_shared_memory()
    if free is None or needed <= free:
        return None
    return f"batches on their way take {_mb(needed)} of shared memory, {_PLACE} has {_mb(free)} free: {_ADVICE}."


def check_shared_memory(needed: int) -> None:
    """Raises `ConfigError` where so many bytes (of all processes of a machine) are not free. All processes call it."""
    # One looks, before any of them takes some.
    found = shortage(needed) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None
    if problems := [problem for problem in gather_all([found]) if problem]:
        raise ConfigError(problems[0])


def no_room(error: BaseException) -> str | None:
    """What to tell the user where a batch found no room in shared memory; None for any other error."""
    if _NO_ROOM.search(str(error)) is None:
        return None
    free = free_shared_memory()
    left = "" if free is None else f" ({_PLACE} has {_mb(free)} free)"
    return f"there is no room for a batch in shared memory{left}: {_ADVICE}."


def worker_lost(error: RuntimeError) -> str | None:
    """What to tell the user where an error means that a worker process is gone; None for any other error."""
    if isinstance(error, WorkerError):
        return str(error)
    found = _LOST.search(str(error))
    if found is None:
        return None
    if found[3] == "Bus error":
        return no_room(error)
    how = f"was killed ({found[3]})" if found[3] else "ended"
    return (
        f"a process that prepares batches {how}, most likely by the system, which was out of memory: lower num_workers "
        "or prefetch_factor, or give the job more memory. The same command then resumes from the newest checkpoint."
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


__all__ = [
    "WorkerError",
    "check_shared_memory",
    "free_shared_memory",
    "local_processes",
    "no_room",
    "shared_bytes",
    "shortage",
    "worker_lost",
]
