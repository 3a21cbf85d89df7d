"""What is done to gradients and optimizer between backward and update, and whether the update is made."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..system.errors import RunFolderError
from ..system.messages import counted
from .checkpoints import TrainerState
from .sharding import global_norm, local_shard


def drop_frozen(optimizer: torch.optim.Optimizer) -> None:
    """Let parameters that no longer train leave the optimizer, weight decay and moments included."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


@torch.no_grad()
def scale_and_clip(parameters: Sequence[nn.Parameter], scale: Tensor, max_norm: float) -> Tensor:
    """Multiply all gradients by `scale`, then clip their norm, in one pass. Returns the norm between the two.

    With gradients of sums over frames, `scale` = processes / masked frames of the whole update makes them those of the
    mean over all frames of all processes (whose gradients DDP has averaged).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = global_norm(gradients) * scale
    gradients = [local_shard(gradient) for gradient in gradients]
    torch._foreach_mul_(gradients, scale * torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


class LossScale:
    """Dynamic loss scaling for float16: halved by a non-finite gradient, doubled after many finite ones.

    The loss is a sum over frames, not a mean, so the scale starts far below PyTorch's.
    """

    def __init__(self, enabled: bool, state: Mapping[str, float] | None = None):
        self.enabled = enabled
        self.value = 16.0 if enabled else 1.0
        self._since_change = 0
        if enabled and state:
            self.value, self._since_change = state["value"], int(state["since_change"])

    @property
    def explains_overflow(self) -> bool:
        """Whether a non-finite gradient may be the scale's doing, so that another try is due."""
        return self.enabled and self.value > 1.0

    def update(self, finite: bool) -> None:
        """Take note of an update."""
        if not self.enabled:
            return
        self._since_change += 1
        if not finite:
            self.value, self._since_change = max(1.0, self.value / 2), 0
        elif self._since_change == 2000:
            self.value, self._since_change = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"value": self.value, "since_change": self._since_change}


class UpdateGuard:
    """Tells updates that may be made from those to skip, and ends a run that skips too many in a row.

    Args:
        state: takes note of skipped updates.
        limit: so many in a row end the run.
        remedy: what the user can do then, a sentence.
        say: takes a line for the user.
    """

    def __init__(self, state: TrainerState, limit: int, remedy: str, say: Callable[[str], object]):
        self.state, self.limit, self.remedy, self.say = state, limit, remedy, say

    def finite(self, step: int, loss: float, grad_norm: float, *, excused: bool = False) -> bool:
        """Whether the numbers of an update, the same on every process, are finite.

        Where they are not, the user is told. `excused`: such an update does not count among those in a row. Raises
        `RunFolderError` where there are too many of them.
        """
        state, numbers = self.state, f"loss {loss}, gradient norm {grad_norm}"
        if math.isfinite(loss) and math.isfinite(grad_norm):
            state.nonfinite_in_a_row = 0
            return True
        state.skipped_steps += 1
        state.nonfinite_in_a_row += not excused
        self.say(f"Step {step}: {numbers}. The update is skipped ({state.skipped_steps} so far).")
        if state.nonfinite_in_a_row >= self.limit:
            raise RunFolderError(
                f"{counted(state.nonfinite_in_a_row, 'update')} in a row had a non-finite loss or gradient, the last "
                f"at step {step} ({numbers}). {self.remedy}"
            )
        return False


__all__ = ["LossScale", "UpdateGuard", "drop_frozen", "scale_and_clip"]
