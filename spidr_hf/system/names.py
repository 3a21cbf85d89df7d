"""Names of utterances: the same recording may be called by its path in one file and by its stem in another."""

from collections.abc import Collection
from pathlib import PurePosixPath

from .messages import counted


def match_names(
    names: Collection[str], known: Collection[str], what: str = "alignment"
) -> tuple[dict[str, str], list[str]]:
    """
    For each name the known one that is equal, or that alone ends in the same part of its path; and the names without.

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
    """For each name the known ones it may stand for: the equal one, else all that end in the same part of its path."""
    by_stem: dict[str, list[str]] = {}
    for name in known:
        by_stem.setdefault(PurePosixPath(name).name, []).append(name)
    known = set(known)
    return {name: [name] if name in known else by_stem.get(PurePosixPath(name).name, []) for name in names}


__all__ = ["find_names", "match_names"]
