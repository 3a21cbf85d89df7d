"""What a process has once and needs again a moment later: memory, and products made ready."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_PRIMITIVES = 8192
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

    Each is for one shape of its inputs. Batches of many lengths make more of them than the 1 024
    that oneDNN keeps by itself, and it then compiles in every step, which scatters the heap besides. A number that the
    environment already has stays.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_PRIMITIVES))


__all__ = ["keep_freed_memory", "keep_primitives", "prepare_training_process"]
