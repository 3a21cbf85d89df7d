"""Model cards: what the Hub reads from them, and what they may and may not claim."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from conversion.cards import write_card
from conversion.sources import CARDS, published
from spidr_hf import SpidrConfig
from spidr_hf.model_card import model_card

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


def all_cards() -> dict[str, str]:
    """Every kind of card: of published checkpoints, of one that is not known, of a model that was trained here."""
    unknown = write_card(SpidrConfig(), model_id="my-model", origin="step_9.pt")
    trained = model_card(SpidrConfig(), "It was trained.", "[run]\n")
    return {**{name: card(name) for name in NAMES}, "unknown": unknown, "trained": trained}


@pytest.mark.parametrize("name", [*sorted(NAMES), "unknown", "trained"])
def test_metadata_keeps_the_rules_of_the_hub(name: str) -> None:
    """What the Hub's own validation, which needs the network, refuses or warns of."""
    content = all_cards()[name]
    assert content.startswith("---\n") and content.count("\n---\n") == 1
    metadata = ModelCard(content).data.to_dict()
    assert ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n").data.to_dict() == metadata
    assert set(metadata) <= {
        *("library_name", "pipeline_tag", "tags", "language", "datasets"),
        *("license", "license_name", "license_link"),
    }
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "feature-extraction"
    assert all(isinstance(tag, str) and 0 < len(tag) <= 50 for tag in metadata["tags"])
    for language in metadata.get("language", ()):
        assert isinstance(language, str) and re.fullmatch(r"[a-z]{2,3}|multilingual", language)
    for dataset in metadata.get("datasets", ()):
        validate_repo_id(dataset)
    assert metadata.get("license") in {None, "other", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}  # names of the Hub's list
    if metadata.get("license") == "other":
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", metadata["license_name"])
        assert metadata["license_link"].startswith("https://")
    if name in NAMES:
        validate_repo_id(published()[name]["hub_id"])


def test_code_in_cards_is_python() -> None:
    for block in re.findall(r"```python\n(.*?)```", card("spidr-base"), re.S):
        compile(block, str(Path("README.md")), "exec")
