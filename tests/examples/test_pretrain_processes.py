"""`examples/pretrain.py` as it is launched: how many processes share an update, and how, changes nothing but the speed;
and what is killed resumes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import (
    SCRIPT,
    assert_same_run,
    children,
    final,
    finish,
    launch,
    rows,
    wait_for_rows,
    write_audio,
    write_config,
)

from spidr_hf.training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def audio(tmp_path_factory) -> Path:
    return write_audio(tmp_path_factory.mktemp("pretrain") / "audio")


@pytest.fixture
def config(audio, tmp_path) -> Path:
    return write_config(tmp_path / "tiny.toml", audio)


def assert_close_runs(ours: Path, expected: Path) -> None:
    """Losses and every tensor of the end, within float32 rounding."""
    for left, right in zip(rows(ours), rows(expected), strict=True):
        for name in ("loss", "layer_losses", "target_ppl", "pred_ppl", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-4), (left["step"], name)
        assert left["active_codewords"] == right["active_codewords"]
        assert (left["lr"], left["ema_decay"], left["epoch"]) == (right["lr"], right["ema_decay"], right["epoch"])
    left, right = final(ours), final(expected)
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_two_processes_equal_one(config, tmp_path):
    """Two processes = two accumulated batches = the same losses and state, through the freeze; resumed bit for bit."""
    two = finish(launch(config, tmp_path / "two", processes=2))
    assert "2 processes" in two
    finish(launch(config, tmp_path / "one", "--optimizer.gradient_accumulation_steps", "2"))
    for folder, processes in (("two", 2), ("one", 1)):
        assert {row["world_size"] for row in rows(tmp_path / folder)} == {processes}
    assert_close_runs(tmp_path / "two", tmp_path / "one")

    finish(launch(config, tmp_path / "resumed", "--optimizer.max_steps", "7", processes=2))
    finish(launch(config, tmp_path / "resumed", processes=2))
    assert_same_run(tmp_path / "resumed", tmp_path / "two")

    # On one process it resumes in the order it had.
    finish(launch(config, tmp_path / "moved", "--optimizer.max_steps", "6", processes=2))
    printed = finish(launch(config, tmp_path / "moved"))
    assert "Updates were made of 2 x 1 batches (processes x accumulation) and now are of 1 x 1" in printed


def test_three_processes_resume_bit_for_bit(config, tmp_path):
    """With three, the order of DDP's sums shows."""
    finish(launch(config, tmp_path / "whole", processes=3))
    finish(launch(config, tmp_path / "resumed", "--optimizer.max_steps", "5", processes=3))
    finish(launch(config, tmp_path / "resumed", processes=3))
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize("processes", [1, 2])
def test_real_kills(config, tmp_path, processes):
    """SIGKILL to a training process, to the launcher, then SIGTERM to it: no process stays behind, nothing is lost,
    and the run ends as if it had never been interrupted."""
    options = ["--data.num_workers", "1", "--optimizer.max_steps", "60", "--run.save_interval", "7"]
    finish(launch(config, tmp_path / "whole", *options, processes=processes))
    for victim, number, count in (
        ("process", signal.SIGKILL, 10),
        ("launcher", signal.SIGKILL, 20),
        ("launcher", signal.SIGTERM, 30),
    ):
        process = launch(config, tmp_path / "killed", *options, processes=processes)
        wait_for_rows(process, tmp_path / "killed", count)
        os.kill(process.pid if victim == "launcher" else children(process)[-1], number)
        process.communicate(timeout=120)  # returns when the last of its processes has closed the pipe
    assert len(rows(tmp_path / "killed")) < 60
    finish(launch(config, tmp_path / "killed", *options, processes=processes))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_signals_save_and_exit_cleanly(config, tmp_path):
    """As SLURM sends them: to the training process itself."""
    options = ["--optimizer.max_steps", "400", "--run.save_interval", "1000"]
    command_line = [
        sys.executable,
        str(SCRIPT),
        "--config",
        str(config),
        "--output-dir",
        str(tmp_path / "run"),
        *options,
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        process = subprocess.Popen(
            command_line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        before = len(rows(tmp_path / "run")) if (tmp_path / "run" / "metrics.jsonl").exists() else 0
        wait_for_rows(process, tmp_path / "run", before + 3)
        process.send_signal(number)
        printed = finish(process)
        (step, *_) = reversed(Checkpoints(tmp_path / "run" / "checkpoints").steps())
        assert f"{number.name}: saved step {step}. The same command continues from there." in printed
        assert len(rows(tmp_path / "run")) == step


def test_a_second_interruption_ends_at_once(config, tmp_path):
    """Ctrl-C twice: no traceback, nothing half-written, and what was saved before is resumed."""
    slow = "import time; from spidr_hf.training import checkpoints\nsave = checkpoints.save_file\n"
    slow += "checkpoints.save_file = lambda *a, **k: (print('saving', flush=True), time.sleep(60), save(*a, **k))"
    arguments = ["--config", str(config), "--output-dir", str(tmp_path / "run"), "--run.save_interval", "1000"]
    arguments += ["--optimizer.max_steps", "400"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, str(faulty(tmp_path, slow)), *arguments]
    process = subprocess.Popen(
        command_line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for_rows(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    while "saving" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=5)[0]
    assert process.returncode == -signal.SIGINT and "Traceback" not in rest
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == []


def test_processes_and_accumulated_batches_are_the_same(config, tmp_path):
    """1 process x 4 batches = 2 x 2 = 4 x 1, through the freeze."""
    for processes in (1, 2, 4):
        accumulation = str(4 // processes)
        options = ["--optimizer.max_steps", "10", "--optimizer.gradient_accumulation_steps", accumulation]
        finish(launch(config, tmp_path / str(processes), *options, processes=processes))
        assert [row["world_size"] for row in rows(tmp_path / str(processes))] == [processes] * 10
    assert_close_runs(tmp_path / "2", tmp_path / "1")
    assert_close_runs(tmp_path / "4", tmp_path / "1")


def test_a_sharded_run_is_the_same_run(config, tmp_path):
    """FSDP2 on two processes = DDP on them; each resumes where the other stopped."""
    options = ["--optimizer.gradient_accumulation_steps", "2"]
    printed = finish(launch(config, tmp_path / "shards", *options, processes=2, sharded=True))
    assert "in shards" in printed and "FSDP2-wrapped" not in printed
    finish(launch(config, tmp_path / "whole", *options, processes=2))
    assert_close_runs(tmp_path / "shards", tmp_path / "whole")
    for steps, sharded in (("4", True), ("6", False), ("12", True)):
        finish(
            launch(config, tmp_path / "mixed", *options, "--optimizer.max_steps", steps, processes=2, sharded=sharded)
        )
    assert_close_runs(tmp_path / "mixed", tmp_path / "whole")
    finish(launch(config, tmp_path / "resumed", *options, "--optimizer.max_steps", "5", processes=2, sharded=True))
    finish(launch(config, tmp_path / "resumed", *options, processes=2, sharded=True))
    assert_same_run(tmp_path / "resumed", tmp_path / "shards")


NAN_ON_ONE_RANK = """
import os
from spidr_hf import SpidrForPretraining
from spidr_hf.data.batches import PretrainingBatches

step = 0
getitem, forward = PretrainingBatches.__getitem__, SpidrForPretraining.forward

def broken_audio(self, key):
    global step
    step += 1
    batch = getitem(self, key)
    if step == 3 and os.environ["RANK"] == "1":
        batch.input_values[:] = float("nan")
    return batch

def broken_gradient(self, *args, **kwargs):
    output = forward(self, *args, **kwargs)
    if step == 5 and os.environ["RANK"] == "1":
        output.loss.register_hook(lambda gradient: gradient * float("nan"))
    return output

PretrainingBatches.__getitem__, SpidrForPretraining.forward = broken_audio, broken_gradient
"""


def faulty(folder: Path, fault: str) -> Path:
    """The command with a fault in it."""
    path = folder / "faulty.py"
    run = f"import runpy, sys\nsys.path.insert(0, {str(SCRIPT.parent.parent)!r})\n{fault}\n"
    path.write_text(f"{run}\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")
    return path


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_what_is_not_finite_on_one_rank_is_skipped_by_all(config, tmp_path, sharded):
    script = faulty(tmp_path, NAN_ON_ONE_RANK)
    printed = finish(launch(config, tmp_path / "run", processes=2, sharded=sharded, script=script))
    assert "Step 3: loss nan" in printed and "(2 so far)" in printed
    loss, norm = printed.split("Step 5: loss ")[1].split(". The update is skipped")[0].split(", gradient norm ")
    assert float(loss) > 0 and norm == "nan"
    assert [row["step"] for row in rows(tmp_path / "run") if row["loss"] is None] == [3, 5]
    assert len(rows(tmp_path / "run")) == 12
    assert all(torch.isfinite(tensor).all() for tensor in final(tmp_path / "run").values())


KILLED_AT = {
    "an optimizer step": """
import torch
kill_on_call(torch.optim.AdamW, "step", 2)
""",
    "a row of metrics.jsonl": """
from spidr_hf.pretraining.reporter import MetricsFile
kill_on_call(MetricsFile, "write", 3, lambda self, row: os.write(self._file.fileno(), b'{"step": '))
""",
    "a checkpoint's write": """
from spidr_hf.training import checkpoints
kill_on_call(checkpoints, "save_file", 2, lambda tensors, path, metadata=None: open(path, "wb").write(b"half"))
""",
    "a checkpoint's renaming": """
import pathlib
kill_on_call(pathlib.Path, "rename", 1)
""",
    "the final save": """
from spidr_hf import SpidrFeatureExtractor
kill_on_call(SpidrFeatureExtractor, "save_pretrained", 1)
""",
}
KILL = """
import os, signal

def kill_on_call(owner, name, number, first=lambda *args, **kwargs: None):
    called, calls = getattr(owner, name), iter(range(1, 1000))
    def call(*args, **kwargs):
        if next(calls) == number:
            first(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return called(*args, **kwargs)
    setattr(owner, name, call)
"""


def test_kills_at_the_worst_moments(config, tmp_path):
    """SIGKILL in the middle of everything that writes, one after the other in the same run."""
    finish(launch(config, tmp_path / "whole"))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    for fault in KILLED_AT.values():
        arguments = ["--config", str(config), "--output-dir", str(tmp_path / "killed")]
        command_line = [sys.executable, str(faulty(tmp_path, KILL + fault)), *arguments]
        killed = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=300)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "killed" / "final").exists()
    finish(launch(config, tmp_path / "killed"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert Checkpoints(tmp_path / "killed" / "checkpoints").steps() == [3, 6, 9, 12]
    assert [path.name for path in (tmp_path / "killed").rglob("*.partial*")] == []
