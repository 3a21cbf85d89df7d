"""Reads configuration files (JSON, TOML) that somebody else wrote: bounded in size, finite numbers, errors in one line.

Also tells the pointers that Git LFS leaves in place of large files, for every kind of file that is read here.
"""

import os
from pathlib import Path
from typing import Any

from spidr_hf.system import tables
from spidr_hf.system.messages import shown

from .errors import ConversionError

_LARGEST = {".json": 8 << 20, ".toml": 1 << 20}
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: str | os.PathLike) -> None:
    """Refuses the few lines that a clone without Git LFS has in place of a large file.

    Raises:
        ConversionError: `path` is such a pointer. `OSError` where it cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ConversionError(
                f"{shown(path)} is a Git LFS pointer, not the file itself. Fetch it: run `git lfs pull` in the clone "
                "that it lies in (after `git lfs install`), or download the file from the repository's page."
            )


def read_table(path: str | os.PathLike) -> dict[str, Any]:
    """A configuration file (TOML if it ends so, else JSON) as a dict.

    Raises:
        ConversionError: it cannot be read, is too large or no valid file of its kind, or holds no table of fields.
    """
    path = Path(path)
    kind = ".toml" if path.suffix == ".toml" else ".json"
    try:
        refuse_lfs_pointer(path)
        with path.open("rb") as file:
            data = file.read(_LARGEST[kind] + 1)
    except OSError as error:
        raise ConversionError(f"The configuration {shown(path)} cannot be read: {error.strerror}.") from None
    return parse_table(data, f"The configuration {shown(path)}", kind)


def parse_table(data: bytes, what: str, kind: str = ".json") -> dict[str, Any]:
    """The table of fields in the bytes of a configuration file.

    Args:
        what: the file, as messages call it.
        kind: ".json" or ".toml".

    Raises:
        ConversionError: as `read_table`.
    """
    if len(data) > _LARGEST[kind]:
        raise ConversionError(f"{what} is larger than {_LARGEST[kind] >> 20} MiB: no configuration is.")
    try:
        return tables.parse_table(data, what, kind)
    except ValueError as error:
        raise ConversionError(str(error)) from None


__all__ = ["parse_table", "read_table", "refuse_lfs_pointer"]
