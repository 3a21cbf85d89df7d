"""Pretraining objectives: what SpidR (arXiv 2512.20308) and DinoSR (arXiv 2305.10005) do differently, a class each.

Everything that depends on the objective asks `get_objective(config.objective)`: what is predicted; what a prediction
head reads, and with it which norm no gradient reaches and what training keeps in memory; how the teacher's decay moves;
what cards and configs say. A further objective is a subclass, registered; what it leaves out is an error when the class
is made, and a name that is not registered one when it is asked for.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor


class Objective(ABC):
    """
    Attributes:
        name: `config.objective`.
        title: the name in prose.
        papers: arXiv numbers.
        reads_own_layer: head k predicts from the representation of the layer whose codebook it is for (its feed-forward
            output before the residual connection); otherwise every head from the final output.
        own_fields: config fields that only this objective reads. One of them in a file tells the objective.
        recipe: where its published recipe differs from `SpidrConfig()`.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    papers: ClassVar[tuple[str, ...]]
    reads_own_layer: ClassVar[bool]
    own_fields: ClassVar[tuple[str, ...]]
    recipe: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if missing := [name for name in Objective.__annotations__ if not hasattr(cls, name)]:
            raise TypeError(f"The objective {cls.__name__} does not say its {', '.join(missing)}.")

    @staticmethod
    @abstractmethod
    def targets(model: Any, projected: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        """
        What codebooks assign codewords to, for the masked frames: K x N x H, float32, without gradient.

        Args:
            model: the `SpidrForPretraining`.
            projected: projected features of all frames, unmasked (B x T x H).
            lengths: valid frames of each row (B); None where all are.
            rows: the N masked frames, as indices into B * T.
        """

    @staticmethod
    @abstractmethod
    def teacher_decay(config: Any, step: int) -> float:
        """Decay of the teacher after optimizer step `step`, counted from 1; at 1 the teacher stands still."""


# By name; what `register_objective` fills.
registered: dict[str, Objective] = {}


def register_objective(cls: type[Objective]) -> type[Objective]:
    """Makes an objective known by its name. Raises `TypeError` where it is not whole, `ValueError` for a name twice."""
    if cls.name in registered:
        raise ValueError(f"There is an objective {cls.name!r} already.")
    registered[cls.name] = cls()
    return cls


def objective_names() -> tuple[str, ...]:
    """The names that `config.objective` may have."""
    return tuple(registered)


def get_objective(name: str) -> Objective:
    """The objective of that name. Raises `ValueError`, naming those there are, for any other."""
    try:
        return registered[name]
    except KeyError:
        known = ", ".join(map(repr, registered))
        raise ValueError(f"The objective must be one of {known}, got {name!r}.") from None


def fields_of_others(name: str) -> frozenset[str]:
    """Config fields that an objective does not read, since they are another's own."""
    own = get_objective(name).own_fields
    return frozenset(field for other in registered.values() for field in other.own_fields if field not in own)


def objective_with_fields(fields: Iterable[str]) -> str | None:
    """The objective that alone has some of these config fields; None where none has."""
    fields = set(fields)
    return next((name for name, objective in registered.items() if fields.intersection(objective.own_fields)), None)


@register_objective
class SpidrObjective(Objective):
    """Every head reads its own layer; the teacher's decay approaches 1 exponentially."""

    name = "spidr"
    title = "SpidR"
    papers = ("2512.20308",)
    reads_own_layer = True
    own_fields = ("ema_timescale", "ema_threshold")
    recipe: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def targets(model: Any, projected: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        return model.teacher_targets(projected, lengths, rows)

    @staticmethod
    def teacher_decay(config: Any, step: int) -> float:
        rest = (1 - config.ema_start_decay) * math.exp(-step / config.ema_timescale)
        return 1.0 if rest <= config.ema_threshold else 1 - rest


@register_objective
class DinosrObjective(Objective):
    """Every head reads the final output; the teacher's decay grows linearly, and is 1 from the freeze on."""

    name = "dinosr"
    title = "DinoSR"
    papers = ("2305.10005",)
    reads_own_layer = False
    own_fields = ()
    recipe: ClassVar[dict[str, Any]] = {"layerdrop": 0.05}

    @staticmethod
    def targets(model: Any, projected: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        return model.teacher_targets(projected, lengths, rows)

    @staticmethod
    def teacher_decay(config: Any, step: int) -> float:
        if step >= config.freeze_step:
            return 1.0
        if step >= config.ema_final_step:
            return float(config.ema_final_decay)
        share = step / config.ema_final_step
        return config.ema_start_decay + (config.ema_final_decay - config.ema_start_decay) * share


__all__ = [
    "DinosrObjective",
    "Objective",
    "SpidrObjective",
    "fields_of_others",
    "get_objective",
    "objective_names",
    "objective_with_fields",
    "register_objective",
    "registered",
]
