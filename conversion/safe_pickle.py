"""Reads PyTorch checkpoints without running anything they contain.

`torch.load(weights_only=True)` comes first. What it refuses (settings stored as omegaconf containers, namespaces,
enums or meters of other packages) goes through an unpickler in which every global name is only a name: tensors and
plain containers are rebuilt by the functions below, instances of unknown classes become `StandIn` objects that hold
their state and nothing else, and a call to any other function ends the reading with an error that names it.
"""

import _compat_pickle
import io
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import ConversionError, UnsafeCheckpointError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
# Classes of the standard library that occur in settings. Their instances become stand-ins like those of any package;
# every other name of the standard library is refused, since its functions are what malicious files call.
_INERT = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "decimal.Decimal",
    "fractions.Fraction",
    "uuid.UUID",
    "datetime.date",
    "datetime.datetime",
    "datetime.time",
    "datetime.timedelta",
    "datetime.timezone",
    "builtins.object",
    "builtins.Ellipsis",
    "builtins.NotImplemented",
    "builtins.NoneType",
    "numpy.ndarray",
    "numpy.random._pickle.__randomstate_ctor",
    "numpy.random._pickle.__generator_ctor",
    "numpy.random._pickle.__bit_generator_ctor",
}
_INERT_MODULES = {"typing", "pathlib", "pathlib._local"}
_CLASS_NAME = re.compile(r"_*[A-Z]")


class _Global:
    """A global name of the file; never the thing it names."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


class StandIn:
    """An instance of a class that is not loaded: what the file stores about it, and no behaviour."""

    __slots__ = ("args", "class_name", "entries", "items", "state")

    def __init__(self, class_name: str, args: tuple = ()):
        self.class_name = class_name
        self.args = args
        self.state: Any = None
        self.items: dict = {}
        self.entries: list = []

    def __repr__(self) -> str:
        return f"<stored {self.class_name}>"

    # What the unpickler fills subclasses of dict, list and set with.
    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.entries.append(value)

    def extend(self, values: list) -> None:
        self.entries.extend(values)

    add = append


class _Storage:
    """A storage of the file: its dtype and its bytes."""

    __slots__ = ("dtype", "numel", "untyped")

    def __init__(self, dtype: torch.dtype, numel: int, untyped: torch.UntypedStorage):
        self.dtype = dtype
        self.numel = numel
        self.untyped = untyped


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    integers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or len(size) != len(stride) or not all(type(n) is int for n in integers):
        raise ConversionError("a tensor of the file is described wrongly")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(integers) < 0 or (0 not in size and last >= storage.numel):
        raise ConversionError("a tensor of the file reaches beyond its data")
    return torch.empty(0, dtype=storage.dtype).set_(storage.untyped, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _rebuild_subclass(function: _Global, _kind: Any, args: tuple, _state: Any) -> Any:
    if not isinstance(function, _Global) or not function.name.startswith("torch._utils._rebuild_tensor"):
        raise UnsafeCheckpointError(str(function))
    return _rebuild_tensor(*args)


def _rebuild_object(kind: Any, *_: Any) -> StandIn:
    return StandIn(str(kind))


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise UnsafeCheckpointError(f"_codecs.encode with {encoding!r}")
    return text.encode(encoding)


def _numpy_dtype(code: str, *_: Any) -> StandIn:
    return StandIn("numpy.dtype", (code,))


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    code = dtype.args[0] if isinstance(dtype, StandIn) and dtype.args else None
    if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code) or not isinstance(data, bytes):
        return data
    big_endian = isinstance(dtype.state, tuple) and len(dtype.state) > 1 and dtype.state[1] == ">"
    return np.frombuffer(data, np.dtype((">" if big_endian else "<") + code), count=1)[0].item()


def _subscript(container: Any, index: Any) -> StandIn:
    # Type hints such as `typing.List[int]` are stored as a call of `operator.getitem`.
    name = container.class_name if isinstance(container, StandIn) else str(container)
    if not isinstance(container, (_Global, StandIn)) or not name.startswith(("typing.", "builtins.")):
        raise UnsafeCheckpointError("operator.getitem")
    return StandIn(name, (index,))


def _type_of(value: Any = None, *rest: Any) -> _Global:
    if value is not None or rest:
        raise UnsafeCheckpointError("builtins.type")
    return _Global("builtins.NoneType")


def _enum_member(kind: Any, name: Any = None, *rest: Any) -> StandIn:
    # Python 3.11.0 to 3.11.3 store a member of an enumeration as a call of `getattr`, by its name.
    if not isinstance(kind, _Global) or kind.name in _CALLABLES or not isinstance(name, str) or rest:
        raise UnsafeCheckpointError("builtins.getattr")
    return StandIn(kind.name, (name,))


# The only functions that a file can have called, by the names it calls them with.
_CALLABLES: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda pairs=(): OrderedDict(pairs),
    "collections.defaultdict": lambda _factory=None, pairs=(): dict(pairs),
    "collections.Counter": lambda counts=(): dict(counts),
    "collections.deque": lambda entries=(), _length=None: list(entries),
    "builtins.dict": lambda pairs=(): dict(pairs),
    "builtins.list": lambda entries=(): list(entries),
    "builtins.tuple": lambda entries=(): tuple(entries),
    "builtins.set": lambda entries=(): set(entries),
    "builtins.frozenset": lambda entries=(): frozenset(entries),
    "builtins.int": lambda number=0: int(number),
    "builtins.float": lambda number=0.0: float(number),
    "builtins.complex": lambda real=0.0, imag=0.0: complex(real, imag),
    "builtins.bool": lambda value=False: bool(value),
    "builtins.str": lambda text="": text if isinstance(text, str) else repr(text),
    "builtins.bytes": lambda data=b"": data if isinstance(data, bytes) else bytes(list(data)),
    "builtins.bytearray": lambda data=b"": data if isinstance(data, bytes) else bytes(list(data)),
    "builtins.type": _type_of,
    "builtins.getattr": _enum_member,
    "operator.getitem": _subscript,
    "copyreg._reconstructor": _rebuild_object,
    "_codecs.encode": _encode,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *parts: ":".join(map(str, parts)),
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _rebuild_object,
    "numpy._core.multiarray._reconstruct": _rebuild_object,
}


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with every opcode that could reach code replaced."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Callable[[Any], None]

    def __init__(self, file: BinaryIO, load_storage: Callable[[Any], _Storage] | None = None):
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        # Files in Python 2's protocol name things as Python 2 did: `commands.Popen` is subprocess's.
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}".replace("_operator.", "operator.")
        is_class = _CLASS_NAME.match(name.rpartition(".")[2])
        if full in _CALLABLES or full in _INERT or (module in _INERT_MODULES and is_class):
            return _Global(full)
        package = module.partition(".")[0]
        if package == "torch":
            if isinstance(dtype := getattr(torch, name, None), torch.dtype) and module == "torch":
                return dtype
            if name in _STORAGES and module in ("torch", "torch.storage"):
                return _Global(name)
        # Functions are lower case everywhere but in rare cases, and an instance of such a "class" is inert as well.
        if package in sys.stdlib_module_names or not is_class:
            raise UnsafeCheckpointError(full)
        return _Global(full)

    def get_extension(self, code: int) -> None:
        raise UnsafeCheckpointError(f"extension {code} of the copyreg module")

    def persistent_load(self, pid: Any) -> Any:
        if self.load_storage is None:
            raise ConversionError("the file refers to data that it does not hold")
        return self.load_storage(pid)

    def call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, _Global):
            raise UnsafeCheckpointError(repr(function))
        args = tuple(args)
        known = _CALLABLES.get(function.name)
        return known(*args) if known else StandIn(function.name, args)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.append(self.call(self.stack.pop(), args))

    def load_newobj_ex(self) -> None:
        self.stack.pop()  # keyword arguments: no class that is rebuilt here takes any
        self.load_newobj()

    def _instantiate(self, function: Any, args: Any) -> None:
        self.append(self.call(function, args))

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], StandIn):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], (OrderedDict, Tensor)):
            raise ConversionError(f"the file gives a state to {self.stack[-1]!r}")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build


def _storage_description(pid: Any, fields: int) -> tuple[torch.dtype, str, int]:
    """(dtype, key, numel) of a storage's persistent id."""
    if not isinstance(pid, tuple) or len(pid) < fields or pid[0] != "storage" or not isinstance(pid[1], _Global):
        raise ConversionError("the file refers to something that is no tensor data")
    dtype, key, numel = _STORAGES.get(pid[1].name), pid[2], pid[4]
    if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise ConversionError(f"the file describes tensor data wrongly ({pid[1]}, {key!r}, {numel!r})")
    return dtype, key, numel


def _untyped(data: bytes | bytearray) -> torch.UntypedStorage:
    if not data:
        return torch.UntypedStorage(0)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage()


def _load_zip(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ConversionError("a zip archive, but not one that torch.save wrote")
        root = pickles[0].partition("/")[0]
        if any(name.startswith(f"{root}/code/") for name in names):
            raise ConversionError("a TorchScript program, not a checkpoint; save the model's state_dict() instead")
        order = archive.read(f"{root}/byteorder").decode() if f"{root}/byteorder" in names else "little"
        if order != sys.byteorder:
            raise ConversionError(f"written on a {order}-endian machine; save it again on one like this")
        storages: dict[str, _Storage] = {}

        def load_storage(pid: Any) -> _Storage:
            dtype, key, numel = _storage_description(pid, 5)
            if key not in storages:
                size = numel * dtype.itemsize
                if f"{root}/data/{key}" not in names or archive.getinfo(f"{root}/data/{key}").file_size != size:
                    raise ConversionError(f"the data of storage {key} is missing or cut off")
                storages[key] = _Storage(dtype, numel, _untyped(archive.read(f"{root}/data/{key}")))
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(pickles[0])), load_storage).load()


def _load_legacy(path: Path) -> Any:
    """The format of PyTorch before 1.6: header pickles, the object, then the storages in a row."""
    file_size = path.stat().st_size
    storages: dict[str, _Storage] = {}

    def load_storage(pid: Any) -> _Storage:
        dtype, key, numel = _storage_description(pid, 6)
        if pid[5] is not None:
            raise ConversionError("written by a PyTorch older than 0.4; load and save it with a newer one first")
        if key not in storages:
            if numel * dtype.itemsize > file_size:
                raise ConversionError(f"the data of storage {key} is cut off")
            storages[key] = _Storage(dtype, numel, torch.UntypedStorage(numel * dtype.itemsize))
        return storages[key]

    with path.open("rb") as file:
        if file.read(2) == b"PK":
            raise EOFError("the end of the archive is missing")
        file.seek(0)
        if _Unpickler(file).load() != _LEGACY_MAGIC:
            raise ConversionError("a pickle, but not one that torch.save wrote")
        _Unpickler(file).load()  # protocol version
        _Unpickler(file).load()  # byte order and type sizes of the machine that wrote it
        result = _Unpickler(file, load_storage).load()
        for key in _Unpickler(file).load():
            storage = storages.get(key)
            header = file.read(8)
            if storage is None or len(header) < 8 or struct.unpack("<q", header)[0] != storage.numel:
                raise ConversionError("the tensor data does not fit its description")
            data = file.read(storage.numel * storage.dtype.itemsize)
            if len(data) < storage.numel * storage.dtype.itemsize:
                raise ConversionError("the file is cut off")
            storage.untyped.copy_(_untyped(data))
    return result


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The object stored in a file of `torch.save` (zip or older format), tensors on the CPU.

    Nothing in the file is executed. Objects of classes that PyTorch does not deem safe come back as `StandIn`.

    Raises:
        UnsafeCheckpointError: the file asks to call a function.
        ConversionError: the file is missing, damaged or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"{path} is not a file.")
    is_zip = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except Exception:
        # Either it holds more than tensors, or it is no checkpoint: the unpickler below finds out which.
        pass
    try:
        return (_load_zip if is_zip else _load_legacy)(path)
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(
            f"{path}: refused. While loading, this file would call `{error}`; nothing of it has run. Get the "
            "checkpoint from its authors, or, if you trust the file, have its tensors saved alone (its state dict)."
        ) from None
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}.") from None
    except MemoryError:
        raise
    except Exception as error:
        with path.open("rb") as file:
            start = file.read(512)
        if start[257:262] == b"ustar":
            raise ConversionError(f"{path} is a tar archive, not a checkpoint; unpack it first.") from None
        raise ConversionError(
            f"{path} is no PyTorch checkpoint, or a damaged one ({type(error).__name__}: {error}). Compare its size "
            "with the original's and download it again."
        ) from None


def plain(value: Any) -> Any:
    """Stored settings as plain Python values.

    Namespaces, dataclasses and omegaconf containers become dicts and lists, enum members their values, numbers and
    strings themselves; what is none of these stays a `StandIn`.
    """
    if isinstance(value, Mapping):
        return {plain(key) if isinstance(key, StandIn) else key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else value
    if not isinstance(value, StandIn):
        return value
    state = value.state
    if isinstance(state, tuple) and len(state) == 2:  # of a class with __slots__
        state = {**(state[0] or {}), **(state[1] or {})}
    if isinstance(state, Mapping):
        # The two kinds of omegaconf nodes; their other fields are types, flags and the way back to the parent.
        for field in ("_content", "_val"):
            if field in state:
                return plain(state[field])
        return plain({**value.items, **state})
    if value.items:
        return plain(value.items)
    if value.entries:
        return plain(value.entries)
    if value.class_name.startswith("pathlib."):
        return os.path.join(*map(str, value.args)) if value.args else "."
    if value.class_name.endswith("Namespace"):
        return {}
    if len(value.args) == 1 and isinstance(value.args[0], (str, int, float)):
        return value.args[0]  # an enum member is stored as its class and its value
    return value


__all__ = ["StandIn", "plain", "read_checkpoint"]
