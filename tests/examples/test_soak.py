"""One run through thirty accidents ends as if there had been none."""

import errno
import fcntl
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import assert_same_run, final, finish, launch, pretrain_here, rows, write_audio, write_config

from spidr_hf.training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

STEPS, EVENTS = 120, 30
OPTIONS = ("--optimizer.gradient_accumulation_steps", "2", "--run.save_interval", "2", "--run.keep_latest", "3")


class Run:
    """The run, started again and again; `where` it is read from its metrics."""

    def __init__(self, config: Path, folder: Path):
        self.config, self.folder = config, folder

    @property
    def where(self) -> int:
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def start(self, prepare: Callable[[], None] = lambda: None, *options: str) -> int:
        """Start it in a process of its own, in which `prepare` is called first; returns the process."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                # What tests print belongs to the parent.
                sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
                prepare()
                pretrain_here(self.config, self.folder, *OPTIONS, *options)
                status = 0
            except BaseException as error:
                (self.folder.parent / "error.txt").write_text(repr(error))
            finally:
                os._exit(status)
        return child

    def wait(self, child: int, steps: int = STEPS) -> int | None:
        """Its exit status; None where it is still going on after so many more steps."""
        reached, deadline = min(self.where + steps, STEPS - 1), time.monotonic() + 120
        while time.monotonic() < deadline:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if steps < STEPS and self.where >= reached:
                return None
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        raise AssertionError(f"It hangs at step {self.where}.")


def full_disk(number: int) -> None:
    """From the `number`th file on, nothing can be kept any more."""
    count = iter(range(10**6))

    def fsync(_: int) -> None:
        if next(count) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fsync


def slow_disk() -> None:
    fsync = os.fsync
    os.fsync = lambda descriptor: time.sleep(0.03) or fsync(descriptor)


def disk_without_locks() -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.lockf = lockf


def happens(run: Run, event: str, rng: random.Random) -> None:
    """Start the run and let something happen to it some steps later."""
    steps = rng.randint(1, 4)
    if event == "full disk":
        assert run.wait(run.start(lambda: full_disk(rng.randint(1, 25)))) in (0, 1)
        return
    if event == "another world size":
        until = str(min(run.where + steps, STEPS - 1))
        options = (*OPTIONS, "--optimizer.gradient_accumulation_steps", "1", "--optimizer.max_steps", until)
        finish(launch(run.config, run.folder, *options, processes=2))
        return
    if event == "damaged checkpoint":
        checkpoints = Checkpoints(run.folder / "checkpoints")
        if len(checkpoints.steps()) > 1:
            file = checkpoints.newest().folder / rng.choice(["model.safetensors", "trainer_state.json"])
            file.write_bytes(file.read_bytes()[:-10] + bytes(10))
    if event == "damaged metrics" and run.where:
        path = run.folder / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        lines.insert(rng.randrange(len(lines)), rng.choice([b"\n", b"\0" * 512 + b"\n", b"\0" * 64]))
        path.write_bytes(b"".join(lines))
    prepare = {"slow disk": slow_disk, "no locks": disk_without_locks}.get(event, lambda: None)
    child = run.start(prepare)
    if run.wait(child, steps) is None:
        asked = event in ("Ctrl-C", "slow disk", "no locks")
        os.kill(child, signal.SIGINT if asked else signal.SIGKILL)
        assert run.wait(child) in ((0,) if asked else (0, -signal.SIGKILL))


EVENT_KINDS = ("kill", "Ctrl-C", "full disk", "damaged checkpoint", "damaged metrics", "slow disk", "no locks")


@pytest.mark.parametrize("world", [False, True], ids=["one process", "also two"])
def test_soak(tmp_path, world):
    config = write_config(tmp_path / "tiny.toml", write_audio(tmp_path / "audio"))
    config.write_text(config.read_text().replace("max_steps = 12", f"max_steps = {STEPS}"))
    whole, run, rng = Run(config, tmp_path / "whole"), Run(config, tmp_path / "run"), random.Random(0)
    assert whole.wait(whole.start()) == 0
    events = [EVENT_KINDS[number % len(EVENT_KINDS)] for number in range(EVENTS)]
    if world:
        events[5], events[20] = "another world size", "another world size"
    rng.shuffle(events)
    for event in events:
        assert run.where < STEPS, "it was over before everything had happened"
        happens(run, event, rng)
    status = run.wait(run.start())
    assert status == 0, (tmp_path / "error.txt").read_text()
    if not world:
        assert_same_run(run.folder, whole.folder)
        return
    assert [row["step"] for row in rows(run.folder)] == list(range(1, STEPS + 1))
    for ours, theirs in zip(rows(run.folder), rows(whole.folder), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2), ours["step"]
    left, right = final(run.folder), final(whole.folder)
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-2, rtol=1e-2)
