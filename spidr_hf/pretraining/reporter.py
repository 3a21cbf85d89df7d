"""What a run reports: `metrics.jsonl`, the tracker's curves, the progress bar, the list of unusable audio.

`metrics.jsonl` has exactly one row per logged step, however often the run was interrupted. Loss, perplexities and
gradient norm of a row are means over the steps since the row before; learning rate and teacher decay are those of the
logged step itself.
"""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from ..data.audio import SAMPLING_RATE
from ..data.batches import Batch, SkippedFiles
from ..data.manifests import Skipped
from ..training.run_state import TrainerState
from .config import PretrainingConfig
from .curves_picture import CurvesPicture
from .setup import CollapseWatch, StepResult, gather_all, start_trackers

# Columns that are means over the steps since the row before.
_MEANS = ("loss", "layer_losses", "target_ppl", "pred_ppl", "active_codewords", "grad_norm")


class MetricsFile:
    """The file. Opening it after `step` keeps the rows up to that step byte for byte and removes later ones."""

    def __init__(self, path: str | Path, step: int = 0):
        self.path = Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (open as long as the run)
        self._file.seek(0)
        kept = 0
        for line in self._file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept += len(line)
        self._file.truncate(kept)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. It is on disk on return: a checkpoint of the same step must never outlive it."""
        self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Averages:
    """Means over the steps since the last row. Its state goes into checkpoints, so that resuming changes no row."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        state = state or {}
        self.count: int = state.get("count", 0)
        self._sums = {name: np.array(value, dtype=np.float64) for name, value in state.get("sums", {}).items()}

    def add(self, values: Mapping[str, float | list[float]]) -> None:
        """Values of one step; the names are the same in every step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.array(value, dtype=np.float64)
        self.count += 1

    def means(self) -> dict[str, Any]:
        """The means so far (None where there was no step)."""
        return {name: (total / self.count).tolist() for name, total in self._sums.items()} if self.count else {}

    def reset(self) -> None:
        """Begin the next row."""
        self.count = 0
        self._sums = {}

    def state(self) -> dict[str, Any]:
        """What `Averages` can be made from again, in JSON's types and without rounding."""
        return {"count": self.count, "sums": {name: total.tolist() for name, total in self._sums.items()}}


class Reporter:
    """Takes note of every update, and writes a row every `run.log_interval` of them.

    Every process has one and calls it alike; the first process writes.

    Args:
        output_dir: the run's folder.
        config: the run's configuration.
        accelerator: its processes and trackers.
        state: where the run begins (or goes on).
        notes: what to say first, one line each; None is passed over.
    """

    def __init__(
        self,
        output_dir: Path,
        config: PretrainingConfig,
        accelerator: Accelerator,
        state: TrainerState,
        notes: Sequence[str | None] = (),
    ):
        is_main = accelerator.is_main_process
        self._accelerator = accelerator
        for note in notes:
            self.say(note)
        start_trackers(accelerator, config, output_dir)
        self._interval = config.run.log_interval
        self._file = MetricsFile(output_dir / "metrics.jsonl", state.step) if is_main else None
        self._picture = CurvesPicture(output_dir, config.model, config.run.plot_minutes if is_main else 0)
        self._averages = Averages(state.metrics)
        self._watch = CollapseWatch(state.collapse)
        self.skipped = SkippedFiles(output_dir / "skipped.jsonl" if is_main else None, config.data.max_skipped_share)
        self._bar = tqdm(
            total=config.optimizer.max_steps, initial=state.step, desc="Pretraining", unit="step", disable=not is_main
        )
        self._restart_window()

    def batch(self, batch: Batch) -> None:
        """Take note of a batch of this process."""
        self._seen.append((batch.skipped, len(batch.key.utterances), batch.audio_samples))
        self._samples += batch.audio_samples

    def update(self, step: int, epoch: int, result: StepResult | None, lr: float, decay: float) -> None:
        """Take note of an update (`result` None: it was skipped), and write the row of a logged step.

        Raises `AudioError` when too much of the audio cannot be used.
        """
        seconds, processes = time.perf_counter() - self._since, self._accelerator.num_processes
        if result is not None:
            self._averages.add(result.as_dict())
            speed = processes * self._samples / SAMPLING_RATE / seconds
            self._bar.set_postfix_str(
                f"loss {result.loss:.3f}, ppl {result.target_ppl:.1f}, {speed:.0f} audio s/s", refresh=False
            )
        self._bar.update()
        if step % self._interval:
            return
        seen = gather_all(self._seen)
        means = self._averages.means()
        row = {
            "step": step,
            "epoch": epoch + 1,
            **{name: means.get(name) for name in _MEANS},
            "lr": lr,
            "ema_decay": decay,
            "audio_seconds_per_second": sum(samples for _, _, samples in seen) / SAMPLING_RATE / seconds,
            "world_size": processes,
        }
        if self._file is not None:
            self._file.write(row)
        self._picture.update()
        if means:
            self._accelerator.log(curves(row), step=step)
            self.say(self._watch.look(means["target_ppl"], means["active_codewords"]))
        self._averages.reset()
        self._restart_window()
        self.skipped.add([entry for skipped, _, _ in seen for entry in skipped], sum(tried for _, tried, _ in seen))

    def pause(self, seconds: float) -> None:
        """Take note of seconds that were spent on something else than training (validation)."""
        self._since += seconds

    def say(self, message: str | None) -> None:
        """Print a line above the progress bar, from the first process only."""
        if message and self._accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)

    def save_into(self, state: TrainerState) -> None:
        """What the next row and the collapse watch need, for a checkpoint."""
        state.metrics, state.collapse = self._averages.state(), self._watch.state()

    def close(self) -> None:
        """End of the run."""
        self._bar.close()
        if self._file is not None:
            self._file.close()
        self.say(self._picture.finish())

    def _restart_window(self) -> None:
        self._seen: list[tuple[list[Skipped], int, int]] = []
        self._samples = 0
        self._since = time.perf_counter()


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """A row as single numbers, for trackers; lists become one curve per codebook."""
    curves: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            curves |= {f"{name}/{index}": item for index, item in enumerate(value)}
        elif name != "step" and value is not None:
            curves[name] = value
    return curves


__all__ = ["Averages", "MetricsFile", "Reporter", "curves"]
