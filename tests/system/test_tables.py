"""Text that somebody else wrote: what is taken, what is passed over, and the line that a refusal names."""

import pytest

from spidr_hf.system.tables import (
    column_lines,
    csv_columns,
    csv_rows,
    interval,
    json_lines,
    known_table,
    parse_json,
    read_table,
    text_lines,
)

ROWS = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xe2\x80\xa8\xc2\x85"}\n'


def test_lines_are_counted_as_editors_do(tmp_path):
    """A byte-order mark and blank lines are no rows, and only line ends end lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS)
    assert list(json_lines(path, lambda row: row["a"], "{}")) == [(1, 1), (4, "\u2028\x85")]
    assert [number for number, _ in text_lines(path, str)] == [1, 4]
    assert list(json_lines(path, dict, lines=[b'{"b": 2}'])) == [(1, {"b": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"null", "None is no object"),
        (b"[1]", r"\[1\] is no object"),
        (b'{"a": 1', "delimiter at character 9"),
        (b'{"b": 1}', "it has no 'a'"),
        (b'{"a": NaN}', "NaN is no finite number"),
        (b'{"a": -Infinity}', "-Infinity is no finite number"),
        (b'{"a": 1e400}', "1e400 is no finite number"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "digits"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xe9"}', "its byte 8 is no UTF-8"),
        (b"\0\0\0\0", "Expecting value"),
        (b'{"a": "x"}', "invalid literal"),
        (b'{"a": null}', "NoneType"),
        (b'{"a": []}', "list"),
    ],
)
def test_damaged_lines_are_named_or_passed_over(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3 is not of the form FORM \(.*{message}") as raised:
        list(json_lines(path, lambda row: int(row["a"]), "FORM"))
    assert str(raised.value).isprintable() and len(str(raised.value)) < 500
    assert [row for _, row in json_lines(path, lambda row: int(row["a"]))] == [1, 2]


def test_errors_of_the_reader_itself_are_not_hidden(tmp_path):
    (tmp_path / "a").write_text("x\n")
    with pytest.raises(ZeroDivisionError):
        list(text_lines(tmp_path / "a", lambda _: 1 / 0, "FORM"))
    with pytest.raises(FileNotFoundError):
        list(text_lines(tmp_path / "b", str))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[]", "must hold a table of fields, not list"),
        ("a.json", b"", "is not valid JSON"),
        ("a.json", b'{"a": 1e400}', "is not valid JSON: 1e400 is no finite number"),
        ("a.toml", b"a = inf", "is not valid TOML: inf is no finite number"),
        ("a.toml", b"a = -1_0e4_00", "is not valid TOML.*no finite number"),
        ("a.toml", b"a = " + b"[" * 100_000, "is nested too deeply"),
        ("a.toml", b"\xff", "is not valid TOML: its byte 1 is no UTF-8"),
    ],
)
def test_tables(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        read_table(path)
    assert known_table(path) == {} == known_table(tmp_path / "nothing")
    path.write_bytes(b"\xef\xbb\xbf" + (b'{"a": 1.5}' if name == "a.json" else b"a = 1_0.5e0"))
    assert read_table(path) == {"a": 1.5 if name == "a.json" else 10.5}


def test_columns_of_words(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffb x a\n1 2 3\n\n4 5\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 4 is not of the form a b"):
        list(column_lines(path, ("a", "b"), lambda a, b: (a, b)))
    path.write_text("b x a\n1 2 3\n")
    assert list(column_lines(path, ("a", "b"), lambda a, b: (a, b))) == [(2, ("3", "1"))]
    for text in ("", "\n", "c b\n1 2\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.txt.*no column a"):
            list(column_lines(path, ("a", "b"), lambda a, b: (a, b)))


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf ID , Note,,\r\n1,"x\ny",,\r\n\r\n2,z,,\r\n')
    assert csv_columns(path, known=("id",)) == ["id", "Note", "", ""]
    assert [(number, row["id"], row["Note"]) for number, row in csv_rows(path, known=("id",))] == [
        (3, "1", "x\ny"),
        (5, "2", "z"),
    ]
    for content, message in (
        (b"a,a\n1,2\n", "line 1: the column 'a' is there more than once"),
        (b"a,b\n1,2\n1\n", "line 3 has 1 cell, the first line 2 columns"),
        (b"a,b\n" + b"x" * 200_000 + b",1\n", "line 2 cannot be read as CSV"),
        (b"a,b\n\xe9,1\n", "is no UTF-8 text"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.csv,? {message}"):
            list(csv_rows(path))


def test_stretches_of_a_recording():
    assert interval("0.5", 1) == (0.5, 1.0)
    for start, end in ((-0.1, 1), (1, 0.5), (0, "inf"), ("nan", 1), (0, 1e300), (None, 1), (0, 10**400), ([], 1)):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            interval(start, end)


def test_json_is_read_as_json_reads_it():
    assert parse_json('{"a": [1, 2.5, -0.0, true, null, "\\u00e9"]}') == {"a": [1, 2.5, 0.0, True, None, "é"]}
