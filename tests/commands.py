"""Runs the commands of `examples/` in this process, which spares every test the seconds of a new one."""

import importlib
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from unittest.mock import patch

_COUNTS = re.compile(r"(?<![\w.,:/=-])1 (?:[a-z]+-)?([a-z]{2,}(?<!s)s)\b|(?<!\w)0\.\d+ (?:h|hours|days)\b")
_NO_COUNTS = {"is", "as", "was", "has", "does"}  # after a number that is a name: "layer 1 has"


@dataclass
class Finished:
    """How a command ended: exit status and what it printed; an error message given to `sys.exit` is in `err`."""

    status: int
    out: str
    err: str


def run_command(name: str, *arguments: object) -> Finished:
    """Run `examples/NAME.py ARGUMENTS`."""
    out, err, status = StringIO(), StringIO(), 0
    with patch.object(sys, "argv", [f"{name}.py", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            importlib.import_module(f"spidr_hf.examples.{name.replace('/', '.')}").main()
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=err)
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    check_counts(out.getvalue() + err.getvalue())
    return Finished(status, out.getvalue(), err.getvalue())


def check_counts(printed: str) -> None:
    """Asserts that of one thing nothing says several, and that no length is a small share of its unit."""
    wrong = [found[0] for found in _COUNTS.finditer(printed) if found[1] not in _NO_COUNTS]
    assert not wrong, (wrong, printed)


def fails(finished: Finished, *words: str) -> None:
    """Asserts a non-zero exit with one line of error that holds the words."""
    assert finished.status != 0
    line = finished.err.strip().splitlines()[-1]
    assert line.startswith("error: ") or ": error: " in line, finished.err
    for word in words:
        assert word in line, line
    assert "Traceback" not in finished.err
