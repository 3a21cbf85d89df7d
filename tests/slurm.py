"""A real SLURM on this machine for tests: munge, a controller and two nodes, with keys and ports of their own."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from spidr_hf.system.processes import die_with_parent

PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=60
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=8 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=8 RealMemory=1000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP
"""


def why_not() -> str | None:
    """Why there can be no SLURM here, or None."""
    if missing := [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]:
        return f"needs SLURM and munge (no {missing[0]}; Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "needs root, to start SLURM's daemons"


@dataclass
class Slurm:
    """A running SLURM.

    Attributes:
        folder: its files and logs.
        environment: what its commands need in theirs.
    """

    folder: Path
    environment: dict[str, str]

    def __call__(self, *command: str) -> str:
        """Output of a command; raises `CalledProcessError`."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise AssertionError(f"{command}: {done.stdout}{done.stderr}")
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(word.split("=", 1) for word in self("scontrol", "-o", "show", "job", number).split() if "=" in word)

    def wait(self, number: str, states: set[str], seconds: float) -> dict[str, str]:
        """The job once it is in one of the states."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {number} is not {states} after {seconds:.0f} s but {job}\n{self.logs()}")
            time.sleep(0.5)
        return job

    def logs(self) -> str:
        """The end of every log."""
        return "\n".join(f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def running() -> Iterator[Slurm]:
    """SLURM for as long as the block lasts."""
    # Everybody may enter, as munge demands of its socket's folder.
    folder = Path(tempfile.mkdtemp(prefix="spidr_hf-slurm-"))
    folder.chmod(0o755)
    daemons: list[subprocess.Popen] = []
    slurm = Slurm(folder, {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        (folder / "state").mkdir()
        names = ("controller", "first", "second")
        ports = dict(zip(names, _free_ports(len(names)), strict=True))
        (folder / "slurm.conf").write_text(_CONF.format(folder=folder, host=socket.gethostname(), **ports))
        slurm("mungekey", "--create", f"--keyfile={folder}/munge.key")
        files = {name: folder / f"munge.{name}" for name in ("key", "socket", "pid", "seed", "log")}
        options = [f"--{name}-file={files[name]}" for name in ("key", "pid", "seed", "log")]
        _start(slurm, daemons, "munged", "--foreground", "--force", *options, f"--socket={files['socket']}")
        _until(files["socket"].exists, slurm)
        _start(slurm, daemons, "slurmctld", "-D")
        for node in ("n1", "n2"):
            _start(slurm, daemons, "slurmd", "-D", "-N", node)
        _until(lambda: _answer(slurm, "sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], slurm)
        yield slurm
    finally:
        if len(daemons) > 1:
            subprocess.run(["scancel", "--full", "--user=root"], env=slurm.environment, capture_output=True, timeout=30)
            _until(lambda: not _answer(slurm, "squeue", "-h").strip(), slurm, fails=False)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start(slurm: Slurm, daemons: list[subprocess.Popen], *command: str) -> None:
    with open(slurm.folder / f"{command[0]}.log", "ab") as log:
        daemons.append(
            subprocess.Popen(
                command,
                env=slurm.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(signal.SIGTERM),  # also where the tests are killed
            )
        )


def _answer(slurm: Slurm, *command: str) -> str:
    return subprocess.run(command, env=slurm.environment, capture_output=True, text=True, timeout=60).stdout


def _until(true, slurm: Slurm, seconds: float = 60, fails: bool = True) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            if fails:
                raise AssertionError(f"SLURM does not start:\n{slurm.logs()}")
            return
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
