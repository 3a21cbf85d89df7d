"""`examples/slurm/` on a real SLURM: a controller and two nodes on this machine, CPUs only."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
from commands import fails, run_command
from runs import SCRIPT, assert_same_run, finish, launch, rows
from small_run import slow_down, write_run

from spidr_hf.training.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parents[2] / "examples" / "slurm"
STEPS = 300
# In seconds: each of these waits takes a fraction of it, unless the machine has much else to do.
PATIENCE = 600
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


def submit(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, FOLDER / "submit.py", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, **options)


# ---- what is submitted


def stand_in(folder: Path, name: str, line: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{line}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("given", "cores"),
    [({}, 1), ({"SLURM_CPUS_ON_NODE": "96"}, 96), ({"SLURM_CPUS_ON_NODE": "96", "SLURM_CPUS_PER_TASK": "24"}, 24)],
)
@pytest.mark.parametrize("nvml", [True, False])
def test_the_cores_and_sockets_of_training_processes(tmp_path, given, cores, nvml):
    """All cores of the job on the node, however it has them, and each process beside its GPU where that is known."""
    stand_in(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo n1; else echo " NodeAddr=n1"; fi')
    launch = 'while [ "$1" != bash ]; do shift; done; exec "$@"'
    stand_in(tmp_path, "srun", f'echo "srun $@, by GPU: ${{SLURM_CPUS_PER_GPU:-no}}"; {launch}')
    stand_in(tmp_path, "python", f'if [ "$1" = -c ]; then exit {int(not nvml)}; else echo "python $@"; fi')
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SPIDR_HF": str(FOLDER.parents[1]), "PYTHON": "python"}
    job = {"SLURM_JOB_ID": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "n1"}
    job |= {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_GPU": "12", **given}
    done = subprocess.run(
        ["bash", FOLDER / "pretrain.sbatch", "--config", "x"], env=environment | job, capture_output=True, text=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"--cpus-per-task={cores} " in done.stdout and "by GPU: no" in done.stdout
    assert ("--enable_cpu_affinity" in done.stdout.split("python ")[-1]) == nvml


def test_a_job_per_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = [write_run(tmp_path / name).rename(tmp_path / f"{name}.toml") for name in ("a", "b")]
    options = ["-A", "me", "-N", "2", "-G", "4", "-c", "6", "-t", "20:00:00", "-C", "h100", "-q", "high", "-p", "gpu"]
    options += ["--mem-per-gpu", "60G", "--optimizer.lr", "1e-3"]
    done = run_command("slurm/submit", *configs, *options, "--dry-run")
    assert done.status == 0, done.err
    first, where, second, _ = done.out.splitlines()
    for option in (
        "--account=me", "--nodes=2", "--gpus-per-node=4", "--cpus-per-task=24", "--time=20:00:00", "--constraint=h100",
        "--qos=high", "--partition=gpu", "--mem-per-gpu=60G", "--job-name=a", "--output=runs/a/slurm-%j.out",
        f"PYTHON={sys.executable}", "--output-dir runs/a --optimizer.lr 1e-3",
    ):  # fmt: skip
        assert option in first
    assert where == f"{configs[0]}: job JOB, runs/a" and "--output-dir runs/b" in second
    assert not (tmp_path / "runs").exists()


def test_where_runs_go_and_a_job_for_validation(tmp_path):
    table = {"partition": "short", "cpus_per_task": 3, "gpus-per-node": False, "exclusive": True}
    config = write_run(tmp_path / "a", run={"workdir": "mine", "slurm_validation": table})
    base = ["slurm/submit", config, "-A", "me", "-N", "1", "-p", "gpu", "--dry-run"]
    _, _, validation, _ = run_command(*base, "-G", "8").out.splitlines()
    for part in (
        "TRAINING_JOB=JOB", "--account=me", "--dependency=after:JOB", "--partition=short", "--cpus-per-task=3",
        "--exclusive", "--output=mine/small/slurm-%j.out", "validate.sbatch --run-dir mine/small",
    ):  # fmt: skip
        assert part in validation
    assert "gpus" not in validation and "nodes" not in validation
    assert f"{config}: job JOB, else/small" in run_command(*base, "-G", "8", "--output-root", "else").out
    assert "gpus" not in run_command(*base, "-G", "0").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer.lrr", "1"], "Unknown field `optimizer.lrr`"),
        (["-N", "0"], "--nodes and --cpus must be at least 1"),
        (["-G", "0", "--mem-per-gpu", "60G"], "--mem-per-gpu needs GPUs"),
        ([], "There is no `sbatch` here"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = run_command("slurm/submit", write_run(tmp_path / "a"), "-A", "me", "-N", "1", "-G", "1", *options)
    fails(done, message)
    assert not done.out


def test_two_configs_with_one_name(tmp_path):
    configs = [write_run(tmp_path / name) for name in ("a", "b")]
    done = run_command("slurm/submit", *configs, "-A", "me", "-N", "1", "-G", "1", "--dry-run")
    fails(done, "Two configs have the same run folder (runs/small): rename one")


# ---- and what comes of it


@pytest.fixture(scope="module")
def cluster():
    if reason := slurm.why_not():
        pytest.skip(reason)
    with slurm.running() as running:
        yield running


def log(folder: Path) -> str:
    return "\n".join(f"--- {path}\n{path.read_text()}" for path in sorted(folder.glob("slurm-*.out")))


def wait_for_rows(folder: Path, count: int, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not (folder / "metrics.jsonl").exists() or len(rows(folder)) < count:
        assert time.monotonic() < deadline, log(folder)
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_through_cancellation_and_time_limit(cluster, tmp_path):
    """Two nodes. Cancelled it saves; submitted again it resumes; before the time limit it saves and goes back into the
    queue; the same job then ends the run, with the losses of one never interrupted."""
    config = write_run(tmp_path / "files", run={"save_interval": 1000, "keep_latest": 2})
    longer = ["--optimizer.max_steps", str(STEPS)]
    finish(launch(config, tmp_path / "whole", *longer, processes=2))

    # On its first start a job is slow, so that it must be interrupted.
    slow = slow_down(tmp_path / "slow", 0.3, "not os.environ.get('SLURM_RESTART_COUNT')")
    command = [config, "-A", "test", "-N", "2", "-G", "0", "-c", "1", "--output-root", tmp_path, *longer]
    environment = {**cluster.environment, **slow}
    run = tmp_path / "small"

    done = submit(*command, "-t", "10", env=environment)
    assert done.returncode == 0, done.stderr
    number = done.stdout.split("job ")[1].split(",")[0]
    assert done.stdout == f"{config}: job {number}, {run}\n"
    wait_for_rows(run, 10)
    cluster("scancel", number)
    cluster.wait(number, {"CANCELLED"}, PATIENCE)
    (cancelled_at,) = Checkpoints(run / "checkpoints").steps()
    assert 10 <= cancelled_at == len(rows(run)) and "SIGTERM: saved step" in log(run)

    # SLURM looks at time limits twice a minute and counts half a minute as nothing: the signal comes after 30 to 60 s.
    done = submit(*command, "-t", "5", env={**environment, "SBATCH_SIGNAL": "B:USR1@240"})
    number = done.stdout.split("job ")[1].split(",")[0]
    deadline = time.monotonic() + PATIENCE
    while cluster.job(number)["Restarts"] == "0":
        assert time.monotonic() < deadline and cluster.job(number)["JobState"] not in OVER, log(run)
        time.sleep(0.5)
    cluster("scontrol", "update", f"JobId={number}", "TimeLimit=30")  # however slow this machine is, it ends this time
    job = cluster.wait(number, OVER, 2 * PATIENCE)
    printed = log(run)
    assert job["JobState"] == "COMPLETED" and int(job["Restarts"]) >= 1, printed
    assert f"Continuing from {run}/checkpoints/step_{cancelled_at}." in printed
    assert "SIGUSR1: saved step" in printed and "the time limit is near: back into the queue" in printed
    assert f"job {number}: start 2, 2 x 1 processes that meet at 127.0.0.1:" in printed
    assert f"job {number}: ended with status 0" in printed
    assert {row["world_size"] for row in rows(run)} == {2}
    assert_same_run(run, tmp_path / "whole")


# In place of Python in the jobs: it prints its arguments. Training fails at once, or continues until it is told to stop
# and is soon done when started again. Validation watches for longer than any test lasts.
STAND_IN = f"""#!/bin/bash
case "$*" in
  *validate.py*--watch*) exec sleep 600 ;;
  *validate.py*) echo "validated: $*" ;;
  *bad.toml*) echo "error: bad"; exit 1 ;;
  *) exec {sys.executable} -S -c "
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit('saved by ' + os.environ['SLURMD_NODENAME']))
print('training:', *sys.argv[1:], flush=True)
time.sleep(1 if 'SLURM_RESTART_COUNT' in os.environ else 600)
" "$@" ;;
esac
"""


@pytest.mark.slow
def test_what_the_jobs_do_around_training(cluster, tmp_path):
    """Requeue after the signal, not after a failure; validation ends with the training job; who starts what where."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    environment = {"PYTHON": str(tmp_path / "python"), "SPIDR_HF": str(FOLDER.parent.parent)}

    def sbatch(name: str, *arguments: str, **variables: str) -> str:
        command = ["sbatch", "--parsable", f"--output={tmp_path / name}.out", "--time=5", *arguments]
        environs = {**cluster.environment, **environment, **variables}
        return slurm.Slurm(cluster.folder, environs)(*command).strip()

    training, validation = str(FOLDER / "pretrain.sbatch"), str(FOLDER / "validate.sbatch")
    bad = sbatch("bad", "-N2", training, "--config", "bad.toml")
    good = sbatch("good", "-N2", training, "--config", "good.toml", SBATCH_SIGNAL="B:USR1@240")
    watching = sbatch("watching", "-N1", f"--dependency=after:{good}", validation, "--run-dir", "x", TRAINING_JOB=good,
                      SECONDS_BETWEEN_LOOKS="2")  # fmt: skip

    job = cluster.wait(bad, OVER, PATIENCE)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "1:0")
    assert f"job {bad}: ended with status 1" in (tmp_path / "bad.out").read_text()

    job = cluster.wait(good, OVER, PATIENCE)
    printed = (tmp_path / "good.out").read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), printed
    assert "saved by n1" in printed and "saved by n2" in printed
    port = 20_000 + int(good) % 10_000
    for start in (1, 2):
        assert f"job {good}: start {start}, 2 x 1 processes that meet at 127.0.0.1:{port}" in printed
    for rank in (0, 1):
        launched = f"--num_machines 2 --num_processes 2 --machine_rank {rank} --main_process_ip 127.0.0.1"
        assert printed.count(f"{launched} --main_process_port {port} {SCRIPT} --config good.toml") == 2
    assert f"job {good}: the time limit is near: back into the queue" in printed
    assert f"job {good}: ended with status 0" in printed

    printed = (tmp_path / "watching.out").read_text() if cluster.wait(watching, OVER, PATIENCE) else ""
    assert f"training job {good} is over" in printed and "validate.py --run-dir x" in printed
    assert cluster.job(watching)["JobState"] == "COMPLETED" and "ended with status 0" in printed


@pytest.mark.slow
def test_validation_is_a_job_of_its_own(cluster, tmp_path):
    """It follows the run to its end; where the training job fails or is cancelled, it does not wait forever."""
    config = write_run(
        tmp_path / "files",
        run={"slurm_validation": {"cpus-per-task": 1, "time": "10"}, "save_interval": 20},
        validation={"dev": {"manifest": str(tmp_path / "files" / "audio")}},
    )
    command = [config, "-A", "test", "-N", "1", "-G", "0", "-c", "1", "-t", "10", "--output-root", tmp_path]
    slow = slow_down(tmp_path / "slow", 0.3, "os.environ.get('SLURM_JOB_NAME') == 'small'")
    environment = {**cluster.environment, **slow, "SECONDS_BETWEEN_LOOKS": "2"}
    run = tmp_path / "small"

    def jobs(steps: int, env: dict[str, str]) -> tuple[str, str]:
        done = submit(*command, "--optimizer.max_steps", steps, env=env)
        assert done.returncode == 0, done.stderr
        training, validation = done.stdout.splitlines()
        return training.split("job ")[1].split(",")[0], validation.split("job ")[1]

    training, validation = jobs(1000, environment)
    wait_for_rows(run, 25)
    cluster.wait(validation, {"RUNNING"}, PATIENCE)
    cluster("scancel", training)
    assert cluster.wait(validation, OVER, PATIENCE)["JobState"] == "COMPLETED", log(run)
    assert f"training job {training} is over" in log(run)
    assert {20, *Checkpoints(run / "checkpoints").steps()} == validated_steps(run)

    steps = max(validated_steps(run)) + 30
    training, validation = jobs(steps, cluster.environment)
    assert cluster.wait(training, OVER, PATIENCE)["JobState"] == "COMPLETED", log(run)
    assert cluster.wait(validation, OVER, PATIENCE)["JobState"] == "COMPLETED", log(run)
    assert validated_steps(run) == {*Checkpoints(run / "checkpoints").steps()} and steps in validated_steps(run)


def validated_steps(run: Path) -> set[int]:
    return {json.loads(line)["step"] for line in (run / "validation.jsonl").read_text().splitlines()}


@pytest.mark.slow
def test_what_sbatch_objects_to_is_said(cluster, tmp_path):
    options = ["-A", "test", "-N", "1", "-G", "0", "-p", "nowhere", "--output-root", tmp_path]
    done = submit(write_run(tmp_path / "files"), *options, env=cluster.environment)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "partition" in done.stderr, done.stderr


def test_every_task_of_an_array_extracts_its_part(tmp_path):
    """The script hands on what it is given, and asks for the part of its task."""
    environment = {**os.environ, "SPIDR_HF": str(ROOT), "PYTHON": "echo", "SLURM_SUBMIT_DIR": "/nowhere"}
    script = ["bash", str(FOLDER / "extract.sbatch"), "MODEL", "a folder", "OUT", "--layers", "6"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == f"{ROOT}/examples/extract_units.py MODEL a folder OUT --layers 6 --shard slurm\n"
    missing = subprocess.run(script, env={**environment, "SPIDR_HF": "/nowhere"}, capture_output=True, text=True)
    assert missing.returncode == 2 and "does not exist. Submit from the repository" in missing.stderr
