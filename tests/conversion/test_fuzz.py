"""Damaged and invented files by the thousand: each is read or refused with one line, soon; nothing else ever happens.

Seeds are fixed. A failure names its own, and `test_...[seed]` repeats it.
"""

import argparse
import collections
import io
import json
import pickle
import random
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from hostile import VALUES, as_json, damaged, with_other_values

from spidr_hf.conversion import convert_checkpoint
from spidr_hf.conversion.checkpoint_file import open_checkpoint
from spidr_hf.conversion.checkpoints import read_config, read_pretraining_checkpoint
from spidr_hf.conversion.errors import ConversionError
from spidr_hf.conversion.fairseq_format import config_from_fairseq, settings, update_count
from spidr_hf.conversion.model_folder import load_folder
from spidr_hf.conversion.safe_pickle import StandIn

FAST, SLOW = range(3), range(3, 40)
SEEDS = [*FAST, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)]
SECONDS = 5


def one_line_or_fine(read: Callable[[], object], what: object) -> bool:
    """Whether it was read; a refusal is a `ConversionError` of one printable line."""
    start = time.monotonic()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        return True
    except ConversionError as error:
        message = str(error)
        assert message and message.isprintable() and len(message) < 2500, what
        return False
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}"[:1000]) from error
    finally:
        assert time.monotonic() - start < SECONDS, what


def small_checkpoint() -> dict[str, Any]:
    """Everything that occurs in checkpoints, in little."""
    return {
        "model": collections.OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.ones(4, dtype=torch.int64)),
        "args": argparse.Namespace(lr=[0.5], names={"a", "b"}, inner=argparse.Namespace(x=None)),
        "counts": collections.Counter("aab"),
        "optimizer_history": [{"num_updates": 3}],
        "shared": torch.zeros(2, 2).T,
    }


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles(legacy: bool, seed: int, tmp_path: Path) -> None:
    """The pickle is damaged, the archive around it is whole, and the settings are then taken for fairseq's."""
    chance = random.Random(seed)
    buffer = io.BytesIO()
    torch.save(small_checkpoint(), buffer, _use_new_zipfile_serialization=not legacy)
    path = tmp_path / "x.pt"
    parts = {}
    if not legacy:
        with zipfile.ZipFile(buffer) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
    read = 0

    def look() -> None:
        with open_checkpoint(path) as checkpoint:
            content = checkpoint.content
            if isinstance(content, dict):
                update_count(content)
                settings(content)

    for _ in range(250):
        if legacy:
            path.write_bytes(damaged(buffer.getvalue(), chance))
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in parts.items():
                    archive.writestr(name, damaged(data, chance) if name.endswith("data.pkl") else data)
        read += one_line_or_fine(look, path.read_bytes())
    assert 0 < read < 250


@pytest.mark.parametrize("seed", SEEDS)
def test_archives(seed: int, tmp_path: Path) -> None:
    """Bytes of the whole file, headers of the archive included."""
    chance = random.Random(seed)
    data = (hostile.TINY / "checkpoint.pt").read_bytes()
    (tmp_path / "config.json").write_bytes((hostile.TINY / "config.json").read_bytes())
    directory = data.index(b"PK\x01\x02")
    path = tmp_path / "x.pt"
    for _ in range(30):
        cut = chance.choice((0, directory))  # damage anywhere, or in the list of what is in the archive
        path.write_bytes(data[:cut] + damaged(data[cut:], chance))
        one_line_or_fine(lambda: read_pretraining_checkpoint(path), (seed, cut))


@pytest.mark.parametrize("seed", SEEDS)
def test_configurations_beside_a_checkpoint(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    shutil.copy(hostile.TINY / "checkpoint.pt", tmp_path)
    for _ in range(40):
        (tmp_path / "config.json").write_text(as_json(with_other_values(hostile.CONFIG, chance), chance))
        read = (tmp_path / "config.json").read_text()[:2000]
        one_line_or_fine(lambda: read_pretraining_checkpoint(tmp_path / "checkpoint.pt"), read)


@pytest.mark.parametrize("seed", SEEDS)
def test_settings_of_fairseq(seed: int) -> None:
    chance = random.Random(seed)
    fields = dict(torch.load(hostile.FAIRSEQ, weights_only=True)["cfg"]["model"])
    loop: list = []
    loop.append(loop)
    values = (*VALUES, float("nan"), float("inf"), loop, hostile.shared(), {1: 2}, (1, 2), {1, 2}, b"x", torch.zeros(2))
    for _ in range(150):
        changed = with_other_values(fields, chance, values)
        holders = ({"cfg": {"model": changed}}, {"cfg": changed}, {"args": changed}, {"args": StandIn("x", (changed,))})
        holder = chance.choice(holders)
        one_line_or_fine(lambda holder=holder: config_from_fairseq(settings(holder)), seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_model_folders(seed: int, tmp_path: Path) -> None:
    """config.json, the index and the weights' header."""
    chance = random.Random(seed)
    folder = tmp_path / "model"
    convert_checkpoint.convert(str(hostile.TINY / "checkpoint.pt"), str(folder))
    whole = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    config = json.loads(whole["config.json"])
    index = folder / "model.safetensors.index.json"
    for _ in range(40):
        match chance.randrange(3):
            case 0:
                (folder / "config.json").write_text(as_json(with_other_values(config, chance), chance))
            case 1:
                tree = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
                index.write_text(as_json(with_other_values(tree, chance), chance))
            case 2:
                header = damaged(whole["model.safetensors"][:3000], chance)
                (folder / "model.safetensors").write_bytes(header + whole["model.safetensors"][3000:])
        one_line_or_fine(lambda: load_folder(folder), (seed, (folder / "config.json").read_text()[:2000]))
        for name, data in whole.items():
            (folder / name).write_bytes(data)
        index.unlink(missing_ok=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_configurations_as_toml_and_json(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    toml = b'[run]\nmodel_type = "spidr"\n[model]\nencoder_dropout = 0.1\nema_timescale = 2e4\nl = [[1, 2], [3]]\n'
    for kind, data in ((".toml", toml), (".json", json.dumps(hostile.CONFIG).encode())):
        path = tmp_path / f"x{kind}"
        for _ in range(150):
            path.write_bytes(damaged(data, chance))
            one_line_or_fine(lambda path=path: read_config(path), path.read_bytes())


def test_pickles_of_nothing_but_opcodes(tmp_path: Path) -> None:
    """Short programs of random opcodes, which nobody would have thought of."""
    chance = random.Random(0)
    opcodes = [
        value.encode("latin-1") for name, value in vars(pickle).items() if name.isupper() and isinstance(value, str)
    ]
    opcodes += [value for name, value in vars(pickle).items() if name.isupper() and isinstance(value, bytes)]
    pieces = [
        *opcodes,
        b"K\x01",
        b"K\x00",
        b"X\x01\x00\x00\x00a",
        b"ctorch\nSize\n",
        b"cbuiltins\nlist\n",
        b"q\x00",
        b"h\x00",
    ]
    for _ in range(800):
        body = b"\x80\x04" + b"".join(chance.choices(pieces, k=chance.randrange(1, 40))) + b"."
        hostile.archive(tmp_path / "x.pt", body)
        one_line_or_fine(lambda: read_pretraining_checkpoint(tmp_path / "x.pt"), body)
