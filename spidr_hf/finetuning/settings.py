"""How a head is trained: the settings of `finetuning.finetune`, and the file that a run's folder knows them by."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..system.tables import known_table
from ..training.folder_settings import keep_settings, setting_changes
from ..training.schedules import OptimizerSection

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """How a head is trained.

    Attributes:
        steps: updates to make.
        lr, head_lr: of the encoder and of the head, at the peak of the tri-stage schedule: `warmup` and `hold` are
            shares of the steps, the rest decays to a hundredth.
        batch_seconds: audio in a batch of one process, padding included.
        accumulation: batches of each process in an update.
        freeze_encoder_steps: updates at first in which only the head trains. Without them the
            encoder follows the gradients of a head that knows nothing yet.
        freeze_encoder: only the head trains, from beginning to end, on features without dropout and masks.
        train_extractor: the convolutional feature extractor trains, too (whenever the encoder does).
        dtype: autocast precision of training, "bfloat16" or "float32"; validation is in float32.
        eval_interval: updates between validations, which checkpoints go with.
    """

    steps: int = 3000
    lr: float = 1e-4
    head_lr: float = 1e-3
    warmup: float = 0.1
    hold: float = 0.4
    batch_seconds: float = 40.0
    accumulation: int = 1
    freeze_encoder_steps: int = 200
    freeze_encoder: bool = False
    train_extractor: bool = False
    weight_decay: float = 0.01
    max_norm: float = 1.0
    dtype: str = "bfloat16"
    eval_interval: int = 200
    log_interval: int = 20
    num_workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "lr",
            "head_lr",
            "batch_seconds",
            "accumulation",
            "max_norm",
            "eval_interval",
            "log_interval",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)!r}.")
        for name in ("freeze_encoder_steps", "weight_decay", "num_workers", "seed", "warmup", "hold"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)!r}.")
        if self.warmup + self.hold > 1:
            raise ValueError(f"`warmup` and `hold` are shares of the steps: {self.warmup} + {self.hold} is above 1.")

    @property
    def schedule(self) -> OptimizerSection:
        """As a section of a pretraining config, which schedules read."""
        warmup, hold = round(self.warmup * self.steps), round(self.hold * self.steps)
        return OptimizerSection(
            lr=self.lr,
            max_steps=self.steps,
            warmup_steps=warmup,
            hold_steps=hold,
            decay_steps=max(1, self.steps - warmup - hold),
            scheduler="tristage",
        )

    def trains_encoder(self, step: int) -> bool:
        """Whether the encoder trains in this update, counted from 1."""
        return not self.freeze_encoder and step > self.freeze_encoder_steps


def settle(
    folder: Path, description: Mapping[str, Any], settings: Settings, resuming: bool, complete: bool = False
) -> list[str]:
    """Write settings.json, but of a complete run. When resuming: say what changed, and refuse another task, model or
    set of labels."""
    now = {**description, **asdict(settings)}
    if not complete:
        return keep_settings(folder / SETTINGS_FILE, now, resuming=resuming, fixed=description)
    now, before = json.loads(json.dumps(now)), known_table(folder / SETTINGS_FILE)
    changes = setting_changes(folder, {name: before.get(name) for name in now}, now, fixed=description)
    of_no_effect = f" Of no effect, therefore: {', '.join(changes)}." if changes else ""
    return [f"{folder} is complete, and left as it is; more --steps continue it, --fresh begins anew.{of_no_effect}"]


__all__ = ["SETTINGS_FILE", "Settings", "settle"]
