"""What a run reports: `metrics.jsonl`, the tracker's curves, the progress bar, the list of unusable audio.

`metrics.jsonl` has exactly one row per logged step, however often the run was interrupted. What an update reports
(`StepResult`: the model's metrics by their names, the gradient norm) stands in a row as means over the steps since the
row before; learning rate and teacher decay are those of the logged step itself.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..training.checkpoints import TrainerState
from ..training.metrics import curves, read_rows
from ..training.observers import Observer
from ..training.reporting import RunReport, say_above_bar
from ..training.trackers import start_trackers
from .config import PretrainingConfig
from .setup import CollapseWatch
from .updates import StepResult


class Reporter(RunReport, Observer):
    """Takes note of every update, and writes a row every `run.log_interval` of them.

    Every process has one and calls it alike; the first process writes. As an observer it closes what it has open at
    the end; what it reports `Updates` tells it, when the numbers of an update are there.

    Args:
        output_dir: the run's folder.
        config: the run's configuration.
        accelerator: its processes and trackers.
        state: where the run begins or resumes.
        notes: what to say first, one line each; None is passed over.
        source: the audio, for the names of what is used again.
    """

    def __init__(
        self,
        output_dir: Path,
        config: PretrainingConfig,
        accelerator: Accelerator,
        state: TrainerState,
        notes: Sequence[str | None] = (),
        source: Any = None,
    ):
        self.processes = accelerator
        for note in notes:
            self.say(note)
        super().__init__(
            output_dir,
            accelerator,
            step=state.step,
            steps=config.optimizer.max_steps,
            title="Pretraining",
            averages=state.metrics,
            source=source,
            max_skipped=config.data.max_skipped_share,
        )
        run = config.run
        self._resumed = state.step
        self._sent = start_trackers(
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
        self._watch = CollapseWatch(state.collapse)
        if self._sent < state.step and self._file is not None:
            for earlier in read_rows(self._file.path):
                if earlier["step"] > self._sent and earlier["loss"] is not None:
                    self.send(curves(earlier), earlier["step"])

    def update(self, step: int, epoch: int, result: StepResult, lr: float, decay: float) -> None:
        """Take note of an update (skipped where `result` is not finite), and write the row of a logged step.

        Raises `AudioError` when too much of the audio cannot be used.
        """
        if result.finite:
            self.averages.add(result.values)
            self.bar.set_postfix_str(
                f"loss {result.loss:.3f}, ppl {result.values['target_ppl']:.1f}, {self.speed():.0f} audio s/s",
                refresh=False,
            )
        self.bar.update()
        if step % self._interval:
            return
        row = self.write_row(step, epoch, result.values, {"lr": lr, "ema_decay": decay}, {})
        if row["loss"] is not None:
            self.send(curves(row), step)
            self.say(self._watch.look(row["target_ppl"], row["active_codewords"]))

    def send(self, values: dict[str, float], step: int) -> None:
        """Points of curves for the tracker, unless the step is made again and it has those of an earlier start."""
        if not self._resumed < step <= self._sent:
            self.processes.log(values, step=step)

    def say(self, message: str | None) -> None:
        """Print a line above the progress bar, from the first process only."""
        say_above_bar(message, self.processes.is_main_process)

    def save_into(self, state: TrainerState) -> None:
        """What the next row and the collapse watch need, for a checkpoint."""
        state.metrics, state.collapse = self.averages.state(), self._watch.state()

    def finish(self, final: Path | None) -> None:
        """End of the run."""
        self.close()


__all__ = ["Reporter"]
