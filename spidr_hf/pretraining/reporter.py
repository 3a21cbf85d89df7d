"""What a run reports: `metrics.jsonl`, the tracker's curves, the progress bar, the list of unusable audio.

`metrics.jsonl` has exactly one row per logged step, however often the run was interrupted. What an update reports
(`StepResult`: the model's metrics by their names, the gradient norm) stands in a row as means over the steps since the
row before; learning rate and teacher decay are those of the logged step itself.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from ..configuration_spidr import SAMPLING_RATE
from ..data.batches import Batch, SkippedFiles
from ..data.sources import Skipped
from ..system.processes import gather_all
from ..training.checkpoints import TrainerState
from ..training.metrics import Averages, MetricsFile, curves
from ..training.observers import Observer
from ..training.trackers import start_trackers
from .config import PretrainingConfig
from .setup import CollapseWatch
from .updates import StepResult


class Reporter(Observer):
    """Takes note of every update, and writes a row every `run.log_interval` of them.

    Every process has one and calls it alike; the first process writes. As an observer it closes what it has open at
    the end; what it reports `Updates` tells it, when the numbers of an update are there.

    Args:
        output_dir: the run's folder.
        config: the run's configuration.
        accelerator: its processes and trackers.
        state: where the run begins or resumes.
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
        run = config.run
        self._file = MetricsFile(output_dir / "metrics.jsonl", state.step) if is_main else None
        self._again = start_trackers(
            accelerator,
            run.tracker,
            output_dir,
            project=run.wandb_project,
            name=run.wandb_name,
            mode=run.wandb_mode,
            config=config.to_dict(),
            step=state.step,
            reached=0 if self._file is None else self._file.reached,
        )
        self._interval = config.run.log_interval
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

    def update(self, step: int, epoch: int, result: StepResult, lr: float, decay: float) -> None:
        """Take note of an update (skipped where `result` is not finite), and write the row of a logged step.

        Raises `AudioError` when too much of the audio cannot be used.
        """
        seconds, processes = time.perf_counter() - self._since, self._accelerator.num_processes
        if result.finite:
            self._averages.add(result.values)
            speed = processes * self._samples / SAMPLING_RATE / seconds
            self._bar.set_postfix_str(
                f"loss {result.loss:.3f}, ppl {result.values['target_ppl']:.1f}, {speed:.0f} audio s/s", refresh=False
            )
        self._bar.update()
        if step % self._interval:
            return
        seen = gather_all(self._seen)
        means = self._averages.means()
        row = {
            "step": step,
            "epoch": epoch + 1,
            **{name: means.get(name) for name in result.values},
            "lr": lr,
            "ema_decay": decay,
            "audio_seconds_per_second": sum(samples for _, _, samples in seen) / SAMPLING_RATE / seconds,
            "world_size": processes,
        }
        if self._file is not None:
            self._file.write(row)
        if means:
            self.send(curves(row), step)
            self.say(self._watch.look(means["target_ppl"], means["active_codewords"]))
        self._averages.reset()
        self._restart_window()
        self.skipped.add([entry for skipped, _, _ in seen for entry in skipped], sum(tried for _, tried, _ in seen))

    def send(self, values: dict[str, float], step: int) -> None:
        """Points of curves for the tracker, unless an earlier start has sent those of the step."""
        if step not in self._again:
            self._accelerator.log(values, step=step)

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

    def finish(self, final: Path | None) -> None:
        """End of the run."""
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def _restart_window(self) -> None:
        self._seen: list[tuple[list[Skipped], int, int]] = []
        self._samples = 0
        self._since = time.perf_counter()


__all__ = ["Reporter"]
