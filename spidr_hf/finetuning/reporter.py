"""What a fine-tuning run says: metrics.jsonl, the progress bar, lines on the screen, and which step was the best."""

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from ..configuration_spidr import SAMPLING_RATE
from ..data.batches import SkippedFiles
from ..system.processes import gather_all
from ..training.checkpoints import TrainerState
from ..training.metrics import Averages, MetricsFile, read_rows
from .batches import LabelledBatch
from .settings import Settings

_MAX_SKIPPED = 0.5  # of the utterances tried


class Reporter:
    """metrics.jsonl, the progress bar, unusable audio, and which step was the best so far."""

    def __init__(self, folder: Path, settings: Settings, state: TrainerState, is_main: bool):
        self.settings = settings
        self.averages = Averages(state.metrics.get("averages"))
        self._best: float | None = state.metrics.get("best")
        self._file = MetricsFile(folder / "metrics.jsonl", state.step) if is_main else None
        skipped = folder / "skipped.jsonl" if is_main else None
        self.skipped = SkippedFiles(skipped, _MAX_SKIPPED, "the share that may be left out")
        self._bar = tqdm(
            total=settings.steps,
            initial=state.step,
            desc="Fine-tuning",
            unit="step",
            disable=not is_main,
            mininterval=1,
        )
        self._restart()

    def batch(self, batch: LabelledBatch) -> None:
        """Take note of a batch of this process."""
        self._samples += batch.audio_samples
        self.skipped.add(batch.skipped, len(batch.key.utterances))

    def update(self, step: int, epoch: int, lr: float, scores: Mapping[str, float]) -> None:
        """Take note of an update, and write the row of a logged or validated step."""
        self._bar.update()
        if step % self.settings.log_interval and not scores:
            return
        means = self.averages.means()
        processes = PartialState().num_processes
        samples = sum(gather_all([self._samples]))
        row = {
            "step": step,
            "epoch": epoch + 1,
            "loss": means.get("loss"),
            "grad_norm": means.get("grad_norm"),
            "lr": lr,
            "audio_seconds_per_second": samples / SAMPLING_RATE / (time.perf_counter() - self._since),
            "world_size": processes,
            **{f"valid_{name}": value for name, value in scores.items()},
        }
        if self._file is not None:
            self._file.write(row)
        if scores:
            values = ", ".join(f"{name} {shown(name, value)}" for name, value in scores.items())
            say(f"Step {step}: training loss {means.get('loss', math.nan):.3f}; validation {values}")
        if means:
            self._bar.set_postfix_str(f"loss {means['loss']:.3f}", refresh=False)
        self.averages.reset()
        self._restart()

    def is_best(self, step: int, value: float, lower_is_better: bool) -> bool:
        """Whether this is the best score so far (of equals the later is better)."""
        better = self._best is None or (value <= self._best if lower_is_better else value >= self._best)
        if better:
            self._best = value
        return better

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"averages": self.averages.state(), "best": self._best}

    def close(self) -> None:
        """End of the updates."""
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def _restart(self) -> None:
        self._samples, self._since = 0, time.perf_counter()


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
        f"{name} ({scores['utterances']} utterances): "
        + ", ".join(f"{key} {shown(key, value)}" for key, value in scores.items() if key != "utterances")
        for name, scores in results["scores"].items()
    )


def say(message: str) -> None:
    """Print a line above the progress bar, from the first process only."""
    if PartialState().is_main_process:
        tqdm.write(message, file=sys.stderr)


__all__ = ["Reporter", "best_step", "describe_scores", "say"]
