"""Pictures of units: matrix, curves over layers, one utterance; and the `--help` of every command about units."""

import json

import numpy as np
import pytest
from commands import fails, run_command

from spidr_hf.plots.figures import layer_figure, matrix_figure, save_figure, utterance_figure
from spidr_hf.units.unit_files import write_units

COMMANDS = (
    "extract_features",
    "extract_units",
    "train_kmeans",
    "evaluate_units",
    "evaluate_abx",
    "write_items",
    "plot_units",
    "train_unit_lm",
    "score_pairs",
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name):
    done = run_command(name, "--help")
    assert done.status == 0 and f"examples/{name}.py" in done.out and "usage:" in done.out
    assert run_command(name, "--nothing").status == 2


def test_the_matrix_shows_shares_in_the_order_of_phones():
    # Unit 3 never occurs; unit 0 is S's, unit 1 IY's, unit 2 SIL's.
    counts = np.array([[0, 9, 0, 0], [8, 0, 1, 0], [2, 1, 9, 0]])
    figure = matrix_figure(counts, ["IY", "S", "SIL"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["SIL", "IY", "S"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2", "1", "0"]
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares, [[0.9, 0.1, 0.2], [0, 0.9, 0], [0.1, 0, 0.8]])
    assert matrix_figure(counts, ["x", "y", "z"]).axes[0].images  # phones of no known set


def test_curves_over_layers():
    scores = {layer: {"pnmi": layer / 10, "codebook_perplexity": 5.0 * layer} for layer in (5, 6, 7)}
    left, right = layer_figure(scores).axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[5, 0.5], [6, 0.6], [7, 0.7]])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [25, 30, 35])
    (axes,) = layer_figure({1: {"within": 4.0}, 2: {"within": 5.0}}, titles=("ABX",)).axes
    assert axes.get_title(loc="left") == "ABX"


def test_an_utterance_and_its_units(tmp_path):
    waveform = np.random.default_rng(0).normal(0, 0.1, 16_000)
    units = {5: np.arange(49) // 7, 6: np.arange(49) // 5}
    phones = [("SIL", 0.0, 0.5), ("S", 0.5, 1.0)]
    assert len(utterance_figure(waveform, phones, units).axes) == 4
    figure = utterance_figure(waveform, [], {None: units[5]}, title="a")
    assert len(figure.axes) == 2
    save_figure(figure, tmp_path / "x" / "a.png")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match=r"a.docx: a picture ends in"):
        save_figure(figure, tmp_path / "a.docx")


def test_the_command(tmp_path, speech):
    rows = [json.loads(line) for line in (speech / "alignments.jsonl").read_text().splitlines()]
    for layer in (5, 6):
        units = {row["id"]: np.arange((row["num_samples"] - 400) // 320 + 1) // (3 * layer) for row in rows[:4]}
        write_units(tmp_path / "units" / str(layer) / "units.jsonl", units, {})
    arguments = (speech / "manifest.csv", tmp_path / "units", tmp_path / "a.png")
    done = run_command("plot_units", *arguments, "--alignments", speech / "alignments.jsonl", "--file", rows[2]["id"])
    assert done.status == 0, done.err
    assert (tmp_path / "a.png").exists()
    less = dict(list(units.items())[:2])
    write_units(tmp_path / "units" / "6" / "units.jsonl", less, {})
    only = run_command("plot_units", *arguments, "--file", rows[3]["id"])
    assert only.status == 0, only.err  # of layer 5 alone
    one = tmp_path / "units" / "5" / "units.jsonl"
    assert run_command("plot_units", speech / "small.tar", one, tmp_path / "b.pdf").status == 0
    part = run_command("plot_units", *arguments, "--start", 0.5, "--end", 1)
    assert part.status == 0 and "--start and --end" not in part.err
    fails(run_command("plot_units", *arguments, "--start", 90), "nothing between 90 and")
    fails(run_command("plot_units", *arguments, "--layers", 7), "no units of layer 7")
    fails(run_command("plot_units", *arguments, "--file", "nothing"), "no utterance 'nothing'", rows[0]["id"])
    assert run_command("plot_units", *arguments, "--file", f"{rows[1]['id']}.flac").status == 0
    others = {f"a/{row['id']}": [1, 2, 3] for row in rows[:2]}
    write_units(tmp_path / "other.jsonl", others, {})
    other = (speech / "manifest.csv", tmp_path / "other.jsonl", tmp_path / "a.png")
    fails(run_command("plot_units", *other), "units", "are those of 0.06 s, the recording has", "give the data")
    write_units(tmp_path / "other.jsonl", {"x": [1, 2, 3]}, {})
    fails(run_command("plot_units", *other), "No utterance of the data has units", "'x'")
    fails(run_command("plot_units", *arguments[:2], tmp_path / "a.txt"), "a.txt")
