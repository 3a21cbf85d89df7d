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
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

INK, FAINT = "#26303a", "#8a949e"
# Columns of metrics.jsonl that have their place in the picture, or need none. Every other has a panel of its own.
_DRAWN = {"step", "epoch", "loss", "layer_losses", "target_ppl", "pred_ppl", "active_codewords", "grad_norm", "lr"}
_DRAWN |= {"ema_decay", "audio_seconds_per_second", "world_size"}


def draw_losses(axes: Axes, rows: Sequence[Mapping[str, Any]], first_layer: int, codebook_size: int) -> None:
    """The loss over the steps of a run (rows of `metrics.jsonl`), and that of each codebook's layer."""
    steps = [row["step"] for row in rows]
    layers = np.array([row["layer_losses"] for row in rows])
    axes.axhline(math.log(codebook_size), color=FAINT, lw=1, ls=(0, (4, 3)))
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
    shades = np.linspace(0.35, 0.8, layers.shape[1])
    for k, shade in enumerate(shades):
        axes.plot(steps, smooth(layers[:, k]), color=blues(shade), lw=1.3, label=f"layer {first_layer + k}")
    axes.plot(steps, smooth([row["loss"] for row in rows]), color="#d9604c", lw=2.2, label="mean")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.8), ncol=2)
    chart(axes, "loss (nats per masked frame)", "training step")


def draw_perplexities(axes: Axes, rows: Sequence[Mapping[str, Any]], floor: float | None = None) -> None:
    """Target and prediction perplexity over the steps of a run; `floor` is the line of a collapse."""
    steps = [row["step"] for row in rows]
    axes.plot(steps, smooth([row["pred_ppl"] for row in rows]), color="#4f86c6", lw=2, label="predictions")
    axes.plot(steps, smooth([row["target_ppl"] for row in rows]), color="#f2a93b", lw=2.2, label="targets")
    axes.set_ylim(bottom=0)
    if floor is not None:
        axes.axhline(floor, color="#d9604c", lw=1, ls=(0, (4, 3)))
        axes.annotate(
            "below: collapsed",
            (0.985, floor),
            xycoords=blended_transform_factory(axes.transAxes, axes.transData),
            xytext=(0, -12),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color="#d9604c",
        )
    axes.legend(loc="upper right")
    chart(axes, "perplexity (codewords)", "training step")


def draw_active_codewords(axes: Axes, rows: Sequence[Mapping[str, Any]], first_layer: int) -> None:
    """The codewords in use over the steps of a run, those of each codebook's layer."""
    steps = [row["step"] for row in rows]
    active = np.array([row["active_codewords"] for row in rows])
    for k, shade in enumerate(np.linspace(0.35, 0.8, active.shape[1])):
        axes.plot(steps, smooth(active[:, k]), color=blues(shade), lw=1.3, label=f"layer {first_layer + k}")
    axes.set_ylim(bottom=0)
    chart(axes, "active codewords", "training step")


def draw_gradients(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Gradient norm and, on an axis of its own, the learning rate over the steps of a run."""
    steps = [row["step"] for row in rows]
    axes.plot(steps, smooth([row["grad_norm"] for row in rows]), color="#2fa39a", lw=2)
    axes.set_ylim(bottom=0)
    chart(axes, "gradient norm, and learning rate (dashed)", "training step")
    beside = axes.twinx()
    beside.plot(steps, [row["lr"] for row in rows], color=FAINT, lw=1.3, ls=(0, (4, 3)))
    beside.set_ylim(bottom=0)
    beside.tick_params(colors=FAINT, labelsize=10)
    beside.spines[:].set_visible(False)


def draw_metric(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, first_layer: int) -> None:
    """Any other column of `metrics.jsonl` over the steps of a run: a number, or one of each codebook's layer."""
    rows = [row for row in rows if row.get(name) is not None]  # a longer run may have it from some step on
    steps, values = [row["step"] for row in rows], np.array([row[name] for row in rows], dtype=float)
    if values.ndim == 1:
        axes.plot(steps, smooth(values), color="#4f86c6", lw=2)
    else:
        for k, shade in enumerate(np.linspace(0.35, 0.8, values.shape[1])):
            axes.plot(steps, smooth(values[:, k]), color=blues(shade), lw=1.3, label=f"layer {first_layer + k}")
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
    for name, marker in zip(names, "osD^v" * len(names), strict=False):
        points = [(row["step"], row["loss"]) for row in validation if row["name"] == name and row["loss"] is not None]
        losses.plot(*zip(*points, strict=True), marker, ms=5, color=INK, mfc="white", label=name, zorder=5)
    draw_losses(losses, rows, first_layer, codebook_size)
    draw_perplexities(perplexities, rows)
    draw_active_codewords(active, rows, first_layer)
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
    if legend := axes.get_legend():
        legend.set_frame_on(False)
        for text in legend.get_texts():
            text.set(fontsize=10, color=INK)


def blues(shade: float) -> tuple[float, float, float]:
    """Blue, from pale (0) to deep (1)."""
    base = np.array(to_rgb("#1f4e8c"))
    return tuple(base + (1 - base) * (1 - shade))


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
    "FAINT",
    "INK",
    "blues",
    "chart",
    "curves_figure",
    "draw_active_codewords",
    "draw_gradients",
    "draw_losses",
    "draw_metric",
    "draw_perplexities",
    "draw_run",
    "read_rows",
    "smooth",
]

if __name__ == "__main__":
    os.nice(int(sys.argv[4]))
    draw_run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
