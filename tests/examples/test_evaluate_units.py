"""Scores beyond purity and PNMI, and the command `evaluate_units.py`."""

import json
import math

import numpy as np
import pytest
from commands import fails, run_command
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from spidr_hf.data.alignments import read_alignments
from spidr_hf.evaluation.phones import (
    active_units,
    agreement,
    all_scores,
    bitrate,
    codebook_perplexity,
    count_pairs,
    without_silence,
)
from spidr_hf.system.names import match_names
from spidr_hf.units.unit_files import write_units

KEYS = [
    "phone_purity",
    "cluster_purity",
    "pnmi",
    "pnmi_without_silence",
    "codebook_perplexity",
    "active_units",
    "bitrate",
    "per",
    "f1",
    "r_val",
]


def alignment(labels, step=0.02):
    return [(label, i * step, (i + 1) * step) for i, label in enumerate(labels)]


def test_by_hand():
    units = {"x": [0, 0, 1, 2], "y": [0, 0, 1, 2]}
    assert active_units(units) == 3
    assert codebook_perplexity(units) == pytest.approx(2**1.5)
    assert bitrate(units) == pytest.approx(1.5 * 50)
    # Six units without repeats, all as frequent, in 0.16 s.
    assert bitrate(units, collapse=True) == pytest.approx(math.log2(3) * 6 / 0.16)
    assert agreement(units, {"x": [0, 0, 1, 1], "y": [1, 0, 1, 2]}) == 6 / 8
    assert agreement(units, units) == 1


def test_silence_is_left_out():
    # Unit 0 is silence's, unit 1 lies on both phones: nothing is known of phones once silence is gone.
    scores = all_scores({"x": [0, 0, 1, 1]}, {"x": alignment(["sil", "SIL", "A", "B"])})
    assert list(scores) == KEYS[:-3]
    assert scores["pnmi"] > 0.4 and scores["pnmi_without_silence"] == 0
    counts, names = without_silence(np.eye(3), ["A", "spn", "B"])
    assert names == ["A", "B"] and counts.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert all_scores({"x": [0, 0]}, {"x": alignment(["SIL", "SIL"])})["pnmi_without_silence"] == 0


@given(
    st.lists(st.tuples(st.sampled_from("ABC"), st.integers(0, 4)), min_size=1, max_size=40), st.permutations(range(5))
)
@settings(max_examples=50)
def test_the_names_of_units_do_not_matter_and_constant_units_know_nothing(pairs, names):
    labels, units = [label for label, _ in pairs], [unit for _, unit in pairs]
    alignments = {"x": alignment(labels)}
    expected = all_scores({"x": units}, alignments)
    assert all_scores({"x": [names[unit] for unit in units]}, alignments) == pytest.approx(expected)
    constant = all_scores({"x": [3] * len(units)}, alignments)
    assert constant["pnmi"] == constant["bitrate"] == 0 and constant["codebook_perplexity"] == 1
    assert all(0 <= expected[key] <= 1 + 1e-9 for key in KEYS[:4])


@pytest.mark.parametrize("step", [0.001, 0.004, 0.005, 0.01, 0.0125, 0.02])
def test_other_steps(step):
    """Every step lies on one unit; all lengths of audio pass, and what the convolutions cannot explain does not."""
    for samples in range(16_000, 16_400, 7):
        frames = (samples - 400) // 320 + 1
        phones = [("A", 0.0, 0.5), ("B", 0.5, samples / 16_000)]
        counts, _ = count_pairs({"x": np.arange(frames) // 25}, {"x": phones}, step=step)
        share = counts[0, 0] / counts.sum()
        assert share == pytest.approx(0.5 * 16_000 / samples, abs=0.03)
        with pytest.raises(ValueError, match="'x' disagree"):
            count_pairs({"x": np.zeros(frames - 2, dtype=int)}, {"x": phones}, step=step)
    with pytest.raises(ValueError, match="between 1 and 20 ms, got 30 ms"):
        count_pairs({"x": [1]}, {"x": [("A", 0.0, 0.02)]}, step=0.03)


def test_what_cannot_be_is_named():
    alignments = {"x": alignment("AAB")}
    with pytest.raises(ValueError, match=r"'x' has the unit 9, but there are 8 units"):
        count_pairs({"x": [1, 9, 2]}, alignments, num_units=8)
    with pytest.raises(ValueError, match=r"'x' has 1 phone \('B' for one\) not among the 2 given"):
        count_pairs({"x": [1, 2, 2]}, alignments, phones=["A", "C"])
    assert count_pairs({"x": [1, 2, 2]}, alignments, num_units=8)[0].shape == (2, 8)
    with pytest.raises(ValueError, match=r"'x' disagree: 2 units here, 3 there"):
        agreement({"x": [1, 2]}, {"x": [1, 2, 3]})
    with pytest.raises(ValueError, match="no units of 'x'"):
        agreement({"x": [1, 2]}, {})


def test_what_to_do_where_lengths_disagree():
    for units, advice in ((2, "not be deduplicated"), (9, "Silence at the end must be labelled")):
        with pytest.raises(ValueError, match=advice):
            count_pairs({"x": [1] * units}, {"x": [("A", 0.0, 0.1)]})


def test_names_match_by_path_or_by_its_last_part():
    assert match_names(["a/x", "y"], ["a/x", "b/y", "b/x"]) == ({"a/x": "a/x", "y": "b/y"}, [])
    assert match_names(["x", "z", "y"], ["a/x", "b/x", "b/y"]) == ({"y": "b/y"}, ["x", "z"])
    with pytest.raises(ValueError, match="2 alignments match 'x', 'a/x' for one"):
        match_names(["x"], ["a/x", "b/x"])
    with pytest.raises(ValueError, match=r"no alignment for 'z' .*'a/x' for one"):
        match_names(["z"], ["a/x"])
    # The nearest, whatever else has the same last part.
    assert match_names(["data/a/x", "data/b/x"], ["a/x", "b/x"])[0] == {"data/a/x": "a/x", "data/b/x": "b/x"}
    # One recording has one alignment: two that might have it have none.
    assert match_names(["a/x", "b/x", "y"], ["x", "y"]) == ({"y": "y"}, ["a/x", "b/x"])
    assert match_names(["a/x", "x"], ["x"]) == ({"x": "x"}, ["a/x"])
    assert match_names(["caf\u00e9"], ["a/cafe\u0301"])[0] == {"caf\u00e9": "a/cafe\u0301"}


@pytest.fixture
def units_folder(tmp_path, speech):
    """Two layers of units of the shipped speech: one knows the phone, one is random."""
    alignments = read_alignments(speech / "alignments.jsonl")
    names = sorted({phone for phones in alignments.values() for phone, _, _ in phones})
    rng = np.random.default_rng(0)
    rows = [json.loads(line) for line in (speech / "alignments.jsonl").read_text().splitlines()]
    good, random = {}, {}
    for row in rows:
        frames = (row["num_samples"] - 400) // 320 + 1
        middles = (np.arange(frames) + 0.5) * 0.02
        ends = [end for _, _, end in row["phones"]]
        good[row["id"]] = [names.index(row["phones"][i][0]) for i in np.searchsorted(ends, middles)]
        random[row["id"]] = rng.integers(0, 40, frames)
    for layer, units in ((5, random), (6, good)):
        write_units(tmp_path / "units" / str(layer) / "units.jsonl", units, {"num_units": 40})
    return tmp_path / "units"


def test_one_file(units_folder, speech, tmp_path):
    path = units_folder / "6" / "units.jsonl"
    done = run_command(
        "evaluate_units", path, speech / "alignments.jsonl", "--json", tmp_path / "s.json", "--plot", tmp_path / "m.png"
    )
    assert done.status == 0, done.err
    scores = json.loads((tmp_path / "s.json").read_text())
    assert list(scores) == KEYS
    assert scores["pnmi"] > 0.85 and scores["active_units"] == 40
    assert (tmp_path / "m.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{scores['pnmi']:.4f}" in done.out


def test_layers_and_agreement(units_folder, speech, tmp_path):
    (tmp_path / "README.md").write_text("---\ntags:\n- speech\n---\n\n# A model\n")
    done = run_command(
        "evaluate_units", units_folder, speech / "alignments.jsonl", "--json", tmp_path / "s.json",
        "--plot", tmp_path / "curves.svg", "--agreement", units_folder, "--deduplicate", "--card", tmp_path, "dev",
    )  # fmt: skip
    assert done.status == 0, done.err
    scores = json.loads((tmp_path / "s.json").read_text())["layers"]
    assert list(scores) == ["5", "6"] and scores["5"]["pnmi"] < 0.05 < scores["6"]["pnmi"]
    assert scores["6"]["agreement"] == 1 and scores["6"]["bitrate"] < scores["5"]["bitrate"]
    assert "layer 5" in done.out and "<svg" in (tmp_path / "curves.svg").read_text()
    told = {
        result.metric_name: result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results
    }
    assert all(told[f"PNMI, layer {layer}"] == round(scores[layer]["pnmi"], 4) for layer in scores)


def test_partly_aligned_units_are_scored_as_far_as_they_are(units_folder, speech, tmp_path):
    lines = (speech / "alignments.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text("".join(lines[:40]))
    path = units_folder / "6" / "units.jsonl"
    done = run_command("evaluate_units", path, tmp_path / "part.jsonl", "--json", tmp_path / "s.json")
    assert done.status == 0 and f"{len(lines) - 40} of {len(lines)} utterances have no alignment" in done.err
    assert json.loads((tmp_path / "s.json").read_text())["pnmi"] > 0.85
    done = run_command("evaluate_units", units_folder, tmp_path / "part.jsonl")
    assert done.status == 0 and done.err.count("have no alignment") == 1  # of several layers, alike


def test_deduplicated_files_with_durations(units_folder, speech, tmp_path):
    lines = (units_folder / "6" / "units.jsonl").read_text().splitlines()
    write_units(tmp_path / "d.jsonl", {row["file"]: row["units"] for row in map(json.loads, lines)}, {}, collapse=True)
    run_command("evaluate_units", tmp_path / "d.jsonl", speech / "alignments.jsonl", "--json", tmp_path / "d.json")
    run_command(
        "evaluate_units", units_folder / "6" / "units.jsonl", speech / "alignments.jsonl", "--json", tmp_path / "u.json"
    )
    assert json.loads((tmp_path / "d.json").read_text()) == json.loads((tmp_path / "u.json").read_text())


def test_bad_input(units_folder, speech, tmp_path):
    alignments = speech / "alignments.jsonl"
    path = units_folder / "6" / "units.jsonl"
    fails(run_command("evaluate_units", tmp_path / "nothing", alignments), "nothing", "no such file")
    fails(run_command("evaluate_units", path, tmp_path / "nothing"), "nothing", "no such file")
    (tmp_path / "empty").mkdir()
    fails(run_command("evaluate_units", tmp_path / "empty", alignments), "no units in this folder")
    fails(run_command("evaluate_units", path, tmp_path / "empty"), "no TextGrid files")
    fails(run_command("evaluate_units", path, alignments, "--num-units", 12), str(path), "there are 12 units")
    fails(run_command("evaluate_units", path, alignments, "--phones", "AH"), str(path), "1 given")
    fails(run_command("evaluate_units", path, alignments, "--alignment-step", 40), "40 ms")
    fails(run_command("evaluate_units", path, alignments, "--plot", tmp_path / "x.docx"), "x.docx", ".png")
    (tmp_path / "file").write_text("")
    fails(run_command("evaluate_units", path, alignments, "--json", tmp_path / "file" / "s.json"), "file")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[3]["units"] = rows[3]["units"][:-5]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    frames = len(rows[3]["units"])
    fails(
        run_command("evaluate_units", tmp_path / "short.jsonl", alignments),
        "short.jsonl", rows[3]["file"], f"its {frames} units cover {2 * frames} steps",
    )  # fmt: skip
