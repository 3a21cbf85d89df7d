"""Pictures of speech, units and training runs (matplotlib, which the extras `train` and `eval` bring).

Each `draw_*` function fills one axes; `run_figure` puts them together on one page.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.transforms import blended_transform_factory

from .evaluation import Phones
from .files import replaced_file

FRAME = 0.02  # seconds per unit
INK, FAINT = "#26303a", "#8a949e"
# Manners of articulation: the phones of each (CMU's), and a colour.
MANNERS = {
    "silence": ("SIL SP SPN", "#dfe3e6"),
    "vowel": ("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW", "#f2a93b"),
    "approximant": ("L R W Y", "#8fbf5f"),
    "nasal": ("M N NG", "#2fa39a"),
    "fricative": ("DH F HH S SH TH V Z ZH", "#4f86c6"),
    "affricate": ("CH JH", "#9a6fb8"),
    "stop": ("B D G K P T", "#d9604c"),
}
_SHARES = ("phone_purity", "cluster_purity", "pnmi", "pnmi_without_silence", "agreement")
_DIVERSITY = ("codebook_perplexity", "active_units")
_CURVES = ["#2fa39a", "#4f86c6", "#f2a93b", "#d9604c", "#9a6fb8"]
_MANNER_OF = {phone: manner for manner, (phones, _) in MANNERS.items() for phone in phones.split()}


def phone_colour(phone: str) -> str:
    """The colour of a phone's manner of articulation; grey for phones outside CMU's set."""
    return MANNERS[_MANNER_OF[phone]][1] if phone in _MANNER_OF else "#b8bec4"


def draw_spectrogram(axes: Axes, waveform: np.ndarray | torch.Tensor, sampling_rate: int = 16_000) -> None:
    """Power in dB over time (s) and frequency (kHz): windows of 25 ms, every 2.5 ms, the loudest 60 dB."""
    waveform = torch.as_tensor(np.asarray(waveform), dtype=torch.float32)
    window, hop = sampling_rate // 40, sampling_rate // 400
    emphasised = torch.cat([waveform[:1], waveform[1:] - 0.95 * waveform[:-1]])
    spectrum = torch.stft(emphasised, 1024, hop, window, torch.hann_window(window), return_complex=True).abs()
    decibels = (20 * spectrum.clamp_min(1e-8).log10()).numpy()
    axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=decibels.max() - 62,
        vmax=decibels.max() - 3,
        extent=(0, len(waveform) / sampling_rate, 0, sampling_rate / 2000),
        interpolation="bilinear",
    )
    axes.set_ylabel("kHz", color=INK)
    axes.set_yticks(range(0, sampling_rate // 2000 + 1, 2))


def draw_phones(axes: Axes, phones: Phones, characters_per_second: float = 50) -> None:
    """One tier of phones, coloured by manner of articulation, with the names of those long enough to hold them."""
    for phone, start, end in phones:
        name = "" if phone == "SIL" else phone
        _block(axes, start, end, phone_colour(phone), name, 9, characters_per_second * 7.5 / 9)
    _tier(axes, "phones")


def draw_units(
    axes: Axes,
    units: Sequence[int] | np.ndarray,
    colours: Mapping[int, Any],
    name: str,
    characters_per_second: float = 50,
) -> None:
    """One tier of units, a block per run of the same unit, with the numbers of those long enough to hold them."""
    values = np.asarray(units)
    starts = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    for start, end in zip(starts, np.append(starts[1:], len(values)), strict=True):
        unit = int(values[start])
        colour = colours.get(unit, "#b8bec4")
        _block(axes, start * FRAME, end * FRAME, colour, str(unit), 7.5, characters_per_second)
    _tier(axes, name)


def unit_colours(counts: np.ndarray, phones: Sequence[str]) -> dict[int, tuple[float, float, float]]:
    """
    A colour for each unit: that of the phone it most often lies on, in a shade of its own. Where units know phones,
    their tiers look like the phones' tier.

    Args:
        counts: Phones x units, from `evaluation.count_pairs`.
        phones: The phones' names.
    """
    colours = {}
    for unit in np.flatnonzero(counts.sum(axis=0)):
        base = np.array(to_rgb(phone_colour(phones[counts[:, unit].argmax()])))
        shade = 0.45 * ((unit * 0.618034) % 1)  # neighbours in number are far apart in shade
        colours[int(unit)] = tuple(base + (1 - base) * shade)
    return colours


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
        axes.plot(steps, _smooth(layers[:, k]), color=_blues(shade), lw=1.3, label=f"layer {first_layer + k}")
    axes.plot(steps, _smooth([row["loss"] for row in rows]), color="#d9604c", lw=2.2, label="mean")
    axes.legend(loc="upper right", bbox_to_anchor=(1, 0.8), ncol=2)
    _chart(axes, "loss (nats per masked frame)", "training step")


def draw_perplexities(axes: Axes, rows: Sequence[Mapping[str, Any]], floor: float | None = None) -> None:
    """Target and prediction perplexity over the steps of a run; `floor` is the line of a collapse."""
    steps = [row["step"] for row in rows]
    axes.plot(steps, _smooth([row["pred_ppl"] for row in rows]), color="#4f86c6", lw=2, label="predictions")
    axes.plot(steps, _smooth([row["target_ppl"] for row in rows]), color="#f2a93b", lw=2.2, label="targets")
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
    _chart(axes, "perplexity (codewords)", "training step")


def draw_scores(axes: Axes, scores: Mapping[str, Mapping[int, float]], name: str) -> None:
    """Bars of one score per layer, for each of the models named in `scores`."""
    colours = ["#cfd6dc", "#2fa39a", "#4f86c6", "#f2a93b"]
    layers = sorted(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for i, (model, values) in enumerate(scores.items()):
        places = np.arange(len(layers)) + (i - (len(scores) - 1) / 2) * width
        bars = axes.bar(places, [values[layer] for layer in layers], width, color=colours[i % 4], label=model)
        axes.bar_label(bars, fmt="%.2f", fontsize=9, color=INK, padding=2)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.margins(y=0.25)
    axes.legend(loc="upper left", ncol=len(scores))
    _chart(axes, name, "layer")


def run_figure(
    *,
    waveform: np.ndarray | torch.Tensor,
    phones: Phones,
    units: Mapping[int, Sequence[int] | np.ndarray],
    colours: Mapping[int, Mapping[int, Any]],
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
        colours: A colour for every unit of every layer, from `unit_colours`.
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
    tiers = above.subplots(
        2 + len(units), 1, sharex=True, gridspec_kw={"height_ratios": [4.2, 0.75, *[0.75] * len(units)]}
    )
    draw_spectrogram(tiers[0], waveform, sampling_rate)
    duration = len(waveform) / sampling_rate
    characters_per_second = 250 / duration  # what a line of this page holds of the tiers' digits
    draw_phones(tiers[1], phones, characters_per_second)
    for axes, layer in zip(tiers[2:], sorted(units), strict=True):
        draw_units(axes, units[layer], colours[layer], f"layer {layer}", characters_per_second)
    for axes in tiers[:-1]:
        axes.tick_params(bottom=False, labelbottom=False)
    tiers[-1].set_xlabel("seconds", color=INK)
    tiers[0].set_xlim(0, duration)
    for axes in tiers:
        axes.tick_params(colors=INK, labelsize=10)
        axes.spines[:].set_visible(False)
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
    above.legend(
        handles=[Patch(color=colour, label=manner) for manner, (_, colour) in MANNERS.items()],
        loc="outside lower center",
        ncol=len(MANNERS),
        frameon=False,
        fontsize=10,
        labelcolor=INK,
        title="phones by manner of articulation; a unit has the colour of the phone it most often lies on",
        title_fontproperties={"size": 10},
        handlelength=1.1,
    )
    charts = below.subplots(1, 3)
    draw_losses(charts[0], rows, min(units), codebook_size)
    draw_perplexities(charts[1], rows, floor)
    draw_scores(charts[2], scores, "PNMI on held-out speech")
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
    manners = list(MANNERS)
    rows = sorted(
        range(len(phones)),
        key=lambda i: (
            manners.index(_MANNER_OF[phones[i]]) if phones[i] in _MANNER_OF else len(manners),
            phones[i],
        ),
    )
    totals = counts.sum(axis=0)
    used = np.flatnonzero((totals > 0) & (totals >= least_share * totals.sum()))
    shares = counts[np.ix_(rows, used)] / totals[used]
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
            color=phone_colour(phones[row]),
            transform=axes.get_yaxis_transform(),
            clip_on=False,
        )
    axes.tick_params(axis="y", length=0, pad=16, labelsize=9)
    if len(used) <= 64:
        axes.set_xticks(range(len(used)), [str(unit) for unit in used[order]], rotation=90, fontsize=7, color=INK)
    else:
        axes.set_xticks([])
    axes.set_xlabel(f"{len(used)} units, by the phone they most often lie on", color=INK)
    axes.set_title("Which phones units lie on", loc="left", fontsize=13, fontweight="bold", color=INK)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("share of the unit's steps", color=INK)
    bar.outline.set_visible(False)
    return figure


def layer_figure(
    scores: Mapping[int, Mapping[str, float]], titles: Sequence[str] = ("Agreement with phones", "Units in use")
) -> Figure:
    """
    Curves of scores over layers: agreement with phones on the left, diversity of units on the right.

    Args:
        scores: By layer, those of `evaluation.all_scores`; any others are drawn together.
        titles: Of the charts.
    """
    layers = sorted(scores)
    names = list(scores[layers[0]])
    groups = [[name for name in names if name in group] for group in (_SHARES, _DIVERSITY)]
    groups = [group for group in groups if group] or [names]
    figure = Figure(figsize=(6.2 * len(groups), 4.4), layout="constrained")
    for axes, group, title in zip(np.atleast_1d(figure.subplots(1, len(groups))), groups, titles, strict=False):
        for name, colour in zip(group, _CURVES * len(group), strict=False):
            values = [scores[layer][name] for layer in layers]
            axes.plot(layers, values, color=colour, lw=2.2, marker="o", ms=5, label=name.replace("_", " "))
        axes.set_xticks(layers)
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=3)
        _chart(axes, title, "layer")
    return figure


def utterance_figure(
    waveform: np.ndarray | torch.Tensor,
    phones: Phones,
    units: Mapping[int | None, Sequence[int] | np.ndarray],
    colours: Mapping[int | None, Mapping[int, Any]] | None = None,
    *,
    title: str = "",
    sampling_rate: int = 16_000,
) -> Figure:
    """
    Spectrogram of an utterance with its phones and the units of some layers.

    Args:
        waveform: Samples.
        phones: `(phone, start, end)` in seconds; may be empty.
        units: One unit per 20 ms frame, by layer; None where the layer is not known.
        colours: A colour for every unit of every layer, from `unit_colours`.
        title: A line above.
        sampling_rate: Samples per second.
    """
    tiers = ["phones"] * bool(len(phones)) + sorted(units)
    duration = len(waveform) / sampling_rate
    figure = Figure(figsize=(16, 3.4 + 0.6 * len(tiers)), layout="constrained")
    axes = figure.subplots(1 + len(tiers), 1, sharex=True, gridspec_kw={"height_ratios": [4.2, *[0.75] * len(tiers)]})
    axes = np.atleast_1d(axes)
    draw_spectrogram(axes[0], waveform, sampling_rate)
    for tier, layer in zip(axes[1:], tiers, strict=True):
        if layer == "phones":
            draw_phones(tier, phones, 250 / duration)
        else:
            name = "units" if layer is None else f"layer {layer}"
            draw_units(tier, units[layer], (colours or {}).get(layer, {}), name, 250 / duration)
    for tier in axes[:-1]:
        tier.tick_params(bottom=False, labelbottom=False)
    axes[-1].set_xlabel("seconds", color=INK)
    axes[0].set_xlim(0, duration)
    axes[0].set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK)
    for tier in axes:
        tier.tick_params(colors=INK, labelsize=10)
        tier.spines[:].set_visible(False)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 120) -> None:
    """Write a picture that is complete or not there at all; its suffix says in which format."""
    path = Path(path)
    formats = sorted(FigureCanvasAgg.get_supported_filetypes())
    if path.suffix.lstrip(".").lower() not in formats:
        raise ValueError(f"{path}: a picture ends in .png, .pdf or .svg.")
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=dpi)


def _block(
    axes: Axes, start: float, end: float, colour: Any, text: str, size: float, characters_per_second: float
) -> None:
    axes.axvspan(start, end, facecolor=colour, edgecolor="white", lw=0.8)
    if len(text) > (end - start) * characters_per_second - 0.3:
        return
    bright = float(np.dot(to_rgb(colour), (0.3, 0.59, 0.11))) > 0.5
    ink = INK if bright else "white"
    axes.text((start + end) / 2, 0.47, text, ha="center", va="center", fontsize=size, color=ink)


def _tier(axes: Axes, name: str) -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11, color=INK)


def _chart(axes: Axes, title: str, xlabel: str) -> None:
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


def _blues(shade: float) -> tuple[float, float, float]:
    base = np.array(to_rgb("#1f4e8c"))
    return tuple(base + (1 - base) * (1 - shade))


def _smooth(values: Sequence[float]) -> np.ndarray:
    """A running mean over about a fiftieth of the run, so that the trend shows."""
    values = np.asarray(values, dtype=float)
    half = len(values) // 100
    sums = np.cumsum(np.append(0.0, values))
    index = np.arange(len(values))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)


__all__ = [
    "draw_losses",
    "draw_perplexities",
    "draw_phones",
    "draw_scores",
    "draw_spectrogram",
    "draw_units",
    "layer_figure",
    "matrix_figure",
    "phone_colour",
    "run_figure",
    "save_figure",
    "unit_colours",
    "utterance_figure",
]
