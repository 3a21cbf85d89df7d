"""Files and folders that are there completely or not at all, whenever the process is killed."""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from .messages import warn_once

# What a disk answers that does not know an operation: no reason to end a job that can do without it.
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
_NOT_ALLOWED = {errno.EPERM, errno.EACCES, errno.EROFS}
# Folders of some disks are no files that one could open or wait for.
_NO_FOLDERS = {errno.EBADF, errno.EISDIR}
_TORCH_WRITER = "inline_container.cc"
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_LONGEST_STEM = 60
_LONGEST_NAME = 200  # bytes; file systems take 255 with what is put around it
_SUFFIX = ".partial"
_PICTURES = (".png", ".pdf", ".svg", ".eps", ".jpg", ".jpeg", ".tif", ".tiff", ".webp")


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[Path]:
    """The path of a new file to write, in `path`'s folder (made if need be) and with its suffix.

    When the block ends well the file is synced and takes the name `path`; when it does not, nothing is left of it.
    An `OSError` from here names the file.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary(path) as partial:
            try:
                yield partial
                publish(partial)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)


def nearest_existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.exists(place))


def check_place(path: Path, *, folder: bool = False) -> Path:
    """The path of a file to write, or of a `folder` to write into.

    Raises `ValueError` where the other of the two is there, or no folder can be made for it, or nothing written.
    """
    there = nearest_existing(path)
    if there.is_dir() != (folder or there != path.absolute()):
        raise ValueError(f"{path} cannot be written: {there} is {'a' if there.is_dir() else 'no'} folder.")
    if not os.access(there if there.is_dir() else there.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: nothing may be written there.")
    return path


def check_picture(path: Path) -> Path:
    """The path of a picture. Raises `ValueError` where its suffix does not say in which format."""
    if path.suffix.lower() not in _PICTURES:
        raise ValueError(f"{path}: a picture ends in .png, .pdf or .svg.")
    return path


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A hidden file beside `path`, of the same name each time: what a killed process left there is written over.

    While a living process writes under that name, it is one that nobody else has.
    """
    # A name as long as `path`'s and more may be longer than disks allow.
    stem = os.fsdecode(os.fsencode(path.stem)[:_LONGEST_STEM])
    partial = path.with_name(f".{stem}{_SUFFIX}{path.suffix}")
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had the lock may have renamed the file since.
            ours = partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())
        except BlockingIOError:
            ours = False
        except OSError:  # no locks here: nobody writes under this name
            ours = False
            partial.unlink(missing_ok=True)
        yield partial if ours else path.with_name(f".{stem}.{secrets.token_hex(4)}{_SUFFIX}{path.suffix}")
    finally:
        os.close(descriptor)


@contextmanager
def replaced_folder(folder: str | os.PathLike, *, new: bool = False) -> Iterator[Path]:
    """A new folder to write into that takes the name `folder` when it is complete and synced, or never does.

    Of a block that fails nothing is left, nor of folders above `folder` that were made for it. `new`: a folder of that
    name with something in it is left as it is. An `OSError` from here names the folder.
    """
    folder = Path(folder).absolute()
    old = folder.with_name(f".{folder.name[:_LONGEST_STEM]}.old")
    with naming(folder), new_parents(folder), unfinished(folder, folder=True) as partial:
        yield partial
        publish(partial)
        if folder.exists():
            if new:
                folder.rmdir()
            else:
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_parents(path: Path) -> Iterator[None]:
    """Makes the folders above a path; where the block fails, those that it made go again, if they are empty."""
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise


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
        if lock is not None:
            os.close(lock)


def remove_abandoned(target: Path) -> None:
    """Remove what killed processes left `unfinished` of `target`, and nothing that a living one is writing."""
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


def publish(path: Path) -> None:
    """Give a file, or a folder with all that is in it, the permissions of any new one, and wait until it is on disk."""
    for entry in (*path.rglob("*"), path) if path.is_dir() else (path,):
        make_public(entry)
        sync(entry)


def _prefix(target: Path) -> str:
    name = os.fsencode(target.name)
    return f".{target.name if len(name) <= _LONGEST_NAME else hashlib.sha256(name).hexdigest()[:32]}."


def _new_locked(target: Path, folder: bool) -> tuple[Path, int | None]:
    """A new path and the descriptor that holds its lock. Where there are no locks, nobody will remove it for us."""
    while True:
        path = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}{_SUFFIX}")
        try:
            path.mkdir() if folder else path.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            lock = os.open(path, os.O_RDONLY)
        except OSError:
            return path, None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            theirs = not (path.exists() and os.path.samestat(os.fstat(lock), path.stat()))
        except OSError as error:
            theirs = isinstance(error, BlockingIOError)
        if not theirs:
            return path, lock
        os.close(lock)  # another process that tidies up has come between the two, and removes it


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """What goes wrong inside with a file that has no name yet (on a full disk) is an `OSError` that names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or ".partial" in str(error.filename)):
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise
    except SafetensorError as error:  # the disk's errors are of safetensors' own kind there
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), os.fspath(path)) from error
    except RuntimeError as error:  # PyTorch's writer counts what is missing, and hides why
        if _TORCH_WRITER not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path)) from error


def is_writing(folder: str | os.PathLike) -> bool:
    """Whether a `replaced_folder` in this folder is being written, by any process (or was, by one that was killed)."""
    return any(Path(folder).glob(".*.partial"))


def write_text(path: str | os.PathLike, text: str) -> None:
    """A text file that is there completely or not at all."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_bytes(path: str | os.PathLike, content: bytes | memoryview) -> None:
    """A file that is there completely or not at all."""
    with replaced_file(path) as partial:
        partial.write_bytes(content)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk. A disk that cannot say is warned about once."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _UNKNOWN | _NOT_ALLOWED | _NO_FOLDERS and path.is_dir():
            return
        raise
    try:
        sync_open(descriptor, path)
    finally:
        os.close(descriptor)


def sync_open(descriptor: int, path: Path) -> None:
    """As `sync`, of a file that is open."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (_UNKNOWN | _NO_FOLDERS if path.is_dir() else _UNKNOWN):
            raise
        _warn("fsync", path, error, "what was written last may be lost if the machine fails")


def make_public(path: Path) -> None:
    """The permissions of any new file. safetensors, for one, writes files that only their owner can read.

    A disk that does not know them, or does not let them be changed, is warned about once.
    """
    umask = os.umask(0)
    os.umask(umask)
    status = path.stat()
    mode = (0o777 if path.is_dir() else 0o666) & ~umask
    if status.st_mode & 0o777 == mode:
        return
    try:
        path.chmod(mode)
    except OSError as error:
        if error.errno not in _UNKNOWN | _NOT_ALLOWED:
            raise
        _warn("chmod", path, error, "others may not be able to read what is written there")


def _warn(operation: str, path: Path, error: OSError, consequence: str) -> None:
    warn_once(operation, f"The disk of {path.parent} does not take {operation} ({error.strerror}): {consequence}.")


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = [
    "check_picture",
    "check_place",
    "file_hash",
    "is_writing",
    "make_public",
    "naming",
    "nearest_existing",
    "new_parents",
    "publish",
    "remove_abandoned",
    "replaced_file",
    "replaced_folder",
    "sync",
    "sync_open",
    "unfinished",
    "write_bytes",
    "write_text",
]
