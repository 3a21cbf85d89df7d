"""The picture of a run: it can be drawn, and what it shows is what it was given."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from spidr_hf.plots.figures import draw_phones, draw_units, phone_colour, run_figure, unit_colours

PHONES = [("SIL", 0.0, 0.3), ("S", 0.3, 0.6), ("IY", 0.6, 1.0)]


def axes():
    return Figure().subplots()


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_a_unit_takes_the_colour_of_the_phone_it_lies_on_most():
    counts = np.array([[5, 0, 0], [1, 0, 4], [0, 0, 5]])  # SIL, S, IY
    colours = unit_colours(counts, ["SIL", "S", "IY"])
    assert sorted(colours) == [0, 2]  # unit 1 never occurs
    assert colours[0] == pytest.approx(to_rgb(phone_colour("SIL")))  # unit 0 has the unchanged shade
    hue = np.array(to_rgb(phone_colour("IY")))
    assert (np.array(colours[2]) >= hue).all()


def test_runs_of_a_unit_become_one_numbered_block():
    ax = axes()
    draw_units(ax, [7] * 10 + [3] * 2 + [7] * 5, {7: "#ffffff"}, "layer 6", characters_per_second=50)
    assert [patch.get_width() for patch in ax.patches] == pytest.approx([0.2, 0.04, 0.1])
    assert texts(ax) == ["7", "3", "7"]
    ax = axes()
    draw_units(ax, [10, 11] * 4, {}, "layer 6", characters_per_second=50)
    assert len(ax.patches) == 8 and texts(ax) == []  # too short for a number


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
        "perplexity (codewords)",
        "PNMI on held-out speech",
    ]
