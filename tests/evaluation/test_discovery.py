"""Phone errors and boundaries of units: by hand, and equal to what DiscoPhon 0.2.0 computed for the same files."""

import json
from pathlib import Path

import numpy as np
import pytest

from spidr_hf.data.alignments import read_alignments
from spidr_hf.evaluation.discovery import assign, boundary_scores, compare_boundaries, discovery_scores, edit_distance
from spidr_hf.evaluation.phones import count_pairs, pnmi
from spidr_hf.units.unit_files import read_units

RECORDED = Path(__file__).parents[1] / "fixtures" / "discophon"
SCORES = json.loads((RECORDED / "scores.json").read_text())


@pytest.mark.parametrize("case", SCORES)
def test_equal_to_discophon(case):
    """Units and phones at random, with ties; of one file the last phone is one that no unit was met with."""
    name, assignment = case.split(" ")
    units, phones = read_units(RECORDED / f"{name}.jsonl"), read_alignments(RECORDED / f"{name}.txt")
    known = {phone for sequence in phones.values() for phone, _, _ in sequence}
    num_units = len(known) if assignment == "one-to-one" else None
    ours = discovery_scores(units, phones, assignment=assignment, num_units=num_units)
    ours["pnmi"] = pnmi(count_pairs(units, phones)[0])
    assert ours == pytest.approx(SCORES[case], abs=1e-12)


def test_units_that_know_the_phone_make_no_error():
    phones = {"x": [("A", 0.0, 0.1), ("B", 0.1, 0.2), ("A", 0.2, 0.3)]}
    units = {"x": [4] * 5 + [2] * 5 + [4] * 5}
    assert discovery_scores(units, phones) == {"per": 0.0, "f1": 1.0, "r_val": 1.0}
    one = discovery_scores({"x": [0] * 15}, phones)  # a single phone: two deletions, no boundary
    assert one["per"] == pytest.approx(2 / 3) and one["f1"] == 0


def test_one_to_one_needs_as_many_units_as_phones():
    counts = np.array([[5, 4], [4, 0]])
    assert assign(counts, "many-to-one").tolist() == [0, 0]
    assert assign(counts, "one-to-one").tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"there are 3 units and 2 phones\. Cluster to 2 units"):
        assign(np.ones((2, 3)), "one-to-one")
    with pytest.raises(ValueError, match="many-to-one or one-to-one, got 'all'"):
        assign(counts, "all")


def test_edit_distance():
    assert edit_distance([1, 2, 3], [1, 3]) == 1 and edit_distance([], [1, 2]) == 2
    assert edit_distance(np.array([1, 300, 2]), [1, 5, 2, 2]) == 2


def test_boundaries():
    gold = np.array([100, 130])  # windows of 20 ms meet: cut in the middle, at 115
    assert compare_boundaries(gold, np.array([115])).tolist() == [1, 0, 1]
    assert compare_boundaries(gold, np.array([115, 116])).tolist() == [2, 0, 0]
    assert compare_boundaries(gold, np.array([79, 80, 81, 151])).tolist() == [1, 3, 1]
    assert compare_boundaries(gold, np.array([], dtype=int)).tolist() == [0, 0, 2]
    assert boundary_scores(0, 5, 0) == {"f1": 0.0, "r_val": 0.0}
    assert boundary_scores(10, 0, 0) == {"f1": 1.0, "r_val": 1.0}
    assert boundary_scores(10, 10, 0)["r_val"] == pytest.approx(1 - (1 + 2**-0.5) / 2)
