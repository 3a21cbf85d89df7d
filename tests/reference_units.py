"""The obvious form of the edit distance: slow, short, and the oracle of `test_comparison.py`."""

from functools import cache


@cache
def edit_distance(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Fewest insertions, deletions and substitutions that turn one sequence into the other."""
    if not first or not second:
        return len(first) + len(second)
    return min(
        edit_distance(first[:-1], second[:-1]) + (first[-1] != second[-1]),
        edit_distance(first[:-1], second) + 1,
        edit_distance(first, second[:-1]) + 1,
    )


__all__ = ["edit_distance"]
