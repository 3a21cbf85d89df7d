"""Files that try to run code while they load are refused, and nothing of them runs."""

import argparse
import builtins
import collections
import enum
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from spidr_hf.conversion import convert_checkpoint
from spidr_hf.conversion.checkpoint_file import read_checkpoint
from spidr_hf.conversion.errors import ConversionError, UnsafeCheckpointError
from spidr_hf.conversion.safe_pickle import StandIn, plain
from spidr_hf.conversion.tensors import same_bits

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"


class Call:
    """Pickles as a call of `function(*args)`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Build:
    """Pickles as an object whose state is set by its class, which runs `__setstate__` of whatever it names."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"a": Call(os.system, "touch ran")}


def attacks(marker: Path) -> dict[str, object]:
    touch = f"touch {marker}"
    write = f"open({str(marker)!r}, 'w')"
    inner = pickle.dumps(Call(os.system, touch))
    return {
        "system": Call(os.system, touch),
        "eval": Call(eval, write),
        "exec": Call(exec, write),
        "open": Call(open, str(marker), "w"),
        "Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "import_module": Call(importlib.import_module, "antigravity"),
        "__import__": Call(builtins.__import__, "os"),
        "getattr": Call(getattr, Call(importlib.import_module, "os"), "system"),
        "nested pickle": Call(pickle.loads, inner),
        "nested torch": Call(torch.storage._load_from_bytes, inner),
        "torch.load": Call(torch.load, str(PARITY)),
        "partial": Call(functools.partial, os.system, touch),
        "map": Call(list, Call(map, os.system, [touch])),
        "methodcaller": Call(operator.methodcaller, "system", touch),
        "attrgetter": Call(operator.attrgetter("system"), 1),
        "numpy": Call(np.load, str(marker)),
        "type": Call(type, "Made", (), {}),
        "state": Build(),
        "path method": Call(pathlib.Path.touch, marker),
        "defaultdict": Call(collections.defaultdict, Call(os.system, touch)),
    }


def save(value: object, path: Path, form: str) -> None:
    if form == "pickle":
        path.write_bytes(pickle.dumps(value, 2))
    elif form == "pickle 5":
        path.write_bytes(pickle.dumps(value, 5))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle 5"])
@pytest.mark.parametrize("where", ["alone", "in a checkpoint"])
def test_attacks_are_refused_by_name_and_nothing_runs(form: str, where: str, tmp_path: Path) -> None:
    for name, attack in attacks(tmp_path / "ran").items():
        path = tmp_path / "attack.pt"
        value = attack if where == "alone" else {"model": {"mask_embedding": torch.zeros(2)}, "args": {"a": [attack]}}
        save(value, path, form)
        loaded = set(sys.modules)
        with pytest.raises(UnsafeCheckpointError) as error:
            read_checkpoint(path)
        assert "nothing of it has run" in str(error.value), name
        assert not (tmp_path / "ran").exists(), name
        assert "antigravity" not in set(sys.modules) - loaded


def test_the_command_refuses_with_one_line(tmp_path: Path, capsys) -> None:
    checkpoint = torch.load(PARITY / "spidr-tiny" / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "hook": Call(os.system, f"touch {tmp_path / 'ran'}")}, tmp_path / "bad.pt")
    code = convert_checkpoint.main([str(tmp_path / "bad.pt"), str(tmp_path / "o"), "--objective", "spidr"])
    error = capsys.readouterr().err
    assert code == 1 and error.count("\n") == 1
    assert f"{os.system.__module__}.system" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt"]


def hand_written(body: bytes, tmp_path: Path) -> Path:
    """A zip checkpoint whose pickle is written by hand."""
    path = tmp_path / "hand.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", body)
        archive.writestr("a/version", "3\n")
        archive.writestr("a/byteorder", sys.byteorder)
        archive.writestr("a/data/0", b"\0" * 16)
    return path


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\n(S'touch ran'\ntR.",
        b"(S'touch ran'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch ran'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x09touch ran\x85R.",
        b"\x80\x02cos\nsystem\nq\x00.",  # named, not even called
        b"\x80\x02\x82\x01)R.",  # a function registered with copyreg
        b"\x80\x02cargparse\nNamespace\n)\x81)R.",  # calls an instance
        b"\x80\x02csite\nmain\n)R.",
        b"\x80\x02ctorch.hub\nload\n(S'x'\nS'y'\ntR.",
        b"\x80\x02cbuiltins\ntype\n(S'X'\n)}tR.",
        b"\x80\x02c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"\x80\x02coperator\ngetitem\n(}S'x'\ntR.",
    ],
)
def test_hand_written_pickles(body: bytes, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafeCheckpointError, match="nothing of it has run"):
        read_checkpoint(hand_written(body, tmp_path))
    assert not Path("ran").exists()


def test_tensors_never_reach_beyond_their_data(tmp_path: Path) -> None:
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    inert = b"cargparse\nNamespace\n0"  # so that PyTorch itself leaves the file to the unpickler under test

    def tensor(offset: int, size: int, stride: int) -> bytes:
        numbers = f"I{offset}\n(I{size}\nt(I{stride}\nt".encode()
        return inert + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"I00\n}tR."

    assert read_checkpoint(hand_written(tensor(1, 3, 1), tmp_path)).tolist() == [0.0, 0.0, 0.0]
    for numbers in ((2, 3, 1), (0, 5, 1), (0, 3, 2), (-1, 2, 1), (3, 4, -1), (0, -1, 1)):
        with pytest.raises(ConversionError, match="beyond its data"):
            read_checkpoint(hand_written(tensor(*numbers), tmp_path))
    with pytest.raises(ConversionError, match="missing or cut off"):
        read_checkpoint(hand_written(tensor(0, 1, 1).replace(b"I4\n", b"I400\n"), tmp_path))


# ---- what may stand in a checkpoint comes back


class Colour(enum.Enum):
    RED = "red"


class Meter:
    def __init__(self):
        self.total, self.inner = 3, argparse.Namespace(a=[1, Colour.RED])


class Settings(dict):
    pass


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_and_settings_come_back(legacy: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    tensors = {
        "float": base,
        "part": base[1:3, 2:],  # shares memory with the first
        "transposed": base.T,
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "bfloat": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "count": torch.tensor([7]),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    value = {
        "tensors": collections.OrderedDict(tensors),
        "args": argparse.Namespace(rate=0.1, path=pathlib.PurePosixPath("a/b"), colour=Colour.RED, none=None),
        "meter": Meter(),
        "settings": Settings(a=1),
        "counts": collections.Counter("aab"),
        "lists": collections.defaultdict(list, a=[1]),
        "queue": collections.deque([1, 2]),
        "numpy": (np.float64(0.25), np.int32(-3), np.bool_(True)),
        "array": np.arange(3),
        "set": {1, 2},
        "bytes": b"\x00\xff",
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "size": torch.Size([1, 2]),
    }
    path = tmp_path / "x.pt"
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    loaded = read_checkpoint(path)
    assert all(same_bits(loaded["tensors"][name], tensor) for name, tensor in tensors.items())
    assert loaded["tensors"]["part"].untyped_storage().data_ptr() == loaded["tensors"]["float"].data_ptr()
    assert isinstance(loaded["args"], StandIn) and isinstance(loaded["meter"], StandIn)
    red = Colour.RED.__reduce_ex__(2)[1][-1]  # its name in Python 3.11.0 to 3.11.3, its value in all others
    assert plain(loaded["args"]) == {"rate": 0.1, "path": "a/b", "colour": red, "none": None}
    assert plain(loaded["meter"]) == {"total": 3, "inner": {"a": [1, red]}}
    assert plain(loaded["settings"]) == {"a": 1}
    assert loaded["counts"] == {"a": 2, "b": 1} and loaded["lists"] == {"a": [1]} and loaded["queue"] == [1, 2]
    assert loaded["numpy"] == (0.25, -3, True)
    assert isinstance(loaded["array"], StandIn)
    assert (loaded["set"], loaded["bytes"]) == ({1, 2}, b"\x00\xff")
    assert (loaded["dtype"], loaded["device"], loaded["size"]) == (torch.float16, "cpu", (1, 2))


def test_members_of_enumerations_by_name(tmp_path: Path) -> None:
    """As Python 3.11.0 to 3.11.3 store them; and `getattr` of anything else is refused."""

    class Member:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __reduce__(self):
            return getattr, self.arguments

    path = tmp_path / "x.pt"
    torch.save({"colour": Member(Colour, "RED")}, path)
    assert plain(read_checkpoint(path)["colour"]) == "RED"
    for arguments in (("text", "format"), (collections.OrderedDict, "fromkeys"), (Colour, "RED", None)):
        torch.save({"colour": Member(*arguments)}, path)
        with pytest.raises(UnsafeCheckpointError, match="getattr"):
            read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_cut_files_are_told_apart(legacy: bool, tmp_path: Path) -> None:
    whole = io.BytesIO()
    value = {"args": argparse.Namespace(a=1), "model": {"w": torch.ones(1000)}}
    torch.save(value, whole, _use_new_zipfile_serialization=not legacy)
    path = tmp_path / "cut.pt"
    for length in (0, 10, 300, len(whole.getvalue()) - 500):
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(ConversionError, match=r"damaged|cut off"):
            read_checkpoint(path)


def test_other_archives_are_told_apart(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ConversionError, match=r"not one that torch\.save wrote"):
        read_checkpoint(tmp_path / "a.zip")
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), tmp_path / "script.pt")
    with pytest.raises(ConversionError, match="TorchScript"):
        read_checkpoint(tmp_path / "script.pt")
    with pytest.raises(ConversionError, match="not a file"):
        read_checkpoint(tmp_path)
