"""Whatever a name from a file holds, a message shows it on one printable line of bounded length."""

from pathlib import Path

import pytest

from spidr_hf.system.messages import one_line, shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("student.layers.0.weight", "student.layers.0.weight"),
        ("Übung 日本語.wav", "Übung 日本語.wav"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("next\x85line\u2028and\u202eback", r"next\x85line\u2028and\u202eback"),
        (b"latin-\xe9".decode(errors="surrogateescape"), r"latin-\udce9"),
        (Path("a\nb"), r"a\nb"),
        (3, "3"),
        (None, "None"),
        (["x\n", 1.5], r"['x\\n', 1.5]".replace("\\\\", "\\")),
    ],
)
def test_names_are_printable(value, text: str) -> None:
    assert shown(value) == text
    assert shown(value).isprintable()


@pytest.mark.parametrize("character", ["a", "\x1b", "\n", "\udce9"])
def test_names_are_bounded(character: str) -> None:
    name = shown("start" + character * 10_000_000 + "end")
    assert len(name) < 300 and name.startswith("start") and name.endswith("end")
    assert len(shown("a" * 50, longest=20)) < 60


def test_values_are_bounded_however_they_are_built() -> None:
    shared: list = []
    for _ in range(60):
        shared = [shared, shared]
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for value in (shared, deep, list(range(10**6)), {str(i): i for i in range(1000)}, 10**100_000, "x" * 10**6):
        assert len(shown(value)) < 300
        assert shown(value).isprintable()


def test_whole_messages() -> None:
    assert one_line("one\n  two  three\r\n") == "one two  three"
    assert one_line(ValueError("a\x1b[0m")) == r"a\x1b[0m"
    assert len(one_line("word " * 10**6)) < 2100
