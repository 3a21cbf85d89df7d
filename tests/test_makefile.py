"""The first minute: Makefile, constraints and the run of continuous integration say what a newcomer needs to hear."""

import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def test_every_direct_dependency_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    requirements = [Requirement(line) for line in asked if not line.startswith("spidr_hf")]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    for requirement in requirements:
        if requirement.name == "triton":
            continue  # torch for CUDA brings the version it was built with
        assert requirement.name in pins, f"{requirement.name} is not in constraints.txt"
        assert pins[requirement.name] in requirement.specifier
        assert version(requirement.name)  # `make test` installs the extra `dev`, which has all of them


@needs_make
def test_make_alone_lists_the_targets():
    text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-all", "lint", "docs", "benchmark", "setup"):
        assert re.search(rf"^  make {target} ", text, re.M)


@needs_make
def test_without_a_python_make_says_what_to_do(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("make", "sh", "grep", "cat", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "python3").write_text("#!/bin/sh\nexit 1\n")  # one that is too old
    (tools / "python3").chmod(0o755)
    result = subprocess.run(
        [tools / "make", "test"], cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "No Python >= 3.11 with its venv module found" in result.stderr
    assert "make PYTHON=/path/to/python3" in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_continuous_integration_ends_with_the_summary(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "bin").mkdir()
    for tool, script in {
        "make": 'echo "F."; echo "1 failed, 1 passed in 0.51s"; echo "make: Error 1" >&2; exit 2',
        "git": "exit 0",
        "python3": "exit 0",
        "apt-get": 'echo "nothing is missing, nothing may be installed"; exit 1',
    }.items():
        (tmp_path / "bin" / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    path = f"{tmp_path / 'bin'}:{Path(shutil.which('bash')).parent}:/usr/bin:/bin"
    result = subprocess.run([tmp_path / ".ci" / "run"], env={"PATH": path}, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout.splitlines()[-1] == "1 failed, 1 passed in 0.51s"
    assert "nothing may be installed" not in result.stdout
