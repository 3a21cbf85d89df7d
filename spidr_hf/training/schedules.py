# ruff: noqa: RUF009 (`option` is `dataclasses.field` with documentation)
"""`[optimizer]` of a configuration, and its learning-rate schedules, as functions of the update's number.

Updates are counted from 1, as everywhere: update 1 uses the first value of the schedule.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..system.fields import NOT_NEGATIVE, POSITIVE, one_of, option

SCHEDULES = ("tristage", "cosine", "rsqrt", "constant")


DTYPES = ("bfloat16", "float32", "float16")


# What freezes at `freeze_step`; the model itself does it.
FREEZABLE = ("feature_extractor", "feature_projection")


@dataclass
class OptimizerSection:
    """`[optimizer]`: AdamW, its schedule, and how an update is made."""

    lr: float = option(5e-4, "peak learning rate", **POSITIVE)
    betas: list[float] = option(
        [0.9, 0.95],
        "AdamW's betas",
        check=lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        allowed="two numbers in [0, 1)",
    )
    weight_decay: float = option(0.01, "AdamW's weight decay, on everything", **NOT_NEGATIVE)
    eps: float = option(1e-6, "AdamW's epsilon", **POSITIVE)
    max_norm: float = option(10.0, "gradient norm to clip at", **POSITIVE)
    dtype: str = option("bfloat16", "autocast precision: 'bfloat16', 'float32' or 'float16'", **one_of(DTYPES))
    init_lr_scale: float = option(0.01, "share of `lr` at the start of the warm-up", **NOT_NEGATIVE)
    final_lr_scale: float = option(0.01, "share of `lr` at the end of the decay", **NOT_NEGATIVE)
    max_steps: int = option(400_000, "updates to make; may be fewer than the schedule has", **POSITIVE)
    warmup_steps: int = option(12_000, "updates of linear warm-up", **NOT_NEGATIVE)
    hold_steps: int = option(188_000, "updates at the peak (tristage, rsqrt)", **NOT_NEGATIVE)
    decay_steps: int = option(200_000, "updates of decay (tristage)", **NOT_NEGATIVE)
    rsqrt_timescale: float = option(10_000, "time constant of rsqrt, in updates", **POSITIVE)
    rsqrt_shift: float = option(0, "shift of rsqrt, in updates", **NOT_NEGATIVE)
    scheduler: str = option("tristage", ", ".join(SCHEDULES), **one_of(SCHEDULES))
    exclude_from_optimizer: list[str] = option(
        ["teacher"], "parameters, by the beginning of SpidR's names for them, that are not trained"
    )
    to_freeze: list[str] = option(
        list(FREEZABLE),
        "what no longer trains after `model.freeze_step` updates",
        check=lambda value: set(value) == set(FREEZABLE),
        allowed=f"{list(FREEZABLE)} (to train these throughout, set model.freeze_step beyond the run's end)",
    )
    gradient_accumulation_steps: int = option(
        1, "ours: batches of each process in one update; counts as one large batch", **POSITIVE
    )


def learning_rate(config: OptimizerSection, step: int) -> float:
    """Learning rate that update `step`, counted from 1, uses."""
    if step < 1:
        raise ValueError(f"Updates are counted from 1, got {step}.")
    return config.lr * _SCALES[config.scheduler](config, step - 1)


def _warmed_up(config: OptimizerSection, index: int, peak: float = 1.0) -> float | None:
    """Linear warm-up from `init_lr_scale` to the peak; None once it is over."""
    if index >= config.warmup_steps:
        return None
    return config.init_lr_scale + (peak - config.init_lr_scale) * index / config.warmup_steps


def _tristage(config: OptimizerSection, index: int) -> float:
    """Warm-up, hold, exponential decay to `final_lr_scale`, which then stays."""
    if (scale := _warmed_up(config, index)) is not None:
        return scale
    decayed = index - config.warmup_steps - config.hold_steps
    if decayed < 0:
        return 1.0
    if decayed >= config.decay_steps:
        return config.final_lr_scale
    return math.exp(math.log(config.final_lr_scale) * decayed / config.decay_steps)


def _cosine(config: OptimizerSection, index: int) -> float:
    """Warm-up, then half a cosine to `final_lr_scale` at `max_steps`."""
    if (scale := _warmed_up(config, index)) is not None:
        return scale
    share = min(1.0, (index - config.warmup_steps) / (config.max_steps - config.warmup_steps))
    return config.final_lr_scale + (1 - config.final_lr_scale) * 0.5 * (1 + math.cos(math.pi * share))


def _rsqrt(config: OptimizerSection, index: int) -> float:
    """Warm-up, hold, then the inverse square root of the updates since the hold."""

    def scale(since_hold: int) -> float:
        return 1 / math.sqrt(1 + (since_hold + config.rsqrt_shift) / config.rsqrt_timescale)

    if (warm := _warmed_up(config, index, peak=scale(0))) is not None:
        return warm
    return scale(max(0, index - config.warmup_steps - config.hold_steps))


def _constant(config: OptimizerSection, index: int) -> float:
    """Warm-up, then the peak."""
    scale = _warmed_up(config, index)
    return 1.0 if scale is None else scale


_SCALES: dict[str, Callable[[OptimizerSection, int], float]] = {
    "tristage": _tristage,
    "cosine": _cosine,
    "rsqrt": _rsqrt,
    "constant": _constant,
}

__all__ = ["DTYPES", "FREEZABLE", "SCHEDULES", "OptimizerSection", "learning_rate"]
