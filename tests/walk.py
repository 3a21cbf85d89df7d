"""A copy of the repository to type a document's commands in, and the commands of a document."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile
import torch

from spidr_hf import SpidrForPretraining
from spidr_hf.conversion.sources import published
from spidr_hf.conversion.spidr_format import config_to_spidr, to_spidr
from spidr_hf.data.manifests import read_manifest

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "spidr_hf",
    "conversion",
    "examples",
    "model_cards",
    "tests",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "LICENSE",
)
STEPS = 3  # that a pretraining config of the copy runs for


def copy_repository(folder: Path, *, shortened: bool = True) -> Path:
    """The repository; `shortened`: its short pretraining configs run for `STEPS` logged steps."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for config in (folder / "examples" / "configs").glob("*.toml") if shortened else ():
        text = config.read_text()
        if int(re.search(r"^max_steps = (\d+)", text, re.M)[1]) <= 10_000:
            text = re.sub(r"^max_steps = .*", f"max_steps = {STEPS}", text, flags=re.M)
            config.write_text(re.sub(r"^log_interval = .*", "log_interval = 1", text, flags=re.M))
    return folder


def own_environment(folder: Path) -> dict[str, str]:
    """Variables of a new environment in `folder`, for pip to install into, which sees the packages of this one."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(f"import sys; sys.path.insert(0, {sysconfig.get_path('purelib')!r})\n")
    path = [folder / "bin", Path(sys.executable).parent, *os.environ["PATH"].split(os.pathsep)]
    return os.environ | {
        "PATH": os.pathsep.join(map(str, path)),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the other way round
    }


def build_wheel(folder: Path) -> Path:
    """Builds the sdist and from it the wheel, which so proves the sdist, too; both lie in the folder returned."""
    for name in ("build", "setuptools"):
        pytest.importorskip(name)
    source = copy_repository(folder / "source", shortened=False)
    line = f"{shlex.quote(sys.executable)} -m build --no-isolation --outdir ../dist ."
    type_in(line, source, {name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    return folder / "dist"


def type_in(line: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Run a command line as a person in `folder` would; it must end well. Returns what it printed."""
    result = subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr


def command_lines(block: str) -> list[str]:
    """The command lines of a bash block, without lines of comments; those that end in a backslash are joined."""
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def write_speech(path: Path) -> None:
    """The shortest utterance that ships, as a file."""
    manifest = read_manifest(ROOT / "examples" / "data" / "manifest.csv")
    soundfile.write(path, manifest.read(int(manifest.num_samples.argmin())), 16_000)


def write_checkpoint(path: Path, model: SpidrForPretraining) -> None:
    """A checkpoint of SpidR's own code, with its config.json."""
    torch.save({"model": to_spidr(model.state_dict())}, path)
    path.with_name("config.json").write_text(json.dumps(config_to_spidr(model.config)))


@contextmanager
def serve_checkpoint(folder: Path, model: SpidrForPretraining) -> Iterator[str]:
    """Address of a server that has `model` where the published spidr-base lies; a mirror for the converter."""
    file = folder / published()["spidr-base"]["source"]["url"].split("/", 3)[3]
    file.parent.mkdir(parents=True)
    write_checkpoint(file, model)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


__all__ = [
    "COPIED",
    "ROOT",
    "STEPS",
    "build_wheel",
    "command_lines",
    "copy_repository",
    "own_environment",
    "serve_checkpoint",
    "type_in",
    "write_checkpoint",
    "write_speech",
]
