"""Reads the pickles in PyTorch checkpoints without running anything they contain, in bounded time and memory.

Every global name is only a name: tensors and plain containers are rebuilt by the functions below, instances of unknown
classes become `StandIn` objects that hold their state and nothing else, and a call to any other function ends the
reading with an error that names it. What is built is counted (`_Effort`), so that no file keeps the reader busy: a few
hundred bytes could ask for 2 ** 60 parts.
"""

import _compat_pickle
import os
import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from torch import Tensor

from spidr_hf.system.messages import shown

from .errors import ConversionError, UnsafeCheckpointError

# Opcodes, entries and copies. The largest known checkpoints (with optimizer and settings) need 60 000.
_MOST_EFFORT = 1_000_000
LARGEST_PICKLE = 16 << 20
_MOST_KEY_PARTS = 1000
_MOST_DIMENSIONS = 64
# Of settings: values in all, and one inside the other.
_MOST_SETTINGS = 100_000
_DEEPEST_SETTINGS = 50
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
    # Tensors of kinds that no model here has.
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_sparse_csr_tensor",
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_device_tensor_from_numpy",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor",
    "torch._utils._rebuild_wrapper_subclass",
    "torch.serialization._get_layout",
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


class Storage:
    """A storage of the file: its dtype and its bytes."""

    __slots__ = ("dtype", "untyped")

    def __init__(self, dtype: torch.dtype, untyped: torch.UntypedStorage):
        self.dtype = dtype
        self.untyped = untyped


def _rebuild_tensor(
    storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any, dtype: torch.dtype | None = None
) -> Tensor:
    described = isinstance(storage, Storage) and isinstance(size, tuple) and isinstance(stride, tuple)
    if not described or len(size) != len(stride) or len(size) > _MOST_DIMENSIONS:
        raise ConversionError("a tensor of the file is described wrongly")
    integers = (offset, *size, *stride)
    if not all(type(n) is int for n in integers):
        raise ConversionError("a tensor of the file is described wrongly")
    dtype = dtype or storage.dtype
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(integers) < 0 or (0 not in size and (last + 1) * dtype.itemsize > storage.untyped.nbytes()):
        raise ConversionError("a tensor of the file reaches beyond its data")
    return torch.empty(0, dtype=dtype).set_(storage.untyped, offset, size, stride)


def _rebuild_newer_tensor(
    storage: Storage, offset: int, size: tuple, stride: tuple, _gradient: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    """Of the types that came after typed storages: the storage is bytes, the type stands beside it."""
    if not isinstance(dtype, torch.dtype):
        raise ConversionError("a tensor of the file is described wrongly")
    return _rebuild_tensor(storage, offset, size, stride, dtype=dtype)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _rebuild_subclass(function: _Global, _kind: Any, args: tuple, _state: Any) -> Any:
    if not isinstance(function, _Global) or not function.name.startswith("torch._utils._rebuild_tensor"):
        raise UnsafeCheckpointError(str(function))
    return _rebuild_tensor(*args)


def _rebuild_object(kind: Any, *_: Any) -> StandIn:
    if not isinstance(kind, _Global):
        raise ConversionError("an object of the file has no class")
    return StandIn(kind.name)


def _text(text: Any = "") -> Any:
    return text if isinstance(text, str) else StandIn("builtins.str", (text,))


def _bytes(data: Any = b"") -> Any:
    return data if isinstance(data, bytes) else bytes(list(data))


def _device(*parts: Any) -> str:
    return ":".join(str(part) for part in parts if isinstance(part, (str, int)))


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise UnsafeCheckpointError(f"_codecs.encode with {shown(encoding)}")
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
    "builtins.str": _text,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.type": _type_of,
    "builtins.getattr": _enum_member,
    "operator.getitem": _subscript,
    "copyreg._reconstructor": _rebuild_object,
    "_codecs.encode": _encode,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_newer_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy.core.multiarray._reconstruct": _rebuild_object,
    "numpy._core.multiarray._reconstruct": _rebuild_object,
}


# Those that put their argument's entries into a hash table, and whether the entries are pairs of a key and a value.
_HASHING = {
    "collections.OrderedDict": True,
    "collections.defaultdict": True,
    "collections.Counter": False,
    "builtins.dict": True,
    "builtins.set": False,
    "builtins.frozenset": False,
}


class _Effort:
    """How much work may still be done for a file."""

    def __init__(self, most: int = _MOST_EFFORT):
        self.left = most

    def spend(self, amount: int = 1) -> None:
        self.left -= amount
        if self.left < 0:
            raise ConversionError("it describes more than any checkpoint holds, which would take too long to build")


class _CountedOpcodes(dict):
    """The unpickler's table of opcodes; each use costs effort."""

    def __init__(self, table: Mapping[int, Any], effort: _Effort):
        super().__init__(table)
        self.effort = effort

    def __getitem__(self, opcode: int) -> Any:
        self.effort.spend()
        return super().__getitem__(opcode)

    def __missing__(self, opcode: int) -> Any:
        raise pickle.UnpicklingError(f"no pickle has the byte {opcode} there")


class _BoundedFile:
    """The part of a file that its pickles may take up; nothing is reserved for what a pickle merely announces."""

    def __init__(self, file: BinaryIO, most: int = LARGEST_PICKLE):
        self.file = file
        self.left = most

    def read(self, size: int) -> bytes:
        return self._spend(self.file.read(self._allowed(size)))

    def readline(self) -> bytes:
        return self._spend(self.file.readline(self.left + 1))

    def _allowed(self, size: int) -> int:
        return min(size, self.left + 1)

    def _spend(self, data: bytes) -> bytes:
        self.left -= len(data)
        if self.left < 0:
            raise ConversionError(f"what it holds beside its tensors is larger than {LARGEST_PICKLE >> 20} MiB")
        return data


class _Unpickler(pickle._Unpickler):
    """Python's unpickler with every opcode that could reach code replaced, and those that could run away bounded."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: _BoundedFile, effort: _Effort, load_storage: Callable[[Any], Storage] | None = None):
        super().__init__(file, encoding="utf-8", errors="surrogateescape")
        self.effort = effort
        self.load_storage = load_storage
        vars(self)["dispatch"] = _CountedOpcodes(self.dispatch, effort)

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
            raise UnsafeCheckpointError(shown(function))
        args = tuple(args)
        known = _CALLABLES.get(function.name)
        if known is None:
            return StandIn(function.name, args)
        for part in args:  # they are copied
            if isinstance(part, (str, bytes, bytearray)):
                self.effort.spend(len(part) // 64)
            elif isinstance(part, (list, tuple, set, frozenset, Mapping)):
                self.effort.spend(len(part))
                if function.name in _HASHING and not isinstance(part, Mapping):
                    self._check_keys(part, pairs=_HASHING[function.name])
        return known(*args)

    def _check_keys(self, entries: Any, *, pairs: bool = False) -> None:
        """Refuses keys whose hashes take long to compute, or can be made to be all alike."""
        for entry in entries:
            key = entry[0] if pairs and isinstance(entry, (list, tuple)) and entry else entry
            parts, count = [key], 0
            while parts:
                part = parts.pop()
                if isinstance(part, (tuple, frozenset)):
                    count += 1 + len(part)
                    if count > _MOST_KEY_PARTS:
                        raise ConversionError("it has a dictionary with keys as long as no checkpoint's")
                    parts.extend(part)
                elif isinstance(part, complex) or (isinstance(part, int) and not -(2**63) <= part < 2**64):
                    raise ConversionError("it has a dictionary with numbers for keys that no checkpoint has")
            if count:
                self.effort.spend(100 + count)

    def _set_items(self, target: Any, items: list) -> None:
        if not isinstance(target, (dict, StandIn)) or len(items) % 2:
            raise ConversionError("it sets entries of something that has none")
        self._check_keys(items[::2])
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set_items(self.stack[-1], items)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(self.stack[-1], items)

    def load_append(self) -> None:
        entry = self.stack.pop()
        self._extend(self.stack[-1], [entry])

    def load_appends(self) -> None:
        entries = self.pop_mark()
        self._extend(self.stack[-1], entries)

    def _extend(self, target: Any, entries: list) -> None:
        if not isinstance(target, (list, StandIn)):
            raise ConversionError("it appends to something that is no list")
        target.extend(entries)

    def load_additems(self) -> None:
        entries = self.pop_mark()
        target = self.stack[-1]
        self._check_keys(entries)
        if isinstance(target, set):
            target.update(entries)
        elif isinstance(target, StandIn):
            target.extend(entries)
        else:
            raise ConversionError("it adds to something that is no set")

    def load_frozenset(self) -> None:
        entries = self.pop_mark()
        self._check_keys(entries)
        self.append(frozenset(entries))

    def load_bytearray8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(length)))  # Python's own would first make one as long as the file says

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
            raise ConversionError(f"the file gives a state to {shown(self.stack[-1])}")

    for _opcode, _method in (
        (pickle.SETITEM, load_setitem),
        (pickle.SETITEMS, load_setitems),
        (pickle.DICT, load_dict),
        (pickle.APPEND, load_append),
        (pickle.APPENDS, load_appends),
        (pickle.ADDITEMS, load_additems),
        (pickle.FROZENSET, load_frozenset),
        (pickle.BYTEARRAY8, load_bytearray8),
        (pickle.REDUCE, load_reduce),
        (pickle.NEWOBJ, load_newobj),
        (pickle.NEWOBJ_EX, load_newobj_ex),
        (pickle.BUILD, load_build),
    ):
        dispatch[_opcode[0]] = _method
    del _opcode, _method


class PickleReader:
    """Reads one file's pickles, all of them together in bounded time and memory."""

    def __init__(self, file: BinaryIO, load_storage: Callable[[Any], Storage] | None = None):
        self.file = _BoundedFile(file)
        self.effort = _Effort()
        self.load_storage = load_storage

    def load(self) -> Any:
        """The next object of the file.

        Raises:
            UnsafeCheckpointError: with the name of what it would call, alone.
            ConversionError: what is wrong, alone. Damaged files raise whatever Python's unpickler does.
        """
        return _Unpickler(self.file, self.effort, self.load_storage).load()


def storage_description(pid: Any, fields: int) -> tuple[torch.dtype, str, int]:
    """(dtype, key, numel) of a storage's persistent id."""
    if not isinstance(pid, tuple) or len(pid) < fields or pid[0] != "storage" or not isinstance(pid[1], _Global):
        raise ConversionError("the file refers to something that is no tensor data")
    dtype, key, numel = _STORAGES.get(pid[1].name), pid[2], pid[4]
    if dtype is None or not isinstance(key, str) or type(numel) is not int or numel < 0:
        raise ConversionError(f"the file describes tensor data wrongly ({pid[1]}, {shown(key)}, {shown(numel)})")
    return dtype, key, numel


class _Settings:
    """Turns stored objects into plain values, and counts them: parts may be shared, or contain themselves."""

    def __init__(self) -> None:
        self.left = _MOST_SETTINGS

    def plain(self, value: Any, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0 or depth > _DEEPEST_SETTINGS:
            raise ConversionError(
                "The settings stored in the file are nested too deeply, contain themselves or are too many."
            )
        if isinstance(value, Mapping):
            return {self._key(key): self.plain(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.plain(entry, depth + 1) for entry in value]
        if isinstance(value, Tensor):
            # One of many numbers is no setting, and has no truth value to be compared by.
            return value.item() if value.numel() == 1 else StandIn("torch.Tensor")
        return self._of_object(value, depth) if isinstance(value, StandIn) else value

    def _key(self, key: Any) -> Any:
        """Keys are names, numbers, or members of enumerations."""
        if isinstance(key, StandIn):
            key = self.plain(key)
        return shown(key) if isinstance(key, (dict, list)) else key

    def _of_object(self, value: StandIn, depth: int) -> Any:
        state = value.state
        if isinstance(state, tuple) and len(state) == 2:  # of a class with __slots__
            state = {name: entry for part in state if isinstance(part, Mapping) for name, entry in part.items()}
        if isinstance(state, Mapping):
            # The two kinds of omegaconf nodes; their other fields are types, flags and the way back to the parent.
            for field in ("_content", "_val"):
                if field in state:
                    return self.plain(state[field], depth + 1)
            return self.plain({**value.items, **state}, depth + 1)
        if value.items:
            return self.plain(value.items, depth + 1)
        if value.entries:
            return self.plain(value.entries, depth + 1)
        if value.class_name.startswith("pathlib.") and all(isinstance(part, str) for part in value.args):
            return os.path.join(*value.args) if value.args else "."
        if value.class_name.endswith("Namespace"):
            return {}
        if len(value.args) == 1 and isinstance(value.args[0], (str, int, float)):
            return value.args[0]  # an enum member is stored as its class and its value
        return value


def plain(value: Any) -> Any:
    """Stored settings as plain Python values.

    Namespaces, dataclasses and omegaconf containers become dicts and lists, enum members their values, numbers and
    strings and tensors of one number themselves; what is none of these is a `StandIn`.

    Raises:
        ConversionError: they are too many, too deep or contain themselves.
    """
    return _Settings().plain(value)


__all__ = ["LARGEST_PICKLE", "PickleReader", "StandIn", "Storage", "plain", "storage_description"]
