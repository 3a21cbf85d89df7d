"""Memory that a training process frees and needs again a moment later."""

import ctypes
import sys

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST_MMAP_THRESHOLD = 32 << 20  # of glibc on 64-bit machines


def keep_freed_memory() -> bool:
    """Lets glibc keep freed blocks of up to 32 MiB for the next allocation; returns whether it does.

    Otherwise it hands large blocks back to the system, and every training step on a CPU has the gradients' and
    activations' pages made and zeroed anew, which can take a fifth of its time. The process then does not shrink.
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


__all__ = ["keep_freed_memory"]
