"""How well units and phones agree: phone purity, cluster purity and PNMI, from unit files and phone alignments; and how
much units carry: perplexity, active units, bitrate.

Definitions of HuBERT (arXiv 2106.07447), over 10 ms steps: a unit covers 20 ms, that is two steps, and a
step's phone is the one at its middle. Silence is a phone like the others, unless it is left out (`without_silence`).
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from ..data.alignments import SILENCES, STEP, Phones, is_silence
from ..system.messages import counted

UNIT = 0.02  # seconds that a unit covers
# The convolutions drop up to 399 samples at the end of an utterance: just under 25 ms, two whole steps of 10 ms.
_DROPPED = 0.0249


def phone_steps(phones: Phones, step: float = STEP) -> np.ndarray:
    """
    For each step (10 ms) of an utterance, the index into `phones` of the phone at the step's middle.

    Args:
        phones: `(phone, start, end)` in seconds, in order and without gaps from 0 on.
        step: Seconds.

    Returns:
        int64 array of `floor(duration / step)` steps.
    """
    starts = np.array([start for _, start, _ in phones], dtype=float)
    ends = np.array([end for _, _, end in phones], dtype=float)
    if not len(ends) or np.any(ends <= starts) or np.any(np.abs(starts - np.append(0.0, ends[:-1])) > STEP / 2):
        raise ValueError("Phones must follow one another from 0 s on without gaps or overlaps; label silence, too.")
    # The small addend: 3.72 / 0.01 is 372 steps, whichever way its binary form rounds.
    steps = np.arange(int(ends[-1] / step + 1e-6))
    return np.searchsorted(ends, (steps + 0.5) * step, side="right")


def count_pairs(
    units: Mapping[str, Sequence[int] | np.ndarray],
    alignments: Mapping[str, Phones],
    *,
    step: float = STEP,
    num_units: int | None = None,
    phones: Collection[str] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """
    How often each phone and each unit occur together, in steps of 10 ms.

    Args:
        units: Units of each utterance, one per 20 ms frame (not deduplicated), by file id.
        alignments: Phones of at least these utterances.
        step: Seconds per step.
        num_units: Units that there can be; larger ones are refused.
        phones: Phones that there can be; others are refused.

    Returns:
        Counts (phones x units, int64) and the phones' names, sorted.
    """
    if not 0.001 <= step <= UNIT:
        raise ValueError(f"A step must lie between 1 and {UNIT * 1000:g} ms, got {step * 1000:g} ms.")
    names = sorted({phone for fileid in units for phone, _, _ in alignments.get(fileid, ())})
    index = {name: i for i, name in enumerate(names)}
    # Where steps do not divide a unit, both ends are cut off.
    most = int(_DROPPED / step) + (abs(UNIT / step - round(UNIT / step)) > 1e-6)
    pairs, largest = [], 0
    for fileid, sequence in units.items():
        if fileid not in alignments:
            raise ValueError(f"There is no alignment for {fileid!r}.")
        try:
            steps = phone_steps(alignments[fileid], step)
        except ValueError as error:
            raise ValueError(f"The alignment of {fileid!r} cannot be used. {error}") from error
        values = np.asarray(sequence, dtype=np.int64)
        covered = np.arange(int(len(values) * UNIT / step + 1e-6))
        unit_steps = values[((covered + 0.5) * step / UNIT).astype(np.int64)] if len(values) else values
        if abs(len(steps) - len(unit_steps)) > most:
            few = len(unit_steps) < len(steps)
            advice = "Units must not be deduplicated." if few else "Silence at the end must be labelled, too."
            raise ValueError(
                f"The lengths of {fileid!r} disagree: its {counted(len(values), 'unit', 'covers', 'cover')} "
                f"{len(unit_steps)} steps of {step * 1000:g} ms, its alignment has {len(steps)}. They may differ by "
                f"{most}. {advice}"
            )
        length = min(len(steps), len(unit_steps))
        if unit_steps[:length].min(initial=0) < 0:
            raise ValueError(f"{fileid!r} has a negative unit: cut the padding (-1) off before evaluating.")
        if num_units is not None and values.max(initial=-1) >= num_units:
            raise ValueError(
                f"{fileid!r} has the unit {values.max()}, but there are {num_units} units (0 to {num_units - 1})."
            )
        if phones is not None and (unknown := sorted({phone for phone, _, _ in alignments[fileid]} - set(phones))):
            raise ValueError(
                f"The alignment of {fileid!r} has {counted(len(unknown), 'phone')} ({unknown[0]!r} for one) not among "
                f"the {len(phones)} given."
            )
        indices = np.array([index[phone] for phone, _, _ in alignments[fileid]])
        pairs.append((indices[steps[:length]], unit_steps[:length]))
        largest = max(largest, unit_steps.max(initial=-1) + 1)
    if not sum(len(phones) for phones, _ in pairs):
        raise ValueError("There are no units to evaluate.")
    columns = largest if num_units is None else num_units
    flat = np.concatenate([phones * columns + values for phones, values in pairs])
    return np.bincount(flat, minlength=len(names) * columns).reshape(len(names), columns), names


def without_silence(
    counts: np.ndarray, names: Sequence[str], silences: Collection[str] = SILENCES
) -> tuple[np.ndarray, list[str]]:
    """Counts (phones x units) without the rows of silence; case does not matter."""
    kept = [i for i, name in enumerate(names) if not is_silence(name, silences)]
    return counts[kept], [names[i] for i in kept]


def phone_purity(counts: np.ndarray) -> float:
    """Share of steps whose phone is the most frequent one of their unit. `counts`: phones x units."""
    return float(counts.max(axis=0).sum() / counts.sum())


def cluster_purity(counts: np.ndarray) -> float:
    """Share of steps whose unit is the most frequent one of their phone. `counts`: phones x units."""
    return float(counts.max(axis=1).sum() / counts.sum())


def pnmi(counts: np.ndarray) -> float:
    """
    Phone-normalised mutual information: the share of the phones' entropy that knowing the unit removes, I(phone; unit)
    / H(phone). 0 where there is a single phone. `counts`: phones x units.
    """
    total = counts.sum()
    joint, phones, units = counts / total, counts.sum(axis=1) / total, counts.sum(axis=0) / total
    if np.count_nonzero(phones) < 2:
        return 0.0
    seen = joint > 0
    information = np.sum(joint[seen] * np.log(joint[seen] / np.outer(phones, units)[seen]))
    entropy = -np.sum(phones[phones > 0] * np.log(phones[phones > 0]))
    return float(information.clip(0, entropy) / entropy)


def unit_entropy(units: Mapping[str, Sequence[int] | np.ndarray]) -> float:
    """Entropy of the units' distribution over all utterances, in bits per unit."""
    values = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in units.values()])
    share = np.unique(values, return_counts=True)[1] / len(values)
    return abs(float(np.sum(share * np.log2(share))))


def codebook_perplexity(units: Mapping[str, Sequence[int] | np.ndarray]) -> float:
    """2 ** entropy of the units: how many would be as diverse if all were as frequent."""
    return 2.0 ** unit_entropy(units)


def active_units(units: Mapping[str, Sequence[int] | np.ndarray]) -> int:
    """How many different units occur."""
    return len(np.unique(np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in units.values()])))


def bitrate(units: Mapping[str, Sequence[int] | np.ndarray], *, collapse: bool = False) -> float:
    """
    Bits per second: entropy of the units times units per second (ZeroSpeech 2019).

    Args:
        units: One unit per 20 ms frame.
        collapse: Of the units without their repeats (durations are not counted).
    """
    seconds = UNIT * sum(len(sequence) for sequence in units.values())
    if collapse:
        units = {fileid: without_repeats(np.asarray(sequence)) for fileid, sequence in units.items()}
    return unit_entropy(units) * sum(len(sequence) for sequence in units.values()) / seconds


def agreement(
    units: Mapping[str, Sequence[int] | np.ndarray], others: Mapping[str, Sequence[int] | np.ndarray]
) -> float:
    """Share of frames in which two sets of units of the same utterances are equal (student and teacher, say)."""
    equal = total = 0
    for fileid, sequence in units.items():
        if fileid not in others:
            raise ValueError(f"There are no units of {fileid!r} to compare with.")
        if len(sequence) != len(others[fileid]):
            raise ValueError(
                f"The lengths of {fileid!r} disagree: {counted(len(sequence), 'unit')} here, {len(others[fileid])} "
                "there."
            )
        equal += int(np.sum(np.asarray(sequence) == np.asarray(others[fileid])))
        total += len(sequence)
    if not total:
        raise ValueError("There are no units to compare.")
    return equal / total


def evaluate_units(
    units: Mapping[str, Sequence[int] | np.ndarray], alignments: Mapping[str, Phones], **options
) -> dict[str, float]:
    """`phone_purity`, `cluster_purity` and `pnmi` of units (see `count_pairs` for the arguments)."""
    counts, _ = count_pairs(units, alignments, **options)
    return {
        "phone_purity": phone_purity(counts),
        "cluster_purity": cluster_purity(counts),
        "pnmi": pnmi(counts),
    }


def all_scores(
    units: Mapping[str, Sequence[int] | np.ndarray],
    alignments: Mapping[str, Phones],
    *,
    silences: Collection[str] = SILENCES,
    collapse: bool = False,
    **options,
) -> dict[str, float]:
    """Every score of units: `evaluate_units`, and without phones perplexity, active units and bitrate.

    Args:
        units, alignments, options: See `count_pairs`.
        silences: Phones that `pnmi_without_silence` leaves out.
        collapse: The bitrate is that of units without repeats.
    """
    counts, names = count_pairs(units, alignments, **options)
    spoken, _ = without_silence(counts, names, silences)
    return {
        "phone_purity": phone_purity(counts),
        "cluster_purity": cluster_purity(counts),
        "pnmi": pnmi(counts),
        "pnmi_without_silence": pnmi(spoken) if spoken.sum() else 0.0,
        "codebook_perplexity": codebook_perplexity(units),
        "active_units": active_units(units),
        "bitrate": bitrate(units, collapse=collapse),
    }


def without_repeats(values: np.ndarray) -> np.ndarray:
    """One value of each run of equal ones."""
    return values[np.append(True, values[1:] != values[:-1])] if len(values) else values


__all__ = [
    "UNIT",
    "Phones",
    "active_units",
    "agreement",
    "all_scores",
    "bitrate",
    "cluster_purity",
    "codebook_perplexity",
    "count_pairs",
    "evaluate_units",
    "phone_purity",
    "phone_steps",
    "pnmi",
    "unit_entropy",
    "without_repeats",
    "without_silence",
]
