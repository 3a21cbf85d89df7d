"""Every reader of files that people bring or that a kill leaves, fed with invented and damaged ones by the thousand.

Each file is read, or refused with one printable line that names it, and the line where it has lines. Seeds are fixed;
a failure names its own.
"""

import io
import json
import random
import re
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hostile import VALUES, as_json, damaged, with_other_values
from safetensors.torch import save

from spidr_hf.data.alignments import read_alignments
from spidr_hf.data.batches import SkippedFiles
from spidr_hf.data.labels import frame_phones, read_table
from spidr_hf.data.manifests import read_manifest
from spidr_hf.evaluation.abx import read_items
from spidr_hf.evaluation.phones import count_pairs
from spidr_hf.examples.compare_runs import read_curve
from spidr_hf.pretraining.config import load_config, make_config
from spidr_hf.pretraining.start import config_changes
from spidr_hf.pretraining.validation_run import ValidationFile
from spidr_hf.system.commands import describe
from spidr_hf.system.errors import RunFolderError
from spidr_hf.training.folder_settings import keep_settings
from spidr_hf.training.metrics import MetricsFile, read_rows
from spidr_hf.units.kmeans import load_features, load_kmeans
from spidr_hf.units.language_model import collapses, read_pairs
from spidr_hf.units.unit_files import known_units, read_units

FAST, SLOW = range(2), range(2, 40)
SEEDS = [*FAST, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)]
SECONDS = 5
NUMBERS = ("Infinity", "-Infinity", "NaN", "1e400", "-1", "-0.5", "0", "1e308", "9" * 30, "9" * 5000, "null", "1_0", "")
NUMBER = re.compile(r"\d+(\.\d+)?")
# What is said of a file as a whole, where there is no line that one could name.
WHOLE = r"UTF-8|holds (no|another)|cannot be read|no TextGrid|no column|stands for|is there \d+ times"
WHOLE += r"|has the (tiers|columns)|no interval tier|unknown kind of data"


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def stored(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def aligned(path: Path) -> None:
    """Reading alignments, and what is done with them next."""
    phones = read_alignments(path)
    for entry in phones.values():
        frame_phones(entry, 20, 320, 400)
    try:
        count_pairs({name: np.arange(20) for name in phones}, phones)
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 2500


def config(path: Path) -> None:
    load_config(path)


def run_config(path: Path) -> None:
    config_changes(path.parent, make_config(tomllib.loads(TOML)), checkpoint=True)  # type: ignore[arg-type]  # that there is one


def metrics(path: Path) -> None:
    read_rows(path)
    MetricsFile(path, 1).close()
    assert all(row["step"] <= 1 for row in read_rows(path))


UNITS = [{"file": "a", "units": [1, 2, 2, 300], "durations": [1, 2, 1, 5]}, {"file": "b/ü", "units": [0, 0, 7]}]
MANIFEST = [
    {"fileid": "001", "path": "a/001.wav", "num_samples": 16_000},
    {"fileid": "x", "path": "x y.flac", "num_samples": 80_000},
]
IN_TAR = [{**row, "archive": "a.tar", "byte_offset": 512 * i, "byte_size": 500} for i, row in enumerate(MANIFEST, 1)]
ALIGNED = [{"id": "a", "phones": [["SIL", 0.0, 0.15], ["K", 0.15, 0.4]]}, {"id": "b", "phones": ["SIL", "K"]}]
TEXTGRID = (
    'File type = "ooTextFile"\nObject class = "TextGrid"\n\n0\n0.4\n<exists>\n1\n"IntervalTier"\n"phones"\n0\n0.4\n'
)
TEXTGRID += '2\n0\n0.15\n""\n0.15\n0.4\n"K"\n'
ITEMS = "#file onset offset #phone prev-phone next-phone speaker\na 0.10 0.25 K SIL AH s1\nb/ü 0.5 0.75 AH K SIL s2\n"
TOML = """[run]
model_type = "spidr"
random_seed = 3
[data]
manifest = "a.csv"
max_sample_size = 8000
[model]
encoder_num_layers = 3
num_codebooks = 2
encoder_dropout = 0.1
[optimizer]
lr = 2e-3
betas = [0.9, 0.95]
[validation.dev]
manifest = "b.csv"
"""
ROW = {
    "step": 1,
    "epoch": 0,
    "loss": 3.25,
    "layer_losses": [1.5, 2.0],
    "name": "dev",
    "data": "abc",
    "checkpoint": None,
}
POINT = {"step": 1, "loss": 3.25, "target_ppl": 20.5, "pred_ppl": 9, "lr": 0.001, "ema_decay": 0.999, "x": None}


@dataclass
class Reader:
    """A kind of file: a good one, what reads it, the rows or table it is written from, and whether it has lines."""

    name: str
    good: bytes
    read: Callable[[Path], object]
    tree: Any = None
    lines: bool = True


def comma(rows: list[dict[str, Any]], mark: str = ",") -> bytes:
    return "".join(mark.join(map(str, row)) + "\n" for row in [list(rows[0]), *(row.values() for row in rows)]).encode()


FLAT = {"clusters": 8, "seed": 0, "num_units": 256, "deduplicated": True, "model": {"layer": 6, "lr": 0.5}, "x": None}
FRAMES = torch.arange(12.0).view(4, 3)
READERS = [
    Reader("units.jsonl", lines(*UNITS), read_units, UNITS),
    Reader("units.parquet", parquet([{"file": "a", "units": [1, 2, 2]}, {"file": "b", "units": [300]}]), read_units),
    Reader("alignments.jsonl", lines(*ALIGNED), aligned, ALIGNED),
    Reader("alignments.ctm", b";; made\na 1 0.00 0.15 K\na 1 0.2 0.2 AH 0.9\n", aligned),
    Reader("alignments.txt", b"#file onset offset #phone\na 0 0.15 K\na 0.15 0.4 AH\n", aligned),
    Reader("a.TextGrid", TEXTGRID.encode(), aligned),
    Reader("b.TextGrid", TEXTGRID.encode("utf-16"), aligned),
    Reader("triphones.item", ITEMS.encode(), read_items),
    Reader("manifest.csv", comma(MANIFEST), read_manifest),
    Reader("tar.csv", comma(IN_TAR, ";"), read_manifest),
    Reader("manifest.tsv", b"/data\na/001.wav\t16000\nx y.flac\t80000\n", read_manifest),
    Reader("header.tsv", comma(MANIFEST, "\t"), read_manifest),
    Reader("manifest.jsonl", lines(*IN_TAR, *[{"path": "c", "num_samples": 5, "fileid": "c"}]), read_manifest, IN_TAR),
    Reader("manifest.parquet", parquet(IN_TAR), read_manifest),
    Reader("manifest.txt", comma(MANIFEST), read_manifest),
    Reader("labels.csv", b'ID,text,speaker\na,"one, two",s1\nb,"th""ree",s2\n', read_table),
    Reader("labels.tsv", b"fileid\ttext\na\tone\nb\ttwo\n", read_table),
    Reader("labels.jsonl", lines({"id": "a", "text": "one"}, {"file": "b", "n": 1.5}), read_table, ALIGNED),
    Reader("pairs.csv", b"positive,negative,g\n1 2 3,3 2 1,x\n4 5,5 4,y\n", read_pairs),
    Reader("spoken.csv", b"id,filename,correct,voice\n1,7 8,1,a\n1,8 7,0,a\n", read_pairs),
    Reader("config.toml", TOML.encode(), config, lines=False),
    Reader("config.json", json.dumps({"run": {"random_seed": 3}, "data": {"manifest": "a"}}).encode(), config,
           {"run": {"random_seed": 3}, "data": {"manifest": "a"}, "optimizer": {"betas": [0.9, 0.95]}}, lines=False),
    Reader("run/config.toml", TOML.encode(), run_config, lines=False),
    Reader("settings.json", json.dumps(FLAT).encode(),
           lambda path: keep_settings(path, FLAT, resuming=True, fixed=("clusters", "model")), FLAT, lines=False),
    Reader("units.provenance.json", json.dumps(FLAT).encode(),
           lambda path: known_units(path.with_name("units.jsonl")), FLAT, lines=False),
    Reader("unit_lm.json", json.dumps(FLAT).encode(), lambda path: collapses(path.parent), FLAT, lines=False),
    Reader("skipped.jsonl", lines({"file": "a", "reason": "x"}, {"file": "b", "reason": "y"}),
           lambda path: SkippedFiles(path, 0.5), [{"file": "a", "reason": "x"}]),
    Reader("validation.jsonl", lines(ROW, {**ROW, "step": 2}), lambda path: ValidationFile(path.parent).rows(), [ROW]),
    Reader("metrics.jsonl", lines(ROW, {**ROW, "step": 2}), metrics, [ROW, ROW]),
    Reader("curve.jsonl", lines(POINT, {**POINT, "step": 2}), read_curve, [POINT, POINT]),
    Reader("features.npy", stored(lambda file: np.save(file, FRAMES.numpy())), load_features, lines=False),
    Reader("features.pt", stored(lambda file: torch.save(FRAMES, file)), load_features, lines=False),
    Reader("kmeans.safetensors",
           save({"centroids": FRAMES}, {"format": "spidr_hf k-means", "provenance": '{"layer": 6}'}),
           load_kmeans, lines=False),
]  # fmt: skip


def invented(reader: Reader, chance: random.Random) -> bytes:
    """The good file with another value, damaged, cut off, or something else altogether."""
    match chance.randrange(10):
        case 0 | 1 | 2 if reader.tree is not None:
            tree = with_other_values(reader.tree, chance)
            rows = tree if isinstance(tree, list) and reader.lines else [tree]
            text = "\n".join(as_json(row, chance) for row in rows)
            return NUMBER.sub(
                lambda found: found[0] if chance.random() < 0.9 else chance.choice(NUMBERS), text
            ).encode()
        case 3 | 4 if b"\0" not in reader.good:
            text = reader.good.decode()
            places = list(NUMBER.finditer(text))
            if not places:
                return reader.good
            place = chance.choice(places)
            return (text[: place.start()] + chance.choice(NUMBERS) + text[place.end() :]).encode()
        case 5:
            return reader.good[: chance.randrange(len(reader.good))]
        case 6:
            return chance.choice((
                b"", b"\n", b"null\n", b"[]", b"{}", b"1", b'"x"', b"[" * 50_000, b'{"a":' * 50_000, b"\0" * 300,
                b"\xff\xfe\0", b"\xef\xbb\xbf", reader.good.replace(b"\n", b"\r\n"), reader.good + b"\0" * 50,
                reader.good * 2, b"\xef\xbb\xbf" + reader.good, chance.randbytes(300),
                json.dumps(chance.choice([v for v in VALUES if not isinstance(v, int)])).encode(),
            ))  # fmt: skip
        case 7:
            kept = reader.good.split(b"\n")
            chance.shuffle(kept)
            return b"\n".join(kept)
        case _:
            return damaged(reader.good, chance)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_read_or_refused_in_one_line(reader: Reader, seed: int, tmp_path: Path) -> None:
    chance, path = random.Random(f"{reader.name} {seed}"), tmp_path / reader.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(reader.good)
    if reader.name != "manifest.txt":
        reader.read(path)
    for _ in range(80):
        content = invented(reader, chance)
        path.write_bytes(content)
        start = time.process_time()
        try:
            reader.read(path)
        except (ValueError, RunFolderError) as error:
            message = describe(error)  # as commands say it
            assert message.isprintable() and len(message) < 2500, (message, content)
            # Fields of a configuration are known by their names.
            named = path.name in message or "config" in reader.name or "holds another run" in message
            assert named, (message, content)
            if reader.lines:
                assert re.search(rf"line \d|utterance \d|{WHOLE}", message), (message, content)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} of {content[:2000]!r}") from error
        assert time.process_time() - start < SECONDS, content
