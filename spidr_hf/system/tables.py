"""Text that somebody else wrote, or that a kill cut off: JSON, JSON lines, TOML, CSV and lines of words.

Numbers are finite, depth and digits are bounded, a byte-order mark is passed over; what cannot be read is a
`ValueError` of one line that names the file and, where there is one, the line.
"""

import csv
import itertools
import json
import math
import os
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .messages import counted, one_line, shown

Row = TypeVar("Row")
# What taking a row to pieces raises where it is no such row.
_NO_ROW = (ValueError, TypeError, LookupError, AttributeError, OverflowError, StopIteration)
_LONGEST_TIME = 1e6  # seconds: eleven days


def finite(text: str) -> float:
    """A number. Raises `ValueError` for text that is none, and for NaN and infinity, however they are spelt."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{shown(text, 40)} is no finite number")
    return number


def interval(start: Any, end: Any) -> tuple[float, float]:
    """Start and end of a stretch of a recording, in seconds. Raises `ValueError` where they cannot be."""
    start, end = finite(start), finite(end)
    if not 0 <= start <= end <= _LONGEST_TIME:
        raise ValueError(f"{start:g} to {end:g} s is no stretch of a recording")
    return start, end


def _toml_finite(text: str) -> float:
    return finite(text.replace("_", ""))


_JSON = json.JSONDecoder(parse_float=finite, parse_constant=finite)


def parse_json(data: bytes | str) -> Any:
    """The value that JSON spells. Raises `ValueError`, for depth and non-finite numbers, too."""
    try:
        text = decoded(data) if isinstance(data, bytes) else data
        value = _JSON.decode(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise ValueError("it has half a character (\\ud800 to \\udfff)") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def decoded(data: bytes) -> str:
    """UTF-8 as text, without a byte-order mark. Raises `ValueError`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its byte {error.start + 1} is no UTF-8") from None


def parse_table(data: bytes, what: str, kind: str = ".json") -> dict[str, Any]:
    """The table of fields in the bytes of a file.

    Args:
        what: the file, as messages call it.
        kind: ".toml", or anything else for JSON.

    Raises `ValueError` for what is none.
    """
    try:
        table = tomllib.loads(decoded(data), parse_float=_toml_finite) if kind == ".toml" else parse_json(data)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{what} is not valid {'TOML' if kind == '.toml' else 'JSON'}: {one_line(error)}.") from None
    if not isinstance(table, dict):
        raise ValueError(f"{what} must hold a table of fields, not {type(table).__name__}.")
    return table


def read_table(path: str | os.PathLike) -> dict[str, Any]:
    """The table in a JSON file (TOML if it ends so). Raises `OSError` and `ValueError`."""
    path = Path(path)
    return parse_table(path.read_bytes(), shown(path), path.suffix)


def known_table(path: str | os.PathLike) -> dict[str, Any]:
    """The table in a JSON file that may be missing or damaged: nothing then."""
    try:
        return read_table(path)
    except (OSError, ValueError):
        return {}


def text_lines(
    path: str | os.PathLike, read: Callable[[str], Row], form: str | None = None, lines: Iterable[bytes] | None = None
) -> Iterator[tuple[int, Row]]:
    """
    The lines of a text file, taken to pieces; blank ones are passed over.

    Args:
        path: The file, read as the iterator goes.
        read: Makes of a line what is wanted; where it raises the line is damaged.
        form: What lines look like. Raises `ValueError` for one that does not; None: damaged lines are passed over.
        lines: The lines themselves, where they are not the file's.

    Yields (number, counted from 1; what `read` made).
    """
    if lines is None:
        with open(path, "rb") as file:
            yield from text_lines(path, read, form, file)
        return
    for number, line in enumerate(lines, start=1):
        try:
            text = decoded(line)
            if not text.strip():
                continue
            row = read(text)
        except _NO_ROW as error:
            if form is None:
                continue
            raise ValueError(f"{shown(path)}, line {number} is not of the form {form} ({_why(error)}).") from error
        yield number, row


def json_lines(
    path: str | os.PathLike,
    read: Callable[[dict[str, Any]], Row],
    form: str | None = None,
    lines: Iterable[bytes] | None = None,
) -> Iterator[tuple[int, Row]]:
    """`text_lines` of a file with one JSON object per line: `read` makes of the object what is wanted."""
    return text_lines(path, lambda line: read(_object(line)), form, lines)


def column_lines(
    path: str | os.PathLike, columns: Sequence[str], read: Callable[..., Row]
) -> Iterator[tuple[int, Row]]:
    """`text_lines` of words under a first line that names `columns`, in any order and among others.

    `read` takes the words of these columns. Raises `ValueError` where one is not named.
    """
    places: list[int] = []

    def words(line: str) -> Row | None:
        found = line.split()
        if places:
            return read(*(found[place] for place in places))
        if missing := [column for column in columns if column not in found]:
            raise ValueError(f"no column {missing[0]}")
        places.extend(map(found.index, columns))
        return None

    for number, row in text_lines(path, words, " ".join(columns)):
        if row is not None:
            yield number, row
    if not places:
        raise ValueError(f"{shown(path)} has no column {columns[0]}: it is empty.")


def csv_columns(path: str | os.PathLike, delimiter: str = ",", known: Collection[str] = ()) -> list[str]:
    """
    Names of a CSV file's columns: its first line, without the blanks around them.

    Args:
        known: Names in small letters that are taken however they are capitalised.

    Raises `ValueError` for two columns of one name, and for what is no text.
    """
    _, cells = next(_csv_lines(path, delimiter), (1, []))
    names = [name.strip() for name in cells]
    names = [name.lower() if name.lower() in known else name for name in names]
    if len(set(names)) < len(names) and (twice := [name for name, n in Counter(names).items() if name and n > 1]):
        raise ValueError(f"{shown(path)}, line 1: the column {shown(twice[0])!r} is there more than once.")
    return names


def csv_rows(
    path: str | os.PathLike, delimiter: str = ",", known: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, cells by `csv_columns`) of each row of a CSV file; blank lines are passed over.

    Raises `ValueError` as `csv_columns`, and for a row of more or fewer cells than columns.
    """
    columns = csv_columns(path, delimiter, known)
    for number, cells in itertools.islice(_csv_lines(path, delimiter), 1, None):
        if cells and len(cells) != len(columns):
            raise ValueError(
                f"{shown(path)}, line {number} has {counted(len(cells), 'cell')}, the first line "
                f"{counted(len(columns), 'column')}."
            )
        if cells:
            yield number, dict(zip(columns, cells, strict=True))


def _csv_lines(path: str | os.PathLike, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter)
        try:
            yield from ((lines.line_num, cells) for cells in lines)
        except UnicodeDecodeError:
            raise ValueError(f"{shown(path)} is no UTF-8 text.") from None
        except csv.Error as error:
            raise ValueError(f"{shown(path)}, line {lines.line_num} cannot be read as CSV ({error}).") from None


def _object(line: str) -> dict[str, Any]:
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError(f"{shown(row, 40)} is no object")
    return row


def _why(error: Exception) -> str:
    if isinstance(error, KeyError) and error.args:
        return f"it has no {shown(error.args[0])!r}"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return one_line(error, 200) or type(error).__name__


__all__ = [
    "column_lines",
    "csv_columns",
    "csv_rows",
    "decoded",
    "finite",
    "interval",
    "json_lines",
    "known_table",
    "parse_json",
    "parse_table",
    "read_table",
    "text_lines",
]
