"""What a fine-tuning run says: metrics.jsonl, the progress bar, lines on the screen, and which step was the best."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..data.sources import AudioSource
from ..system.messages import counted
from ..training.checkpoints import TrainerState
from ..training.metrics import read_rows
from ..training.reporting import RunReport, say_above_bar
from .settings import Settings

_MAX_SKIPPED = 0.5  # of the utterances tried


class Reporter(RunReport):
    """metrics.jsonl, the progress bar, unusable audio, and which step was the best so far."""

    def __init__(self, folder: Path, settings: Settings, state: TrainerState, source: AudioSource):
        self._interval = settings.log_interval
        self._best: float | None = state.metrics.get("best")
        super().__init__(
            folder,
            PartialState(),
            step=state.step,
            steps=settings.steps,
            title="Fine-tuning",
            averages=state.metrics.get("averages"),
            source=source,
            max_skipped=_MAX_SKIPPED,
            limit="the share that may be left out",
        )

    def update(self, step: int, epoch: int, lr: float, scores: Mapping[str, float]) -> None:
        """Take note of an update, and write the row of a logged or validated step.

        Raises `AudioError` when too much of the audio cannot be used.
        """
        self.bar.update()
        if step % self._interval and not scores:
            return
        valid = {f"valid_{name}": value for name, value in scores.items()}
        row = self.write_row(step, epoch, ("loss", "grad_norm"), {"lr": lr}, valid)
        loss = math.nan if row["loss"] is None else row["loss"]
        if scores:
            values = ", ".join(f"{name} {shown(name, value)}" for name, value in scores.items())
            say(f"Step {step}: training loss {loss:.3f}; validation {values}")
        self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)

    def is_best(self, step: int, value: float, lower_is_better: bool) -> bool:
        """Whether this is the best score so far (of equals the later is better)."""
        better = self._best is None or (value <= self._best if lower_is_better else value >= self._best)
        if better:
            self._best = value
        return better

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"averages": self.averages.state(), "best": self._best}


def best_step(folder: Path, metric: str, lower_is_better: bool) -> int:
    """The step whose weights were kept, by metrics.jsonl."""
    rows = read_rows(folder / "metrics.jsonl")
    key = f"valid_{metric}"
    values = [(row[key] if lower_is_better else -row[key], -row["step"]) for row in rows if key in row]
    return -min(values)[1]


def shown(name: str, value: float) -> str:
    """A score for people: shares in per cent, losses as they are."""
    return f"{value:.3f}" if name == "loss" else f"{100 * value:.2f} %"


def describe_scores(results: Mapping[str, Any]) -> str:
    """One line per split."""
    return "\n".join(
        f"{name} ({counted(scores['utterances'], 'utterance')}): "
        + ", ".join(f"{key} {shown(key, value)}" for key, value in scores.items() if key != "utterances")
        for name, scores in results["scores"].items()
    )


def say(message: str) -> None:
    """Print a line above the progress bar, from the first process only."""
    say_above_bar(message, PartialState().is_main_process)


__all__ = ["Reporter", "best_step", "describe_scores", "say"]
