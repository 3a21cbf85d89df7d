"""The model card of a converted checkpoint, from `model_cards/`."""

import re
from typing import Any

import jinja2

from spidr_hf import SpidrConfig
from spidr_hf.layers_spidr import receptive_field

from .sources import CARDS

_SAMPLING_RATE = 16_000
_OBJECTIVES = {"spidr": "SpidR", "dinosr": "DinoSR"}
_PAPERS = {"spidr": ["2512.20308"], "dinosr": ["2305.10005"]}


def write_card(
    config: SpidrConfig, *, model_id: str, origin: str, update_count: int = 0, card: dict[str, Any] | None = None
) -> str:
    """The README.md of a model folder.

    Args:
        config: the model's configuration.
        model_id: what users give `from_pretrained`.
        origin: where the checkpoint came from: a file name or a URL.
        update_count: updates the checkpoint has seen.
        card: data of a published checkpoint's card; without it the card claims nothing about data, licence or quality.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    template = environment.from_string((CARDS / "template.md").read_text(encoding="utf-8"))
    entries = (CARDS / "citations.bib").read_text(encoding="utf-8").strip().split("\n\n")
    papers = card["papers"] if card else _PAPERS[config.objective]
    text = template.render(
        config=config,
        card=card,
        name=model_id,
        model_id=model_id,
        origin=origin,
        origin_link=f"<{origin}>" if re.match(r"https?://", origin) else f"`{origin}`",
        objective_name=_OBJECTIVES[config.objective],
        frame_ms=round(1000 * config.inputs_to_logits_ratio / _SAMPLING_RATE),
        receptive_field=receptive_field(config),
        advised_layer=min(6, config.num_hidden_layers),
        update_count=update_count,
        citations=[entry for paper in papers for entry in entries if paper in entry],
    )
    return text.rstrip() + "\n"


__all__ = ["write_card"]
