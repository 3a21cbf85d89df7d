"""Pictures can be drawn, and what they show is what they were given."""

import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from spidr_hf.finetuning.plots import curves_figure as finetuning_figure
from spidr_hf.finetuning.plots import layer_weights_figure
from spidr_hf.plots.curves import curves_figure
from spidr_hf.plots.figures import (
    draw_phones,
    draw_spectrogram,
    draw_units,
    layer_figure,
    matrix_figure,
    run_figure,
    utterance_figure,
    validation_figure,
)
from spidr_hf.plots.palette import COLOURS, unit_colour, unit_colours

PHONES = [("SIL", 0.0, 0.3), ("S", 0.3, 0.6), ("IY", 0.6, 1.0)]


def axes():
    return Figure().subplots()


def texts(ax):
    return [text.get_text() for text in ax.texts]


def blocks(ax):
    """Start, width, colour and hatching of what a tier shows, in order."""
    found = []
    for collection in ax.collections:
        for path, colour in zip(collection.get_paths(), collection.get_facecolors(), strict=True):
            (left, _), (right, _) = path.vertices.min(axis=0), path.vertices.max(axis=0)
            found.append((left, right - left, to_hex(colour), bool(collection.get_hatch())))
    return sorted(found)


def test_a_unit_takes_the_colour_of_the_phone_it_lies_on_most():
    counts = np.array([[5, 0, 0], [1, 0, 4], [0, 0, 5]])  # SIL, S, IY
    colours = unit_colours(counts, ["SIL", "S", "IY"])
    assert sorted(colours) == [0, 2]  # unit 1 never occurs
    assert colours[0] == (pytest.approx(to_rgb(COLOURS["silence"])), "silence")  # unit 0 has the unchanged shade
    hue = np.array(to_rgb(COLOURS["vowel"]))
    assert (np.array(colours[2][0]) >= hue).all() and colours[2][1] == "vowel"


def test_runs_of_a_unit_become_one_numbered_block():
    ax = axes()
    draw_units(ax, [7] * 10 + [3] * 2 + [7] * 5, {7: ("#ffffff", "silence")}, "layer 6", characters_per_second=50)
    assert [width for _, width, _, _ in blocks(ax)] == pytest.approx([0.2, 0.04, 0.1])
    assert [hatched for *_, hatched in blocks(ax)] == [False, True, False]  # nothing is known of unit 3
    assert texts(ax) == ["7", "3", "7"]
    ax = axes()
    draw_units(ax, [10, 11] * 4, {}, "layer 6", characters_per_second=50)
    assert len(blocks(ax)) == 8 and texts(ax) == []  # too short for a number


@pytest.mark.parametrize("loudness, dark", [(0.0, True), (3e-5, False)])
def test_silence_is_dark(loudness, dark):
    ax = axes()
    draw_spectrogram(ax, loudness * np.sin(np.arange(16_000)))
    image = ax.images[0]
    assert bool((image.norm(image.get_array()) <= 0).all()) == dark


def test_units_without_phones_have_colours_of_their_own():
    ax = axes()
    draw_units(ax, [7, 7, 3, 7], {}, "units")
    assert [colour for _, _, colour, _ in blocks(ax)] == [unit_colour(7), unit_colour(3), unit_colour(7)]


def test_narrow_units_keep_their_colour():
    """78 s in a picture: no edge covers more than a part of its block."""
    ax = axes()
    draw_units(ax, np.arange(200) % 100, {}, "units", characters_per_second=250 / 78)
    points = 0.02 * 16 * 72 / 78  # of a unit, on a page of 16 inches
    widths = ax.collections[0].get_linewidths()
    assert len(widths) == 200 and max(widths) < points / 4


def test_phones_are_coloured_whoever_aligned_them():
    ax = axes()
    draw_phones(ax, [("sil", 0, 1), ("ay1", 1, 2), ("AH0", 2, 3), ("tʃ", 3, 4), ("§", 4, 5)])
    expected = ["silence", "vowel", "vowel", "affricate", "other"]
    assert [colour for _, _, colour, _ in blocks(ax)] == [COLOURS[manner] for manner in expected]
    assert texts(ax) == ["ay", "AH", "tʃ", "§"]


def test_a_legend_and_a_part():
    waveform, units = np.random.default_rng(0).normal(size=32_000), {6: np.arange(99) // 3}
    colours = {6: {unit: ("#ffffff", "vowel") for unit in range(33)}}
    figure = utterance_figure(waveform, PHONES, units, colours, part=(0.5, 1.25))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(COLOURS)
    assert [ax.get_xlim() for ax in figure.axes] == [(0.5, 1.25)] * 3
    assert figure.axes[0].images[0].get_extent()[:2] == [0.5, 1.25]
    start, width, _, _ = blocks(figure.axes[2])[-1]
    assert start < 1.25 < start + width  # none beyond
    assert "colour of its own" in utterance_figure(waveform, [], units).legends[0].get_title().get_text()
    with pytest.raises(ValueError, match=r"nothing between 3 and 2 s of a recording of 2\.00 s"):
        utterance_figure(waveform, [], units, part=(3, None))


def test_phones_are_named_and_silence_is_not():
    ax = axes()
    draw_phones(ax, PHONES)
    assert [text for text in texts(ax) if text] == ["S", "IY"]


def test_the_page_of_a_run(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"step": step, "loss": 4 - step / 50, "layer_losses": [4.0, 3.9], "target_ppl": 20.0, "pred_ppl": 30.0}
        for step in range(10, 60, 10)
    ]
    figure = run_figure(
        waveform=rng.normal(size=16_000),
        phones=PHONES,
        units={3: rng.integers(0, 9, 49), 4: rng.integers(0, 9, 49)},
        colours={3: {}, 4: {}},
        rows=rows,
        codebook_size=16,
        scores={"random weights": {3: 0.01, 4: 0.02}, "after training": {3: 0.1, 4: 0.2}},
        title="title",
        subtitle="subtitle",
        floor=5.0,
    )
    figure.savefig(tmp_path / "page.png", dpi=50)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    labels = [ax.get_ylabel() for ax in figure.get_axes()]
    assert [label for label in labels if label] == ["kHz", "phones", "layer 3", "layer 4"]
    titles = [ax.get_title(loc="left") for ax in figure.get_axes()]
    assert [title for title in titles if title] == [
        "subtitle",
        "loss (nats per masked frame)",
        "perplexity (of 16 codewords)",
        "PNMI on held-out speech",
    ]


def test_curves_say_what_they_are():
    layers = {"layer_losses": [4.0] * 8, "active_codewords": [9] * 8}
    rows = [{"step": 1, "epoch": 1, "loss": 4, "target_ppl": 2, "pred_ppl": 3, "grad_norm": 1, "lr": 1} | layers] * 2
    losses, perplexities, active, gradients, _ = curves_figure(rows, first_layer=5, codebook_size=64).axes
    assert len({to_hex(line.get_color()) for line in active.lines}) == 8
    assert perplexities.get_title(loc="left") == "perplexity (of 64 codewords)"
    assert active.get_title(loc="left") == "active codewords (of 64)"
    assert all(ax.get_legend() for ax in (losses, perplexities, active, gradients))


def test_axes_of_validation_begin_at_0_and_have_whole_steps():
    rows = [{"step": n, "name": "dev", "loss": 1 + n, "target_ppl": 9, "layer_losses": [1, 2]} for n in (1, 2, 3)]
    figure = validation_figure(rows, first_layer=5)
    for ax in figure.axes[:2]:
        assert ax.get_ylim()[0] == ax.get_xlim()[0] == 0 and ax.get_ylim()[1] > ax.dataLim.y1
        assert all(tick == round(tick) for tick in ax.get_xticks())


def test_a_single_validation_has_a_whole_step():
    figure = finetuning_figure([{"step": 2, "loss": 3.0, "valid_loss": 2.9, "valid_per": 1.0}], 2)
    for ax in figure.axes:
        assert [tick for tick in ax.get_xticks() if ax.get_xlim()[0] <= tick <= ax.get_xlim()[1]] == [2]


def test_pictures_say_what_their_lines_and_squares_mean():
    (axes,) = layer_figure({1: {"within": 4.0}, 2: {"within": 0.0}}, titles=("ABX",), chance=50).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["within", "chance (50 %)"]
    assert axes.get_ylim()[1] > 50 and not axes.lines[0].get_clip_on()  # markers at 0 are whole
    matrix = matrix_figure(np.eye(3, dtype=int), ["AH0", "T", "sil"])
    assert [text.get_text() for text in matrix.legends[0].get_texts()] == ["silence", "vowel", "stop"]
    assert (
        "all the same: 1/4" in layer_weights_figure([0.1, 0.2, 0.3, 0.4]).axes[0].get_legend().get_texts()[0].get_text()
    )
