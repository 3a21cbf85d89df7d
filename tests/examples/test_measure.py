"""examples/benchmark_results/measure.sh: what is typed on a GPU that is there for half an hour."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from commands import run_command

from spidr_hf.pretraining.config import load_config

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "benchmark_results" / "measure.sh"


def measure(*arguments: str, **environment: object) -> subprocess.CompletedProcess:
    environment = {name: str(value) for name, value in environment.items()}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_its_commands_can_be_typed():
    """Files are there, and options and what they may be are as the commands' help says."""
    lines = measure("h100", DRY=1).stdout.splitlines()
    assert len(lines) == 16 and len({line.partition(":")[0] for line in lines}) == 12
    for line in lines:
        name, _, command = line.partition(": ")
        words = command.replace("-m slow or not slow", "").split()
        assert words[0] == "python"
        if words[1] == "-m":
            assert all((ROOT / file).is_file() for file in words[3:])
            continue
        if name == "curves":
            fields = dict(pairwise(words))
            changes = [word for word in words if word.startswith("--") and "." in word]
            load_config(
                ROOT / "examples/configs/demo.toml", [x for change in changes for x in (change, fields[change])]
            )
            words = [word for word in words if word not in changes]
        else:
            assert words[-2:] == ["--json", f"examples/benchmark_results/h100-{name}.json"]
        done = run_command(Path(words[1]).stem, *words[2:], "--help")  # which looks at all that stands before it
        assert done.status == 0, done.err
        options = [word for word in words if word.startswith("--")]
        assert all(re.search(rf"(?<![\w-]){option}(?![\w-])", done.out) for option in options), line


def test_parts_are_chosen_and_one_that_fails_or_takes_too_long_keeps_no_other(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path / 'log')!r}).open('a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "time.sleep(60 * ('--new-lengths' in sys.argv))\n"
        "sys.exit('--frozen' in sys.argv)\n"
    )
    python.chmod(0o755)
    parts = ("step", "lengths", "frozen", "compile-warm")
    done = measure("x", *parts, PYTHON=python, SECONDS_EACH=2, RESULTS=tmp_path)
    called = [shlex.split(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [call[-1] for call in called] == [
        f"{tmp_path}/x-{n}.json" for n in ("step", "frozen", "lengths", "compile-warm")
    ]
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "== not done: frozen lengths"


@pytest.mark.parametrize("arguments", [(), ("h100", "nothing")])
def test_what_is_no_part_is_told(arguments):
    done = measure(*arguments, DRY=1)
    assert done.returncode and not done.stdout and ("name of the chip" in done.stderr or "parity step" in done.stderr)
