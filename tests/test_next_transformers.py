"""The release of transformers after the pinned one: its own suites and the adapters, in an environment of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
NEXT = "5.24.0"
TESTS = Path(__file__).parent


def test_its_suites_pass(tmp_path):
    def run(*command: str) -> subprocess.CompletedProcess:
        # Found before the pinned one, beside whose dependencies it runs.
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(
            [sys.executable, *command], cwd=TESTS.parent, env=environment, capture_output=True, text=True
        )

    target = ("--target", str(tmp_path), f"transformers=={NEXT}")
    if run("-m", "pip", "install", "--quiet", "--no-deps", *target).returncode:
        pytest.skip(f"transformers {NEXT} cannot be installed here (no network, or no pip)")
    assert run("-c", "import transformers; print(transformers.__version__)").stdout.strip() == NEXT
    fetched = run(str(TESTS / "fetch_transformers_tests.py"))
    suites = [str(TESTS / name) for name in ("test_common_suite.py", "test_peft.py")]
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *suites)
    assert done.returncode == 0 and not fetched.stderr, f"{fetched.stderr}\n{done.stdout[-5000:]}"
