"""`spidr-hf COMMAND`: every command by its name, with its own options, and none that was not decided on."""

import argparse
import importlib
import json
import os
import re
import socket
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
# What a command may use, and this package does not require.
OPTIONAL = (
    "gradio",
    "matplotlib",
    "rapidfuzz",
    "sklearn",
    "scipy",
    "jiwer",
    "tensorboard",
    "wandb",
    "trackio",
    "kenlm",
)
OPTIONAL += ("pyctcdecode", "peft", "s3prl", "fastabx", "spidr", "triton", "torchcodec", "torchaudio")
NAMES = sorted(name for names in COMMANDS.values() for name in names)


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    """Status, and all that was printed."""
    monkeypatch.setattr(sys, "argv", ["spidr-hf", *map(str, arguments)])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # else some start a process anew in place of this one
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


def arguments_of(command: str, **given: str) -> list[str]:
    """What a command must be given, none of which is there; by their names, what it is `given` besides, or instead."""
    arguments = []
    for action in parser_of(command)._actions:
        if action.dest not in given and not action.required:
            continue
        value = given.get(action.dest) or (
            next(iter(action.choices)) if action.choices else "2" if action.type is int else "nothing"
        )
        arguments += [*action.option_strings[-1:], *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]
    return arguments


def taking(*wanted: str) -> list[tuple[str, str]]:
    """Commands, and which of these arguments they have; but the one that runs where this package is not."""
    names = [name for name in NAMES if name != "reference-run"]
    return [(name, a.dest) for name in names for a in parser_of(name)._actions if a.dest in wanted and a.nargs != 0]


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


@pytest.mark.parametrize("name", NAMES)
def test_a_command_speaks_of_itself_by_this_name(monkeypatch, capsys, name):
    status, printed = run(monkeypatch, capsys, name, "--help")
    assert status == 0 and printed.startswith(f"usage: spidr-hf {name} ")


def test_a_command_that_starts_anew_is_what_was_started(monkeypatch):
    """Not `-m`, which finds the modules of the folder that one is in first."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(sys, "argv", ["spidr-hf", "pretrain", "--dry-run"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-P", "/venv/bin/spidr-hf", "pretrain", "--dry-run"])
    started = []

    def stop(path: str, arguments: list[str]) -> None:
        started.extend([path, *arguments])
        raise Stopped

    monkeypatch.setattr(os, "execv", stop)
    with pytest.raises(Stopped):
        main()
    assert started == [sys.executable, sys.executable, "-P", "/venv/bin/spidr-hf", "pretrain", "--dry-run"]
    assert os.environ.pop("OMP_WAIT_POLICY") == "PASSIVE"


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


@pytest.fixture
def nothing_optional(monkeypatch, tmp_path) -> Path:
    """A script whose first lines hide every package that is not among this one's requirements."""
    script = tmp_path / "bare.py"
    script.write_text(f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n")
    return script


@pytest.mark.slow
def test_help_needs_no_optional_package(nothing_optional):
    with nothing_optional.open("a") as file:
        file.write(
            "import importlib\nfrom spidr_hf.__main__ import module_of\n"
            f"for name in {NAMES}:\n"
            "    sys.argv = [name, '--help']\n"
            "    try:\n"
            "        importlib.import_module(module_of(name)).main()\n"
            "    except SystemExit as stop:\n"
            "        assert not stop.code, (name, stop.code)\n"
        )
    done = subprocess.run([sys.executable, nothing_optional], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.count("usage: ") == len(NAMES), done.stderr[-2000:]
    hidden = nothing_optional.read_text().partition("import importlib")[0]
    for script, arguments, status, said in (
        ("s3prl/run_downstream.py", ["--help"], 0, "All options are s3prl's"),
        ("s3prl/run_downstream.py", [], 1, "pip install s3prl"),
        ("demo.py", ["--help"], 0, "--fresh"),
        ("demo.py", [], 1, "pip install 'spidr_hf[train]'"),
    ):
        path = str(ROOT / "examples" / script)
        started = f"import runpy\nsys.argv[:1] = []\nrunpy.run_path({path!r}, run_name='__main__')\n"
        nothing_optional.write_text(hidden + started)
        command = [sys.executable, nothing_optional, path, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == status and said in done.stdout + done.stderr, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [name for name in NAMES if arguments_of(name)])
def test_what_is_not_there_is_said_in_one_line(monkeypatch, capsys, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    status, printed = run(monkeypatch, capsys, name, *arguments_of(name))
    line = printed.strip().splitlines()[-1]
    assert status in (1, 2) and "error: " in line and "Traceback" not in printed, printed
    assert not list(tmp_path.iterdir())


PLACES = taking("device", "port", "plot", "picture", "json", "scores", "out", "out_dir", "output", "output_dir")


@pytest.mark.parametrize(("name", "argument"), PLACES)
def test_a_place_that_cannot_be_used_is_told_first(monkeypatch, capsys, tmp_path, name, argument):
    """A device, a port, a file or folder to write: whatever else the command is given, which is not there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        value = {"device": "nowhere", "port": str(taken.getsockname()[1])}.get(argument, "file/under")
        status, printed = run(monkeypatch, capsys, name, *arguments_of(name, **{argument: value}))
    line = printed.strip().splitlines()[-1]
    assert status in (1, 2) and "error: " in line and value in line and "Traceback" not in printed, printed
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize(("name", "argument"), taking("plot", "picture"))
def test_a_picture_ends_as_pictures_do(monkeypatch, capsys, name, argument):
    status, printed = run(monkeypatch, capsys, name, *arguments_of(name, **{argument: "picture.doc"}))
    assert status == 2 and printed.endswith("picture.doc: a picture ends in .png, .pdf or .svg.\n")


@pytest.mark.parametrize("name", ["evaluate-units", "evaluate-abx"])
def test_a_card_that_is_not_there_is_told_first(monkeypatch, capsys, tmp_path, name):
    status, printed = run(monkeypatch, capsys, name, *arguments_of(name), "--card", tmp_path, "dev")
    assert status == 1 and "has no card" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "package", "install"),
    [
        ("plot-units a b c.png", "matplotlib", "'spidr_hf[eval]'"),
        ("evaluate-units a b", "rapidfuzz", "'spidr_hf[eval]'"),
        ("evaluate-units a b --assignment one-to-one", "scipy", "'spidr_hf[eval]'"),
        ("evaluate-abx a b --plot c.png", "matplotlib", "'spidr_hf[eval]'"),
        ("evaluate-abx a b --backend fastabx", "fastabx", "fastabx"),
        ("train-kmeans a b.safetensors --clusters 2", "sklearn", "'spidr_hf[eval]'"),
        ("benchmark --plot c.png", "matplotlib", "'spidr_hf[eval]'"),
        ("benchmark --peers spidr", "spidr", "spidr"),
        ("demo-app --model a", "gradio", "'spidr_hf[demo]'"),
        ("finetune-ctc a b c --valid d", "jiwer", "'spidr_hf[finetune]'"),
        ("finetune-classification a b c --valid d --task frame", "matplotlib", "'spidr_hf[finetune]'"),
        ("convert a b --verify", "spidr", "spidr"),
    ],
)
def test_a_missing_package_is_told_first(nothing_optional, arguments, package, install):
    """Before anything is read or computed, in one line that says what to install."""
    with nothing_optional.open("a") as file:
        file.write(f"sys.argv[1:] = {arguments.split()}\nfrom spidr_hf.__main__ import main\nmain()\n")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, nothing_optional], capture_output=True, text=True, cwd=ROOT, env=environment)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode in (1, 2) and "error: " in line and "Traceback" not in done.stderr, done.stderr
    assert not done.stdout and package in line and f"pip install {install}" in line


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "spidr_hf"], ["-m", "accelerate.commands.accelerate_cli", "launch", "-m"]])
def test_starts_as_a_module(start, tmp_path):
    """Training commands start once more, with threads that do not spin; their arguments arrive."""
    command = [sys.executable, *start, *(["spidr_hf"] if "launch" in start else []), "pretrain", "--config", "no.toml"]
    done = subprocess.run([*command, "--output-dir", tmp_path / "run"], capture_output=True, text=True)
    assert done.returncode == 1 and "error: no.toml: cannot be read" in done.stderr


if __name__ == "__main__":
    OPTIONS.write_text(json.dumps({name: options_of(name) for name in NAMES}, indent=1) + "\n")
