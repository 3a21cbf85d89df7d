"""What utterances are labelled with (texts, phones, speakers): from files beside the audio, or the data set itself."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..system.messages import shown
from ..system.tables import csv_rows, json_lines
from .alignments import SILENCES, Phones, is_silence, read_alignments
from .datasets_source import DatasetSource
from .sources import AudioSource

_ID_COLUMNS = ("fileid", "id", "file", "path")


class Labels:
    """The columns of label files, or of DATA itself, by file id.

    Args:
        files: `.jsonl`, `.csv` or `.tsv` files with a column `fileid` (or `id`, `file`). Several are put together.
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
        for path in self.files or [Path(data)]:
            self._rows |= read_table(path)

    def column(self, name: str) -> dict[str, Any]:
        """A column's value by file id; utterances without one are left out.

        Raises `ValueError` where there is no such column.
        """
        if isinstance(self.source, DatasetSource) and not self.files:
            return {self.source.fileid(i): value for i, value in enumerate(self.source.values(name))}
        values = {key: row[name] for key, row in self._rows.items() if row.get(name) not in (None, "")}
        if not values:
            columns = sorted({column for row in self._rows.values() for column in row})
            raise ValueError(f"{self.name} has no column {name!r}, only {', '.join(columns) or '(none)'}.")
        return values


def read_table(path: str | Path) -> dict[str, dict[str, Any]]:
    """Rows of a `.jsonl`, `.csv` or `.tsv` file with a header, by file id.

    Raises `ValueError`, naming the line, for what is no such table, and for a file id that comes twice.
    """
    path = Path(path)
    if not path.is_file() or path.suffix.lower() not in (".jsonl", ".json", ".csv", ".tsv"):
        what = "no such file" if not path.exists() else "no table"
        raise ValueError(
            f"{path}: {what} of labels. Labels are .jsonl, .csv or .tsv with a column fileid (or id) and one for the "
            "labels, or columns of a manifest or data set."
        )
    kind, rows = path.suffix.lower(), dict[str, dict[str, Any]]()
    entries: Iterable[tuple[int, dict[str, Any]]]
    if kind in (".csv", ".tsv"):
        entries = csv_rows(path, "\t" if kind == ".tsv" else ",", _ID_COLUMNS)
    else:
        entries = json_lines(path, dict, '{"id": "...", ...}')
    for number, row in entries:
        key = next((str(row[name]) for name in _ID_COLUMNS if row.get(name) not in (None, "")), None)
        if key is None:
            raise ValueError(f"{path}, line {number}: has no file id; expected a column fileid, id or file.")
        if key in rows:
            raise ValueError(f"{path}, line {number}: the file id {shown(key)!r} was there before.")
        rows[key] = row
    return rows


def read_phones(files: Sequence[str | Path], tier: str | None = None) -> dict[str, Phones]:
    """Phones of all alignment files (see `evaluation.read_alignments`), by file id."""
    return {fileid: phones for file in files for fileid, phones in read_alignments(file, tier=tier).items()}


def without_silence(phones: Phones, silences: Collection[str] = SILENCES) -> list[str]:
    """The names of the phones that are no silence."""
    return [phone for phone, _, _ in phones if not is_silence(phone, silences)]


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
    "read_phones",
    "read_table",
    "without_silence",
]
