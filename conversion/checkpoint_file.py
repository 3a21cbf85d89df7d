"""Opens the files that `torch.save` writes (zip archives, or the format before PyTorch 1.6) in bounded time and memory.

Tensors whose bytes lie in the file as they are become windows into it, so that a checkpoint's optimizer costs nothing.
What is compressed is read and checked; `Checkpoint.check` holds the windows against the checksums in the file.
"""

import io
import mmap
import os
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spidr_hf.system.messages import one_line, shown

from .errors import ConversionError, UnsafeCheckpointError
from .safe_pickle import LARGEST_PICKLE, PickleReader, StandIn, Storage, storage_description
from .text_files import refuse_lfs_pointer

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_BLOCK = 1 << 20
_LARGEST_DIRECTORY = 4 << 20  # of a zip archive: 40 000 tensors
_LARGEST_NOTE = 1000
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ALIGNMENT = 16  # the largest item: complex128


def most_expanded(size: int) -> int:
    """Bytes that `size` bytes of a file may stand for: compressed, of half precision, or shared between tensors."""
    return 16 * size + (64 << 20)


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Archive:
    """A zip archive of `torch.save`."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        try:
            size = os.fstat(self.file.fileno()).st_size
            end = zipfile._EndRecData(self.file)  # type: ignore[attr-defined]
            if not end or end[5] > _LARGEST_DIRECTORY:
                raise ConversionError("it lists more files than any checkpoint")
            self.zip = zipfile.ZipFile(self.file)
            self.entries = {entry.filename: entry for entry in self.zip.infolist()}
            if sum(entry.file_size for entry in self.zip.infolist()) > most_expanded(size):
                raise ConversionError(f"its {size} bytes would become far more when unpacked than any checkpoint's")
            if not any(entry.CRC for entry in self.entries.values()):  # `torch.serialization.set_crc32_options(False)`
                for entry in self.entries.values():
                    entry.CRC = None  # type: ignore[assignment]
            self.root = self._find_root()
        except BaseException:
            self.file.close()
            raise
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.storages: dict[str, Storage] = {}
        # Address of what is read without being unpacked -> its entry and where in the file it begins.
        self.windows: dict[int, tuple[zipfile.ZipInfo, int]] = {}

    def _find_root(self) -> str:
        pickles = [name for name in self.entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ConversionError("a zip archive, but not one that torch.save wrote")
        root = pickles[0].partition("/")[0]
        if any(name.startswith(f"{root}/code/") for name in self.entries):
            raise ConversionError("a TorchScript program, not a checkpoint; save the model's state_dict() instead")
        order = self.entries.get(f"{root}/byteorder")
        if order is not None:
            said = self.zip.read(order).decode() if order.file_size < _LARGEST_NOTE else "unknown"
            if said != sys.byteorder:
                raise ConversionError(f"written on a {shown(said)}-endian machine; save it again on one like this")
        return root

    def load(self) -> Any:
        with self.zip.open(f"{self.root}/data.pkl") as file:
            return PickleReader(io.BytesIO(file.read(LARGEST_PICKLE + 1)), self._storage).load()

    def _storage(self, pid: Any) -> Storage:
        dtype, key, numel = storage_description(pid, 5)
        if key not in self.storages:
            entry = self.entries.get(f"{self.root}/data/{key}")
            if entry is None or entry.file_size != numel * dtype.itemsize:
                raise ConversionError(f"the data of storage {shown(key)} is missing or cut off")
            self.storages[key] = Storage(dtype, self._bytes(entry))
        return self.storages[key]

    def _bytes(self, entry: zipfile.ZipInfo) -> torch.UntypedStorage:
        if not entry.file_size:
            return torch.UntypedStorage(0)
        start = self._data_start(entry)
        if start is not None and start % _ALIGNMENT == 0:
            window = torch.frombuffer(self.map, dtype=torch.uint8, offset=start, count=entry.file_size)
            self.windows[window.data_ptr()] = entry, start
            return window.untyped_storage()
        return torch.frombuffer(bytearray(self.zip.read(entry)), dtype=torch.uint8).untyped_storage()

    def _data_start(self, entry: zipfile.ZipInfo) -> int | None:
        """Where in the file an entry's bytes begin; None where they do not lie there as they are."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            return None
        self.file.seek(entry.header_offset)
        signature, name, extra = _LOCAL_HEADER.unpack(self.file.read(_LOCAL_HEADER.size))
        start = entry.header_offset + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or start + entry.file_size > len(self.map):
            raise ConversionError(f"the data of {shown(entry.filename)} is missing or cut off")
        return start

    def check(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Compares windows with their checksums; without any, with the bytes that the archive's own reader finds."""
        for storage in storages:
            if storage.data_ptr() not in self.windows:
                continue
            entry, start = self.windows[storage.data_ptr()]
            with memoryview(self.map)[start : start + entry.file_size] as window:
                same = self._reads(entry, window) if entry.CRC is None else zlib.crc32(window) == entry.CRC
            if not same:
                raise ConversionError(f"{shown(entry.filename)} does not have its checksum: the file is damaged")

    def _reads(self, entry: zipfile.ZipInfo, window: memoryview) -> bool:
        start = 0
        with self.zip.open(entry) as file:
            while block := file.read(_BLOCK):
                if window[start : start + len(block)] != block:
                    return False
                start += len(block)
        return start == len(window)

    def close(self) -> None:
        self.zip.close()
        self.file.close()  # the map stays for as long as there are tensors in it


class _LegacyFile:
    """The format of PyTorch before 1.6: header pickles, the object, then the storages in a row."""

    def __init__(self, path: Path):
        self.file = path.open("rb")
        self.left = os.fstat(self.file.fileno()).st_size
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        if self.file.read(2) == b"PK":
            raise EOFError("the end of the archive is missing")
        self.file.seek(0)
        reader = PickleReader(self.file, self._storage)
        if reader.load() != _LEGACY_MAGIC:
            raise ConversionError("a pickle, but not one that torch.save wrote")
        reader.load()  # protocol version
        reader.load()  # byte order and type sizes of the machine that wrote it
        result = reader.load()
        keys = reader.load()
        for key in keys:
            storage = self.storages.get(key)
            header = self.file.read(8)
            length = storage.untyped.nbytes() if storage else 0
            if storage is None or header != struct.pack("<q", length // storage.dtype.itemsize):
                raise ConversionError("the tensor data does not fit its description")
            if length and self.file.readinto(_as_bytes(storage.untyped).numpy()) != length:  # type: ignore[arg-type]
                raise ConversionError("the file is cut off")
        if set(keys) != set(self.storages):
            raise ConversionError("the file lacks the data of some of its tensors")
        return result

    def _storage(self, pid: Any) -> Storage:
        dtype, key, numel = storage_description(pid, 6)
        if pid[5] is not None:
            raise ConversionError("written by a PyTorch older than 0.4; load and save it with a newer one first")
        if key not in self.storages:
            self.left -= numel * dtype.itemsize
            if self.left < 0:
                raise ConversionError(f"the data of storage {shown(key)} is cut off")
            self.storages[key] = Storage(dtype, torch.UntypedStorage(numel * dtype.itemsize))
        return self.storages[key]

    def check(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Everything was read already."""

    def close(self) -> None:
        self.file.close()


class Checkpoint:
    """An open checkpoint file; `content` is the object stored in it."""

    def __init__(self, path: Path, file: _Archive | _LegacyFile):
        self._path = path
        self._file = file
        with _in_one_line(path):
            self.content = file.load()

    def check(self, tensors: Iterable[Tensor]) -> None:
        """Holds the tensors' bytes against what the file says about them in another place.

        Raises:
            ConversionError: they are not what was written.
        """
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        with _in_one_line(self._path):
            self._file.check(storages.values())


@contextmanager
def open_checkpoint(path: str | os.PathLike) -> Iterator[Checkpoint]:
    """A file of `torch.save`, open; its tensors are on the CPU and can be kept.

    Nothing in the file is executed. Objects of unknown classes are `StandIn`s.

    Raises:
        UnsafeCheckpointError: the file asks to call a function.
        ConversionError: the file is missing, damaged, something else, or larger inside than any checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{shown(path)} is not a file.")
    try:
        refuse_lfs_pointer(path)
    except OSError as error:
        raise ConversionError(f"{shown(path)} cannot be read: {error.strerror}.") from None
    with _in_one_line(path):
        file = _Archive(path) if zipfile.is_zipfile(path) else _LegacyFile(path)
    try:
        yield Checkpoint(path, file)
    finally:
        file.close()


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The object stored in a file of `torch.save`; see `open_checkpoint`."""
    with open_checkpoint(path) as checkpoint:
        return checkpoint.content


@contextmanager
def _in_one_line(path: Path) -> Iterator[None]:
    """Turns what goes wrong in a file into a `ConversionError` that names it."""
    name = shown(path)
    try:
        yield
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f"{name}: refused. While loading, this file would call `{error}`; nothing of it has run. Get the "
            "checkpoint from its authors, or, if you trust the file, have its tensors saved alone (its state dict)."
        ) from None
    except ConversionError as error:
        raise ConversionError(f"{name}: {error}.") from None
    except OSError as error:
        raise ConversionError(f"{name} cannot be read: {error.strerror or error}.") from None
    except MemoryError:
        raise ConversionError(f"{name} needs more memory than there is.") from None
    except Exception as error:
        with path.open("rb") as file:
            start = file.read(512)
        if start[257:262] == b"ustar":
            raise ConversionError(f"{name} is a tar archive, not a checkpoint; unpack it first.") from None
        raise ConversionError(
            f"{name} is no PyTorch checkpoint, or a damaged one ({type(error).__name__}: {one_line(error, 200)}). "
            "Compare its size with the original's and download it again."
        ) from None


def kind_of(content: Any) -> str:
    """What a checkpoint file holds, in words."""
    if isinstance(content, StandIn):
        return f"an object of {shown(content.class_name)}"
    return f"a {type(content).__name__}"


__all__ = ["Checkpoint", "kind_of", "most_expanded", "open_checkpoint", "read_checkpoint"]
