"""Pretraining on two machines: two network namespaces with addresses of their own, joined by a cable."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
from runs import SCRIPT, assert_same_run, children, finish, launch, rows
from small_run import write_run

from spidr_hf.system.processes import contact_lost

MULTI_NODE = SCRIPT.parent / "accelerate" / "multi_node.yaml"
OPTIONS = ["--optimizer.max_steps", "60", "--run.save_interval", "7", "--data.num_workers", "1"]
# How long the others may take to notice. (A machine that vanishes without a word is another matter: minutes.)
PATIENCE = 120


@dataclass
class Machine:
    """A network namespace.

    Attributes:
        name, cable, address: of the namespace, of its network interface, of both.
    """

    name: str
    cable: str
    address: str

    def start(self, rank: int, first: "Machine", *arguments: object) -> subprocess.Popen:
        """`accelerate launch` of one process on this machine."""
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            # Both have this machine's host name: without being told, gloo would take what it resolves to.
            "GLOO_SOCKET_IFNAME": self.cable,
        }
        command = [
            "ip",
            "netns",
            "exec",
            self.name,
            sys.executable,
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
        ]
        command += ["--config_file", MULTI_NODE, "--num_machines", 2, "--num_processes", 2, "--machine_rank", rank]
        command += ["--main_process_ip", first.address, SCRIPT, *arguments]
        return subprocess.Popen(
            [str(word) for word in command],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    number = os.getpid()
    first, second = (Machine(f"spidr{rank}-{number}", f"sp{rank}-{number}", f"10.213.47.{rank}") for rank in (1, 2))
    try:
        made = [ip("netns", "add", machine.name) for machine in (first, second)]
        made.append(ip("link", "add", first.cable, "netns", first.name, "type", "veth", "peer", second.cable, "netns",
                       second.name))  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs `ip` (Debian: apt-get install iproute2)")
    try:
        if failed := [done.stderr.strip() for done in made if done.returncode]:
            pytest.skip(f"no network namespaces here: {failed[0]}")
        for machine in (first, second):
            for words in (
                ("address", "add", f"{machine.address}/24", "dev", machine.cable),
                ("link", "set", machine.cable, "up"),
                ("link", "set", "lo", "up"),
            ):
                done = ip("-n", machine.name, *words)
                assert done.returncode == 0, done.stderr
        yield first, second
    finally:
        for machine in (first, second):
            ip("netns", "delete", machine.name)


def start(machines: tuple[Machine, Machine], *arguments: object) -> list[subprocess.Popen]:
    return [machine.start(rank, machines[0], *arguments) for rank, machine in enumerate(machines)]


def wait_for_rows(processes: list[subprocess.Popen], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < count:
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            raise AssertionError("\n---\n".join(process.communicate()[0] for process in processes))
        time.sleep(0.02)


def test_which_errors_mean_that_contact_is_lost():
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.2]:4\nGLHF!"
    for error in (RuntimeError(gloo), dist.DistNetworkError("reset by\npeer"), dist.DistBackendError("NCCL error")):
        message = contact_lost(error)
        assert message.startswith("contact with the other processes is lost (") and "\n" not in message
        assert "The same command resumes from the newest checkpoint." in message
    assert contact_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None


@pytest.mark.slow
def test_an_error_does_not_wait_for_workers_that_ignore_sigterm():
    code = (
        "import multiprocessing, signal, time\n"
        "from spidr_hf.system.processes import kill_workers_at_exit\n"
        "def decode(started):\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    started.set()\n"
        "    time.sleep(600)\n"
        "kill_workers_at_exit()\n"
        "started = multiprocessing.get_context('fork').Event()\n"
        "multiprocessing.get_context('fork').Process(target=decode, args=[started], daemon=True).start()\n"
        "started.wait()\n"
        "raise RuntimeError('an error')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "RuntimeError: an error" in done.stderr


@pytest.mark.slow
def test_two_machines(machines, tmp_path):
    """One process of either machine is killed, then a whole machine: both end soon and say why, and the next start goes
    on as if nothing had happened."""
    config, folder = write_run(tmp_path / "files"), tmp_path / "killed"
    arguments = ["--config", config, "--output-dir", folder, *OPTIONS]
    finish(launch(config, tmp_path / "whole", *OPTIONS, processes=2))
    for rank, whole_machine, count in ((1, False, 10), (0, False, 20), (1, True, 30)):
        processes = start(machines, *arguments)
        wait_for_rows(processes, folder, count)
        victims = [*children(processes[rank]), *([processes[rank].pid] if whole_machine else [])]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        printed = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        assert all(process.returncode for process in processes), printed
        # The launcher of the process that was killed names the signal; the other machine's process has lost contact.
        assert whole_machine or "SIGKILL" in printed[rank]
        assert "error: contact with the other processes is lost (" in printed[1 - rank], printed[1 - rank]
        assert "The same command resumes from the newest checkpoint." in printed[1 - rank]
    assert len(rows(folder)) < 60
    processes = start(machines, *arguments)
    for process in processes:
        finish(process)
    assert {row["world_size"] for row in rows(folder)} == {2}
    assert_same_run(folder, tmp_path / "whole")
