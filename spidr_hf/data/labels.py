"""What utterances are labelled with (texts, phones, speakers): from files beside the audio, or the data set itself."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..system.messages import shown
from ..system.tables import csv_columns, csv_rows, json_lines
from .alignments import SILENCES, Phones, is_silence, read_alignments
from .audio import AUDIO_SUFFIXES, FURTHER_SUFFIXES
from .datasets_source import DatasetSource
from .sources import AudioSource

_ID_COLUMNS = ("fileid", "id", "file", "path")
_PATH_COLUMNS = ("file", "path")
_TABLES = (".jsonl", ".json", ".csv", ".tsv")


class Labels:
    """The columns of label files, or of DATA itself, by file id.

    Args:
        files: `.jsonl`, `.csv` or `.tsv` files with a column `fileid` (or `id`, `file`). Several are put together;
            alignments of other kinds beside them are passed over.
        data: what DATA was, whose own columns count where no file is given: a manifest, or a data set.
        source: DATA, opened.
    """

    def __init__(self, files: Sequence[str | Path], data: str | Path, source: AudioSource):
        self.files = [Path(file) for file in files]
        self.source = source
        self.name = ", ".join(map(str, self.files)) or str(data)
        self._rows: dict[str, dict[str, Any]] = {}
        if isinstance(source, DatasetSource) and not files:
            return
        tables = [path for path in self.files if path.suffix.lower() in _TABLES]
        for path in tables or self.files or [Path(data)]:
            for key, row in read_table(path).items():
                known = self._rows.setdefault(key, {})
                for column in (known.keys() & row.keys()).difference(_ID_COLUMNS):
                    if str(known[column]) != str(row[column]):
                        raise _clash(path, key, column)
                known |= row

    def column(self, name: str) -> dict[str, Any]:
        """A column's value by file id; utterances without one are left out.

        Raises `ValueError` where there is no such column.
        """
        values: dict[str, Any]
        if isinstance(self.source, DatasetSource) and not self.files:
            values = {self.source.fileid(i): value for i, value in enumerate(self.source.values(name))}
            values = {key: value for key, value in values.items() if value not in (None, "")}
            if not values:
                raise ValueError(f"{self.name}: no row has a value in the column {name!r}.")
            return values
        values = {key: row[name] for key, row in self._rows.items() if row.get(name) not in (None, "")}
        if not values:
            columns = sorted({column for row in self._rows.values() for column in row})
            raise ValueError(f"{self.name} has no column {name!r}, only {', '.join(columns) or '(none)'}.")
        return values


def read_table(path: str | Path) -> dict[str, dict[str, Any]]:
    """Rows of a `.jsonl`, `.csv` or `.tsv` file with a header, by file id; of a path to audio that is without suffix.

    Raises `ValueError`, naming the line, for what is no such table, and for a file id that comes twice.
    """
    path = Path(path)
    if not path.is_file() or path.suffix.lower() not in _TABLES:
        what = "no such file" if not path.exists() else "no table"
        raise ValueError(
            f"{path}: {what} of labels. Labels are .jsonl, .csv or .tsv with a column fileid (or id) and one for the "
            "labels, or columns of a manifest or data set."
        )
    kind, rows = path.suffix.lower(), dict[str, dict[str, Any]]()
    entries: Iterable[tuple[int, dict[str, Any]]]
    if kind in (".csv", ".tsv"):
        # Semicolons lie between the columns in much of Europe.
        marks = ("\t",) if kind == ".tsv" else (",", ";", "\t")
        found = (mark for mark in marks if set(_ID_COLUMNS) & set(csv_columns(path, mark, _ID_COLUMNS)))
        entries = csv_rows(path, next(found, marks[0]), _ID_COLUMNS)
    else:
        entries = json_lines(path, dict, '{"id": "...", ...}')
    for number, row in entries:
        name = next((name for name in _ID_COLUMNS if row.get(name) not in (None, "")), None)
        if name is None:
            raise ValueError(f"{path}, line {number}: has no file id; expected a column fileid, id or file.")
        key = _without_suffix(str(row[name])) if name in _PATH_COLUMNS else str(row[name])
        if key in rows:
            raise ValueError(f"{path}, line {number}: the file id {shown(key)!r} was there before.")
        rows[key] = row
    return rows


def read_phones(files: Sequence[str | Path], tier: str | None = None) -> dict[str, Phones]:
    """Phones of all alignment files (see `alignments.read_alignments`), by file id. CSV and TSV are none: they are
    tables of something else, of speakers for example.

    Raises `ValueError` where two files have other phones for the same.
    """
    phones: dict[str, Phones] = {}
    for file in (file for file in files if Path(file).suffix.lower() not in (".csv", ".tsv")):
        for fileid, entry in read_alignments(file, tier=tier).items():
            if phones.setdefault(fileid, entry) != entry:
                raise _clash(file, fileid, "phones")
    return phones


def _clash(path: str | Path, fileid: str, what: str) -> ValueError:
    return ValueError(
        f"{path} has other {what} for {shown(fileid)!r} than a file before it: give recordings names that differ "
        "(by their folder, for example)."
    )


def _without_suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in (*AUDIO_SUFFIXES, *FURTHER_SUFFIXES) else path


def without_silence(phones: Phones, silences: Collection[str] = SILENCES) -> list[str]:
    """The names of the phones that are no silence."""
    return [phone for phone, _, _ in phones if not is_silence(phone, silences)]


def spoken_phones(value: Any) -> str:
    """Phones between spaces: of such a text, of a list of phones, or of an alignment, without its silence.

    Raises `ValueError` for anything else.
    """
    if isinstance(value, list):
        names = [entry[0] if isinstance(entry, list) and entry else entry for entry in value]
        value = " ".join(name for name in names if isinstance(name, str) and not is_silence(name))
    return " ".join(plain_label(value).split())


def plain_label(value: Any) -> str:
    """A label as text. Raises `ValueError` for what is none: lists and objects."""
    if isinstance(value, list | dict):
        raise ValueError(f"{shown(value, 60)} is no label: a text or a number is.")
    return str(value)


def frame_phones(phones: Phones, num_frames: int, hop: int, window: int, sampling_rate: int = 16_000) -> list[str]:
    """
    The phone at the middle of each frame's window; "" where there is none.

    Args:
        phones: `(phone, start, end)` in seconds.
        num_frames: T.
        hop, window: samples from frame to frame (320), and those that a frame sees (400).
    """
    phones = sorted(phones, key=lambda phone: phone[1])
    starts = np.array([start for _, start, _ in phones])
    middles = (np.arange(num_frames) * hop + window / 2) / sampling_rate
    indices = np.searchsorted(starts, middles, side="right") - 1
    return [
        phones[index][0] if index >= 0 and time < phones[index][2] else ""
        for index, time in zip(indices.tolist(), middles.tolist(), strict=True)
    ]


def parse_hold_out(text: str) -> tuple[str, str]:
    """`COLUMN=VALUE` as a pair."""
    column, separator, value = text.partition("=")
    if not (column and separator and value):
        raise ValueError(f"{text!r} does not say what to hold out: give COLUMN=VALUE, as in speaker=slt.")
    return column, value


def held_out(labels: Labels, column: str, value: str) -> set[str]:
    """File ids of the utterances that have this value in the column. Raises `ValueError` where there is none."""
    values: Mapping[str, Any] = labels.column(column)
    found = {fileid for fileid, entry in values.items() if str(entry) == value}
    if not found:
        known = sorted({str(entry) for entry in values.values()})
        shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
        raise ValueError(f"{labels.name}: no utterance has {column} {value!r}, only {shown}.")
    return found


__all__ = [
    "Labels",
    "frame_phones",
    "held_out",
    "parse_hold_out",
    "plain_label",
    "read_phones",
    "read_table",
    "spoken_phones",
    "without_silence",
]
