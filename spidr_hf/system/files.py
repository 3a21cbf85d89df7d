"""Files and folders that are there completely or not at all, whenever the process is killed."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: str | os.PathLike) -> Iterator[Path]:
    """The path of a new file to write, in `path`'s folder (made if need be) and with its suffix.

    When the block ends well the file is synced and takes the name `path`; when it does not, nothing is left of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        _make_public(partial)
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """A new folder to write into that takes the name `folder` when it is complete and synced, or never does."""
    folder = Path(folder)
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _make_public(path)
            sync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_writing(folder: str | os.PathLike) -> bool:
    """Whether a `replaced_folder` in this folder is being written, by any process (or was, by one that was killed)."""
    return any(Path(folder).glob(".*.partial"))


def write_text(path: str | os.PathLike, text: str) -> None:
    """A text file that is there completely or not at all."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_public(path: Path) -> None:
    """The permissions of any new file. safetensors, for one, writes files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


__all__ = ["file_hash", "is_writing", "replaced_file", "replaced_folder", "sync", "write_text"]
