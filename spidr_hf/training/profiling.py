"""A profile of some steps of a run: `--run.profile_steps 100:105` leaves a trace in the run's folder."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..system.files import replaced_file
from .observers import Observer


class StepProfiler(Observer):
    """Profiles steps `first` to `last` of a run and writes `profile/steps_FIRST-LAST.json.gz`.

    The trace opens in https://ui.perfetto.dev and chrome://tracing. Other steps cost nothing.

    Args:
        output_dir: the run's folder.
        steps: "first:last", counted from 1, both included (`run.profile_steps`); None: no profile.
    """

    def __init__(self, output_dir: str | Path, steps: str | None):
        self._first, self._last = (0, 0) if steps is None else map(int, steps.split(":"))
        self.path = Path(output_dir) / "profile" / f"steps_{self._first}-{self._last}.json.gz"
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        """Begin the profile where it is time."""
        if step == self._first:
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()

    def after_step(self, step: int) -> None:
        """End the profile where it is time."""
        if step == self._last:
            self.finish()

    def finish(self, final: Path | None = None) -> None:
        """Write what has been profiled, if anything."""
        if self._profile is None:
            return
        finished, self._profile = self._profile, None
        finished.stop()
        with replaced_file(self.path) as partial:
            finished.export_chrome_trace(str(partial))


__all__ = ["StepProfiler"]
