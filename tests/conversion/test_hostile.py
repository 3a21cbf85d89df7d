"""Files made to harm or confuse end the command with one line, soon, and in little memory; nothing is written."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hostile
import pytest
import torch

from spidr_hf.conversion import convert_checkpoint, export_checkpoint
from spidr_hf.conversion.checkpoints import read_pretraining_checkpoint
from spidr_hf.conversion.errors import ConversionError

ROOT = Path(__file__).resolve().parents[2]
FILES = hostile.files()
SECONDS = 5  # of the processor, beyond the imports
GIGABYTE = 1 << 30


def one_line(error: str, said: str) -> None:
    assert error.startswith("error: ") and error.count("\n") == 1, error[:500]
    assert error.strip().isprintable() and len(error) < 2500
    assert re.search(said, error), error[:500]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., None]:
    """Runs a command that has to refuse its input in words like these."""

    def run(main: Callable[[list[str]], int], arguments: list[object], said: str) -> None:
        capsys.readouterr()
        before = sorted(tmp_path.rglob("*"))
        start = time.process_time()
        code = main([str(argument) for argument in arguments])
        assert time.process_time() - start < SECONDS
        assert code == 1
        one_line(capsys.readouterr().err, said)
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good model folder."""
    convert_checkpoint.convert(str(hostile.TINY / "checkpoint.pt"), str(tmp_path / "model"))
    return tmp_path / "model"


@pytest.mark.parametrize("name", FILES)
def test_checkpoints(name: str, tmp_path: Path, refused) -> None:
    make, said = FILES[name]
    make(tmp_path / "x.pt")
    refused(convert_checkpoint.main, [tmp_path / "x.pt", tmp_path / "o", "--objective", "dinosr"], said)
    with pytest.raises(ConversionError):  # as `run.init_ckpt` reads it
        read_pretraining_checkpoint(tmp_path / "x.pt", objective="dinosr")


def test_configurations_beside_a_checkpoint(tmp_path: Path, refused) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes((hostile.TINY / "checkpoint.pt").read_bytes())
    for _, text, said in hostile.configs():
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        refused(convert_checkpoint.main, [checkpoint, tmp_path / "o"], said)


def test_configurations_given_by_name(tmp_path: Path, refused) -> None:
    checkpoint = hostile.TINY / "checkpoint.pt"
    for kind in ("json", "toml"):
        path = tmp_path / f"given.{kind}"
        refused(convert_checkpoint.main, [checkpoint, tmp_path / "o", "--config", path], "cannot be read")
    for text in ("a = inf", "a = nan", "a = 1e400", "a = [" * 100_000, "a =", "a" + ".a" * 600_000 + " = 1"):
        path.write_text(text)
        refused(convert_checkpoint.main, [checkpoint, tmp_path / "o", "--config", path], "configuration")


def test_settings_of_fairseq(tmp_path: Path, refused) -> None:
    checkpoint = torch.load(hostile.FAIRSEQ, weights_only=True)
    good = dict(checkpoint["cfg"]["model"])
    for _, changes, said in hostile.fairseq_settings():
        checkpoint["cfg"]["model"] = {**good, **changes}
        torch.save(checkpoint, tmp_path / "x.ckpt")
        refused(convert_checkpoint.main, [tmp_path / "x.ckpt", tmp_path / "o"], said)


def test_configurations_of_model_folders(folder: Path, tmp_path: Path, refused) -> None:
    config = json.loads((folder / "config.json").read_text())
    for name, changes, said in hostile.folder_configs():
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        if not said:  # of no matter for the weights: taken or refused
            assert export_checkpoint.main([str(folder), str(tmp_path / "out" / "x.pt")]) in (0, 1), name
            for path in (tmp_path / "out").glob("*"):
                path.unlink()
        else:
            refused(export_checkpoint.main, [folder, tmp_path / "x.pt"], said)
    for _, text, said in hostile.configs():
        if "{" not in text or "model_type" not in text:
            (folder / "config.json").write_text(text, errors="surrogateescape")
            refused(export_checkpoint.main, [folder, tmp_path / "x.pt"], f"{said}|not hold a model")


def test_indexes_of_model_folders(folder: Path, tmp_path: Path, refused) -> None:
    for _, text, said in hostile.indexes():
        (folder / "model.safetensors.index.json").write_text(text)
        refused(export_checkpoint.main, [folder, tmp_path / "x.pt"], said)


def test_weights_of_model_folders(folder: Path, tmp_path: Path, refused) -> None:
    for _, data, said in hostile.safetensors_files(tmp_path):
        (folder / "model.safetensors").write_bytes(data)
        refused(export_checkpoint.main, [folder, tmp_path / "x.pt"], said)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_each_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    """Time and memory as a user sees them, beyond what the imports take."""
    FILES[name][0](tmp_path / "x.pt")
    measure = (
        "import resource, sys, time\n"
        "from spidr_hf.conversion import convert_checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "start, before = time.process_time(), peak()\n"
        "code = convert_checkpoint.main(sys.argv[1:])\n"
        "print(code, time.process_time() - start, peak())\n"
    )
    command = [sys.executable, "-c", measure, str(tmp_path / "x.pt"), str(tmp_path / "o"), "--objective", "dinosr"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    one_line(result.stderr, FILES[name][1])
    code, seconds, peak = map(float, result.stdout.split())
    assert code == 1 and seconds < SECONDS and peak < GIGABYTE
    assert not (tmp_path / "o").exists()
