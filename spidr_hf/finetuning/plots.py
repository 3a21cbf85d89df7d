"""Pictures of fine-tuning runs: curves of loss and scores, and the weights of a learned sum over layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from ..plots.curves import DASHES, FAINT, MARKERS, SERIES, chart, from_zero

_PREFIX = "valid_"


def curves_figure(rows: Sequence[Mapping[str, Any]], best_step: int | None = None) -> Figure:
    """
    Losses of training and validation on the left, validation scores in per cent on the right, over the steps.

    Args:
        rows: The rows of a `metrics.jsonl`.
        best_step: Where the weights that were kept are marked.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = [row for row in rows if row["loss"] is not None]
    left.plot([row["step"] for row in trained], [row["loss"] for row in trained], color=SERIES[0], lw=1.6)
    left.lines[0].set_label("training")
    validated = [row for row in rows if any(name.startswith(_PREFIX) for name in row)]
    steps = [row["step"] for row in validated]
    names = [name for name in (validated[0] if validated else ()) if name.startswith(_PREFIX)]
    if f"{_PREFIX}loss" in names:
        values = [row.get(f"{_PREFIX}loss") for row in validated]
        left.plot(steps, values, color=SERIES[1], lw=2, marker="o", ms=4, label="validation")
    for name, colour, marker in zip((n for n in names if n != f"{_PREFIX}loss"), SERIES, MARKERS, strict=False):
        values = [100 * row[name] for row in validated]
        label = name.removeprefix(_PREFIX).replace("_", " ")
        right.plot(steps, values, color=colour, lw=2, marker=marker, ms=5, label=label)
    from_zero(right)
    if best_step is not None:
        right.axvline(best_step, color=FAINT, lw=1, ls=DASHES, label="kept")
    for axes, title in ((left, "Loss"), (right, "Validation, %")):
        if axes.lines:
            axes.legend()
        chart(axes, title, "step")
    return figure


def layer_weights_figure(weights: Sequence[float]) -> Figure:
    """Bars of the shares in a learned sum of the encoder's input and every layer's output (after the residual)."""
    figure = Figure(figsize=(max(5.0, 0.45 * len(weights) + 2), 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(weights)), weights, color=SERIES[0])
    label = f"all the same: 1/{len(weights)}, where training begins"
    axes.axhline(1 / len(weights), color=FAINT, lw=1, ls=DASHES, label=label)
    axes.margins(y=0.18)
    axes.legend(loc="upper left")
    chart(axes, "Share of each layer's output in the sum", "layer")
    axes.set_xticks(range(len(weights)), ["input", *map(str, range(1, len(weights)))])
    return figure


__all__ = ["curves_figure", "layer_weights_figure"]
