"""What the commands that train set for their process, and that they leave alone what is set."""

import os
import subprocess
import sys

import pytest

from spidr_hf.system.allocation import memory_of_machine

CODE = """
import os
from spidr_hf.system import allocation
if {memory}: allocation.memory_of_machine = lambda: {memory} << 30
allocation.prepare_training_process()
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


@pytest.mark.parametrize(
    ("given", "memory", "processes", "number"),
    [
        (None, 128, 1, 8192),
        (None, 16, 1, (16 << 30) // 8 // 700_000),  # an eighth of the memory for all of them
        (None, 16, 2, (16 << 30) // 16 // 700_000),
        (None, 1, 1, 1024),  # what oneDNN has by itself
        ("7", 0, 1, 7),
    ],
)
def test_primitives_are_kept_as_far_as_there_is_memory(monkeypatch, given, memory, processes, number):
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if given:
        monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
    done = subprocess.run([sys.executable, "-c", CODE.format(memory=memory)], capture_output=True, text=True)
    assert done.stdout.split() == [str(number)], done.stderr


def test_memory_of_the_machine():
    assert 1 << 28 < memory_of_machine() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
