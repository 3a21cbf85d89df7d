"""Shared memory that is too small: told before the start, and when it happens all the same."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from mounts import inside, needs_mounts, on_small_disk
from runs import SCRIPT, rows, write_audio, write_config
from torch import Tensor
from torch.utils.data import Dataset

from spidr_hf.data.batches import make_loader, shared_memory
from spidr_hf.data.sections import DataSection
from spidr_hf.system.commands import clear_errors, training_command
from spidr_hf.system.errors import ConfigError
from spidr_hf.system.shared_memory import WorkerError, check_shared_memory, shared_bytes, shortage, worker_lost

ADVICE = ("--shm-size", "num_workers", "prefetch_factor")


class Waves(Dataset):
    """Batches with tensors; `before` is called first."""

    def __init__(self, before=lambda: None):
        self.before = before

    def __getitem__(self, index):
        self.before()
        return SimpleNamespace(input_values=torch.zeros(1000), number=index)


def loader(before=lambda: None, workers=1):
    return make_loader(Waves(before), range(20), DataSection(num_workers=workers, max_batch_length=1000))


@pytest.fixture
def small(monkeypatch):
    """64 MB of shared memory, as a container has them."""
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=16_000, f_frsize=4_000))


def test_how_much_it_takes(monkeypatch):
    assert shared_bytes(10, 2, 100) == 2100 and shared_bytes(10, 2, 100, processes=8) == 16_800
    assert shared_bytes(0, 2, 100) == 0
    data = DataSection(num_workers=3, prefetch_factor=2, max_batch_length=1000)
    assert shared_memory(data) == 7 * 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert shared_memory(data) == 2 * 7 * 4000


def test_too_little_at_the_start(small):
    assert shortage(64_000_000) is None
    assert shortage(64_000_001).startswith("batches on their way take 64 MB of shared memory, /dev/shm has 64 MB free")
    with pytest.raises(ConfigError) as caught:
        make_loader(Waves(), range(20), DataSection(num_workers=10, max_batch_length=3_800_000))
    assert all(word in str(caught.value) for word in ADVICE)
    make_loader(Waves(), range(20), DataSection(num_workers=0, max_batch_length=3_800_000))


def test_machines_without_such_a_limit(monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: (_ for _ in ()).throw(FileNotFoundError(path)))
    check_shared_memory(10**18)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"),
        RuntimeError("unable to write to file </torch_1_2_3>"),
        OSError(28, "No space left on device"),
    ],
)
def test_no_room_for_a_batch(monkeypatch, error):
    """Left to the queue's thread, the batch would never come."""

    def full(self):
        raise error

    monkeypatch.setattr(Tensor, "share_memory_", full)
    begun = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        next(iter(loader()))
    assert all(word in str(caught.value) for word in ADVICE) and time.monotonic() - begun < 20
    with pytest.raises(SystemExit) as stop, clear_errors():
        raise caught.value
    assert stop.value.code == f"error: {caught.value}"


def test_other_errors_in_workers_stay_what_they_are(monkeypatch):
    def broken():
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else") as caught:
        next(iter(loader(broken)))
    assert worker_lost(caught.value) is None


@pytest.mark.parametrize("ends", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(3)])
@pytest.mark.parametrize("command", [clear_errors, training_command])
def test_a_worker_that_the_system_killed(ends, command, monkeypatch):
    monkeypatch.setattr("spidr_hf.system.commands.die_with_launcher", lambda: None)
    with pytest.raises(SystemExit) as stop, command():
        list(loader(ends))
    line = stop.value.code
    assert line.startswith("error: a process that prepares batches ") and "num_workers" in line and "memory" in line
    assert "\n" not in line


def test_a_batch_comes_as_it_is():
    batches = list(loader(workers=2))
    assert [batch.number for batch in batches] == list(range(20))
    assert all(batch.input_values.is_shared() for batch in batches)
    assert not next(iter(loader(workers=0))).input_values.is_shared()


@pytest.mark.slow
@needs_mounts
def test_a_run_in_a_small_container(tmp_path):
    """Told at the start and in --dry-run; where something else fills it later, the run ends with one line."""
    config = write_config(tmp_path / "tiny.toml", write_audio(tmp_path / "audio"))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    def start(kilobytes: int, name: str, *options: str) -> subprocess.Popen:
        run = [sys.executable, str(SCRIPT), "--config", str(config), "--output-dir", str(tmp_path / name), *options]
        return subprocess.Popen(
            on_small_disk("/dev/shm", kilobytes, run),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    for options in (["--data.num_workers", "2"], ["--data.num_workers", "2", "--dry-run"]):
        process = start(128, "told", *options)
        printed = process.communicate(timeout=120)[0]
        line = printed.strip().splitlines()[-1]
        assert process.returncode == 1 and line.startswith("error: ") and all(word in line for word in ADVICE), printed
    process = start(400, "filled", "--data.num_workers", "2", "--optimizer.max_steps", "100000")
    deadline = time.time() + 120
    while not (tmp_path / "filled" / "metrics.jsonl").exists() or len(rows(tmp_path / "filled")) < 2:
        assert time.time() < deadline and process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    inside(process, "dd", "if=/dev/zero", "of=/dev/shm/filler")
    begun = time.monotonic()
    printed = process.communicate(timeout=90)[0]
    line = printed.strip().splitlines()[-1]
    assert process.returncode == 1 and line.startswith("error: there is no room for a batch"), printed
    assert all(word in line for word in ADVICE) and time.monotonic() - begun < 60
