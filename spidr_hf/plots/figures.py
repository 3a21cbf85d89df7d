"""Pictures of speech, units and training runs (matplotlib, which the extras `train` and `eval` bring).

Each `draw_*` function fills one axes; `run_figure` puts them together on one page.
"""

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

from ..evaluation.phones import Phones
from ..system.files import replaced_file
from .curves import INK, chart, draw_losses, draw_perplexities

FRAME = 0.02  # seconds per unit
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
        base = np.array(to_rgb(phone_colour(phones[int(counts[:, unit].argmax())])))
        shade = 0.45 * ((unit * 0.618034) % 1)  # neighbours in number are far apart in shade
        colours[int(unit)] = tuple(base + (1 - base) * shade)
    return colours


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
    chart(axes, name, "layer")


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


def draw_validation(axes: Axes, rows: Sequence[Mapping[str, Any]], score: str, title: str) -> None:
    """One score over the steps of a run, a curve with points for each data set (rows of `validation.jsonl`).

    Of a score with an entry per codebook the best is drawn.
    """
    for i, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        points = [(row["step"], row[score]) for row in rows if row["name"] == name and row.get(score) is not None]
        steps = [step for step, _ in points]
        values = [max(value) if isinstance(value, list) else value for _, value in points]
        axes.plot(steps, values, color=_CURVES[i % len(_CURVES)], lw=1.8, marker="o", ms=4, label=name)
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
            lower.plot(layers, row[by_layer], color=_CURVES[i % len(_CURVES)], lw=1.8, marker="o", ms=4, label=label)
        if lower.lines:
            lower.legend(loc="best")
        lower.xaxis.get_major_locator().set_params(integer=True)
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
        chart(axes, title, "layer")
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
    tiers: list[Any] = [*["phones"] * bool(len(phones)), *sorted(units)]  # type: ignore[type-var]  # one None, or none
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
    "phone_colour",
    "run_figure",
    "save_figure",
    "unit_colours",
    "utterance_figure",
    "validation_figure",
]
