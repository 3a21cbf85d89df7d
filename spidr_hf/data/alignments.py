"""Phone alignments as they come: Praat's TextGrid, CTM, one label per step; and the item files made of them."""

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..system.files import write_text
from ..system.messages import shown
from ..system.tables import column_lines, decoded, finite, interval, json_lines, text_lines

Phones = Sequence[tuple[str, float, float]]

STEP = 0.01  # seconds
SILENCE = "SIL"
# Labels of silence, pauses and noise: MFA's and Kaldi's, TIMIT's, Festival's, MAUS's. Their case does not matter.
SILENCES = (
    *("", "SIL", "SP", "SPN", "NSN", "<EPS>", "<SIL>", "SILENCE", "H#", "EPI", "PAU", "SSIL", "BRTH"),
    *("<P:>", "<USB>", "<NIB>"),
)
POSITION = re.compile(r"_[BIES]$")  # of a phone in its word, as Kaldi marks it
_PHONE_TIERS = ("phones", "phone", "phonemes", "phoneme", "phns", "mau")
# Strings (quotes inside are doubled), then what must not be taken for a number, then numbers.
_TEXTGRID_TOKEN = re.compile(r'"(?:[^"]|"")*"|\[\d*\]|<[^>]*>|![^\n]*|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?')


def is_silence(label: str, silences: Collection[str] = SILENCES) -> bool:
    """Whether a label is one of silence, with or without its position in the word ("SPN_S"); case does not matter."""
    return not {label.upper(), POSITION.sub("", label).upper()}.isdisjoint(name.upper() for name in silences)


def phones_of_steps(labels: Sequence[str], step: float) -> list[tuple[str, float, float]]:
    """Phones `(phone, start, end)` in seconds from one label per `step` seconds; equal neighbours are one phone."""
    phones: list[tuple[str, float, float]] = []
    for i, label in enumerate(labels):
        if phones and phones[-1][0] == str(label):
            phones[-1] = (phones[-1][0], phones[-1][1], (i + 1) * step)
        else:
            phones.append((str(label), i * step, (i + 1) * step))
    return phones


def read_textgrids(path: str | os.PathLike, tier: str | None = None) -> dict[str, list[tuple[str, float, float]]]:
    """Phones of a `.TextGrid` file, or of all below a folder, by path without suffix. Empty labels are silence."""
    path = Path(path)
    files = alignment_files(path)
    if not files:
        raise ValueError(f"{path}: no TextGrid files in this folder or below it.")
    root = path.parent if path.is_file() else path
    return {file.relative_to(root).with_suffix("").as_posix(): read_textgrid(file, tier) for file in files}


def alignment_files(path: Path) -> list[Path]:
    """The files that alignments are read from: the one, or all TextGrids below a folder, sorted."""
    # What macOS puts beside files ("._a.TextGrid") is none.
    below = () if path.is_file() else (p for p in path.rglob("*") if not p.name.startswith("._"))
    return [path] if path.is_file() else sorted(p for p in below if p.suffix.lower() == ".textgrid")


def read_textgrid(path: str | os.PathLike, tier: str | None = None) -> list[tuple[str, float, float]]:
    """Phones `(phone, start, end)` of one tier of a TextGrid, in Praat's long or short text format."""
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-16") if content[:2] in (b"\xff\xfe", b"\xfe\xff") else decoded(content)
    except ValueError as error:
        raise ValueError(f"{path} is no text, so no TextGrid ({error}).") from error
    tokens = [token for token in _TEXTGRID_TOKEN.finditer(text) if token[0][0] not in "[!<"]
    waiting = iter(tokens)
    try:
        tiers = _textgrid_tiers(token[0] for token in waiting)
    except (ValueError, StopIteration) as error:
        left = next(waiting, None)
        end = len(text) if left is None else tokens[tokens.index(left) - 1].start()
        raise ValueError(
            f"{path}, line {text.count(chr(10), 0, end) + 1} cannot be read as a TextGrid in Praat's text format."
        ) from error
    names = [name for name, _ in tiers]
    if tier is None:
        wanted = [name for name in names if name.lower() in _PHONE_TIERS or name.lower().endswith("phones")]
        wanted = wanted or names
        if len(wanted) != 1:
            raise ValueError(f"{path} has the tiers {shown(', '.join(names)) or '(none)'}: choose one with --tier.")
        tier = wanted[0]
    if names.count(tier) != 1:
        what = f"{names.count(tier)} interval tiers" if tier in names else "no interval tier"
        advice = ": rename all but one" if tier in names else f", only {shown(', '.join(names)) or '(none)'}"
        raise ValueError(f"{path} has {what} {tier!r}{advice}.")
    return [(_label(label), start, end) for label, start, end in tiers[names.index(tier)][1]]


def _label(label: Any) -> str:
    """A label as it is told from others; what is empty, or JSON's null, is silence."""
    return ("" if label is None else str(label).strip()) or SILENCE


def _textgrid_tiers(tokens: Iterator[str]) -> list[tuple[str, list[tuple[str, float, float]]]]:
    """Names and intervals of the interval tiers."""

    def string() -> str:
        token = next(tokens)
        if token[0] != '"':
            raise ValueError(token)
        return token[1:-1].replace('""', '"')

    def number() -> float:
        return finite(next(tokens))

    if string() != "ooTextFile" or string() != "TextGrid":
        raise ValueError("header")
    number(), number()
    tiers: list[tuple[str, list[tuple[str, float, float]]]] = []
    for _ in range(int(number())):
        kind, name = string(), string()
        number(), number()
        entries = int(number())
        if kind == "IntervalTier":
            intervals = []
            for _ in range(entries):
                start, end = interval(number(), number())
                intervals.append((string(), start, end))
            tiers.append((name, intervals))
        else:  # a tier of points
            for _ in range(entries):
                number(), string()
    return tiers


def read_ctm(path: str | os.PathLike) -> dict[str, list[tuple[str, float, float]]]:
    """Phones by utterance of a CTM file (`utterance channel start duration phone`); gaps become silence."""
    channels: dict[str, str] = {}

    def entry(line: str) -> tuple[str, str, float, float] | None:
        if line.startswith(";;"):
            return None
        fileid, channel, start, duration, phone, *_ = line.split()
        if channels.setdefault(fileid, channel) != channel:
            raise ValueError(f"{fileid} has the channel {channels[fileid]} above: give every channel a name of its own")
        return fileid, phone, *interval(start, finite(start) + finite(duration))

    return _by_utterance(text_lines(path, entry, "'utterance channel start duration phone'"))


def read_rows(path: str | os.PathLike) -> dict[str, list[tuple[str, float, float]]]:
    """Phones by utterance of a text file with the columns `#file onset offset #phone` (DiscoPhon's alignments)."""

    def entry(fileid: str, onset: str, offset: str, phone: str) -> tuple[str, str, float, float]:
        return fileid, phone, *interval(onset, offset)

    return _by_utterance(column_lines(path, ("#file", "onset", "offset", "#phone"), entry))


def _by_utterance(
    entries: Iterable[tuple[int, tuple[str, str, float, float] | None]],
) -> dict[str, list[tuple[str, float, float]]]:
    phones: dict[str, list[tuple[str, float, float]]] = {}
    for _, entry in entries:
        if entry is not None:
            phones.setdefault(entry[0], []).append(entry[1:])
    return {fileid: _fill_gaps(sorted(entries, key=lambda e: e[1])) for fileid, entries in phones.items()}


def _fill_gaps(phones: list[tuple[str, float, float]]) -> list[tuple[str, float, float]]:
    filled, end = [], 0.0
    for phone, start, stop in phones:
        if start - end > 1e-4:
            filled.append((SILENCE, end, start))
        filled.append((phone, start, stop))
        end = stop
    return filled


def write_items(
    path: str | os.PathLike,
    alignments: Mapping[str, Phones],
    speakers: Mapping[str, str],
    *,
    silences: Collection[str] = SILENCES,
    durations: Mapping[str, float] | None = None,
) -> int:
    """
    Write the `.item` file of an ABX test on triphones: every phone with both its neighbours, none of them silence, and
    no gap between them.

    Args:
        path: The file; complete or not there at all.
        alignments: Phones by file id.
        speakers: Speaker of each of these utterances.
        silences: Labels that no triphone may hold; case does not matter.
        durations: Where features end, in seconds; triphones that reach beyond are left out. (The convolutions drop the
            last 5 to 25 ms of an utterance.)

    Returns:
        How many there are.

    Raises `ValueError` where a speaker is missing, and for names with blanks, which end a word of such files.
    """
    silent, lines = cache(lambda label: is_silence(label, silences)), list[str]()
    for fileid, phones in alignments.items():
        if fileid not in speakers:
            raise ValueError(f"There is no speaker for {fileid!r}.")
        end_of_features = (durations or {}).get(fileid, float("inf"))
        for (before, onset, _), (phone, _, _), (after, _, offset) in _triphones(phones):
            if offset > end_of_features or any(map(silent, (before, phone, after))):
                continue
            words = (fileid, f"{onset:.4f}", f"{offset:.4f}", phone, before, after, speakers[fileid])
            if wrong := [word for word in words if len(word.split()) != 1]:
                raise ValueError(
                    f"{shown(wrong[0])!r} has a blank in it, where a word of an item file ends: rename it."
                )
            lines.append(" ".join(words) + "\n")
    write_text(path, "#file onset offset #phone prev-phone next-phone speaker\n" + "".join(lines))
    return len(lines)


def _triphones(phones: Phones) -> Iterator[tuple[tuple[str, float, float], ...]]:
    """Three phones that follow one another without a gap, from each phone on."""
    phones = sorted(phones, key=lambda phone: phone[1])
    for three in zip(phones, phones[1:], phones[2:], strict=False):
        if all(abs(start - end) <= STEP / 2 for (_, _, end), (_, start, _) in pairwise(three)):
            yield three


def read_alignments(
    path: str | os.PathLike, *, step: float = STEP, tier: str | None = None
) -> dict[str, list[tuple[str, float, float]]]:
    """
    Phones of each utterance, `(phone, start, end)` in seconds, by file id.

    Args:
        path: JSON lines with the keys `id` and `phones` (`[phone, start, end]` in seconds each, or one label per
            step); a `.ctm` file; a `.txt` file with the columns `#file onset offset #phone` (DiscoPhon's); a
            `.TextGrid` file or a folder of them, whose file ids are paths without suffix.
        step: Seconds per label, where there is one per step.
        tier: Name of the TextGrids' tier (by default the one named like phones, or the only one).
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of alignments.")
    if path.is_dir() or path.suffix.lower() == ".textgrid":
        return read_textgrids(path, tier)
    if path.suffix.lower() == ".ctm":
        return read_ctm(path)
    if path.suffix.lower() == ".txt":
        return read_rows(path)
    return _read_jsonl(path, step)


def _read_jsonl(path: Path, step: float) -> dict[str, list[tuple[str, float, float]]]:
    alignments: dict[str, list[tuple[str, float, float]]] = {}

    def entry(row: dict[str, Any]) -> tuple[str, list[tuple[str, float, float]]]:
        labels = row["phones"]
        if not isinstance(labels, list):
            raise TypeError("its phones are no list")
        if labels and not isinstance(labels[0], list):
            phones = phones_of_steps([_label(label) for label in labels], step)
        else:
            phones = [(_label(label), *interval(start, end)) for label, start, end in labels]
        return str(row["id"] if "id" in row else row["file"]), phones

    form = '{"id": "...", "phones": [["AH", 0.0, 0.1], ...]}'
    for number, (fileid, phones) in json_lines(path, entry, form):
        if fileid in alignments:
            raise ValueError(f"{path}, line {number}: the id {shown(fileid)!r} was there before.")
        alignments[fileid] = phones
    return alignments


__all__ = [
    "POSITION",
    "SILENCE",
    "SILENCES",
    "STEP",
    "Phones",
    "alignment_files",
    "is_silence",
    "phones_of_steps",
    "read_alignments",
    "read_ctm",
    "read_rows",
    "read_textgrid",
    "read_textgrids",
    "write_items",
]
