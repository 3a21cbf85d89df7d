"""What a process has once and needs again a moment later: memory, and products made ready."""

import ctypes
import os
import sys
from contextlib import suppress

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_PRIMITIVES = 8192
_BYTES_OF_A_PRIMITIVE = 700_000  # with its code and scratch, for AMX and AVX-512; the heap that it scatters included
_LARGEST_MMAP_THRESHOLD = 32 << 20  # of glibc on 64-bit machines


def prepare_training_process() -> None:
    """Both of what follows; to be called before the first tensor is made."""
    keep_freed_memory()
    keep_primitives()


def keep_freed_memory() -> bool:
    """Lets glibc keep freed blocks of up to 32 MiB for the next allocation; returns whether it does.

    Otherwise it hands large blocks back to the system, and every batch on a CPU has the pages of its activations and
    gradients made and zeroed anew. The process then does not shrink.
    Other C libraries are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
    return all([mallopt(option, value) for option, value in settings])


def keep_primitives() -> None:
    """Lets oneDNN keep more of the operations that it has compiled, if it has not compiled any yet.

    Each is for one shape of its inputs. Batches of many lengths make more of them than the 1 024 that oneDNN keeps by
    itself, and it then compiles in every step, which scatters the heap besides. All of them together get an eighth of
    this process's share of the machine's memory. A number that the environment already has stays.
    """
    room = memory_of_machine() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // 8
    number = min(max(room // _BYTES_OF_A_PRIMITIVE, 1024), _PRIMITIVES)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(number))


def memory_of_machine() -> int:
    """Bytes of memory, of the container where it has a limit of its own."""
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError), open(limit, encoding="ascii") as file:  # "max" is no number
            sizes.append(int(file.read()))
    return min(sizes)


__all__ = ["keep_freed_memory", "keep_primitives", "memory_of_machine", "prepare_training_process"]
