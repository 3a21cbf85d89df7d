"""README.md of model folders: one template for what was converted, pretrained and fine-tuned.

The template and the data of the published checkpoints' cards are files in `model_cards/`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from .. import __version__
from ..configuration_spidr import SAMPLING_RATE, SpidrConfig, receptive_field
from ..objectives_spidr import get_objective

_PACKAGE = Path(__file__).resolve().parent.parent
# In the repository the folder lies beside the package, in the wheel it is inside.
CARDS = next(folder for root in (_PACKAGE, _PACKAGE.parent) if (folder := root / "model_cards").is_dir())

_UNNAMED = "this-repository"
# What a fine-tuned model is, by its task: the pipeline that takes it or else its Auto class, and what comes out.
_HEADS: dict[str, dict[str, str]] = {
    "ctc": {"pipeline": "automatic-speech-recognition", "title": "Speech recognition ({units}, CTC)"},
    "utterance": {"pipeline": "audio-classification", "title": "Classification of utterances"},
    "speaker": {
        "class": "AutoModelForAudioXVector",
        "title": "Speaker embeddings (x-vectors)",
        "output": "embeddings  # batch x size; compare them by their cosine",
    },
    "frame": {
        "class": "AutoModelForAudioFrameClassification",
        "title": "Phones of frames",
        "output": "logits  # batch x frames x phones",
    },
}
_PRETRAINED = ("self-supervised", "speech-units")  # tags
_METRICS_OF_THE_HUB = ("accuracy", "cer", "wer")


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


def trained_card(config: SpidrConfig, summary: str, training_toml: str, *, model_id: str | None = None) -> str:
    """Of a model that was pretrained here. What only its maker knows is left for them to say.

    Args:
        config: the model's configuration.
        summary: a sentence on how it came about.
        training_toml: the run's whole configuration.
        model_id: what users give `from_pretrained`, where that is known.
    """
    return _render(
        config,
        _metadata(config, "feature-extraction", tags=_PRETRAINED),
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
    # A folder is nothing that the Hub could point at.
    base = None if description["random_encoder"] or Path(start).exists() else start
    known: dict[str, Any] = {
        "metrics": [name for name in metrics if name in _METRICS_OF_THE_HUB] or None,
        "base_model": base,
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


__all__ = ["CARDS", "converted_card", "finetuned_card", "trained_card"]
