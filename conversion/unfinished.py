"""What is being written: files and folders under temporary names, which vanish with the process that writes them.

A process that is killed cannot tidy up; the next one for the same target does, and leaves what a living one holds.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spidr_hf.system.files import sync
from spidr_hf.system.messages import one_line, shown

from .errors import ConversionError

_SUFFIX = ".partial"
_LONGEST_NAME = 200  # bytes; file systems take 255 with what is put around it


@contextmanager
def unfinished(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `target` (whose parent exists), removed at the end unless it has been renamed.

    Until then a lock tells other processes that somebody is writing it; what processes that are gone have left of the
    same target is removed first.
    """
    remove_abandoned(target)
    path, lock = _new_locked(target, folder)
    try:
        yield path
    finally:
        _remove(path)
        os.close(lock)


def remove_abandoned(target: Path) -> None:
    """Removes what processes that were killed left of `target`, and nothing that a living one is writing."""
    ours = re.compile(re.escape(_prefix(target)) + "[a-z0-9_]+" + re.escape(_SUFFIX))
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        if not ours.fullmatch(path.name) or path.is_symlink():
            continue
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        except OSError:
            pass  # a living process has it, or this file system knows no locks and nobody can tell
        finally:
            os.close(lock)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns what goes wrong while `target` is written, a full disk above all, into one line that names it.

    Raises:
        ConversionError: in place of `OSError` and the errors that safetensors and PyTorch make of it.
    """
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{shown(target)} cannot be written: {error.strerror or error}.") from None
    except (SafetensorError, RuntimeError) as error:
        space = os.strerror(errno.ENOSPC)
        full = " (is the disk full?)" if space not in str(error) else ""
        raise ConversionError(f"{shown(target)} cannot be written{full}: {one_line(error, 200)}") from None


def publish(path: Path) -> None:
    """Gives a temporary file or folder the permissions of any new one, and waits until it is on the disk."""
    umask = os.umask(0)
    os.umask(umask)
    for entry in (*path.rglob("*"), path) if path.is_dir() else (path,):
        entry.chmod((0o777 if entry.is_dir() else 0o666) & ~umask)
        sync(entry)


def _prefix(target: Path) -> str:
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()[:32]}."


def _new_locked(target: Path, folder: bool) -> tuple[Path, int]:
    """A new path and the descriptor that holds its lock."""
    prefix, parent = _prefix(target), target.parent
    while True:
        if folder:
            path = Path(tempfile.mkdtemp(_SUFFIX, prefix, parent))
        else:
            handle, name = tempfile.mkstemp(_SUFFIX, prefix, parent)
            os.close(handle)
            path = Path(name)
        lock = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass
        except OSError:
            return path, lock  # no locks here: nobody will remove it, neither now nor later
        # Another process that tidies up may have come between the two.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return path, lock
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


__all__ = ["publish", "remove_abandoned", "unfinished", "writing"]
