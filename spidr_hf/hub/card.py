"""README.md of model folders: one template for what was converted, pretrained and fine-tuned.

The template and the data of the published checkpoints' cards are files in `model_cards/`.
"""

import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError  # type: ignore[import-untyped]

from .. import __version__
from ..configuration_spidr import SAMPLING_RATE, SpidrConfig, receptive_field
from ..objectives_spidr import get_objective
from ..system.files import write_text
from ..system.messages import one_line

_PACKAGE = Path(__file__).resolve().parent.parent
# In the repository the folder lies beside the package, in the wheel it is inside.
CARDS = next(folder for root in (_PACKAGE, _PACKAGE.parent) if (folder := root / "model_cards").is_dir())

_UNNAMED = "this-repository"
# What a fine-tuned model is, by its task: the pipeline that takes it or else its Auto class, and what comes out.
_HEADS: dict[str, dict[str, str]] = {
    "ctc": {
        "pipeline": "automatic-speech-recognition",
        "task": "automatic-speech-recognition",
        "title": "Speech recognition ({units}, CTC)",
    },
    "utterance": {
        "pipeline": "audio-classification",
        "task": "audio-classification",
        "title": "Classification of utterances",
    },
    "speaker": {
        "class": "AutoModelForAudioXVector",
        "task": "speaker-verification",
        "title": "Speaker embeddings (x-vectors)",
        "output": "embeddings  # batch x size; compare them by their cosine",
    },
    "frame": {
        "class": "AutoModelForAudioFrameClassification",
        "task": "audio-frame-classification",
        "title": "Phones of frames",
        "output": "logits  # batch x frames x phones",
    },
}
_PRETRAINED = ("self-supervised", "speech-units")  # tags
_METRICS_OF_THE_HUB = ("accuracy", "cer", "wer")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
# Scores that the Hub is told of; those in per cent are fractions everywhere else.
_SCORES = {
    "per": "Phone error rate (%)",
    "cer": "Character error rate (%)",
    "wer": "Word error rate (%)",
    "eer": "Equal error rate (%)",
    "accuracy": "Accuracy (%)",
    "abx_within": "ABX error within speakers (%)",
    "abx_across": "ABX error across speakers (%)",
    "abx_units_within": "ABX error of units within speakers (%)",
    "abx_units_across": "ABX error of units across speakers (%)",
    "pnmi": "PNMI",
    "pnmi_without_silence": "PNMI without silence",
    "phone_purity": "Phone purity",
    "cluster_purity": "Cluster purity",
    "f1": "Boundary F1 (%)",
    "r_val": "Boundary R-value (%)",
}


@cache
def published() -> dict[str, dict[str, Any]]:
    """The published checkpoints by name: the data of their model cards."""
    cards = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(CARDS.glob("*.toml"))}
    return {name: {"name": name, **card} for name, card in cards.items()}


def base_model(start: str | Path | None) -> str | None:
    """The repository of the Hub that a run's first weights are of, None where there is none.

    Args:
        start: what the run was given: a published name or its URL, a model folder, whose card knows, or a name on the
            Hub.
    """
    known = {name: card["hub_id"] for name, card in published().items()}
    known |= {card["source"]["url"]: card["hub_id"] for card in published().values() if "url" in card["source"]}
    names: list[Any] = [known.get(str(start), start)]
    if start is not None and os.path.exists(start):
        path, data = Path(start) / "README.md", ModelCardData()
        with suppress(YAMLError, ValueError, TypeError):  # whatever is wrong with a card, the model itself is there
            data = ModelCard.load(path, ignore_metadata_errors=True).data if path.is_file() else data
        names = [data.model_name, data.base_model]
    return next((name for name in names if isinstance(name, str) and _REPOSITORY.fullmatch(name)), None)


def evaluation_results(
    scores: Mapping[str, Any], dataset: str, *, task: str = "feature-extraction", layer: int | None = None
) -> list[EvalResult]:
    """Scores as the Hub takes them; what it is not told of (losses, counts) is left out.

    Args:
        scores: by the names of validation.jsonl, results.json and the `evaluate_*` commands (ABX errors as
            "abx_within", "abx_units_across"); fractions, or a list of them with an entry per layer.
        dataset: what they were computed on; the name of a data set on the Hub, or any other.
        task: the task as the Hub names it.
        layer: the layer that scores are of, the first one of a list.
    """
    results = []
    for name, title in _SCORES.items():
        values = scores.get(name)
        for offset, value in enumerate(values if isinstance(values, list) else [values]):
            if value is None or not math.isfinite(value):
                continue
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset if _REPOSITORY.fullmatch(dataset) else "audiofolder",
                    dataset_name=dataset,
                    metric_type=name,
                    metric_name=title if layer is None else f"{title}, layer {layer + offset}",
                    metric_value=round(100 * value, 2) if title.endswith("(%)") else round(value, 4),
                )
            )
    return results


def add_results(folder: str | Path, results: Sequence[EvalResult]) -> None:
    """Writes results into the metadata of a model folder's card, in place of those of the same score and data.

    Raises `ValueError` as `read_card`.
    """
    card = read_card(folder)
    before = card.data.eval_results or []
    new = {(result.dataset_name, result.metric_name): result for result in results}
    # What others wrote may share both names, and differ in split or configuration.
    kept = [new.pop((result.dataset_name, result.metric_name), result) for result in before] + list(new.values())
    if kept != before:
        card.data.model_name = card.data.model_name or _UNNAMED
        card.data.eval_results = kept
        write_text(Path(folder) / "README.md", str(card))


def read_card(folder: str | Path) -> ModelCard:
    """A model folder's card. Raises `ValueError` where there is none, or one whose metadata cannot be read."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise ValueError(f"{folder} has no card: there is no README.md in it.")
    try:
        return ModelCard.load(path)
    except (YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{path}: its metadata cannot be read ({one_line(error, 200)}).") from error


def converted_card(
    config: SpidrConfig, *, model_id: str, origin: str, update_count: int = 0, card: Mapping[str, Any] | None = None
) -> str:
    """Of a converted checkpoint.

    Args:
        config: the model's configuration.
        model_id: what users give `from_pretrained`.
        origin: where the checkpoint came from: a file name or a URL.
        update_count: updates the checkpoint has seen.
        card: data of a published checkpoint's card; without it the card claims nothing about data, licence or quality.
    """
    known: dict[str, Any] = {"tags": _PRETRAINED}
    if card:
        known |= {"language": card["language"], "datasets": card["datasets"], "license": card["license"]["id"]}
        known |= {f"license_{key}": card["license"][key] for key in ("name", "link") if key in card["license"]}
        # By this name a model that is trained from the folder knows what it comes from.
        known |= {"model_name": card["hub_id"], "eval_results": _published_results(card)}
    title = get_objective(config.objective).title
    unknown = f"A {title} model converted from `{origin}`. Nothing else is known about it here."
    return _render(
        config,
        _metadata(config, "feature-extraction", **known),
        kind="converted",
        title=card["title"] if card else model_id,
        summary=card["summary"] if card else unknown,
        papers=card["papers"] if card else None,
        model_id=model_id,
        card=card,
        origin=f"<{origin}>" if re.match(r"https?://", origin) else f"`{origin}`",
        update_count=update_count,
    )


def trained_card(
    config: SpidrConfig,
    summary: str,
    training_toml: str,
    *,
    model_id: str | None = None,
    start: str | None = None,
) -> str:
    """Of a model that was pretrained here. What only its maker knows is left for them to say.

    Args:
        config: the model's configuration.
        summary: a sentence on how it came about.
        training_toml: the run's whole configuration.
        model_id: what users give `from_pretrained`, where that is known.
        start: the model that it was pretrained further from.
    """
    return _render(
        config,
        _metadata(config, "feature-extraction", _PRETRAINED, model_name=model_id, base_model=base_model(start)),
        kind="trained",
        title=f"A {get_objective(config.objective).title} model",
        summary=summary,
        model_id=model_id or _UNNAMED,
        settings=training_toml,
    )


def finetuned_card(
    config: SpidrConfig, description: Mapping[str, Any], results: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
    """Of a fine-tuned model. What only its maker knows is left for them to say.

    Args:
        config: the model's configuration.
        description: what the run was about (`Task.description`).
        results: what `finetuning.finetune` returns.
        settings: how it was trained.
    """
    head, start = _HEADS[description["task"]], description["model"]
    metrics = sorted({name for scores in results["scores"].values() for name in scores} - {"utterances"})
    known: dict[str, Any] = {
        "metrics": [name for name in metrics if name in _METRICS_OF_THE_HUB] or None,
        "base_model": None if description["random_encoder"] else base_model(start),
        "model_name": _UNNAMED,
        "eval_results": [
            result
            for part, scores in results["scores"].items()
            for result in evaluation_results(scores, part, task=head["task"])
        ],
    }
    return _render(
        config,
        _metadata(config, head.get("pipeline"), **known),
        kind="fine-tuned",
        title=head["title"].format(**description),
        summary=f"Fine-tuned from {'random weights' if description['random_encoder'] else f'`{start}`'}.",
        model_id=_UNNAMED,
        head=head,
        metrics=metrics,
        results=results,
        settings=json.dumps({**description, **settings}, indent=1, ensure_ascii=False) + "\n",
    )


def _published_results(card: Mapping[str, Any]) -> list[EvalResult] | None:
    """The authors' own numbers for a published checkpoint."""
    source = {"source_name": "the authors' paper", "source_url": f"https://arxiv.org/abs/{card['papers'][0]}"}
    return [EvalResult(**score, **source) for score in card["results"].get("scores", ())] or None


def _metadata(config: SpidrConfig, pipeline_tag: str | None, tags: Sequence[str] = (), **known: Any) -> str:
    """What the Hub reads, as YAML."""
    tags = ["speech", "audio", *tags, config.objective]
    return ModelCardData(library_name="transformers", pipeline_tag=pipeline_tag, tags=tags, **known).to_yaml()


def _render(config: SpidrConfig, metadata: str, *, papers: list[str] | None = None, **facts: Any) -> str:
    papers = papers or list(get_objective(config.objective).papers)
    entries = (CARDS / "citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
    text = _template().render(
        {"card": None, "origin": None, "update_count": 0, "head": None, "settings": None} | facts,
        metadata=metadata,
        config=config,
        frame_ms=round(1000 * config.inputs_to_logits_ratio / SAMPLING_RATE),
        receptive_field=receptive_field(config),
        advised_layer=min(6, config.num_hidden_layers),
        version=__version__,
        citations=[entry for paper in papers for entry in entries if paper in entry],
    )
    return text.rstrip() + "\n"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["score"] = _score
    return environment.from_string((CARDS / "template.md").read_text(encoding="utf-8"))


def _score(value: float | None, name: str) -> str:
    """A cell of the table of results: losses as they are, shares in per cent, nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.3f}" if name == "loss" else f"{100 * value:.2f}"


__all__ = [
    "CARDS",
    "add_results",
    "base_model",
    "converted_card",
    "evaluation_results",
    "finetuned_card",
    "published",
    "read_card",
    "trained_card",
]
