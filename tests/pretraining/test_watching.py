"""What a run shows as it goes: the picture of its curves, trackers, profiles, models on the Hub."""

import gzip
import json
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from accelerate.utils import LoggerType
from runs import pretrain_here, rows, write_audio, write_config

from spidr_hf import SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.plots.curves import draw_run, read_rows
from spidr_hf.pretraining import curves_picture
from spidr_hf.pretraining.config import load_config, make_config
from spidr_hf.pretraining.curves_picture import CurvesPicture
from spidr_hf.pretraining.hub_push import HubPush
from spidr_hf.system.errors import ConfigError
from spidr_hf.training.profiling import StepProfiler


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watching")
    return write_config(folder / "tiny.toml", write_audio(folder / "audio"))


def metrics_row(step: int, **changes) -> str:
    row = {"step": step, "epoch": 1, "loss": 2.0, "layer_losses": [2.0, 2.1], "target_ppl": 8.0, "pred_ppl": 9.0}
    row |= {"active_codewords": [9, 8], "grad_norm": 1.0, "lr": 1e-3} | changes
    return json.dumps(row) + "\n"


# ---- the picture


def test_the_picture_of_the_curves(tmp_path):
    """Skipped updates have no loss, and the last line may be half written."""
    assert draw_run(tmp_path, 2, 12) is None
    validation = json.dumps({"step": 2, "name": "dev", "loss": 2.2}) + "\n" + json.dumps({"step": 3, "name": "dev"})
    (tmp_path / "validation.jsonl").write_text(validation)
    (tmp_path / "metrics.jsonl").write_text(metrics_row(1) + metrics_row(2, loss=None) + metrics_row(3) + '{"step": 4')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 3]
    path = draw_run(tmp_path, 2, 12)
    assert path.read_bytes().startswith(b"\x89PNG") and path == tmp_path / "curves.png"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl", "validation.jsonl"]


def test_it_is_drawn_by_another_process_as_the_run_goes(tmp_path, monkeypatch):
    model = make_config({"run": {"model_type": "spidr"}, "data": {"manifest": "x"}}).model
    (tmp_path / "metrics.jsonl").write_text(metrics_row(1))
    (tmp_path / ".curves.1.partial.png").write_text("of a killed run")
    said = []
    picture = CurvesPicture(tmp_path, model, 0.001, said.append)
    assert not list(tmp_path.glob(".curves*"))
    time.sleep(0.07)
    start = time.perf_counter()
    picture.after_step(1)
    assert time.perf_counter() - start < 1  # it does not wait for the picture
    picture.after_step(2)
    picture.finish()
    assert said == [None] and (tmp_path / "curves.png").exists()

    broken = tmp_path / "broken.py"
    broken.write_text("raise OSError('no room for pictures')")
    monkeypatch.setattr(curves_picture, "DRAWING", broken)
    CurvesPicture(tmp_path, model, 1, said.append).finish()
    assert "no room for pictures" in said[-1]
    CurvesPicture(tmp_path, model, 0, said.append).finish()
    assert len(said) == 2


# ---- profiles


def test_a_profile_of_some_steps(tmp_path):
    profiler = StepProfiler(tmp_path, "3:4")
    for step in range(1, 7):
        profiler.before_step(step)
        torch.ones(1, 10 + step) @ torch.ones(10 + step, 1)
        profiler.after_step(step)
        assert profiler.path.exists() == (step >= 4)
    profiler.finish()
    trace = json.loads(gzip.decompress(profiler.path.read_bytes()))
    shapes = [event["args"].get("Input Dims") for event in trace["traceEvents"] if event.get("name") == "aten::mm"]
    assert [shape[0] for shape in shapes] == [[1, 13], [1, 14]]
    StepProfiler(tmp_path / "none", None).before_step(1)
    assert not (tmp_path / "none").exists()


# ---- the Hub


class StubApi:
    """Keeps what would be uploaded; can fail, and can be held up."""

    uploads: list[tuple[str, str, dict[str, bytes]]]
    failing: bool
    gate: threading.Event

    def create_repo(self, repo_id, private, exist_ok):
        assert private and exist_ok

    def upload_folder(self, repo_id, folder_path, commit_message):
        assert self.gate.wait(30)
        if self.failing:
            raise ConnectionError("the Hub is away")
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.uploads.append((repo_id, commit_message, files))


@pytest.fixture
def hub(monkeypatch):
    StubApi.uploads, StubApi.failing, StubApi.gate = [], False, threading.Event()
    StubApi.gate.set()
    monkeypatch.setattr("spidr_hf.pretraining.hub_push.HfApi", StubApi)
    return StubApi


def test_models_go_to_the_hub_as_the_run_goes(config, tmp_path, hub, capsys):
    folder = pretrain_here(config, tmp_path / "run", "--run.push_to_hub", "me/spidr", "--run.keep_latest", "1")
    assert {repo for repo, _, _ in hub.uploads} == {"me/spidr"}
    *checkpoints, (_, message, final) = hub.uploads
    assert message == "The final model" and {m for _, m, _ in checkpoints} <= {f"Step {s}" for s in (3, 6, 9, 12)}
    assert checkpoints and "Pushed to https://huggingface.co/me/spidr" in capsys.readouterr().err
    assert final["model.safetensors"] == (folder / "final" / "model.safetensors").read_bytes()
    assert not list(folder.glob(".push-*"))

    # A pushed checkpoint is a model like any other.
    for _, message, files in checkpoints:
        pushed = tmp_path / message
        pushed.mkdir()
        for name, content in files.items():
            (pushed / name).write_bytes(content)
        assert SpidrForPretraining.from_pretrained(pushed).current_step.item() == int(message.removeprefix("Step "))
        SpidrFeatureExtractor.from_pretrained(pushed)
        assert set(files) == set(final)
        assert json.loads(files["config.json"])["auto_map"] == json.loads(final["config.json"])["auto_map"]
        assert f"A checkpoint after {message.removeprefix('Step ')} updates." in files["README.md"].decode()


def test_a_hub_that_is_away_stops_nothing(config, tmp_path, hub, caplog):
    hub.failing = True
    with caplog.at_level(logging.WARNING):
        folder = pretrain_here(config, tmp_path / "run", "--run.push_to_hub", "me/spidr")
    assert (folder / "final").exists() and len(rows(folder)) == 12
    assert "Pushing 'The final model' to me/spidr failed: the Hub is away" in caplog.text


def test_what_cannot_be_pushed_is_refused_before_anything_is_trained(config, tmp_path, hub, monkeypatch):
    def refused(self, *_, **__):
        raise ConnectionError("403 Forbidden: no right to write.\nRequest ID: 1")

    monkeypatch.setattr(StubApi, "create_repo", refused)
    with pytest.raises(ConfigError, match=r"`run\.push_to_hub` me/spidr: nothing can be pushed there \(403 Forbidden"):
        pretrain_here(config, tmp_path / "run", "--run.push_to_hub", "me/spidr")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock"]


def test_a_resumed_run_does_not_depend_on_the_hub(config, tmp_path, hub, monkeypatch, caplog):
    """It has been pushed to before: what fails for a while must not end a run of days."""
    options = ["--run.push_to_hub", "me/spidr"]
    pretrain_here(config, tmp_path / "run", *options, "--optimizer.max_steps", "3")
    monkeypatch.setattr(StubApi, "create_repo", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("away")))
    with caplog.at_level(logging.WARNING):
        folder = pretrain_here(config, tmp_path / "run", *options)
    assert len(rows(folder)) == 12 and "failed: away" in caplog.text


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_trained(config, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    for tracker in ("wandb", "trackio", "mlflow"):
        with pytest.raises(ConfigError, match=f"`run.tracker` is {tracker}, which is not installed: pip install"):
            pretrain_here(config, tmp_path / "run", "--run.tracker", tracker)
    assert not (tmp_path / "run").exists()


def test_only_the_newest_waits(config, tmp_path, hub):
    """Uploads slower than training: what waits is replaced, and checkpoints may be removed meanwhile."""
    hub.gate.clear()
    said = []
    push = HubPush("me/spidr", load_config(config), tmp_path, said.append)
    for step in (1, 2, 3):
        folder = tmp_path / f"step_{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes([step]))
        push.saved(folder)
        if step == 1:
            while push.waiting is not None:  # the first is being uploaded
                time.sleep(0.01)
        (folder / "model.safetensors").unlink()
    push.saved(tmp_path / "step_4")  # not there: said, and no more
    hub.gate.set()
    while push.waiting is not None or len(hub.uploads) < 2:
        time.sleep(0.01)
    final = tmp_path / "final"
    final.mkdir()
    (final / "model.safetensors").write_bytes(b"final")
    push.finish(final)
    assert said == ["Pushed to https://huggingface.co/me/spidr"]
    assert [(message, files["model.safetensors"]) for _, message, files in hub.uploads] == [
        ("Step 1", b"\x01"),
        ("Step 3", b"\x03"),
        ("The final model", b"final"),
    ]


# ---- trackers


def test_any_tracker_of_accelerate(config, tmp_path, monkeypatch):
    """A stand-in for those that accelerate knows, under the name of one of them."""
    started, logged = [], []

    class Recorder(GeneralTracker):
        name, requires_logging_directory = "trackio", False

        @on_main_process
        def __init__(self, run_name, **options):
            super().__init__()
            started.append((run_name, options))

        @property
        def tracker(self):
            return self

        @on_main_process
        def store_init_configuration(self, values):
            started.append(values)

        @on_main_process
        def log(self, values, step=None, **_):
            logged.append((step, values))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Recorder)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TRACKIO])
    options = ["--run.tracker", "trackio", "--run.wandb_project", "speech", "--run.log_interval", "4"]
    folder = pretrain_here(config, tmp_path / "run", *options)
    (project, given), values = started
    identifier = (folder / ".tracker_id").read_text().split()[0]
    assert project == "speech" and given["name"] == f"run-{identifier}"
    assert values == load_config(folder / "config.toml").to_dict()
    assert [step for step, _ in logged] == [4, 8, 12]
    assert logged[0][1]["loss"] == rows(folder)[0]["loss"]
    assert logged[0][1]["layer_losses/1"] == rows(folder)[0]["layer_losses"][1]


def test_wandb_offline(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = ["--run.tracker", "wandb", "--run.wandb_mode", "offline"]
    folder = pretrain_here(config, tmp_path / "run", *options, "--optimizer.max_steps", "3")
    pretrain_here(config, folder, *options, "--optimizer.max_steps", "6")
    runs = list((folder / "wandb").glob("offline-run-*"))
    identifiers = {path.name.rpartition("-")[2] for path in runs}
    assert len(runs) == 2 and len(identifiers) == 1  # one run on the site, in two pieces
    assert all(list(path.glob("*.wandb")) for path in runs)
    assert not [thread.name for thread in threading.enumerate() if "wandb" in thread.name]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("profile_steps", "5", "first and the last step"),
        ("profile_steps", "5:3", "first and the last step"),
        ("push_to_hub", "a/b/c", "a repository's name"),
        ("push_to_hub", "/b", "a repository's name"),
        ("plot_minutes", "-1", "at least 0"),
    ],
)
def test_bad_options(config, field, value, message):
    with pytest.raises(ConfigError, match=rf"`run\.{field}` must be .*{message}"):
        load_config(config, [f"--run.{field}", value])


def test_a_run_with_all_of_it(config, tmp_path):
    folder = pretrain_here(config, tmp_path / "run", "--run.profile_steps", "11:40", "--run.plot_minutes", "0.0001")
    assert (folder / "curves.png").exists()
    assert (folder / "profile" / "steps_11-40.json.gz").exists()  # the run ends before the profile does
    assert [path.name for path in (folder / "profile").iterdir()] == ["steps_11-40.json.gz"]
