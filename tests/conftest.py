"""Tests run offline, in one thread per process, and leave nothing behind outside temporary folders."""

import importlib.metadata
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Set before torch and transformers are imported, here and in the processes that tests start.
_HOME = tempfile.mkdtemp(prefix="spidr_hf-tests-")
if not any(Path(name).exists() for name in ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/kfd")):
    os.environ["TRITON_INTERPRET"] = "1"  # without a GPU, Triton's kernels run in its interpreter
os.environ |= {
    "HF_HOME": _HOME,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "Agg",
    "MPLCONFIGDIR": str(Path(_HOME, "matplotlib")),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging as transformers_logging  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def pytest_sessionfinish() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins on this machine may be reached, nothing else: a test that needs the network fails at once."""
    connect = socket.socket.connect

    def local_connect(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise ConnectionError(f"tests must not use the network, but something connects to {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_connect)


@pytest.fixture(scope="session")
def speech() -> Path:
    """The folder with `small.tar`, `manifest.csv` and `alignments.jsonl`: real speech for tests."""
    return ROOT / "examples" / "data"


@pytest.fixture(autouse=True)
def _transformers_speaks() -> None:
    """Commands that run inside a test, or in a fixture, silence transformers; every test may look at its messages."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond 60 kB, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def new_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is warned about once per process is warned about anew."""
    monkeypatch.setattr("spidr_hf.system.messages.WARNED", set())


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is found by PYTHONPATH alone, as on clusters and in containers: pip knows nothing of it."""
    distribution = importlib.metadata.distribution

    def found(name: str) -> importlib.metadata.Distribution:
        if name.replace("-", "_") == "spidr_hf":
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(importlib.metadata, "distribution", found)
