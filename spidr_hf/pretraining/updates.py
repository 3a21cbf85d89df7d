"""Updates: made where loss and gradient are finite, skipped where they are not, and reported once either way.

On a GPU the decision is taken there: Python begins the next step, and reads a step's numbers when it has begun
the one after. Where that cannot be (float16, whose loss scale the next step needs; shards) or gains nothing (CPU),
Python reads them first. What is computed is the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from ..codebooks_spidr import SpidrTrainingStatistics
from ..data.batches import Batch
from ..modeling_spidr import SpidrForPretraining
from ..system.host_copy import HostCopy
from ..training.checkpoints import TrainerState
from ..training.optimizing import LossScale, UpdateGuard
from ..training.sharding import is_sharded


@dataclass
class StepResult:
    """What an update reports, over all processes.

    Attributes:
        values: by name, the metrics of its statistics (`SpidrTrainingStatistics.metrics`; a list has one value per
            codebook), and `grad_norm`, the gradient's norm before clipping.
    """

    values: dict[str, float | list[float]]

    @staticmethod
    def send(statistics: SpidrTrainingStatistics, grad_norm: Tensor) -> "PendingResult":
        """Begin to fetch the numbers from the device, in one transfer. They are the same on every process."""
        metrics = {**statistics.metrics, "grad_norm": grad_norm}
        flat = torch.cat([tensor.reshape(-1).float() for tensor in metrics.values()])
        return PendingResult(HostCopy(flat), {name: tensor.shape for name, tensor in metrics.items()})

    @classmethod
    def fetch(cls, statistics: SpidrTrainingStatistics, grad_norm: Tensor) -> "StepResult":
        """The numbers from the device, waiting for them."""
        return cls.send(statistics, grad_norm).result()

    @property
    def loss(self) -> float:
        """Mean over masked frames and codebooks."""
        return self.values["loss"]  # type: ignore[return-value]  # a scalar

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self.values["grad_norm"]  # type: ignore[return-value]  # a scalar

    @property
    def finite(self) -> bool:
        """Whether the update may be made."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class PendingResult:
    """A `StepResult` on its way from the device: numbers end to end, and their shapes by name."""

    numbers: HostCopy
    shapes: dict[str, torch.Size]

    def result(self) -> StepResult:
        """The numbers, once they are there."""
        numbers = iter(self.numbers.tolist())
        values = {name: list(islice(numbers, shape.numel())) for name, shape in self.shapes.items()}
        return StepResult({name: value if self.shapes[name] else value[0] for name, value in values.items()})


class Listener(Protocol):
    """Who is told of updates, in a run its `Reporter`."""

    def batch(self, batch: Batch) -> None:
        """A batch of an update that is reported next."""

    def update(self, step: int, epoch: int, result: StepResult, lr: float, decay: float) -> None:
        """An update; where `result` is not finite it was skipped."""

    def say(self, message: str | None) -> None:
        """A line for the user."""


@dataclass
class _Waiting:
    """An update of which the numbers have not been read."""

    step: int
    batches: Sequence[Batch]
    lr: float
    decay: float
    numbers: PendingResult


class Updates:
    """Makes the updates of a run.

    Args:
        model, optimizer: what they move.
        state: takes note of skipped updates.
        loss_scale: of float16.
        reporter: is told of every update, in order.
        max_nonfinite: so many skipped updates in a row end the run.
        late: read a step's numbers one step late; None: where it gains something.
    """

    def __init__(
        self,
        model: SpidrForPretraining,
        optimizer: torch.optim.Optimizer,
        state: TrainerState,
        loss_scale: LossScale,
        reporter: Listener,
        max_nonfinite: int,
        late: bool | None = None,
    ):
        self.model, self.optimizer, self.loss_scale = model, optimizer, loss_scale
        self.reporter = reporter
        remedy = "Resume from the checkpoint before with a lower optimizer.lr or with optimizer.dtype float32."
        self._guard = UpdateGuard(state, max_nonfinite, remedy, reporter.say)
        on_gpu = next(model.parameters()).is_cuda
        self.late = on_gpu and not is_sharded(model) and not loss_scale.enabled if late is None else late
        self._waiting: _Waiting | None = None

    def make(
        self, step: int, batches: Sequence[Batch], lr: float, statistics: SpidrTrainingStatistics, grad_norm: Tensor
    ) -> None:
        """Move student, codebooks and teacher, if loss and gradient norm are finite on every process.

        `statistics` and `grad_norm` are the same on all of them, so that all make the update or all skip it. Raises
        `RunFolderError` after too many skipped updates in a row.
        """
        numbers = StepResult.send(statistics, grad_norm)
        decay = self.model.teacher_decay(step)
        if self.late:
            finite = statistics.loss.isfinite() & grad_norm.isfinite()
            # What a GradScaler would set: the fused optimizer then leaves parameters, moments and its step alone.
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
            self.model.update_teacher(step, finite)
        elif numbers.result().finite:
            self.optimizer.step()
            self.model.update_teacher(step)
        else:
            self.model.discard_statistics()
        self.optimizer.zero_grad()
        before, self._waiting = self._waiting, _Waiting(step, batches, lr, decay, numbers)
        if not self.late:
            self.settle()
        elif before is not None:
            self._report(before)

    def settle(self) -> None:
        """Read and report what has not been. To be called before anything that must know of every update."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._report(waiting)

    def _report(self, update: _Waiting) -> None:
        result = update.numbers.result()
        for batch in update.batches:
            self.reporter.batch(batch)
        epoch = update.batches[-1].key.epoch
        self.reporter.update(update.step, epoch, result, update.lr, update.decay)
        excused = self.loss_scale.explains_overflow
        self.loss_scale.update(self._guard.finite(update.step, result.loss, result.grad_norm, excused=excused))


__all__ = ["Listener", "PendingResult", "StepResult", "Updates"]
