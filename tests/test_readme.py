"""What README.md tells people to type works: every block in it runs, in order, in a copy of the repository.

Downloads come from a server on this machine, the checkpoint and the data are small. `make` targets are left out; they
run this test.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile
import torch
from tiny import tiny_model

from conversion.sources import MIRROR_VARIABLE, published
from conversion.spidr_format import config_to_spidr, to_spidr
from spidr_hf import SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.manifests import read_manifest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COPIED = (
    "spidr_hf",
    "conversion",
    "examples",
    "model_cards",
    "pyproject.toml",
    "constraints.txt",
    "README.md",
    "LICENSE",
)


def commands(block: str) -> list[str]:
    """The command lines of a bash block, without `make` and comments."""
    lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
    return [line for line in lines if shlex.split(line, comments=True)[0] != "make"]


@pytest.fixture(scope="module")
def small_base() -> SpidrForPretraining:
    """As many layers and codebooks as spidr-base, narrow ones."""
    return tiny_model(num_hidden_layers=12, num_codebooks=8)


def write_speech(path: Path) -> None:
    manifest = read_manifest(ROOT / "examples" / "data" / "manifest.csv")
    soundfile.write(path, manifest.read(int(manifest.num_samples.argmin())), 16_000)


def write_checkpoint(path: Path, model: SpidrForPretraining) -> None:
    """A checkpoint of SpidR's own code, with its config.json."""
    torch.save({"model": to_spidr(model.state_dict())}, path)
    path.with_name("config.json").write_text(json.dumps(config_to_spidr(model.config)))


def test_only_python_and_shell_blocks_and_the_files_they_name():
    assert BLOCKS and {language for language, _ in BLOCKS} == {"python", "bash"}
    scripts = set(re.findall(r"(?:examples|conversion)/[\w/]+\.(?:py|toml)", README))
    assert scripts and not [script for script in scripts if not (ROOT / script).exists()]


def test_published_checkpoints_are_those_of_the_converter():
    assert set(re.findall(r"^\| `([\w-]+)` \|", README, re.M)) == set(published())


def test_python_blocks(small_base, tmp_path, monkeypatch):
    small_base.save_pretrained(tmp_path / "facebook" / "spidr-base")
    SpidrFeatureExtractor().save_pretrained(tmp_path / "facebook" / "spidr-base")
    write_speech(tmp_path / "speech.wav")
    monkeypatch.chdir(tmp_path)
    for number, code in enumerate(code for language, code in BLOCKS if language == "python"):
        exec(compile(code, f"README.md, Python block {number + 1}", "exec"), {})


@pytest.fixture
def server(small_base, tmp_path) -> Iterator[str]:
    """Address of a server that has a checkpoint where the published one lies."""
    folder = tmp_path / "served"
    file = folder / published()["spidr-base"]["source"]["url"].split("/", 3)[3]
    file.parent.mkdir(parents=True)
    write_checkpoint(file, small_base)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


@pytest.fixture
def copy(small_base, tmp_path) -> Path:
    """A copy of the repository with the files that README takes for granted, and a demo of three steps."""
    folder = tmp_path / "copy"
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    config = folder / "examples" / "configs" / "demo.toml"
    shortened, changes = re.subn(r"^max_steps = .*", "max_steps = 3", config.read_text(), flags=re.M)
    assert changes == 1
    config.write_text(shortened)
    write_speech(folder / "speech.wav")
    (folder / "downloads").mkdir()
    write_checkpoint(folder / "downloads" / "checkpoint.pt", small_base)
    return folder


@pytest.fixture
def environment(tmp_path, server) -> dict[str, str]:
    """An environment of its own for pip to install into, which sees the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (own,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"import sys; sys.path.insert(0, {sysconfig.get_path('purelib')!r})\n")
    path = [tmp_path / "venv" / "bin", Path(sys.executable).parent, *os.environ["PATH"].split(os.pathsep)]
    return os.environ | {
        "PATH": os.pathsep.join(map(str, path)),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the other way round
        MIRROR_VARIABLE: server,
    }


@pytest.mark.slow
def test_the_whole_walk(copy, environment):
    for language, block in BLOCKS:
        lines = commands(block) if language == "bash" else [f"python -c {shlex.quote(block)}"]
        for line in lines:
            result = subprocess.run(["bash", "-c", line], cwd=copy, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    exported = torch.load(copy / "exported.pt", weights_only=True)
    original = torch.load(copy / "downloads" / "checkpoint.pt", weights_only=True)["model"]
    exported = exported.get("model", exported)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    assert (copy / "runs" / "mine" / "final" / "config.json").exists()
    assert (copy / "units" / "6" / "units.jsonl").exists() and (copy / "features" / "6").is_dir()
