"""Model cards: what the Hub reads from them, and what they may and may not claim."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from conversion.cards import write_card
from conversion.sources import CARDS, published
from spidr_hf import SpidrConfig

NAMES = {"spidr-base", "dinosr-base", "dinosr-original", "spidr-vp20", "spidr-mmsulab"}
LICENSES = {
    "spidr-base": "cc-by-nc-4.0",
    "dinosr-base": "cc-by-nc-4.0",
    "dinosr-original": "other",
    "spidr-vp20": "cc-by-nc-sa-4.0",
    "spidr-mmsulab": "other",
}


def card(name: str) -> str:
    data = published()[name]
    config = SpidrConfig(objective=data["source"]["objective"])
    return write_card(config, model_id=data["hub_id"], origin="https://example.org/a.pt", update_count=9, card=data)


def test_every_published_checkpoint_has_a_card() -> None:
    assert set(published()) == NAMES
    assert {path.name for path in CARDS.iterdir()} == {f"{name}.toml" for name in NAMES} | {
        "template.md",
        "citations.bib",
    }


@pytest.mark.parametrize("name", sorted(NAMES))
def test_cards_of_published_checkpoints(name: str) -> None:
    text, data = card(name), published()[name]
    metadata = ModelCard(text).data.to_dict()
    assert metadata["license"] == LICENSES[name]
    assert ("license_name" in metadata) == ("license_link" in metadata) == (LICENSES[name] == "other")
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "feature-extraction"
    assert data["source"]["objective"] in metadata["tags"]
    assert metadata["language"] == data["language"] and metadata["datasets"] == data["datasets"]
    assert "import spidr_hf" in text and "trust_remote_code=True" in text and data["hub_id"] in text
    assert "Layers count from 1" in text and "layer 5 or 6" in text and "before* the residual" in text
    for section in ("Intended use", "Limitations", "Training data", "Results", "Licence", "Origin", "Citation"):
        assert f"## {section}\n" in text
    for paper in data["papers"]:
        assert f"eprint = {{{paper}}}" in text
    assert not re.search(r"\{\{|\{%|None", text.partition("## Citation")[0])


def test_results_name_their_source() -> None:
    assert "3.32" in card("spidr-base") and "2.99" in card("spidr-base")
    assert "5.01" in card("dinosr-base")
    for name in NAMES:
        results = card(name).partition("## Results")[2].partition("## ")[0]
        assert "arxiv.org/abs/" in results
    for name in ("dinosr-original", "spidr-vp20", "spidr-mmsulab"):
        assert "|" not in card(name).partition("## Results")[2].partition("## ")[0]


def test_an_unknown_checkpoint_claims_nothing() -> None:
    config = SpidrConfig(objective="dinosr", num_hidden_layers=4, num_codebooks=2)
    text = write_card(config, model_id="my-model", origin="step_9.pt")
    metadata = ModelCard(text).data.to_dict()
    assert "license" not in metadata and "language" not in metadata and "datasets" not in metadata
    assert "layers 3 to 4" in text and "`step_9.pt`" in text
    assert "## Results" not in text and "## Training data" not in text
    assert "eprint = {2305.10005}" in text


def test_code_in_cards_is_python() -> None:
    for block in re.findall(r"```python\n(.*?)```", card("spidr-base"), re.S):
        compile(block, str(Path("README.md")), "exec")
