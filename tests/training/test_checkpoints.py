"""Checkpoints, the lock, signals: what a run that is killed at any moment finds when it starts again."""

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from spidr_hf.pretraining.config import make_config
from spidr_hf.pretraining.setup import save_final
from spidr_hf.system.errors import RunFolderError
from spidr_hf.system.files import replaced_folder, write_text
from spidr_hf.system.processes import RunLock, die_with_launcher
from spidr_hf.training.checkpoints import Checkpoints, TrainerState, set_aside
from spidr_hf.training.metrics import Averages, MetricsFile, read_rows
from spidr_hf.training.stopping import StopSignal


def model_and_optimizer(seed=0):
    """A model that has made an update, and its AdamW."""
    model = tiny_model(seed=seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    model.train()
    waveforms = torch.randn(2, 4000, generator=torch.Generator().manual_seed(seed))
    model(waveforms, mask_time_indices=torch.tensor([[0, 3], [5, 6]])).loss.backward()
    optimizer.step()
    model.update_teacher(1)
    return model, optimizer


def names(model):
    return {parameter: name for name, parameter in model.named_parameters()}


def test_a_checkpoint_brings_everything_back(tmp_path):
    model, optimizer = model_and_optimizer()
    state = TrainerState(step=7, epoch=2, batch=5, metrics={"count": 1, "sums": {"loss": 0.1}}, data="x")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, model, optimizer, wait=True)
    found = Checkpoints(tmp_path).newest()
    assert found.folder == tmp_path / "step_7" and found.state == state

    other, other_optimizer = model_and_optimizer(seed=1)
    found.load_model(other)
    found.load_optimizer(other_optimizer, names(other))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    left, right = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert left.keys() == right.keys()
    assert all(torch.equal(left[i][moment], right[i][moment]) for i in left for moment in left[i])
    # ... and is a model folder.
    assert type(model).from_pretrained(found.folder).current_step.item() == 1


def test_a_checkpoint_is_of_the_moment_it_was_taken(tmp_path):
    """Training continues while it is written."""
    model, optimizer = model_and_optimizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainerState(step=1), model, optimizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    checkpoints.wait()
    Checkpoints(tmp_path).newest().load_model(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_moments_of_frozen_parameters_stay_behind(tmp_path):
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainerState(step=1), model, optimizer, wait=True)
    model.freeze_feature_encoder()
    rest = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    checkpoints.newest().load_optimizer(rest, names(model))
    assert all("exp_avg" in rest.state[p] for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("keep", "left"), [(-1, [1, 2, 3, 4]), (2, [3, 4]), (1, [4])])
def test_keep_latest(tmp_path, keep, left):
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path, keep)
    for step in range(1, 5):
        checkpoints.save(TrainerState(step=step), model, optimizer, wait=True)
    assert checkpoints.steps() == left


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-10] + b"0123456789"),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, file, damage):
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 10):
        checkpoints.save(TrainerState(step=step), model, optimizer, wait=True)
    damage(tmp_path / "step_10" / file)
    assert checkpoints.newest().state.step == 9
    assert "step_10 is damaged" in caplog.text
    # It is written again when the run gets there.
    checkpoints.save(TrainerState(step=10), model, optimizer, wait=True)
    assert checkpoints.newest().state.step == 10


@pytest.fixture
def three(tmp_path, monkeypatch):
    """Three checkpoints; the disk is asked again without a pause."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 6, 9):
        checkpoints.save(TrainerState(step=step), model, optimizer, wait=True)
    return checkpoints


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.json"])
def test_none_that_can_be_read_is_not_none(three, file, damage):
    """One flipped bit in the only checkpoint must not have the run begin again."""
    for step in three.steps():
        damage(three.folder / f"step_{step}" / file)
    with pytest.raises(RunFolderError, match=r"None of .*step_9: .*step_3: .*Restore one .* with --fresh"):
        three.newest()
    assert three.steps() == [3, 6, 9]


def test_a_run_begun_anew_keeps_what_was_there(three):
    folder = three.folder.parent
    for name in ("metrics.jsonl", ".lock", "data.arrow"):
        (folder / name).write_text("x")
    assert set_aside(folder) == folder / "earlier-1"
    assert three.newest() is None and not (folder / "metrics.jsonl").exists()
    assert (folder / ".lock").exists() and (folder / "data.arrow").exists()
    assert Checkpoints(folder / "earlier-1" / "checkpoints").newest().state.step == 9
    assert set_aside(folder) is None
    (folder / "metrics.jsonl").write_text("y")
    assert set_aside(folder) == folder / "earlier-2" and (folder / "earlier-1" / "metrics.jsonl").read_text() == "x"
    assert set_aside(folder / "no") is None


def test_without_checkpoints_there_is_none(tmp_path):
    assert Checkpoints(tmp_path).newest() is None
    (tmp_path / "step_x").mkdir()
    assert Checkpoints(tmp_path).newest() is None


@pytest.mark.parametrize(("changes", "what"), [({"version": 2}, "format 2"), ({"warmth": 3}, "with warmth")])
def test_another_version_is_no_damage(three, changes, what):
    """The newest is not passed over for an older one, which this version could read."""
    path = three.folder / "step_9" / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RunFolderError, match=rf"step_9 was written by another version of this package \({what}\)"):
        three.newest()


def test_fields_that_an_earlier_version_did_not_know(three):
    path = three.folder / "step_9" / "trainer_state.json"
    content = json.loads(path.read_text())
    del content["stream"]
    path.write_text(json.dumps(content))
    assert three.newest().state.stream == {}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("times", [2, 100])
def test_a_disk_that_does_not_answer(three, monkeypatch, number, times):
    """It is asked again, and then told of: an older checkpoint would cost steps, none the whole run."""
    left, real = [times], Path.read_text

    def flaky(self, *arguments, **options):
        if self.parent.name == "step_9" and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", flaky)
    if times == 2:
        assert three.newest().state.step == 9
    else:
        with pytest.raises(RunFolderError, match=r"step_9 cannot be read: .*3 times tried.*Nothing was changed"):
            three.newest()


def test_a_folder_that_was_removed_is_not_made_again(tmp_path):
    model, optimizer = model_and_optimizer()
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoints, metrics = Checkpoints(folder / "checkpoints"), MetricsFile(folder / "metrics.jsonl")
    metrics.write({"step": 1})
    shutil.rmtree(folder)
    with pytest.raises(RunFolderError, match=r"metrics.jsonl was removed, or moved, during the run"):
        metrics.write({"step": 2})
    with pytest.raises(RunFolderError, match=r"run was removed"):
        checkpoints.save(TrainerState(step=2), model, optimizer, wait=True)
    assert not folder.exists()


def test_a_kill_during_the_write_leaves_the_one_before(tmp_path, monkeypatch):
    """The half-written folder has another name, and goes at the next start."""
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainerState(step=1), model, optimizer, wait=True)
    partial = tmp_path / ".step_2.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert checkpoints.newest().state.step == 1
    checkpoints.remove_partial()
    assert not partial.exists() and checkpoints.steps() == [1]


def test_a_full_disk_is_reported_and_spoils_nothing(tmp_path, monkeypatch):
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainerState(step=1), model, optimizer, wait=True)

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"some")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("spidr_hf.training.checkpoints.save_file", full)
    checkpoints.save(TrainerState(step=2), model, optimizer)
    with pytest.raises(RunFolderError, match=r"Cannot write a checkpoint into .*No space left on device"):
        checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1"]


def test_a_disk_that_is_full_for_safetensors(tmp_path, small_files):
    """Its writer's errors are of its own kind."""
    model, optimizer = model_and_optimizer()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainerState(step=2), model, optimizer)
    with pytest.raises(RunFolderError, match=r"Cannot write a checkpoint into .*too large.*the same command resumes"):
        checkpoints.wait()
    config = make_config({"run": {"model_type": "spidr"}, "data": {"manifest": "x"}})
    with pytest.raises(RunFolderError, match=r"Cannot write the model into .*too large.*the same command does so"):
        save_final(model, tmp_path / "final", config, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [MemoryError(), KeyError("name"), AssertionError()])
def test_whatever_ends_the_write_is_reported(tmp_path, monkeypatch, error):
    def failing(tensors, path, metadata=None):
        raise error

    model, optimizer = model_and_optimizer()
    monkeypatch.setattr("spidr_hf.training.checkpoints.save_file", failing)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainerState(step=2), model, optimizer)
    with pytest.raises(RunFolderError, match=rf"Cannot write a checkpoint into .*({type(error).__name__}|name)"):
        checkpoints.wait()


def test_folders_are_replaced_whole(tmp_path):
    target = tmp_path / "final"
    for content in ("old", "new"):
        with replaced_folder(target) as folder:
            (folder / "file").write_text(content)
    assert (target / "file").read_text() == "new"
    with pytest.raises(KeyboardInterrupt), replaced_folder(target) as folder:
        (folder / "file").write_text("half")
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["final"]
    write_text(tmp_path / "a.txt", "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "final"]


def in_another_process(code: str, *arguments: str) -> subprocess.Popen:
    """Python code that imports `spidr_hf.training.checkpoints` alone, without the seconds that transformers takes."""
    package = Path(__file__).parents[2] / "spidr_hf"
    preamble = (
        "import sys, types\n"
        "package = sys.modules['spidr_hf'] = types.ModuleType('spidr_hf')\n"
        f"package.__path__ = [{str(package)!r}]\n"
        "from spidr_hf.system import processes\nfrom spidr_hf.training import checkpoints as run_state, stopping\n"
    )
    return subprocess.Popen([sys.executable, "-c", preamble + code, *arguments], stdout=subprocess.PIPE, text=True)


def test_one_run_per_folder(tmp_path):
    code = "import time\nlock = processes.RunLock(sys.argv[1])\nprint('locked', flush=True)\ntime.sleep(60)"
    other = in_another_process(code, str(tmp_path))
    try:
        assert other.stdout.readline() == "locked\n"
        message = rf"{tmp_path} is in use by another run \(process {other.pid} on .*\)\. Stop it first"
        with pytest.raises(RunFolderError, match=message):
            RunLock(tmp_path, patience=0.2)
    finally:
        other.kill()
        other.wait()
    RunLock(tmp_path, patience=5).release()  # a killed run holds nothing
    RunLock(tmp_path, patience=0).release()


def test_of_a_folder_in_which_nothing_was_done_nothing_is_left(tmp_path):
    code = "processes.RunLock(sys.argv[1])\nraise SystemExit(1)"
    with in_another_process(code, str(tmp_path / "a" / "b")) as process:
        assert process.wait() == 1
    assert list(tmp_path.iterdir()) == []
    lock = RunLock(tmp_path / "a")
    (tmp_path / "a" / "file").touch()
    lock.release()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".lock", "file"]


def test_who_waited_for_a_lock_that_is_gone_keeps_others_out(tmp_path):
    code = "print('ready', flush=True)\nlock = processes.RunLock(sys.argv[1])\nprint('locked', flush=True)\n"
    code += "import time\ntime.sleep(60)"
    lock = RunLock(tmp_path / "run")
    with in_another_process(code, str(tmp_path / "run")) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        lock.release()
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(RunFolderError, match=f"in use by another run .process {process.pid} "):
            RunLock(tmp_path / "run", patience=0.2)
        process.terminate()


def test_processes_die_with_their_launcher():
    """The launcher is killed; its process gets SIGTERM, as if asked to save and stop."""
    worker = (
        "import os, time\n"
        "processes.die_with_launcher()\n"
        "stop = stopping.StopSignal()\n"
        "print(os.getpid(), flush=True)\n"
        "while not stop.agreed(): time.sleep(0.01)\n"
        "print(stop.received, flush=True)\n"
    )
    launcher = (
        "import os\n"
        "os.environ['TORCHELASTIC_RUN_ID'] = 'test'\n"
        "reader = int(sys.argv[1])\n"
        "if os.fork() == 0:\n" + "".join(f"    {line}\n" for line in worker.splitlines()) + "    os._exit(0)\n"
        "os.wait()"
    )
    process = in_another_process(launcher, "0")
    worker_pid = int(process.stdout.readline())
    process.kill()
    assert process.stdout.readline() == "SIGTERM\n"
    deadline = time.time() + 10
    while time.time() < deadline and Path(f"/proc/{worker_pid}").exists():
        time.sleep(0.01)
    process.wait()


def test_without_a_launcher_a_process_outlives_its_shell(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    die_with_launcher()
    wanted = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(2, ctypes.byref(wanted))  # PR_GET_PDEATHSIG
    assert wanted.value == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_ask_to_stop(number):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = StopSignal()
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed() and stop.received == number.name
        assert signal.alarm(0) > 60  # a process that cannot stop is ended in the end
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)


# Signalled, a process takes longer to stop than it has time, since another does not answer or the disk is slow.
SLOW_TO_STOP = """
import os, signal, time
from pathlib import Path
stopping.GRACE_SECONDS, stopping.WRITING_SECONDS, stopping.LOOK_SECONDS = 4, {limit}, 0.1
folder = Path(sys.argv[1])
stop = stopping.StopSignal(folders=[folder])
model = run_state.nn.Linear(2, 2)
checkpoints = run_state.Checkpoints(folder)
save_file = run_state.save_file

def slow(*arguments, **options):
    time.sleep({seconds})
    save_file(*arguments, **options)

run_state.save_file = slow
os.kill(os.getpid(), signal.SIGUSR1)
assert stop.agreed()
{does}
print("stopped", flush=True)
"""
WRITES = "checkpoints.save(run_state.TrainerState(step=1), model, run_state.torch.optim.AdamW(model.parameters()))\n"


@pytest.mark.slow
def test_a_slow_disk_has_more_time(tmp_path):
    cases = {
        "while it is written": (WRITES + "time.sleep(7)", 6, 60, True),
        "while nothing is": ("time.sleep(30)", 2, 60, False),
        "not forever": (WRITES + "checkpoints.wait()", 30, 0.5, False),
    }
    processes = {
        name: in_another_process(SLOW_TO_STOP.format(does=does, seconds=seconds, limit=limit), str(tmp_path / name))
        for name, (does, seconds, limit, _) in cases.items()
    }
    for name, (*_, stops) in cases.items():
        printed = processes[name].communicate(timeout=120)[0]
        assert (printed, processes[name].returncode) == (("stopped\n", 0) if stops else ("", -signal.SIGALRM)), name
        assert Checkpoints(tmp_path / name).steps() == ([1] if stops else []), name


def test_the_end_is_put_off_while_a_folder_is_written(tmp_path, monkeypatch):
    alarms = []
    monkeypatch.setattr(signal, "alarm", lambda seconds: alarms.append(seconds) or 60)
    monkeypatch.setattr("spidr_hf.training.stopping.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("spidr_hf.training.stopping.WRITING_SECONDS", 2.0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop = StopSignal(folders=[tmp_path, tmp_path / "none"])
        with replaced_folder(tmp_path / "step_1"):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.3)
        assert stop.received == "SIGUSR1" and len(alarms) > 1
        time.sleep(0.05)
        count = len(alarms)
        time.sleep(0.1)
        assert len(alarms) == count

        monkeypatch.setattr(signal, "alarm", lambda seconds: alarms.append(seconds) or 0)
        with replaced_folder(tmp_path / "step_2"):
            time.sleep(0.1)
        assert alarms[count:] == [alarms[0], 0]  # called off meanwhile, it stays off
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_metrics_keep_one_row_per_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in (2, 4, 6, 8):
        file.write({"step": step, "loss": 1 / step})
    file.close()
    lines = path.read_bytes().splitlines(keepends=True)
    with path.open("ab") as torn:
        torn.write(b'{"step": 9, "lo')
    file = MetricsFile(path, step=5)
    assert path.read_bytes() == b"".join(lines[:2])
    file.write({"step": 6, "loss": None})
    file.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]
    MetricsFile(path, step=0).close()
    assert path.read_bytes() == b""


ROWS = [b'{"step": %d, "loss": 0.5}\n' % step for step in (2, 4, 6)]
DAMAGED = {
    "a blank line": ROWS[0] + b"\n" + ROWS[1] + ROWS[2],
    "zeros of a power cut": ROWS[0] + b"\0" * 4096 + b"\n" + ROWS[1] + ROWS[2],
    "zeros before a row": ROWS[0] + b"\0" * 100 + ROWS[1] + ROWS[2],
    "a row cut off, another behind it": ROWS[0] + b'{"step": 3, "lo' + ROWS[1] + ROWS[2],
    "text": ROWS[0] + b"[1]\nnull\n7\n{}\n\xff\n" + ROWS[1] + b'{"step": "x"}\n' + ROWS[2],
    "at the end": b"".join(ROWS) + b"\0\0\n\n",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_lines_cost_no_rows(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert [row["step"] for row in read_rows(path)] == [2, 4, 6]
    file = MetricsFile(path, step=4)
    assert file.reached == 6 and path.read_bytes() == b"".join(ROWS[:2])
    file.write({"step": 6, "loss": 0.5})
    file.close()
    assert path.read_bytes() == b"".join(ROWS) and [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_row_for_which_there_is_no_room(tmp_path, small_files):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"step": 1, "text": "x" * 50_000})
    with pytest.raises(OSError, match="File too large") as caught:
        file.write({"step": 2, "text": "x" * 50_000})
    assert caught.value.filename == str(path)
    assert [row["step"] for row in read_rows(path)] == [1] and path.read_bytes().endswith(b"\n")
    file.write({"step": 2})  # there is room again
    file.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_averages_survive_a_checkpoint():
    whole, first = Averages(), Averages()
    values = [{"loss": 0.1 * i, "layer_losses": [0.3 * i, 0.7]} for i in range(5)]
    for value in values:
        whole.add(value)
    for value in values[:2]:
        first.add(value)
    second = Averages(json.loads(json.dumps(first.state())))
    for value in values[2:]:
        second.add(value)
    assert second.means() == whole.means() and Averages().means() == {}
    assert whole.means()["layer_losses"] == pytest.approx([0.6, 0.7])
