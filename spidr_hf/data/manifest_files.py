"""The files that manifests are read from and written to: CSV, JSON lines, Parquet, fairseq TSV."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from ..system.errors import ManifestError
from ..system.messages import shown
from ..system.tables import csv_columns, csv_rows, json_lines, text_lines

SCHEMA = pa.schema(
    {
        "fileid": pa.large_string(),
        "path": pa.large_string(),
        "num_samples": pa.int64(),
        "archive": pa.large_string(),
        "byte_offset": pa.int64(),
        "byte_size": pa.int64(),
    }
)


_FORM = '{"path": "...", "num_samples": 80000, ...}'
_NAMES = SCHEMA.names
_NUMBERS = ("num_samples", "byte_offset", "byte_size")
_ROWS = 65_536  # of a chunk of a table


def read_csv(path: Path) -> tuple[pa.Table, Path]:
    """The known columns of a CSV with a header, and the folder that its paths are relative to."""
    delimiter, columns = _columns(path)
    try:
        table = pyarrow.csv.read_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(skip_rows=1, column_names=columns),
            # Names may have line ends in them.
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=SCHEMA,
                include_columns=[name for name in _NAMES if name in columns],
                strings_can_be_null=False,
            ),
        )
    except pa.ArrowInvalid:
        if any(True for _ in csv_rows(path, delimiter, _NAMES)):
            raise
        table = SCHEMA.empty_table()  # a header alone
    return table, path.parent


def _has_header(path: Path) -> bool:
    """Whether a TSV has named columns: fairseq's have none."""
    return "path" in csv_columns(path, "\t", _NAMES)


def _columns(path: Path) -> tuple[str, list[str]]:
    """What lies between the columns of a CSV file (semicolons in much of Europe), and their names."""
    delimiter = next((mark for mark in (",", ";", "\t") if "path" in csv_columns(path, mark, _NAMES)), ",")
    columns = csv_columns(path, delimiter, _NAMES)
    if missing := [name for name in ("path", "num_samples") if name not in columns]:
        raise ManifestError(
            f"{path}, line 1: has no column {', '.join(missing)}, only {shown(', '.join(columns)) or '(none)'}. "
            f"A manifest's first line names its columns: {', '.join(_NAMES[:3])} and, for audio in a tar, "
            f"{', '.join(_NAMES[3:])}."
        )
    return delimiter, columns


def read_jsonl(path: Path) -> tuple[pa.Table, Path]:
    """The known columns of a file with an object per line, and the folder that its paths are relative to."""
    chunks, rows = [SCHEMA.empty_table()], list[tuple[Any, ...]]()
    # pyarrow's own reader ends the process at a line that says null.
    for _, row in json_lines(path, _values, _FORM):
        rows.append(row)
        if len(rows) == _ROWS:
            chunks.append(_table(rows))
            rows.clear()
    table = pa.concat_tables([*chunks, _table(rows)])
    given = [name for name in _NAMES if table.column(name).null_count < len(table)]
    return table.select(given if len(table) else _NAMES), path.parent


def _values(row: dict[str, Any]) -> tuple[Any, ...]:
    if fault := _fault(row):
        raise ValueError(fault)
    number = row.get("fileid")
    fileid = str(number) if type(number) is int else number
    return fileid, row["path"], *(row.get(name) for name in _NAMES[2:])


def _table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ([] for _ in _NAMES)
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, SCHEMA.types, strict=True)], schema=SCHEMA)


def explain(path: Path) -> None:
    """Looks for what makes a manifest unusable, row by row. Raises `ValueError` that names the line."""
    kind, named = path.suffix.lower(), None
    rows: Iterable[tuple[int, dict[str, Any]]]
    if kind in (".jsonl", ".json"):
        rows = json_lines(path, dict, _FORM)
    elif kind == ".csv" or (kind == ".tsv" and _has_header(path)):
        rows = csv_rows(path, _columns(path)[0], _NAMES)
    elif kind == ".tsv":
        rows = _tsv_rows(path)
    else:
        return
    for number, row in rows:
        if fault := _fault({name: _number(name, row[name]) for name in _NAMES if name in row}):
            raise ManifestError(f"{path}, line {number}: {fault}.")
        if named not in (None, bool(row.get("fileid"))):
            raise ManifestError(f"{path}, line {number}: has {'no' if named else 'a'} fileid, unlike those before it.")
        named = bool(row.get("fileid"))


def _tsv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in text_lines(path, str):
        cells = line.rstrip("\r\n").split("\t")
        if number > 1 and len(cells) != 2:
            raise ManifestError(
                f"{path}, line {number}: {shown(cells[0], 60)!r}, with {len(cells) - 1} tabs behind it; lines of a "
                "fairseq TSV are a path, a tab and the number of samples, but for the first."
            )
        if number > 1:
            yield number, dict(zip(_NAMES[1:3], cells, strict=True))


def _number(name: str, value: Any) -> Any:
    """What a cell says; JSON's values as they are."""
    digits = name in _NUMBERS and isinstance(value, str) and len(value) < 30 and value.removeprefix("-").isdecimal()
    return int(value) if digits else None if value == "" else value


def _fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the values of a row, if something is."""
    if row.get("path") in (None, ""):
        return "has no path"
    for name in ("path", "archive"):
        if not isinstance(row.get(name) or "", str):
            return f"its {name} is {shown(row[name], 60)}, which is no text"
    if not isinstance(row.get("fileid", ""), str | int | None) or isinstance(row.get("fileid"), bool):
        return f"its fileid is {shown(row['fileid'], 60)}, which is no text"
    for name in _NUMBERS if row.get("archive") else _NUMBERS[:1]:
        if row.get(name) in (None, ""):
            return f"has no {name}"
    for name in _NUMBERS:
        value = row.get(name)
        if value is not None and not (type(value) is int and 0 <= value < 1 << 63):
            return f"its {name} is {shown(value, 60)}; expected a whole number of at least 0"
    return None


def read_parquet(path: Path) -> tuple[pa.Table, Path]:
    """The known columns of a Parquet file, and the folder that its paths are relative to."""
    names = pyarrow.parquet.read_schema(path).names
    return pyarrow.parquet.read_table(path, columns=[name for name in SCHEMA.names if name in names]), path.parent


def read_tsv(path: Path) -> tuple[pa.Table, Path]:
    """Paths and lengths of a fairseq TSV, and the folder that its first line names; one with a header as `read_csv`."""
    if _has_header(path):
        return read_csv(path)
    _, first = next(text_lines(path, str), (1, ""))
    root = os.path.expanduser(first.rstrip("\r\n"))
    if not root or "\t" in root:
        raise ManifestError(
            f"{path}, line 1: {shown(root, 60) or 'is empty'}; the first line of a fairseq TSV is the folder that its "
            "paths are relative to."
        )
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(skip_rows=1, column_names=["path", "num_samples"]),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=pyarrow.csv.ConvertOptions(column_types=SCHEMA, strings_can_be_null=False),
    )
    beside = path.absolute().parent / root
    return table, beside if beside.exists() else Path(root)


def rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as dicts, without all of them in memory at once."""
    for batch in table.to_batches(max_chunksize=65_536):
        yield from batch.to_pylist()


def write_csv(file: IO[str], table: pa.Table) -> None:
    """A header and a line per row."""
    writer = csv.DictWriter(file, table.column_names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows_of(table))


def write_jsonl(file: IO[str], table: pa.Table) -> None:
    """An object per row, without the values that it lacks."""
    for row in rows_of(table):
        file.write(json.dumps({name: value for name, value in row.items() if value is not None}) + "\n")


__all__ = [
    "SCHEMA",
    "explain",
    "read_csv",
    "read_jsonl",
    "read_parquet",
    "read_tsv",
    "rows_of",
    "write_csv",
    "write_jsonl",
]
