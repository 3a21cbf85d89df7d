"""Alignment of two unit sequences: its distance is the least, and its pairs are an alignment of that distance."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from reference_units import edit_distance

from spidr_hf.examples.demo_page.comparison import align_units, compare_units

sequences = st.lists(st.integers(0, 3), max_size=9)


@given(sequences, sequences)
def test_distance_and_pairs(first, second):
    distance, pairs = align_units(first, second)
    assert distance == edit_distance(tuple(first), tuple(second))
    assert [i for i, _ in pairs if i is not None] == list(range(len(first)))
    assert [j for _, j in pairs if j is not None] == list(range(len(second)))
    assert sum(i is None or j is None or first[i] != second[j] for i, j in pairs) == distance


@given(sequences, sequences)
def test_distance_is_symmetric(first, second):
    assert align_units(first, second)[0] == align_units(second, first)[0]


def test_tempo_does_not_count():
    units = [7, 3, 7, 9]
    result = compare_units(np.repeat(units, [1, 2, 3, 1]), np.repeat(units, [4, 1, 1, 2]))
    assert result.scores() == {"edit_distance": 0, "normalized_distance": 0.0, "shared_units": 3, "distinct_units": 3}
    assert result.pairs == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_nothing_in_common():
    result = compare_units([1, 1, 2], [3, 4, 5, 5])
    assert result.scores() == {"edit_distance": 3, "normalized_distance": 1.0, "shared_units": 0, "distinct_units": 5}


def test_utterances_of_a_minute():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 256, 3_000)
    second = np.delete(first, [10, 500, 2_999])
    assert align_units(first, second)[0] == 3
