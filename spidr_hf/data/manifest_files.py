"""The files that manifests are read from and written to: CSV, JSON lines, Parquet, fairseq TSV."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from ..system.errors import ManifestError

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


def read_csv(path: Path) -> tuple[pa.Table, Path]:
    """The known columns of a CSV with a header, and the folder that its paths are relative to."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    table = pyarrow.csv.read_csv(
        path,
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),  # names may have them
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=SCHEMA,
            include_columns=[name for name in SCHEMA.names if name in header],
            strings_can_be_null=False,
        ),
    )
    return table if table.num_columns else table.select([]), path.parent


def read_jsonl(path: Path) -> tuple[pa.Table, Path]:
    """The known columns of a file with an object per line, and the folder that its paths are relative to."""
    # The JSON reader knows no large_string; `_checked` casts.
    fields = {name: pa.string() if pa.types.is_large_string(kind) else kind for name, kind in _fields()}
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    table = pyarrow.json.read_json(path, parse_options=options)
    return table.select(
        [name for name in table.column_names if table.column(name).null_count < len(table)]
    ), path.parent


def read_parquet(path: Path) -> tuple[pa.Table, Path]:
    """The known columns of a Parquet file, and the folder that its paths are relative to."""
    names = pyarrow.parquet.read_schema(path).names
    return pyarrow.parquet.read_table(path, columns=[name for name in SCHEMA.names if name in names]), path.parent


def read_tsv(path: Path) -> tuple[pa.Table, Path]:
    """Paths and lengths of a fairseq TSV, and the folder that its first line names."""
    with open(path, encoding="utf-8-sig") as file:
        root = os.path.expanduser(file.readline().rstrip("\r\n"))
    if not root or "\t" in root:
        raise ManifestError(f"{path}: the first line of a fairseq TSV is the folder that its paths are relative to.")
    table = pyarrow.csv.read_csv(
        path,
        read_options=pyarrow.csv.ReadOptions(skip_rows=1, column_names=["path", "num_samples"]),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=pyarrow.csv.ConvertOptions(column_types=SCHEMA, strings_can_be_null=False),
    )
    beside = path.absolute().parent / root
    return table, beside if beside.exists() else Path(root)


def _fields() -> list[tuple[str, pa.DataType]]:
    return [(field.name, field.type) for field in SCHEMA]


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


__all__ = ["SCHEMA", "read_csv", "read_jsonl", "read_parquet", "read_tsv", "rows_of", "write_csv", "write_jsonl"]
