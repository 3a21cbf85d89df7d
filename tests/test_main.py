"""`spidr-hf COMMAND`: every command by its name, with its own options, and none that was not decided on."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from commands import check_counts
from tiny import tiny_config, tiny_model

from spidr_hf import SpidrForCTC, __version__
from spidr_hf.__main__ import COMMANDS, main, module_of, overview, summary
from spidr_hf.conversion.sources import published

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ROOT / "tests" / "fixtures" / "options.json"
NAMES = sorted(name for names in COMMANDS.values() for name in names)


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Status, and all that was printed."""
    monkeypatch.setattr(sys, "argv", ["spidr-hf", *map(str, arguments)])
    status: object = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    printed = "".join(capsys.readouterr())
    check_counts(printed)
    return (status or 0, printed) if not isinstance(status, str) else (1, printed + status)


class Stopped(Exception):
    """A parser was about to read its arguments."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """A command's parser, as it is when it begins to read its arguments."""
    parsers = []

    def stop(parser: argparse.ArgumentParser, *_: object) -> None:
        parsers.append(parser)
        raise Stopped

    with (
        patch.object(sys, "argv", ["command"]),
        patch.object(argparse.ArgumentParser, "parse_args", stop),
        patch.object(argparse.ArgumentParser, "parse_known_args", stop),
        pytest.raises(Stopped),
    ):
        importlib.import_module(module_of(command)).main()
    return parsers[0]


def options_of(command: str) -> list[str]:
    """The options that a command's parser has."""
    usage = parser_of(command).format_usage()
    return sorted(set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", usage)) - {"-h", "--help"})


def test_every_command_has_a_name():
    files = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "demo"}  # make demo
    named = {name.replace("-", "_") for name in NAMES} - {"convert", "export", "submit"}
    assert named == files
    for name in NAMES:
        assert summary(name) in overview() and len(summary(name)) > 20, name


@pytest.mark.parametrize("name", NAMES)
def test_options_are_those_decided_on(name):
    """A new option is a decision: it goes into the file with `python tests/test_main.py`, and into the documents."""
    assert options_of(name) == json.loads(OPTIONS.read_text())[name]


@pytest.mark.parametrize("name", NAMES)
def test_help_says_every_default(name):
    parser = parser_of(name)
    for action in parser._actions:
        if not action.option_strings or action.nargs == 0 or action.required:
            continue
        text = " ".join(parser._get_formatter()._expand_help(action).split())
        assert text.count("default:") == 1 and f"({action.default})" not in text, (action.option_strings, text)


def test_lists_hints_and_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys) == (0, overview() + "\n") == run(monkeypatch, capsys, "--help")
    assert run(monkeypatch, capsys, "--version") == (0, __version__ + "\n")
    status, printed = run(monkeypatch, capsys, "extract-unit")
    assert status == 1 and printed == "error: there is no command 'extract-unit'. Did you mean extract-units?"
    assert "alone lists them" in run(monkeypatch, capsys, "zzz")[1]


def test_a_command_speaks_of_itself_by_this_name(monkeypatch, capsys):
    status, printed = run(monkeypatch, capsys, "compare-runs")
    assert status == 2 and "usage: spidr-hf compare-runs" in printed


def test_info(monkeypatch, capsys, tmp_path):
    for name, card in published().items():
        status, printed = run(monkeypatch, capsys, "info", name, "--json")
        facts = json.loads(printed)
        assert status == 0 and facts["licence"] == card["license"]["id"] and facts["codebook_layers"][-1] == 12
    tiny_model().save_pretrained(tmp_path / "model")
    status, printed = run(monkeypatch, capsys, "info", tmp_path / "model")
    assert status == 0 and "layers 2 to 4, 24 codewords" in printed and "not stated" in printed
    SpidrForCTC(tiny_config(vocab_size=5)).save_pretrained(tmp_path / "ctc")
    assert re.search(r"codebooks +none", run(monkeypatch, capsys, "info", tmp_path / "ctc")[1])
    status, printed = run(monkeypatch, capsys, "info", tmp_path)
    assert status == 1 and printed.startswith("error: ") and "no model folder" in printed


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "spidr_hf"], ["-m", "accelerate.commands.accelerate_cli", "launch", "-m"]])
def test_starts_as_a_module(start, tmp_path):
    """Training commands start once more, with threads that do not spin; their arguments arrive."""
    command = [sys.executable, *start, *(["spidr_hf"] if "launch" in start else []), "pretrain", "--config", "no.toml"]
    done = subprocess.run([*command, "--output-dir", tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 1 and "error: no.toml: cannot be read" in done.stderr


if __name__ == "__main__":
    OPTIONS.write_text(json.dumps({name: options_of(name) for name in NAMES}, indent=1) + "\n")
