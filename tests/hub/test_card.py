"""Model cards: what the Hub reads from them, what they may and may not claim, and that what they tell people works."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from tiny import tiny_config, tiny_model
from transformers import Wav2Vec2Processor

from spidr_hf import (
    SpidrConfig,
    SpidrFeatureExtractor,
    SpidrForAudioFrameClassification,
    SpidrForCTC,
    SpidrForSequenceClassification,
    SpidrForXVector,
)
from spidr_hf.conversion.sources import published
from spidr_hf.finetuning.ctc import make_tokenizer
from spidr_hf.hub.card import (
    CARDS,
    add_results,
    base_model,
    converted_card,
    evaluation_results,
    finetuned_card,
    trained_card,
)

ADAPT = {f"spidr-adapt-{kind}" for kind in ("ssl", "ssl-reptile", "ssl-foblo", "sl", "sl-reptile", "sl-foblo")}
NAMES = {"spidr-base", "dinosr-base", "dinosr-original", "spidr-vp20", "spidr-mmsulab"} | ADAPT
LICENSES = {
    "spidr-base": "cc-by-nc-4.0",
    "dinosr-base": "cc-by-nc-4.0",
    "dinosr-original": "other",
    "spidr-vp20": "cc-by-nc-sa-4.0",
    "spidr-mmsulab": "other",
    **dict.fromkeys(ADAPT, "cc-by-nc-4.0"),
}
ADAPT_ABX = ("4.33", "4.19", "4.01", "3.88", "3.76", "3.80")
HEADS = {
    "ctc": SpidrForCTC,
    "utterance": SpidrForSequenceClassification,
    "speaker": SpidrForXVector,
    "frame": SpidrForAudioFrameClassification,
}
METRICS = {"ctc": "per", "utterance": "accuracy", "speaker": "eer", "frame": "accuracy"}
SECTIONS = ("Use", "Intended use", "Limitations", "Training data", "Licence", "Origin", "Citation")


def card(name: str) -> str:
    data = published()[name]
    config = SpidrConfig(objective=data["source"]["objective"])
    return converted_card(config, model_id=data["hub_id"], origin="https://example.org/a.pt", update_count=9, card=data)


def finetuned(task: str, **description: object) -> str:
    about = {"model": "facebook/spidr-base", "task": task, "units": "phones", "random_encoder": False} | description
    scores = {METRICS[task]: 0.25, "loss": 1.5}
    results = {"steps": 9, "best_step": 6, "scores": {"validation": {"utterances": 3, **scores}}}
    return finetuned_card(tiny_config(), about, results, {"steps": 9, "lr": 1e-4})


def all_cards() -> dict[str, str]:
    """Every kind of card: of published checkpoints, of one that is not known, of models that were trained here."""
    unknown = converted_card(SpidrConfig(), model_id="my-model", origin="step_9.pt")
    trained = trained_card(SpidrConfig(), "It was trained.", "[run]\n")
    return {
        **{name: card(name) for name in NAMES},
        "unknown": unknown,
        "trained": trained,
        **{task: finetuned(task) for task in HEADS},
    }


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_every_published_checkpoint_has_a_card() -> None:
    assert set(published()) == NAMES
    assert {path.name for path in CARDS.iterdir()} == {f"{name}.toml" for name in NAMES} | {
        "template.md",
        "citations.bib",
    }


@pytest.mark.parametrize("name", [*sorted(NAMES), "unknown", "trained", *HEADS])
def test_cards_are_complete(name: str) -> None:
    text = all_cards()[name]
    assert [title for title in re.findall(r"^## (.*)$", text, re.M) if title in SECTIONS] == list(SECTIONS)
    assert ("## Which layer\n" in text) == (name not in HEADS) and ("## Results\n" in text) == (
        name in NAMES | {*HEADS}
    )
    assert "import spidr_hf" in text and "trust_remote_code=True" in text
    assert "400 samples" in text and "20 ms" in text and "eprint = {" in text
    assert not re.search(r"\{\{|\{%|%\}|None|\n\n\n| \n", text.partition("## Citation")[0])


@pytest.mark.parametrize("name", sorted(NAMES))
def test_cards_of_published_checkpoints(name: str) -> None:
    text, data = card(name), published()[name]
    metadata = ModelCard(text).data.to_dict()
    assert metadata["license"] == LICENSES[name]
    assert ("license_name" in metadata) == ("license_link" in metadata) == (LICENSES[name] == "other")
    assert data["source"]["objective"] in metadata["tags"]
    assert metadata["language"] == data["language"] and metadata["datasets"] == data["datasets"]
    assert data["hub_id"] in text and "Say " not in text
    assert "Layers count from 1" in text and "layer 5 or 6" in text and "before* the residual" in text
    for paper in data["papers"]:
        assert f"eprint = {{{paper}}}" in text


def test_results_name_their_source() -> None:
    assert "3.32" in card("spidr-base") and "2.99" in card("spidr-base")
    assert "5.01" in card("dinosr-base")
    abx = dict(zip(("ssl", "ssl-reptile", "ssl-foblo", "sl", "sl-reptile", "sl-foblo"), ADAPT_ABX, strict=True))
    assert all(f": {error}, as the authors" in card(f"spidr-adapt-{kind}") for kind, error in abx.items())
    for name in NAMES:
        results = card(name).partition("## Results")[2].partition("## ")[0]
        assert "arxiv.org/abs/" in results
    for name in ("dinosr-original", "spidr-vp20", "spidr-mmsulab"):
        assert "|" not in card(name).partition("## Results")[2].partition("## ")[0]


def test_an_unknown_checkpoint_claims_nothing() -> None:
    config = SpidrConfig(objective="dinosr", num_hidden_layers=4, num_codebooks=2)
    text = converted_card(config, model_id="my-model", origin="step_9.pt")
    metadata = ModelCard(text).data.to_dict()
    assert "license" not in metadata and "language" not in metadata and "datasets" not in metadata
    assert "layers 3 to 4" in text and "`step_9.pt`" in text
    assert "Not known here." in text and "it is not known here" in text
    assert "eprint = {2305.10005}" in text


@pytest.mark.parametrize("objective", ["spidr", "dinosr"])
def test_the_card_of_a_trained_model(objective: str, not_installed) -> None:
    config = tiny_config(objective=objective)
    text = trained_card(config, "Pretrained for 7 updates.", "[run]\nx = 1\n", model_id="me/mine")
    assert "Pretrained for 7 updates." in text and "```toml\n[run]\nx = 1\n```" in text
    assert ("A SpidR model" if objective == "spidr" else "A DinoSR model") in text and "24 codewords" in text
    assert 'from_pretrained("me/mine")' in text and "this-repository" not in text
    assert "Trained with spidr_hf" in text and "Say here under which licence" in text


def test_the_card_of_a_fine_tuned_model(tmp_path) -> None:
    text = finetuned("ctc")
    assert "# Speech recognition (phones, CTC)" in text and "from `facebook/spidr-base`" in text
    assert (
        "| utterances of | number | loss | per (%) |\n|---|---|---|---|\n| validation | 3 | 1.500 | 25.00 |\n" in text
    )
    assert "Step 6 of 9" in text and '"lr": 0.0001' in text
    metadata = ModelCard(text).data.to_dict()
    assert metadata["base_model"] == "facebook/spidr-base" and "metrics" not in metadata
    assert ModelCard(finetuned("utterance")).data.metrics == ["accuracy"]
    # A folder is no model of the Hub, nor are random weights.
    assert ModelCard(finetuned("ctc", model=str(tmp_path))).data.base_model is None
    random = finetuned("ctc", random_encoder=True)
    assert ModelCard(random).data.base_model is None and "Fine-tuned from random weights." in random


def test_what_the_hub_is_told_of_results(tmp_path) -> None:
    def told(text: str) -> dict[tuple[str, str], float]:
        data = ModelCard(text).data
        return {(result.dataset_name, result.metric_name): result.metric_value for result in data.eval_results or ()}

    ctc = ModelCard(finetuned("ctc")).data.eval_results
    assert [(r.task_type, r.metric_type, r.metric_value) for r in ctc] == [("automatic-speech-recognition", "per", 25)]
    assert told(finetuned("frame")) == {("validation", "Accuracy (%)"): 25}
    # Every number that the Hub is told of a published checkpoint stands in the text, and those of the paper are told.
    for name in NAMES:
        results = card(name).partition("## Results")[2].partition("## ")[0]
        assert all(f" {value:.2f} " in results for value in told(card(name)).values())
        assert len(told(card(name))) == len(re.findall(r"(?<=\| )\d\.\d\d(?= \|)", results))
    assert told(card("spidr-base"))["LibriSpeech dev-clean", "ABX error of units within speakers (%), layer 6"] == 2.99
    assert ModelCard(card("spidr-base")).data.eval_results[0].source_url == "https://arxiv.org/abs/2512.20308"

    readme = tmp_path / "README.md"
    readme.write_text(text := trained_card(tiny_config(), "It was trained.", "[run]\n"))
    scores = {"pnmi": [0.1, 0.2], "per": [0.5, None], "loss": 1.0, "r_val": float("nan")}
    add_results(tmp_path, evaluation_results(scores, "dev", layer=3))
    expected = {("dev", "PNMI, layer 3"): 0.1, ("dev", "PNMI, layer 4"): 0.2}
    expected["dev", "Phone error rate (%), layer 3"] = 50
    assert told(readme.read_text()) == expected
    # The same score of the same data takes the place of the earlier one; the text stays as it is.
    add_results(tmp_path, evaluation_results({"pnmi": 0.3, "abx_within": 0.05}, "dev", layer=4))
    expected |= {("dev", "PNMI, layer 4"): 0.3, ("dev", "ABX error within speakers (%), layer 4"): 5}
    assert told(readme.read_text()) == expected
    assert readme.read_text().split("\n---\n", 1)[1].strip() == text.split("\n---\n", 1)[1].strip()
    for broken in ("a: [", "- a", "1: a", "model-index: 1"):
        readme.write_text(f"---\n{broken}\n---\n")
        with pytest.raises(ValueError, match=r"README.md: its metadata cannot be read"):
            add_results(tmp_path, [])
        assert base_model(tmp_path) is None
    readme.unlink()
    with pytest.raises(ValueError, match="has no card"):
        add_results(tmp_path, [])


def test_results_of_others_stay(tmp_path) -> None:
    """They may differ in what ours do not say: the kind of score where it has no name, or the split."""
    data = {"task_type": "automatic-speech-recognition", "dataset_type": "a/b", "dataset_name": "B"}
    theirs = [
        EvalResult(**data, metric_type="wer", metric_value=10),
        EvalResult(**data, metric_type="cer", metric_value=3),
        EvalResult(**data, metric_type="wer", metric_name="WER", metric_value=11, dataset_config="fr"),
        EvalResult(**data, metric_type="wer", metric_name="WER", metric_value=12, dataset_config="de"),
    ]
    metadata = ModelCardData(model_name="me/mine", eval_results=theirs)
    (tmp_path / "README.md").write_text(f"---\n{metadata.to_yaml()}\n---\n")
    add_results(tmp_path, evaluation_results({"pnmi": 0.5}, "dev"))
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert sorted(result.metric_value for result in found) == [0.5, 3, 10, 11, 12]


@pytest.mark.parametrize(
    "name",
    ["my: data", "it's", '"quoted"', "# one", "no", "1e3", "- a", "{a}", "ü 音", "a\nb", " a ", "&a *b %c @d !e"],
)
def test_data_of_any_name(tmp_path, name: str) -> None:
    (tmp_path / "README.md").write_text(trained_card(tiny_config(), "It was trained.", "[run]\n"))
    for score in (0.4, 0.5):
        add_results(tmp_path, evaluation_results({"pnmi": score}, name))
    (found,) = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert (found.dataset_name, found.metric_value) == (name, 0.5)


def test_the_model_that_another_comes_from(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = "facebook/spidr-base"
    url = published()["spidr-base"]["source"]["url"]
    assert [base_model(start) for start in ("spidr-base", url, base, "me/mine")] == [base, base, base, "me/mine"]
    assert base_model(None) is None and base_model("runs/mine/final") is None and base_model("step_9.pt") is None

    def folder(name: str, text: str) -> Path:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "README.md").write_text(text)
        return Path(name)

    # A folder is known by its card: what it is itself, or what it comes from.
    converted = folder(base, card("spidr-base"))
    assert base_model(converted) == base
    assert base_model("dinosr-original") is None and base_model(str(folder("here", card("dinosr-original")))) is None
    adapted = folder("adapted", trained_card(tiny_config(), "", "", start=str(converted)))
    assert ModelCard((adapted / "README.md").read_text()).data.base_model == base == base_model(adapted)
    assert base_model(folder("ours", trained_card(tiny_config(), "", "", model_id="me/ours"))) == "me/ours"
    assert ModelCard(finetuned("ctc", model=str(adapted))).data.base_model == base
    assert base_model(folder("unknown", converted_card(SpidrConfig(), model_id="my-model", origin="a.pt"))) is None


@pytest.mark.parametrize("name", [*sorted(NAMES), "unknown", "trained", *HEADS])
def test_metadata_keeps_the_rules_of_the_hub(name: str) -> None:
    """What the Hub's own validation, which needs the network, refuses or warns of."""
    content = all_cards()[name]
    assert content.startswith("---\n") and content.count("\n---\n") == 1
    metadata = ModelCard(content).data.to_dict()
    assert ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n").data.to_dict() == metadata
    assert set(metadata) <= {
        *("library_name", "pipeline_tag", "tags", "language", "datasets", "metrics", "base_model"),
        *("license", "license_name", "license_link", "model-index", "model_name"),
    }
    assert metadata["library_name"] == "transformers"
    tags = {"ctc": "automatic-speech-recognition", "utterance": "audio-classification", "speaker": None, "frame": None}
    assert metadata.get("pipeline_tag") == tags.get(name, "feature-extraction")
    assert all(isinstance(tag, str) and 0 < len(tag) <= 50 for tag in metadata["tags"])
    for language in metadata.get("language", ()):
        assert isinstance(language, str) and re.fullmatch(r"[a-z]{2,3}|multilingual", language)
    for repository in (*metadata.get("datasets", ()), metadata.get("base_model", "a/b")):
        validate_repo_id(repository)
    assert set(metadata.get("metrics", ())) <= {"accuracy", "cer", "wer"}
    assert metadata.get("license") in {None, "other", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"}  # names of the Hub's list
    if metadata.get("license") == "other":
        assert re.fullmatch(r"[a-z0-9][a-z0-9.-]*", metadata["license_name"])
        assert metadata["license_link"].startswith("https://")
    if name in NAMES:
        validate_repo_id(published()[name]["hub_id"])


@pytest.mark.parametrize("name", ["trained", *HEADS])
def test_what_a_card_tells_people_to_type_works(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = "this-repository"
    if name == "trained":
        tiny_model().save_pretrained(folder)
        text = trained_card(tiny_config(), "", "")
    else:
        HEADS[name](tiny_config(vocab_size=5, pad_token_id=0, num_labels=2)).save_pretrained(folder)
        text = finetuned(name)
    if name == "ctc":
        Wav2Vec2Processor(SpidrFeatureExtractor(), make_tokenizer("phones", ["A B C"])).save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    typed = {"waveform": torch.randn(9000).numpy()}
    for code in python_blocks(text):
        if "trust_remote_code" not in code:  # test_remote_code.py
            exec(compile(code.replace('"speech.wav"', "waveform"), "README.md", "exec"), typed)
    if name == "trained":
        assert typed["features"].shape[:2] == typed["units"].shape[::2]


def test_code_in_cards_is_python() -> None:
    for text in all_cards().values():
        for block in python_blocks(text):
            compile(block, "README.md", "exec")
