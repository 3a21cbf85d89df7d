"""What README.md tells people to type works: every block in it runs, in order, in a copy of the repository.

Downloads come from a server on this machine, the checkpoint and the data are small. `make` targets are left out; they
run this test.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from walk import ROOT, command_lines, copy_repository, own_environment, serve_checkpoint, type_in, write_speech

from spidr_hf import SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.conversion.sources import MIRROR_VARIABLE, published

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def small_base() -> SpidrForPretraining:
    """As many layers and codebooks as spidr-base, narrow ones."""
    return tiny_model(num_hidden_layers=12, num_codebooks=8)


def test_only_python_and_shell_blocks_and_the_files_they_name():
    assert BLOCKS and {language for language, _ in BLOCKS} == {"python", "bash"}
    scripts = set(re.findall(r"(?:examples|conversion)/[\w/]+\.(?:py|toml)", README))
    assert scripts and not [script for script in scripts if not (ROOT / script).exists()]


def test_published_checkpoints_are_those_of_the_converter():
    assert set(re.findall(r"^\| `([\w-]+)` \|", README, re.M)) == set(published())


def test_python_blocks(small_base, tmp_path, monkeypatch):
    small_base.save_pretrained(tmp_path / "facebook" / "spidr-base")
    SpidrFeatureExtractor().save_pretrained(tmp_path / "facebook" / "spidr-base")
    write_speech(tmp_path / "speech.flac")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(code for language, code in BLOCKS if language == "python"):
        exec(compile(code, f"README.md, Python block {number + 1}", "exec"), {})


@pytest.fixture
def server(small_base, tmp_path) -> Iterator[str]:
    with serve_checkpoint(tmp_path / "served", small_base) as address:
        yield address


@pytest.fixture
def copy(tmp_path) -> Path:
    return copy_repository(tmp_path / "copy")


@pytest.mark.slow
def test_the_whole_walk(copy, server, tmp_path):
    environment = own_environment(copy / ".venv") | {MIRROR_VARIABLE: server}
    for language, block in BLOCKS:
        lines = command_lines(block) if language == "bash" else [f"python -c {shlex.quote(block)}"]
        for line in lines:
            if not line.startswith("make "):
                type_in(line, copy, environment)
    (served,) = (tmp_path / "served").rglob("*.pt")
    exported, original = (torch.load(path, weights_only=True)["model"] for path in (copy / "exported.pt", served))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    weights = [(copy / name / "model.safetensors").read_bytes() for name in ("facebook/spidr-base", "my-model")]
    assert weights[0] == weights[1]
    assert (copy / "runs" / "mine" / "final" / "config.json").exists()
    assert (copy / "units" / "6" / "units.jsonl").exists() and (copy / "features" / "6").is_dir()
