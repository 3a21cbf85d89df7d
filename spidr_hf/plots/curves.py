"""The curves of a training run, and the picture of them beside its `metrics.jsonl`.

This file imports nothing of the package, so that a run can have its picture drawn by a process of its own, which
is done before the package would be imported:

    python -P spidr_hf/plots/curves.py RUN_DIR FIRST_LAYER CODEBOOK_SIZE NICENESS
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import blended_transform_factory

INK, FAINT, MARK = "#26303a", "#6b757f", "#d55e00"
DASHES = (0, (4, 3))
# Colours and markers of curves in one chart (Okabe and Ito's, for the colour-blind, too).
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
MARKERS = "osD^v"
# Columns of metrics.jsonl that have their place in the picture, or need none. Every other has a panel of its own.
_DRAWN = {"step", "epoch", "loss", "layer_losses", "target_ppl", "pred_ppl", "active_codewords", "grad_norm", "lr"}
_DRAWN |= {"ema_decay", "audio_seconds_per_second", "world_size"}


def draw_losses(axes: Axes, rows: Sequence[Mapping[str, Any]], first_layer: int, codebook_size: int) -> None:
    """The loss over the steps of a run (rows of `metrics.jsonl`), and that of each codebook's layer."""
    steps = [row["step"] for row in rows]
    layers = np.array([row["layer_losses"] for row in rows])
    axes.axhline(math.log(codebook_size), color=FAINT, lw=1, ls=DASHES)
    axes.annotate(
        f"ln {codebook_size}: knowing nothing",
        (0.985, math.log(codebook_size)),
        xycoords=blended_transform_factory(axes.transAxes, axes.transData),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=FAINT,
    )
    draw_layers(axes, steps, layers, first_layer)
    axes.plot(steps, smooth([row["loss"] for row in rows]), color=INK, lw=2.2, ls=(0, (1, 1)), label="mean")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.8), ncol=2)
    chart(axes, "loss (nats per masked frame)", "training step")


def draw_layers(axes: Axes, steps: Sequence[int], values: np.ndarray, first_layer: int) -> None:
    """A curve of each codebook's layer (steps x layers), from dark to light in the order of the layers."""
    for k, colour in enumerate(layer_colours(values.shape[1])):
        axes.plot(steps, smooth(values[:, k]), color=colour, lw=1.6, label=f"layer {first_layer + k}")


def draw_perplexities(
    axes: Axes, rows: Sequence[Mapping[str, Any]], codebook_size: int, floor: float | None = None
) -> None:
    """Target and prediction perplexity over the steps of a run; `floor` is the line of a collapse."""
    steps = [row["step"] for row in rows]
    axes.plot(steps, smooth([row["pred_ppl"] for row in rows]), color=SERIES[0], lw=2, label="predictions")
    axes.plot(steps, smooth([row["target_ppl"] for row in rows]), color=SERIES[1], lw=2.2, label="targets")
    from_zero(axes)
    if floor is not None:
        axes.axhline(floor, color=MARK, lw=1, ls=DASHES)
        axes.annotate(
            "below: collapsed",
            (0.985, floor),
            xycoords=blended_transform_factory(axes.transAxes, axes.transData),
            xytext=(0, -12),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=MARK,
        )
    axes.legend(loc="upper right", ncol=2)
    chart(axes, f"perplexity (of {codebook_size} codewords)", "training step")


def draw_active_codewords(axes: Axes, rows: Sequence[Mapping[str, Any]], first_layer: int, codebook_size: int) -> None:
    """The codewords in use over the steps of a run, those of each codebook's layer."""
    active = np.array([row["active_codewords"] for row in rows])
    draw_layers(axes, [row["step"] for row in rows], active, first_layer)
    from_zero(axes)
    axes.legend(loc="lower right", ncol=2)
    chart(axes, f"active codewords (of {codebook_size})", "training step")


def draw_gradients(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Gradient norm and, on an axis of its own, the learning rate over the steps of a run."""
    steps = [row["step"] for row in rows]
    (norms,) = axes.plot(steps, smooth([row["grad_norm"] for row in rows]), color=SERIES[2], lw=2)
    from_zero(axes)
    beside = axes.twinx()
    (rates,) = beside.plot(steps, [row["lr"] for row in rows], color=FAINT, lw=1.3, ls=DASHES)
    from_zero(beside)
    beside.tick_params(colors=FAINT, labelsize=10)
    beside.spines[:].set_visible(False)
    axes.legend([norms, rates], ["gradient norm", "learning rate (axis on the right)"], loc="upper right", ncol=2)
    chart(axes, "gradient norm and learning rate", "training step")


def draw_metric(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, first_layer: int) -> None:
    """Any other column of `metrics.jsonl` over the steps of a run: a number, or one of each codebook's layer."""
    rows = [row for row in rows if row.get(name) is not None]  # a longer run may have it from some step on
    steps, values = [row["step"] for row in rows], np.array([row[name] for row in rows], dtype=float)
    if values.ndim == 1:
        axes.plot(steps, smooth(values), color=SERIES[0], lw=2)
    else:
        draw_layers(axes, steps, values, first_layer)
        axes.legend(loc="upper right", ncol=2)
    chart(axes, name.replace("_", " "), "training step")


def curves_figure(
    rows: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]] = (),
    *,
    first_layer: int,
    codebook_size: int,
    title: str = "",
) -> Figure:
    """
    Losses, perplexities, active codewords and gradients of a run.

    Args:
        rows: The rows of `metrics.jsonl` that have a loss; what they have beside the usual gets panels of its own.
        validation: Those of `validation.jsonl`: their losses are drawn as points.
        first_layer: The first layer that has a codebook, counted from 1.
        codebook_size: Codewords per codebook.
        title: A line above.
    """
    figure = Figure(layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=INK)
    more = [name for name, value in rows[-1].items() if name not in _DRAWN and isinstance(value, (float, int, list))]
    panels = figure.subplots(2 + math.ceil(len(more) / 2), 2)
    (losses, perplexities), (active, gradients) = panels[:2]
    names = sorted({row["name"] for row in validation})
    for name, marker in zip(names, MARKERS * len(names), strict=False):
        points = [(row["step"], row["loss"]) for row in validation if row["name"] == name and row["loss"] is not None]
        losses.plot(*zip(*points, strict=True), marker, ms=5, color=INK, mfc="white", label=name, zorder=5)
    draw_losses(losses, rows, first_layer, codebook_size)
    draw_perplexities(perplexities, rows, codebook_size)
    draw_active_codewords(active, rows, first_layer, codebook_size)
    draw_gradients(gradients, rows)
    for name, axes in zip(more, panels[2:].flat, strict=False):
        draw_metric(axes, rows, name, first_layer)
    for axes in panels.flat[4 + len(more) :]:
        axes.set_axis_off()
    figure.set_size_inches(14, 4.25 * len(panels))
    return figure


def chart(axes: Axes, title: str, xlabel: str) -> None:
    """The look of a chart: its title, what lies below it, and its legend if it has one."""
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, color=INK)
    axes.tick_params(colors=INK, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(FAINT)
    axes.grid(axis="y", color="#e8ebee", lw=0.8)
    axes.set_axisbelow(True)
    if not isinstance(axes.xaxis.get_major_locator(), FixedLocator):  # there is no half of a step or a layer
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if legend := axes.get_legend():
        legend.set_frame_on(False)
        for text in legend.get_texts():
            text.set(fontsize=10, color=INK)


def from_zero(axes: Axes) -> None:
    """Let the axis of values begin at 0, with room for a legend above what is drawn."""
    axes.set_ylim(0, 1.16 * axes.dataLim.y1 if axes.dataLim.y1 > 0 else 1)


def layer_colours(layers: int) -> list[Any]:
    """Colours in order, dark to light, also for the colour-blind."""
    return [colormaps["viridis"](place) for place in np.linspace(0, 0.92, layers)]


def smooth(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """A running mean over about a fiftieth of the run, so that the trend shows."""
    values = np.asarray(values, dtype=float)
    half = len(values) // 100
    sums = np.cumsum(np.append(0.0, values))
    index = np.arange(len(values))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl` or `validation.jsonl` that have a loss; none where there is no file, and none of a line
    that is not whole (the run may be writing it)."""
    rows = []
    if os.path.exists(path):
        for line in Path(path).read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and row.get("loss") is not None:
                rows.append(row)
    return rows


def draw_run(run_dir: str | os.PathLike, first_layer: int, codebook_size: int) -> Path | None:
    """Draw `curves.png` into a run's folder, whole or not at all; None where there is nothing to draw yet."""
    run_dir = Path(run_dir)
    rows = read_rows(run_dir / "metrics.jsonl")
    if not rows:
        return None
    last = rows[-1]
    figure = curves_figure(
        rows,
        read_rows(run_dir / "validation.jsonl"),
        first_layer=first_layer,
        codebook_size=codebook_size,
        title=f"{run_dir.resolve().name}: step {last['step']}, epoch {last['epoch']}",
    )
    path = run_dir / "curves.png"
    partial = path.with_name(f".curves.{os.getpid()}.partial.png")
    try:
        figure.savefig(partial, dpi=100)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


__all__ = [
    "DASHES",
    "FAINT",
    "INK",
    "MARKERS",
    "SERIES",
    "chart",
    "curves_figure",
    "draw_active_codewords",
    "draw_gradients",
    "draw_layers",
    "draw_losses",
    "draw_metric",
    "draw_perplexities",
    "draw_run",
    "from_zero",
    "layer_colours",
    "read_rows",
    "smooth",
]

if __name__ == "__main__":
    os.nice(int(sys.argv[4]))
    draw_run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
