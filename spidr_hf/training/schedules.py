"""Learning-rate schedules, as functions of the update's number.

Updates are counted from 1, as everywhere: update 1 uses the first value of the schedule.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pretraining.config import OptimizerSection

SCHEDULES = ("tristage", "cosine", "rsqrt", "constant")


def learning_rate(config: "OptimizerSection", step: int) -> float:
    """Learning rate that update `step`, counted from 1, uses."""
    if step < 1:
        raise ValueError(f"Updates are counted from 1, got {step}.")
    return config.lr * _SCALES[config.scheduler](config, step - 1)


def _warmed_up(config: "OptimizerSection", index: int, peak: float = 1.0) -> float | None:
    """Linear warm-up from `init_lr_scale` to the peak; None once it is over."""
    if index >= config.warmup_steps:
        return None
    return config.init_lr_scale + (peak - config.init_lr_scale) * index / config.warmup_steps


def _tristage(config: "OptimizerSection", index: int) -> float:
    """Warm-up, hold, exponential decay to `final_lr_scale`, which then stays."""
    if (scale := _warmed_up(config, index)) is not None:
        return scale
    decayed = index - config.warmup_steps - config.hold_steps
    if decayed < 0:
        return 1.0
    if decayed >= config.decay_steps:
        return config.final_lr_scale
    return math.exp(math.log(config.final_lr_scale) * decayed / config.decay_steps)


def _cosine(config: "OptimizerSection", index: int) -> float:
    """Warm-up, then half a cosine to `final_lr_scale` at `max_steps`."""
    if (scale := _warmed_up(config, index)) is not None:
        return scale
    share = min(1.0, (index - config.warmup_steps) / (config.max_steps - config.warmup_steps))
    return config.final_lr_scale + (1 - config.final_lr_scale) * 0.5 * (1 + math.cos(math.pi * share))


def _rsqrt(config: "OptimizerSection", index: int) -> float:
    """Warm-up, hold, then the inverse square root of the updates since the hold."""

    def scale(since_hold: int) -> float:
        return 1 / math.sqrt(1 + (since_hold + config.rsqrt_shift) / config.rsqrt_timescale)

    if (warm := _warmed_up(config, index, peak=scale(0))) is not None:
        return warm
    return scale(max(0, index - config.warmup_steps - config.hold_steps))


def _constant(config: "OptimizerSection", index: int) -> float:
    """Warm-up, then the peak."""
    scale = _warmed_up(config, index)
    return 1.0 if scale is None else scale


_SCALES: dict[str, Callable[["OptimizerSection", int], float]] = {
    "tristage": _tristage,
    "cosine": _cosine,
    "rsqrt": _rsqrt,
    "constant": _constant,
}

__all__ = ["SCHEDULES", "learning_rate"]
