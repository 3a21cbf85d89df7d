"""Names of utterances: the same recording may be called by its path in one file and by its stem in another."""

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterator

from .messages import counted


def match_names(
    names: Collection[str], known: Collection[str], what: str = "alignment"
) -> tuple[dict[str, str], list[str]]:
    """
    For each name the known one that is equal, or that alone ends in most of its path; and the names without.

    Args:
        names, known: File ids.
        what: What the known ones are names of, for messages.

    Raises `ValueError` where not one has any.
    """
    found = find_names(names, known)
    matches = {name: candidates[0] for name, candidates in found.items() if len(candidates) == 1}
    if names and not matches:
        name, candidates = next(iter(found.items()))
        several = f"{counted(len(candidates), what)} match {name!r}, {candidates[0]!r} for one" if candidates else None
        example = f", {next(iter(known))!r} for one" if known else ""
        raise ValueError(
            f"{several or f'There is no {what} for {name!r}'} (one of {counted(len(names), 'utterance')}; "
            f"{counted(len(known), what)}{example}). Both must have the same names: a path, or what "
            "it ends in where that is unique."
        )
    return matches, [name for name in names if name not in matches]


def find_names(names: Collection[str], known: Collection[str]) -> dict[str, list[str]]:
    """
    For each name the known ones it may stand for: the equal one, else those that end in most of its path.

    A known one that several names may stand for is that of the nearest; of equally near ones it is none's. Letters with
    accents are the same however they are encoded (macOS takes them apart in names of files).
    """
    by_end: dict[str, list[str]] = defaultdict(list)
    for name in known:
        for end in _ends(name):
            by_end[end].append(name)
    known = set(known)
    found: dict[str, list[str]] = {}
    claims: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name in names:
        found[name], common = [], 0.0
        if name in known:
            found[name], common = [name], float("inf")
        elif shared := next((end for end in _ends(name) if end in by_end), None):
            found[name], common = by_end[shared], shared.count("/")
        if len(found[name]) == 1:
            claims[found[name][0]].append((common, name))
    for claimed in claims.values():
        most = max(claimed)[0]
        nearest = [name for common, name in claimed if common == most]
        for _, name in claimed:
            if nearest != [name]:
                found[name] = []
    return found


def _ends(name: str) -> Iterator[str]:
    """What a path ends in: the whole, then ever fewer of its parts."""
    parts = [part for part in unicodedata.normalize("NFC", name).split("/") if part]
    return ("/".join(parts[place:]) for place in range(len(parts)))


__all__ = ["find_names", "match_names"]
