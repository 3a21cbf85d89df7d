"""What the commands that train set for their process, and that they leave alone what is set."""

import subprocess
import sys

import pytest

CODE = """
import os
from spidr_hf.system.allocation import prepare_training_process
prepare_training_process()
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


@pytest.mark.parametrize("given", [None, "7"])
def test_primitives_are_kept(monkeypatch, given):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    if given:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.split() == [given or "8192"], done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_freed_memory_is_kept():
    """A block of 16 MiB that was freed comes back without the system having to make its pages anew."""
    code = """
import resource, torch
from spidr_hf.system.allocation import keep_freed_memory
if not keep_freed_memory():
    raise SystemExit("no glibc")
for _ in range(20):  # until the heap has places for them
    torch.ones(4 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(4 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "no glibc" in done.stderr:
        pytest.skip("the C library is not glibc")
    assert int(done.stdout) < 1000, done.stderr
