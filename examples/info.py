#!/usr/bin/env python
"""What a model is: objective, layers and codebooks, the advised layer, and its licence.

    python examples/info.py MODEL
    python examples/info.py spidr-base          # a published checkpoint, without downloading it

MODEL is a model folder, a name on the Hub, or the name of a published checkpoint.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from huggingface_hub import ModelCard

from spidr_hf import SpidrConfig
from spidr_hf.configuration_spidr import SAMPLING_RATE, receptive_field
from spidr_hf.conversion.sources import published
from spidr_hf.hub.loading import loading
from spidr_hf.system.commands import HelpFormatter, clear_errors

_WITH_CODEBOOKS = {"SpidrForPretraining", "SpidrForAudioTokenization"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="model folder, name on the Hub, or published checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: the main branch)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    with clear_errors():
        facts = describe(args.model, args.revision)
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))


def describe(model: str, revision: str | None = None) -> dict[str, Any]:
    """Facts about a model by name. Raises `ValueError` for what is none."""
    card = None if Path(model).exists() else published().get(model)
    if card is not None:
        config = SpidrConfig(objective=card["source"]["objective"])
        facts = of_config(config) | {"licence": card["license"]["id"], "advice": card["layer_advice"]}
        return {"model": model, "title": card["title"], "source": where(card["source"]), **facts}
    with loading(model, revision):
        config = SpidrConfig.from_pretrained(model, revision=revision)
    title, licence = of_card(model)
    return {"model": model, "title": title, **of_config(config), "licence": licence}


def of_config(config: SpidrConfig) -> dict[str, Any]:
    """What a configuration says."""
    classes = config.architectures or []
    # Folders of fine-tuned models keep the fields of codebooks that they no longer hold.
    kept = not classes or not _WITH_CODEBOOKS.isdisjoint(classes)
    layers = list(range(config.first_codebook_layer, config.num_hidden_layers + 1)) if kept else []
    return {
        "objective": config.objective,
        "classes": classes,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "codebook_layers": layers,
        "codebook_size": config.codebook_size,
        "advised_layer": min(6, config.num_hidden_layers),
        "frame_seconds": config.inputs_to_logits_ratio / SAMPLING_RATE,
        "frame_window_seconds": receptive_field(config) / SAMPLING_RATE,
    }


def of_card(model: str) -> tuple[str | None, str | None]:
    """Title and licence in a model's README.md, where they are said."""
    path = Path(model, "README.md") if Path(model).is_dir() else model
    try:
        card = ModelCard.load(path, ignore_metadata_errors=True)
    except Exception:  # whatever keeps a card from being read, the model itself is there
        return None, None
    title = next((line.removeprefix("# ").strip() for line in card.text.splitlines() if line.startswith("# ")), None)
    return title, getattr(card.data, "license", None)


def where(source: dict[str, Any]) -> str:
    """Where a published checkpoint lies."""
    return source.get("url") or f"https://huggingface.co/{source['repo']}"


def as_text(facts: dict[str, Any]) -> str:
    """For people."""
    layers = facts["codebook_layers"]
    codebooks = f"layers {layers[0]} to {layers[-1]}, {facts['codebook_size']} codewords each" if layers else "none"
    lines = {
        "": facts["title"],
        "from": facts.get("source"),
        "objective": facts["objective"],
        "classes": ", ".join(facts["classes"]),
        "encoder": f"{facts['layers']} layers of width {facts['hidden_size']}",
        "codebooks": codebooks,
        "frames": f"one per {1000 * facts['frame_seconds']:g} ms, each of {1000 * facts['frame_window_seconds']:g} ms",
        "layer to use": facts.get("advice") or f"{facts['advised_layer']}, to begin with (layers count from 1)",
        "licence": facts["licence"] or "not stated",
    }
    return "\n".join([facts["model"], *(f"  {name:14}{value}" for name, value in lines.items() if value)])


if __name__ == "__main__":
    main()
