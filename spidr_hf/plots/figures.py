"""Pictures of speech, units and training runs (matplotlib, which the extras `train` and `eval` bring).

Each `draw_*` function fills one axes; `run_figure` puts them together on one page.
"""

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

from ..evaluation.phones import Phones
from ..system.files import check_picture, replaced_file
from ..system.messages import counted
from .curves import DASHES, FAINT, INK, MARKERS, SERIES, chart, draw_losses, draw_perplexities, from_zero
from .palette import COLOURS, HATCHED, ink_on, manners, merge_phones, phone_name, unit_colour

FRAME = 0.02  # seconds per unit
_QUIETEST = -60.0  # dB of a spectrum: below it is no sound, which would look like the loudest
_SHARES = ("phone_purity", "cluster_purity", "pnmi", "pnmi_without_silence", "agreement")
_DIVERSITY = ("codebook_perplexity", "active_units")


def draw_spectrogram(
    axes: Axes, waveform: np.ndarray | torch.Tensor, sampling_rate: int = 16_000, start: float = 0.0
) -> None:
    """Power in dB over time (from `start` on, in s) and frequency (kHz): windows of 25 ms, every 2.5 ms, the loudest
    60 dB."""
    waveform = torch.as_tensor(np.asarray(waveform), dtype=torch.float32)
    # A spectrum needs half of its 1024 samples on either side of the first; shorter recordings get silence.
    waveform = torch.nn.functional.pad(waveform, (0, max(0, 1024 - len(waveform))))
    window, hop = sampling_rate // 40, sampling_rate // 400
    emphasised = torch.cat([waveform[:1], waveform[1:] - 0.95 * waveform[:-1]])
    spectrum = torch.stft(emphasised, 1024, hop, window, torch.hann_window(window), return_complex=True).abs()
    decibels = (20 * spectrum.clamp_min(1e-8).log10()).numpy()
    loudest = max(float(decibels.max()), _QUIETEST)
    axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=loudest - 62,
        vmax=loudest - 3,
        extent=(start, start + len(waveform) / sampling_rate, 0, sampling_rate / 2000),
        interpolation="bilinear",
    )
    axes.set_ylabel("kHz", color=INK)
    axes.set_yticks(range(0, sampling_rate // 2000 + 1, 2))


def draw_phones(axes: Axes, phones: Phones, characters_per_second: float = 50) -> None:
    """One tier of phones, coloured by manner of articulation, with the names of those long enough to hold them."""
    kinds = manners(phone for phone, _, _ in phones)
    blocks = [
        _Block(start, end, COLOURS[kinds[phone]], kinds[phone], "" if kinds[phone] == "silence" else phone_name(phone))
        for phone, start, end in phones
    ]
    _draw_tier(axes, blocks, "phones", 9, characters_per_second * 7.5 / 9)


def draw_units(
    axes: Axes,
    units: Sequence[int] | np.ndarray,
    colours: Mapping[int, tuple[Any, str]],
    name: str,
    characters_per_second: float = 50,
) -> None:
    """One tier of units, a block per run of the same unit, with the numbers of those long enough to hold them.

    Without `colours` (of `palette.unit_colours`) each unit has a colour of its own; others than those are hatched.
    """
    values = np.asarray(units)
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    blocks = []
    for start, end in zip(starts, np.append(starts[1:], len(values)), strict=True):
        unit = int(values[start])
        colour, kind = colours.get(unit, (COLOURS["other"], "other")) if colours else (unit_colour(unit), "unit")
        blocks.append(_Block(start * FRAME, end * FRAME, colour, kind, str(unit)))
    _draw_tier(axes, blocks, name, 7.5, characters_per_second)


def draw_scores(axes: Axes, scores: Mapping[str, Mapping[int, float]], name: str) -> None:
    """Bars of one score per layer, for each of the models named in `scores`."""
    colours = itertools.cycle(["#cfd6dc", *SERIES])
    layers = sorted(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for i, (model, values) in enumerate(scores.items()):
        places = np.arange(len(layers)) + (i - (len(scores) - 1) / 2) * width
        bars = axes.bar(places, [values[layer] for layer in layers], width, color=next(colours), label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=9, color=INK, padding=2)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.margins(y=0.25)
    axes.legend(loc="upper left", ncol=len(scores))
    chart(axes, name, "layer")


def run_figure(
    *,
    waveform: np.ndarray | torch.Tensor,
    phones: Phones,
    units: Mapping[int, Sequence[int] | np.ndarray],
    colours: Mapping[int, Mapping[int, tuple[Any, str]]],
    rows: Sequence[Mapping[str, Any]],
    codebook_size: int,
    scores: Mapping[str, Mapping[int, float]],
    title: str,
    subtitle: str,
    sampling_rate: int = 16_000,
    floor: float | None = None,
) -> Figure:
    """
    One page about a pretraining run: an utterance with its phones and the units of several layers above, the training
    curves and the units' PNMI below.

    Args:
        waveform: Samples of one utterance.
        phones: Its phones, `(phone, start, end)` in seconds.
        units: Its units, one per 20 ms frame, by layer.
        colours: A colour for every unit of every layer, from `palette.unit_colours`.
        rows: The rows of the run's `metrics.jsonl`.
        codebook_size: Codewords per codebook.
        scores: PNMI by layer, for each model to be compared.
        title, subtitle: Two lines above; the second may be the utterance's text.
        sampling_rate: Samples per second.
        floor: Target perplexity under which the run counts as collapsed.
    """
    figure = Figure(figsize=(16, 9.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.03, hspace=0.0, wspace=0.04)
    above, below = figure.subfigures(2, 1, height_ratios=(1.45, 1))
    tiers = _draw_utterance(above, waveform, phones, units, colours, sampling_rate=sampling_rate)
    tiers[0].annotate(
        title,
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 30),
        textcoords="offset points",
        fontsize=17,
        fontweight="bold",
        color=INK,
    )
    tiers[0].set_title(subtitle, loc="left", fontsize=12, color=INK, pad=8)
    charts = below.subplots(1, 3)
    draw_losses(charts[0], rows, min(units), codebook_size)
    draw_perplexities(charts[1], rows, codebook_size, floor)
    draw_scores(charts[2], scores, "PNMI on held-out speech")
    return figure


def draw_validation(axes: Axes, rows: Sequence[Mapping[str, Any]], score: str, title: str) -> None:
    """One score over the steps of a run, a curve with points for each data set (rows of `validation.jsonl`).

    Of a score with an entry per codebook the best is drawn.
    """
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        points = [(row["step"], row[score]) for row in rows if row["name"] == name and row.get(score) is not None]
        steps = [step for step, _ in points]
        values = [max(value) if isinstance(value, list) else value for _, value in points]
        axes.plot(steps, values, **_curve(i), label=name)
    axes.set_xlim(0, 1.04 * axes.dataLim.x1 if axes.lines else None)
    from_zero(axes)
    axes.legend(loc="best")
    chart(axes, title, "training step")


def validation_figure(rows: Sequence[Mapping[str, Any]], first_layer: int) -> Figure:
    """
    Curves of a run's validation: loss, perplexity of the targets, and where phones are known PNMI of the best layer;
    below, the latest scores by layer.

    Args:
        rows: Those of `validation.jsonl`.
        first_layer: The layer of the first codebook, counted from 1.
    """
    charts = {"loss": "loss (nats per masked frame)", "target_ppl": "perplexity of the targets"}
    if any("pnmi" in row for row in rows):
        charts["pnmi"] = "PNMI, best layer"
    figure = Figure(figsize=(5.4 * len(charts), 7.6), layout="constrained")
    above, below = figure.subplots(2, len(charts), squeeze=False)
    latest = {row["name"]: row for row in rows}
    for axes, lower, (score, title) in zip(above, below, charts.items(), strict=True):
        draw_validation(axes, rows, score, title)
        by_layer = {"loss": "layer_losses", "target_ppl": "layer_target_ppl"}.get(score, score)
        for i, (name, row) in enumerate(latest.items()):
            if row.get(by_layer) is None or None in row[by_layer]:
                continue
            layers = range(first_layer, first_layer + len(row[by_layer]))
            label = f"{name}, step {row['step']}"
            lower.plot(layers, row[by_layer], **_curve(i), label=label)
        if lower.lines:
            lower.legend(loc="best")
            from_zero(lower)
        chart(lower, title.replace(", best layer", "") + " by layer", "layer")
    return figure


def matrix_figure(counts: np.ndarray, phones: Sequence[str], *, least_share: float = 0.0) -> Figure:
    """
    Phone-by-unit matrix: the share of each phone in the steps of each unit. Phones stand by manner of articulation,
    units by the phone they most often lie on.

    Args:
        counts: Phones x units, from `evaluation.count_pairs`.
        phones: The phones' names.
        least_share: Leave out units that make up a smaller share of all steps.
    """
    counts, phones = merge_phones(counts, phones)
    kinds = manners(phones)
    rows = sorted(range(len(phones)), key=lambda i: (list(COLOURS).index(kinds[phones[i]]), phones[i]))
    totals = counts.sum(axis=0)
    used = np.flatnonzero((totals > 0) & (totals >= least_share * totals.sum()))
    shares = counts[np.ix_(np.array(rows), used)] / totals[used]
    order = np.lexsort((-shares.max(axis=0), shares.argmax(axis=0)))
    figure = Figure(figsize=(max(7.0, min(18.0, 2.5 + 0.06 * len(used))), 2 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares[:, order], aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_yticks(range(len(rows)), [phones[i] for i in rows])
    for label in axes.get_yticklabels():
        label.set_color(INK)
    for i, row in enumerate(rows):
        axes.plot(
            [-0.018],
            [i],
            marker="s",
            ms=6,
            mfc=COLOURS[kinds[phones[row]]],
            mec=FAINT,
            mew=0.5,
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )
    axes.tick_params(axis="y", length=0, pad=16, labelsize=9)
    present = [manner for manner in COLOURS if manner in kinds.values()]
    figure.legend(
        handles=[_patch(manner) for manner in present],
        loc="outside lower left",
        ncol=min(4, len(present)),
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        title="squares: the phones' manner of articulation",
        title_fontproperties={"size": 9},
    ).get_title().set_color(INK)
    if len(used) <= 64:
        axes.set_xticks(range(len(used)), [str(unit) for unit in used[order]], rotation=90, fontsize=7, color=INK)
    else:
        axes.set_xticks([])
    axes.set_xlabel(f"{counted(len(used), 'unit')}, by the phone they most often lie on", color=INK)
    axes.set_title("Which phones units lie on", loc="left", fontsize=13, fontweight="bold", color=INK)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("share of the unit's steps", color=INK)
    bar.outline.set_visible(False)
    return figure


def layer_figure(
    scores: Mapping[int, Mapping[str, float]],
    titles: Sequence[str] = ("Agreement with phones", "Units in use"),
    chance: float | None = None,
) -> Figure:
    """
    Curves of scores over layers: agreement with phones on the left, diversity of units on the right.

    Args:
        scores: By layer, those of `evaluation.all_scores`; any others are drawn together.
        titles: Of the charts.
        chance: What guessing scores, drawn as a line.
    """
    layers = sorted(scores)
    names = list(scores[layers[0]])
    groups = [[name for name in names if name in group] for group in (_SHARES, _DIVERSITY)]
    groups = [group for group in groups if group] or [names]
    figure = Figure(figsize=(6.2 * len(groups), 4.4), layout="constrained")
    for axes, group, title in zip(np.atleast_1d(figure.subplots(1, len(groups))), groups, titles, strict=False):
        for i, name in enumerate(group):
            values = [scores[layer][name] for layer in layers]
            axes.plot(layers, values, **_curve(i), label=name.replace("_", " "), clip_on=False, zorder=3)
        if chance is not None:
            axes.axhline(chance, color=FAINT, lw=1, ls=DASHES, label=f"chance ({chance:g} %)")
        from_zero(axes)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3)
        chart(axes, title, "layer")
        axes.set_xticks(layers)
    return figure


def utterance_figure(
    waveform: np.ndarray | torch.Tensor,
    phones: Phones,
    units: Mapping[int | None, Sequence[int] | np.ndarray],
    colours: Mapping[int | None, Mapping[int, tuple[Any, str]]] | None = None,
    *,
    title: str = "",
    sampling_rate: int = 16_000,
    part: tuple[float, float | None] = (0.0, None),
) -> Figure:
    """
    Spectrogram of an utterance with its phones and the units of some layers.

    Args:
        waveform: Samples.
        phones: `(phone, start, end)` in seconds; may be empty.
        units: One unit per 20 ms frame, by layer; None where the layer is not known.
        colours: A colour for every unit of every layer, from `palette.unit_colours`.
        title: A line above.
        sampling_rate: Samples per second.
        part: Which part of it, from and to (its end for None), in seconds.
    """
    figure = Figure(figsize=(16, 3.8 + 0.6 * (bool(len(phones)) + len(units))), layout="constrained")
    axes = _draw_utterance(figure, waveform, phones, units, colours or {}, sampling_rate=sampling_rate, part=part)
    axes[0].set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def _draw_utterance(
    figure: Figure | SubFigure,
    waveform: np.ndarray | torch.Tensor,
    phones: Phones,
    units: Mapping[Any, Sequence[int] | np.ndarray],
    colours: Mapping[Any, Mapping[int, tuple[Any, str]]],
    *,
    sampling_rate: int,
    part: tuple[float, float | None] = (0.0, None),
) -> np.ndarray:
    """Spectrogram and tiers, one above the other, and the legend of their colours."""
    duration = len(waveform) / sampling_rate
    start, end = part[0], duration if part[1] is None else min(part[1], duration)
    if not 0 <= start < end:
        raise ValueError(f"There is nothing between {start:g} and {end:g} s of a recording of {duration:.2f} s.")
    tiers: list[Any] = [*["phones"] * bool(len(phones)), *sorted(units)]
    ratios = {"height_ratios": [4.2, *[0.75] * len(tiers)]}
    axes = np.atleast_1d(figure.subplots(1 + len(tiers), 1, sharex=True, gridspec_kw=ratios))
    axes[0].set_xlim(start, end)
    piece = waveform[int(start * sampling_rate) : int(np.ceil(end * sampling_rate))]
    draw_spectrogram(axes[0], piece, sampling_rate, start)
    axes[0].set_xlim(start, end)
    characters_per_second = 250 / (end - start)  # what a line of such a page holds of the tiers' digits
    for tier, layer in zip(axes[1:], tiers, strict=True):
        if layer == "phones":
            draw_phones(tier, phones, characters_per_second)
        else:
            name = "units" if layer is None else f"layer {layer}"
            draw_units(tier, units[layer], colours.get(layer, {}), name, characters_per_second)
    for tier in axes:
        tier.tick_params(colors=INK, labelsize=10)
        tier.spines[:].set_visible(False)
    for tier in axes[:-1]:
        tier.tick_params(bottom=False, labelbottom=False)
    axes[-1].set_xlabel("seconds", color=INK)
    known = any(colours.values())
    labels = [manner for manner in COLOURS if manner != "other"] if known or len(phones) else []
    title = "phones by manner of articulation" + "; a unit has the colour of the phone it most often lies on" * known
    figure.legend(
        handles=[_patch(manner) for manner in [*labels, *["other"] * bool(labels)]],
        loc="outside lower center",
        ncol=len(COLOURS),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        title=title if labels else "each unit has a colour of its own, the same everywhere",
        title_fontproperties={"size": 10},
        handlelength=1.4,
    ).get_title().set_color(INK)
    return axes


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 120) -> None:
    """Write a picture that is complete or not there at all; its suffix says in which format."""
    with replaced_file(check_picture(Path(path))) as partial:
        figure.savefig(partial, dpi=dpi)


class _Block(NamedTuple):
    """A phone or a run of a unit: seconds, colour, and what it is."""

    start: float
    end: float
    colour: Any
    manner: str
    text: str


def _draw_tier(axes: Axes, blocks: Sequence[_Block], name: str, size: float, characters_per_second: float) -> None:
    """Blocks side by side; those long enough hold their text."""
    left, right = axes.get_xlim() if axes.get_autoscalex_on() is False else (-np.inf, np.inf)
    shown = [block for block in blocks if block.end > left and block.start < right]
    for hatched in (False, True):
        group = [block for block in shown if (block.manner == HATCHED) == hatched]
        axes.broken_barh(
            [(block.start, block.end - block.start) for block in group],
            (0, 1),
            facecolors=[block.colour for block in group],
            edgecolors=FAINT if hatched else "white",
            # In proportion, or the edges of narrow blocks would cover them.
            linewidths=[min(0.8, 0.12 * characters_per_second * (block.end - block.start)) for block in group],
            hatch="////" if hatched else None,
        )
    for block in shown:
        start, end = max(block.start, left), min(block.end, right)
        if block.text and len(block.text) <= (end - start) * characters_per_second - 0.3:
            ink = ink_on(block.colour)
            axes.text((start + end) / 2, 0.47, block.text, ha="center", va="center", fontsize=size, color=ink)
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, color=INK)


def _curve(index: int) -> dict[str, Any]:
    """The look of a chart's curve by its number."""
    return {
        "color": SERIES[index % len(SERIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "ls": "-" if index < len(SERIES) else DASHES,
        "lw": 2,
        "ms": 5,
    }


def _patch(manner: str) -> Patch:
    hatch = {"hatch": "////"} if manner == HATCHED else {}
    return Patch(facecolor=COLOURS[manner], edgecolor=FAINT, lw=0.5, label=manner, **hatch)


__all__ = [
    "draw_losses",
    "draw_perplexities",
    "draw_phones",
    "draw_scores",
    "draw_spectrogram",
    "draw_units",
    "draw_validation",
    "layer_figure",
    "matrix_figure",
    "run_figure",
    "save_figure",
    "utterance_figure",
    "validation_figure",
]
