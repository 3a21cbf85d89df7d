"""What every training run reports: rows of metrics.jsonl, the progress bar, the list of audio that cannot be used."""

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator, PartialState
from tqdm import tqdm

from ..configuration_spidr import SAMPLING_RATE
from ..data.batches import SkippedFiles
from ..data.batching import BatchKey
from ..data.sources import Skipped
from ..system.processes import gather_all
from .metrics import Averages, MetricsFile


class HeardBatch(Protocol):
    """What is noted of a batch; its fields are those of `data.batches.Batch`."""

    key: BatchKey
    audio_samples: int
    skipped: list[Skipped]


class RunReport:
    """Takes note of batches and updates. Every process has one and calls it alike; the first process writes.

    Args:
        folder: the run's folder.
        processes: those of the run.
        step, steps: where the run begins or resumes, and how many updates it makes.
        title: of the progress bar.
        averages: state of the averages of an earlier start.
        source: the audio, for the names of what an earlier start could not use and this one can.
        max_skipped, limit: see `SkippedFiles`.
    """

    def __init__(
        self,
        folder: Path,
        processes: Accelerator | PartialState,
        *,
        step: int,
        steps: int,
        title: str,
        averages: Mapping[str, Any] | None,
        source: Any,
        max_skipped: float,
        limit: str = "`data.max_skipped_share`",
    ):
        is_main = processes.is_main_process
        self.processes, self.averages = processes, Averages(averages)
        self.bar = tqdm(total=steps, initial=step, desc=title, unit="step", disable=not is_main)
        self._source = source
        self.skipped = SkippedFiles(folder / "skipped.jsonl", max_skipped, limit, writes=is_main)
        self._file = MetricsFile(folder / "metrics.jsonl", step) if is_main else None
        self._restart()

    def batch(self, batch: HeardBatch) -> None:
        """Take note of a batch of this process."""
        again = self.skipped.used_again(batch.key.utterances, batch.skipped, self._source)
        self._seen.append((batch.skipped, len(batch.key.utterances), batch.audio_samples, again))
        self._samples += batch.audio_samples

    def pause(self, seconds: float) -> None:
        """Take note of seconds that were spent on something else than training (validation)."""
        self._since += seconds

    def speed(self) -> float:
        """Seconds of audio per second since the last row, if all processes are as fast as this one."""
        return self.processes.num_processes * self._samples / SAMPLING_RATE / (time.perf_counter() - self._since)

    def write_row(
        self, step: int, epoch: int, averaged: Iterable[str], now: Mapping[str, float], scores: Mapping[str, float]
    ) -> dict[str, Any]:
        """Write the row of a logged step, and return it.

        Args:
            epoch: counted from 0.
            averaged: names of what stands in it as the mean over the steps since the last row; None where there was no
                step to average.
            now: what stands in it as it is.
            scores: the same, at its end.

        Raises `AudioError` when too much of the audio cannot be used.
        """
        seconds, means = time.perf_counter() - self._since, self.averages.means()
        seen = gather_all(self._seen)
        row = {
            "step": step,
            "epoch": epoch + 1,
            **{name: means.get(name) for name in averaged},
            **now,
            "audio_seconds_per_second": sum(samples for _, _, samples, _ in seen) / SAMPLING_RATE / seconds,
            "world_size": self.processes.num_processes,
            **scores,
        }
        if self._file is not None:
            self._file.write(row)
        self.averages.reset()
        self._restart()
        self.skipped.add(
            [entry for skipped, *_ in seen for entry in skipped],
            sum(tried for _, tried, *_ in seen),
            [name for *_, again in seen for name in again],
        )
        return row

    def close(self) -> None:
        """End of the updates."""
        self.bar.close()
        if self._file is not None:
            self._file.close()

    def _restart(self) -> None:
        self._seen: list[tuple[list[Skipped], int, int, list[str]]] = []
        self._samples, self._since = 0, time.perf_counter()


def say_above_bar(message: str | None, is_main: bool) -> None:
    """Print a line above the progress bar, from the first process only."""
    if message and is_main:
        tqdm.write(message, file=sys.stderr)


__all__ = ["HeardBatch", "RunReport", "say_above_bar"]
