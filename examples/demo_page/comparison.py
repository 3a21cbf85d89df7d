"""Two sequences of units side by side: their alignment of least edit distance, and what they share."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest

import numpy as np
from rapidfuzz.distance import Levenshtein

from spidr_hf.units.unit_files import deduplicate

# Positions in the first and in the second sequence that stand opposite each other; None opposite a gap.
Pair = tuple[int | None, int | None]


def align_units(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> tuple[int, list[Pair]]:
    """
    Alignment of two sequences of units (of N and M) with the fewest insertions, deletions and substitutions.

    Returns:
        The edit distance, and the pairs of positions in order: every position of either sequence is in one pair.
    """
    a, b = np.asarray(first).tolist(), np.asarray(second).tolist()
    pairs: list[Pair] = []
    # Each run of one operation goes forward in the first sequence, in the second, or in both.
    for _, start, stop, other_start, other_stop in Levenshtein.opcodes(a, b):
        pairs += zip_longest(range(start, stop), range(other_start, other_stop))
    return Levenshtein.distance(a, b), pairs


@dataclass(frozen=True)
class Comparison:
    """How two utterances agree in units; repeats are collapsed first, so that the tempo does not count."""

    edit_distance: int
    normalized_distance: float  # by the length of the longer sequence: 0 for the same units, 1 for nothing in common
    shared_units: int  # distinct units that are in both
    distinct_units: int  # distinct units that are in either
    pairs: list[Pair]  # of positions in the collapsed sequences

    def scores(self) -> dict[str, float]:
        """Everything but the alignment."""
        return {name: value for name, value in asdict(self).items() if name != "pairs"}


def compare_units(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> Comparison:
    """Compare the units of two utterances, one unit per frame each."""
    a, _ = deduplicate(first)
    b, _ = deduplicate(second)
    distance, pairs = align_units(a, b)
    longest = max(len(a), len(b), 1)
    return Comparison(distance, distance / longest, len({*a} & {*b}), len({*a, *b}), pairs)


__all__ = ["Comparison", "Pair", "align_units", "compare_units"]
