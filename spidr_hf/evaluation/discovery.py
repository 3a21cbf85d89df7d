"""Phoneme discovery: units read as phones, scored as DiscoPhon scores them (its package, 0.2.0).

Every unit stands for a phone: the one that it occurs with most often (many-to-one), or so that each phone has one unit
and all together occur most often (one-to-one). The units of an utterance are then a string of phones, whose errors are
counted (`per`), and whose changes are boundaries (`f1`, `r_val`). Silence is a phone like the others.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np

from ..data.alignments import STEP, Phones
from .phones import UNIT, count_pairs, phone_steps, without_repeats

Assignment = Literal["many-to-one", "one-to-one"]
ASSIGNMENTS: tuple[Assignment, ...] = ("many-to-one", "one-to-one")
MARGIN = 0.020  # seconds on either side of a boundary in which it counts as found


def discovery_scores(
    units: Mapping[str, Sequence[int] | np.ndarray],
    alignments: Mapping[str, Phones],
    *,
    assignment: Assignment = "many-to-one",
    step: float = STEP,
    num_units: int | None = None,
    phones: Collection[str] | None = None,
) -> dict[str, float]:
    """
    `per`, `f1` and `r_val` of units that are read as phones.

    Args:
        units: Units of each utterance, one per 20 ms frame (not deduplicated), by file id.
        alignments: Phones of at least these utterances.
        assignment: How units become phones.
        step: Seconds per step of the alignments.
        num_units: Units that there can be.
        phones: Phones that there can be, silence among them; by default those that occur.

    Raises `ValueError` for what `count_pairs` refuses, and for a one-to-one assignment of other than as many units as
    phones.
    """
    labels = {name: _steps_as_phones(alignments[name], step) for name in sorted(units)}
    if num_units is None:  # of the frames beyond an alignment's end, too
        num_units = 1 + max((int(np.max(sequence)) for sequence in units.values() if len(sequence)), default=-1)
    counts, sorted_names = count_pairs(units, alignments, step=step, num_units=num_units, phones=phones)
    missing = [name for name in phones or () if name not in sorted_names]
    counts = np.concatenate([counts, np.zeros((len(missing), counts.shape[1]), dtype=counts.dtype)])
    covered = (sequence[: round(len(units[name]) * UNIT / step)] for name, sequence in labels.items())
    met = dict.fromkeys(label for sequence in covered for label in sequence)
    counts, names = _by_frequency(counts, [*sorted_names, *missing], list(met))
    phone_of = assign(counts, assignment)
    errors = length = 0
    boundaries = np.zeros(3, dtype=np.int64)
    # A phone that no unit was met with (at the very end of an utterance) is none that a unit can stand for.
    numbers = {name: i if name in met else len(names) + i for i, name in enumerate(names)}
    for fileid, gold_labels in labels.items():
        gold = np.array([numbers[label] for label in gold_labels])
        predicted = phone_of[np.asarray(units[fileid], dtype=np.int64)]
        wanted, found = without_repeats(gold), without_repeats(predicted)
        errors += edit_distance(found, wanted)
        length += len(wanted)
        boundaries += compare_boundaries(_changes(gold, step), _changes(predicted, UNIT))
    hits, extra, missed = map(int, boundaries)
    return {"per": errors / length, **boundary_scores(hits, extra, missed)}


def assign(counts: np.ndarray, assignment: Assignment) -> np.ndarray:
    """
    The phone (row) that each unit stands for.

    Args:
        counts: Phones x units, how often they occur together.
        assignment: See above.
    """
    if assignment == "many-to-one":
        return counts.argmax(axis=0)
    if assignment != "one-to-one":
        raise ValueError(f"Units are assigned to phones {' or '.join(ASSIGNMENTS)}, got {assignment!r}.")
    if counts.shape[0] != counts.shape[1]:
        raise ValueError(
            f"A one-to-one assignment needs as many units as phones, silence included: there are {counts.shape[1]} "
            f"units and {counts.shape[0]} phones. Cluster to {counts.shape[0]} units (train_kmeans.py), or name the "
            "phones and units that there can be (--phones, --num-units)."
        )
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(counts, maximize=True)
    phone_of = np.empty(counts.shape[1], dtype=np.int64)
    phone_of[columns] = rows
    return phone_of


def edit_distance(one: Sequence[int] | np.ndarray, other: Sequence[int] | np.ndarray) -> int:
    """Fewest insertions, deletions and substitutions that make one sequence of the other."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.distance(list(map(int, one)), list(map(int, other)))


def compare_boundaries(gold: np.ndarray, predicted: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """
    Boundaries found, predicted besides, and missed.

    A boundary is found if at least one is predicted within the margin around it. Where two such windows meet they are
    cut in the middle, so that no prediction counts twice (Räsänen et al. 2009, section 2.3).

    Args:
        gold, predicted: Times in milliseconds, ascending.
        margin: Seconds.
    """
    wide = round(1000 * margin)
    first, last = gold - wide, gold + wide
    middles = (gold[:-1] + gold[1:]) // 2
    first[1:], last[:-1] = np.maximum(first[1:], middles + 1), np.minimum(last[:-1], middles)
    inside = np.searchsorted(predicted, last, side="right") - np.searchsorted(predicted, first, side="left")
    hits = np.count_nonzero(inside > 0)
    return np.array([hits, len(predicted) - hits, len(gold) - hits])


def boundary_scores(hits: int, extra: int, missed: int) -> dict[str, float]:
    """`f1` and `r_val` (Räsänen et al. 2009) of boundaries found, predicted besides, and missed; 0 where undefined."""
    gold = hits + missed
    if not gold:
        return {"f1": 0.0, "r_val": 0.0}
    recall, over = hits / gold, (hits + extra) / gold - 1
    far, along = np.hypot(1 - recall, over), abs(recall - 1 - over) / np.sqrt(2)
    return {"f1": 2 * hits / (2 * hits + extra + missed), "r_val": float(1 - (far + along) / 2)}


def _steps_as_phones(phones: Phones, step: float) -> list[str]:
    return [phones[index][0] for index in phone_steps(phones, step)]


def _by_frequency(counts: np.ndarray, names: Sequence[str], met: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """
    Rows from the most frequent phone down, which decides between equals; of equally frequent ones the later met goes
    first, and those that no unit was met with last.
    """
    row_of = {name: i for i, name in enumerate(names)}
    ordered = [*met, *(name for name in names if name not in set(met))]
    table = counts[[row_of[name] for name in ordered]]
    order = np.argsort(table.sum(axis=1), kind="stable")[::-1]
    return table[order], [ordered[i] for i in order]


def _changes(values: np.ndarray, step: float) -> np.ndarray:
    """Times in milliseconds at which a sequence of so many seconds per step changes."""
    return (np.flatnonzero(values[1:] != values[:-1]) + 1) * round(1000 * step)


__all__ = [
    "ASSIGNMENTS",
    "MARGIN",
    "Assignment",
    "assign",
    "boundary_scores",
    "compare_boundaries",
    "discovery_scores",
    "edit_distance",
]
