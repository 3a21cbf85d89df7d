"""Two sequences of units side by side: their alignment of least edit distance, and what they share."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from spidr_hf.units.unit_files import deduplicate

# Positions in the first and in the second sequence that stand opposite each other; None opposite a gap.
Pair = tuple[int | None, int | None]


def align_units(first: Sequence[int] | np.ndarray, second: Sequence[int] | np.ndarray) -> tuple[int, list[Pair]]:
    """
    Alignment of two sequences of units (of N and M) with the fewest insertions, deletions and substitutions.

    Returns:
        The edit distance, and the pairs of positions in order: every position of either sequence is in one pair. Among
        alignments of the same distance, substitutions are preferred to gaps. Takes 4 x N x M bytes.
    """
    a, b = np.asarray(first), np.asarray(second)
    columns = np.arange(len(b) + 1, dtype=np.int32)
    table = np.empty((len(a) + 1, len(b) + 1), dtype=np.int32)
    table[0] = columns
    for i, unit in enumerate(a, start=1):
        table[i, 0] = i
        np.minimum(table[i - 1, :-1] + (b != unit), table[i - 1, 1:] + 1, out=table[i, 1:])
        # Insertions depend on the left neighbour: cost(j) = min over k <= j of cost(k) + (j - k).
        table[i] = np.minimum.accumulate(table[i] - columns) + columns
    pairs: list[Pair] = []
    i, j = len(a), len(b)
    while i or j:
        if i and j and table[i, j] == table[i - 1, j - 1] + int(a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif i and table[i, j] == table[i - 1, j] + 1:
            i -= 1
            pairs.append((i, None))
        else:
            j -= 1
            pairs.append((None, j))
    return int(table[-1, -1]), pairs[::-1]


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
