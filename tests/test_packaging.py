"""The wheel: complete, and enough without the repository. Version, changelog and citation agree."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import soundfile
import yaml
from huggingface_hub import ModelCard
from packaging.version import Version
from tiny import tiny_model
from walk import ROOT, build_wheel

import spidr_hf
from spidr_hf import SpidrFeatureExtractor
from spidr_hf.data.manifests import read_manifest

SHIPPED = ("spidr_hf", "conversion", "model_cards", "examples")  # folders that the wheel holds
FIXTURE = ROOT / "tests" / "fixtures" / "parity" / "spidr-tiny" / "checkpoint.pt"

# Run with nothing of the repository in reach: every module, the pipeline, the Auto classes.
SCRIPT = """
import importlib, pathlib, pkgutil, sys
import spidr_hf
home = pathlib.Path(spidr_hf.__file__).parent
assert home.is_relative_to(sys.prefix), home
optional = {"triton_spidr", "__main__"}  # needs a GPU's package; is the command
for module in pkgutil.walk_packages([str(home)], "spidr_hf."):
    if module.name.rpartition(".")[2] not in optional:
        importlib.import_module(module.name)
from transformers import AutoFeatureExtractor, AutoModel, pipeline
import soundfile
result = pipeline("speech-to-units", model="model", layer=4, deduplicate=True, device="cpu")("speech.wav")
waveform, rate = soundfile.read("speech.wav")
inputs = AutoFeatureExtractor.from_pretrained("model")(waveform, sampling_rate=rate, return_tensors="pt")
frames = AutoModel.from_pretrained("model").get_intermediate_outputs(**inputs)[3].shape[1]
assert frames == sum(result["durations"]) > 50
converted = AutoModel.from_pretrained("converted")
from spidr_hf.hub.card import CARDS, trained_card
assert CARDS.is_relative_to(home) and "## Origin" in trained_card(converted.config, "Trained.", "")
print("works", spidr_hf.__version__)
"""


def test_version_is_said_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "spidr_hf.__version__"}
    assert version("spidr_hf") == spidr_hf.__version__


def test_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == spidr_hf.__version__
    assert headings == sorted(headings, key=Version, reverse=True)


def test_citation_names_both_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "spidr_hf" and citation["license"] == "MIT"
    assert citation["type"] == "software" and citation["message"] and citation["authors"]
    papers = {identifier["value"] for paper in citation["references"] for identifier in paper["identifiers"]}
    assert papers == {"arXiv:2512.20308", "arXiv:2305.10005"}
    bibliography = (ROOT / "model_cards" / "citations.bib").read_text(encoding="utf-8")
    for paper in citation["references"]:
        assert paper["type"] == "article" and paper["title"] in re.sub(r"[{}]", "", bibliography)
        for author in paper["authors"]:
            assert author["family-names"] in bibliography and author["given-names"] in bibliography


def packaged_files() -> set[str]:
    """What a wheel must hold of the repository, by the names it has there."""
    suffixes = {".py", ".typed", ".toml", ".bib", ".yaml", ".sbatch"}
    files = {path for folder in SHIPPED for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}
    files |= {*(ROOT / "model_cards").glob("*.md"), *(ROOT / "examples" / "data").glob("*.*")}
    names = {str(path.relative_to(ROOT)) for path in files if "s3prl" not in path.parts}  # that needs a clone of s3prl
    return {name if name.startswith("spidr_hf/") else f"spidr_hf/{name}" for name in names}


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(tmp_path):
    dist = build_wheel(tmp_path)
    (wheel,) = dist.glob("*.whl")
    (sdist,) = dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == packaged_files()
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "conversion/sources.py", "model_cards/template.md"} <= inside

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies are those of this environment, whose own links to the repository (.pth files) are not followed.
    (own,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (own / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")

    work = tmp_path / "work"
    tiny_model().save_pretrained(work / "model")
    SpidrFeatureExtractor().save_pretrained(work / "model")
    soundfile.write(work / "speech.wav", read_manifest(ROOT / "examples" / "data" / "manifest.csv").read(0), 16_000)
    command = tmp_path / "venv" / "bin" / "spidr-hf"
    run(command, "convert", FIXTURE, "converted", cwd=work)
    assert ModelCard.load(work / "converted" / "README.md").data.library_name == "transformers"
    assert f"works {spidr_hf.__version__}" in run(python, "-c", SCRIPT, cwd=work)
    shipped = work / "shipped"
    shipped.symlink_to(next((tmp_path / "venv").glob("lib/python*/site-packages/spidr_hf/examples")))
    run(command, "extract-units", "model", "shipped/data/manifest.csv", "units", "--layers", "4", cwd=work)
    run(command, "evaluate-units", "units", "shipped/data/alignments.jsonl", "--json", "scores.json", cwd=work)
    assert 0 < json.loads((work / "scores.json").read_text())["layers"]["4"]["pnmi"] < 1
    options = ["--optimizer.max_steps", "2", "--run.tracker", "none", "--data.num_workers", "0"]
    config = [
        "--config",
        "shipped/configs/demo.toml",
        "--output-dir",
        "run",
        "--data.manifest",
        "shipped/data/manifest.csv",
    ]
    run(command, "pretrain", *config, *options, cwd=work)
    assert (work / "run" / "final" / "model.safetensors").exists()


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout
