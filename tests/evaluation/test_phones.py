"""Phone purity, cluster purity and PNMI: by hand, against the obvious form, and on every wrong input."""

import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spidr_hf.data.alignments import read_alignments
from spidr_hf.evaluation.phones import evaluate_units, phone_steps


def obvious_steps(phones):
    """The phone at the middle of every whole 10 ms, asked for one by one."""
    labels = []
    for step in range(math.floor(round(phones[-1][2] * 100, 6))):
        middle = (step + 0.5) / 100
        labels.append(next(phone for phone, start, end in phones if start <= middle < end))
    return labels


def obvious_metrics(units, alignments):
    """The definitions, pair by pair."""
    pairs = []
    for fileid, sequence in units.items():
        twice = [unit for unit in sequence for _ in range(2)]
        pairs += zip(obvious_steps(alignments[fileid]), twice, strict=False)
    of_unit, of_phone = defaultdict(Counter), defaultdict(Counter)
    for phone, unit in pairs:
        of_unit[unit][phone] += 1
        of_phone[phone][unit] += 1
    total = len(pairs)
    information = sum(
        n / total * math.log(n * total / (sum(of_phone[phone].values()) * sum(of_unit[unit].values())))
        for (phone, unit), n in Counter(pairs).items()
    )
    entropy = -sum(p * math.log(p) for p in (sum(c.values()) / total for c in of_phone.values()))
    return {
        "phone_purity": sum(max(c.values()) for c in of_unit.values()) / total,
        "cluster_purity": sum(max(c.values()) for c in of_phone.values()) / total,
        "pnmi": information / entropy if len(of_phone) > 1 else 0.0,
    }


def alignment(labels, step=0.02):
    return [(label, i * step, (i + 1) * step) for i, label in enumerate(labels)]


def test_by_hand():
    # Unit 0 lies on A twice and once on B, unit 1 once on B.
    scores = evaluate_units({"x": [0, 0, 0, 1]}, {"x": alignment("AABB")})
    assert scores["phone_purity"] == pytest.approx(3 / 4)
    assert scores["cluster_purity"] == pytest.approx(3 / 4)
    information = 0.5 * math.log(0.5 / (0.5 * 0.75)) + 0.25 * math.log(0.25 / (0.5 * 0.75)) + 0.25 * math.log(2)
    assert scores["pnmi"] == pytest.approx(information / math.log(2))


def test_perfect_and_constant_units():
    phones = {"x": alignment("ABCABC")}
    assert evaluate_units({"x": [7, 3, 5, 7, 3, 5]}, phones) == pytest.approx(
        {"phone_purity": 1, "cluster_purity": 1, "pnmi": 1}
    )
    assert evaluate_units({"x": [4] * 6}, phones)["pnmi"] == pytest.approx(0, abs=1e-12)
    assert evaluate_units({"x": [1, 2, 3]}, {"x": alignment("AAA")})["pnmi"] == 0


@given(
    st.lists(st.tuples(st.sampled_from("ABCD"), st.integers(1, 9)), min_size=1, max_size=20),
    st.randoms(use_true_random=False),
    st.integers(-1, 1),
)
@settings(max_examples=60, deadline=None)
def test_matches_the_obvious_form_whatever_the_names_of_units(segments, random, extra):
    # Ends off the 10 ms grid, lengths up to two steps apart.
    phones, start = [], 0.0
    for label, tenths in segments:
        end = round(start + tenths * 0.0137, 4)
        phones.append((label, start, end))
        start = end
    length = len(obvious_steps(phones)) // 2 + extra
    if length < 1:
        return
    units = {"x": [random.randrange(5) for _ in range(length)]}
    if abs(2 * length - len(obvious_steps(phones))) > 2 or not obvious_steps(phones):
        with pytest.raises(ValueError, match="disagree"):
            evaluate_units(units, {"x": phones})
        return
    scores = evaluate_units(units, {"x": phones})
    assert scores == pytest.approx(obvious_metrics(units, {"x": phones}), abs=1e-9)
    names = random.sample(range(100), 5)
    assert evaluate_units({"x": [names[u] for u in units["x"]]}, {"x": phones}) == pytest.approx(scores, abs=1e-9)


def test_real_alignments_fit_the_frames_of_the_encoder(speech):
    alignments = read_alignments(speech / "alignments.jsonl")
    rows = [json.loads(line) for line in (speech / "alignments.jsonl").read_text().splitlines()]
    assert len(alignments) == len(rows) == 66
    rng = np.random.default_rng(0)
    units = {row["id"]: rng.integers(0, 9, (row["num_samples"] - 400) // 320 + 1) for row in rows}
    scores = evaluate_units(units, alignments)
    assert scores == pytest.approx(obvious_metrics(units, alignments))
    assert scores["pnmi"] < 0.05
    for phones in alignments.values():
        names = [phones[i][0] for i in phone_steps(phones)]
        assert names == obvious_steps(phones)


def test_steps_on_the_grid_are_not_lost_to_rounding():
    assert [len(phone_steps([("A", 0.0, n / 100)])) for n in range(1, 3000)] == list(range(1, 3000))


@pytest.mark.parametrize(
    ("units", "phones", "message"),
    [
        ({"x": [1] * 10}, {"x": alignment("A" * 12)}, r"'x' disagree: its 10 units cover 20 steps.* has 24"),
        ({"x": [1, -1]}, {"x": alignment("AA")}, r"'x' has a negative unit"),
        ({"y": [1]}, {"x": alignment("A")}, r"no alignment for 'y'"),
        ({"x": [1] * 5}, {"x": [("A", 0.0, 0.05), ("B", 0.07, 0.1)]}, r"alignment of 'x' cannot be used.* gaps"),
        ({"x": [1] * 5}, {"x": [("A", 0.02, 0.1)]}, r"alignment of 'x' cannot be used"),
        ({"x": []}, {"x": []}, r"alignment of 'x' cannot be used"),
        ({}, {}, r"no units to evaluate"),
    ],
)
def test_wrong_input_is_named(units, phones, message):
    with pytest.raises(ValueError, match=message):
        evaluate_units(units, phones)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "x", "phones": [["A", 0, 1]]}\nnonsense\n', "line 2"),
        ('{"id": "x"}\n', "line 1.*phones"),
        ('{"id": "x", "phones": []}\n{"id": "x", "phones": []}\n', "line 2: the id 'x' was there before"),
    ],
)
def test_broken_alignment_files_are_named(tmp_path, text, message):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s)a.jsonl, {message}"):
        read_alignments(path)
