"""Whatever a name from a file holds, a message shows it on one printable line of bounded length."""

from pathlib import Path

import pytest

from spidr_hf.system.messages import counted, duration, one_line, shown


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


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (counted(1, "update"), "1 update"),
        (counted(0, "update"), "0 updates"),
        (counted(2, "batch"), "2 batches"),
        (counted(3, "epoch"), "3 epochs"),
        (counted(1, "process"), "1 process"),
        (counted(1, "utterance", "has", "have", of=7), "1 of 7 utterances has"),
        (counted(0, "file", "is", "are", of=1), "0 of 1 file are"),
        (duration(0.4), "0.40 s"),
        (duration(2.1), "2.1 s"),
        (duration(36), "36 s"),
        (duration(119.4), "119 s"),
        (duration(229), "3.8 min"),
        (duration(1200), "20 min"),
        (duration(7200), "2.0 h"),
        (duration(960.98 * 3600), "961 h"),
        (duration(80 * 3600, days=True), "3.3 days"),
    ],
)
def test_counts_and_lengths(said: str, text: str) -> None:
    assert said == text
