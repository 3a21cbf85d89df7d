"""The documents besides README: what they point at is there, and their Python runs."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor
from spidr_hf.data.sections import DataSection
from spidr_hf.hub.spidr_names import MODEL_SECTION_FIELDS
from spidr_hf.pretraining.config import RunSection
from spidr_hf.training.schedules import OptimizerSection

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "examples/README.md",
        "examples/migration.md",
        "examples/reproducing.md",
        "examples/data/README.md",
    )
]
FOLDERS = ("spidr_hf", "conversion", "examples", "tests", "model_cards")


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text(document))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    assert not [link for link in local if not (document.parent / link).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(document):
    names = re.findall(rf"\b((?:{'|'.join(FOLDERS)})/[\w./*-]*\w)", re.sub(r"https?://\S+", "", text(document)))
    assert not [name for name in names if not list(ROOT.glob(name))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_that_are_named_exist(document):
    """`--name` is an option of some command here or of accelerate's launcher, `--section.field` a field of configs."""
    code = "\n".join(
        text(path) for folder in ("spidr_hf", "conversion", "examples") for path in ROOT.glob(f"{folder}/**/*.py")
    )
    files = ("data/sections.py", "data/masking.py", "pretraining/config.py", "training/schedules.py")
    fields_of_configs = "".join(text(ROOT / "spidr_hf" / name) for name in files)
    launcher = {
        "--config_file",
        "--machine_rank",
        "--main_process_ip",
        "--multi_gpu",
        "--num_machines",
        "--num_processes",
    }
    options = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", text(document))) - launcher - {"--help", "--section.field"}
    for option in options:
        _, dot, field = option.partition(".")
        assert re.search(rf"\b{field}\b", fields_of_configs) if dot else f'"{option}"' in code, option


def test_contributing_names_what_the_code_has():
    """Names of functions, constants and tests in its walks are found in the files that it names beside them."""
    for section in text(ROOT / "CONTRIBUTING.md").split("\n## ")[2:]:
        files = [ROOT / name for name in re.findall(r"`((?:spidr_hf|conversion|tests)/[\w./]+\.py)`", section)]
        files += ROOT.glob("tests/conversion/*.py")
        code = "\n".join(map(text, files))
        names = re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)`", section)
        # What the walk adds, words of the file formats, and types that are defined elsewhere.
        new = {"ema_schedule", "case", "SpidrConfig", "SpidrForPretraining", "init_ckpt", "weights_only"}
        missing = [name for name in names if name not in new and name.rpartition(".")[2] not in code]
        assert not missing, missing


def test_python_of_the_migration_page_runs(tmp_path, monkeypatch):
    model = tiny_model(num_hidden_layers=12, num_codebooks=8)
    model.save_pretrained(tmp_path / "facebook" / "spidr-base")
    SpidrFeatureExtractor().save_pretrained(tmp_path / "facebook" / "spidr-base")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", text(ROOT / "examples" / "migration.md"), re.M | re.S)
    assert blocks
    for code in blocks:
        exec(compile(code, "migration.md", "exec"), {})


def test_options_of_the_reproducing_page_exist():
    sections = {"run": RunSection, "data": DataSection, "optimizer": OptimizerSection}
    known = {f"{name}.{field.name}" for name, section in sections.items() for field in fields(section)}
    known |= {f"model.{name}" for name in MODEL_SECTION_FIELDS}
    named = set(re.findall(r"\b((?:run|data|optimizer|model)\.\w+)", text(ROOT / "examples" / "reproducing.md")))
    assert len(named) > 3 and named <= known


def test_expected_numbers_are_those_of_the_configs():
    """The page, the headers of the configs and the model cards say the same."""
    page = text(ROOT / "examples" / "reproducing.md")
    header = text(ROOT / "examples" / "configs" / "spidr-base-librispeech.toml").partition("[run]")[0]
    for number in ("5.57", "2.1", "1.2", "1.6", "1.00", "1.40", "195 and 210", "3.32"):
        assert number in page and number in header, number
    for number in ("23 h", "15 h", "29 h", "19 h"):
        assert number in page and number in header.replace("\n#", ""), number
    card = text(ROOT / "model_cards" / "spidr-base.toml")
    for number in ("3.32", "3.22", "2.99", "2.90"):
        assert number in page and number in card, number
