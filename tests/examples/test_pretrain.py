"""`examples/pretrain.py` from end to end: it runs, and resumes where it was killed. (The rest with real processes.)"""

import ast
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, constants
from runs import SCRIPT, assert_same_run, final, pretrain_here, rows, write_audio, write_config
from safetensors.torch import load_file

from spidr_hf import SpidrFeatureExtractor, SpidrForPretraining, SpidrModel
from spidr_hf.data.batches import PretrainingBatches
from spidr_hf.data.manifests import scan_folder
from spidr_hf.hub.spidr_names import TRAINING_FIELDS, to_model_section
from spidr_hf.pretraining.config import load_config
from spidr_hf.system.errors import BatchingError, ConfigError, ManifestError, RunFolderError
from spidr_hf.system.processes import RunLock
from spidr_hf.training.checkpoints import Checkpoints
from spidr_hf.training.metrics import MetricsFile
from spidr_hf.training.schedules import learning_rate
from spidr_hf.training.stopping import StopSignal

ROW = {
    "step", "epoch", "loss", "layer_losses", "target_ppl", "pred_ppl", "active_codewords", "grad_norm", "lr",
    "ema_decay", "audio_seconds_per_second", "world_size",
}  # fmt: skip


@pytest.fixture(scope="session")
def audio(tmp_path_factory) -> Path:
    return write_audio(tmp_path_factory.mktemp("pretrain") / "audio")


@pytest.fixture
def config(audio, tmp_path) -> Path:
    return write_config(tmp_path / "tiny.toml", audio)


@pytest.fixture
def pretrain(config, tmp_path):
    """`pretrain(name, *overrides)` runs it in this process, into a folder of that name, and returns the folder."""
    return lambda name, *overrides, **options: pretrain_here(config, tmp_path / name, *overrides, **options)


def test_what_a_later_start_uses_is_listed_no_more(pretrain, audio, tmp_path):
    shutil.copytree(audio, tmp_path / "copy")
    scan_folder(tmp_path / "copy", progress=False).write(tmp_path / "m.csv")
    first, *_, last = sorted((tmp_path / "copy").glob("*.*"))
    whole = first.read_bytes()
    first.write_text("not audio")
    last.unlink()
    options = ("--data.manifest", str(tmp_path / "m.csv"), "--data.max_skipped_share", "0.9")

    def listed(folder):
        return sorted(json.loads(line)["file"] for line in (folder / "skipped.jsonl").read_text().splitlines())

    folder = pretrain("run", *options, "--optimizer.max_steps", "12")
    assert listed(folder) == [first.stem, last.stem]
    first.write_bytes(whole)
    assert listed(pretrain("run", *options, "--optimizer.max_steps", "24")) == [last.stem]


class Killed(BaseException):
    """Stands for SIGKILL where a test needs it at an exact place."""


def test_a_run(pretrain, config, audio):
    (audio / "bad.wav").write_text("not audio")
    try:
        folder = pretrain("run", "--run.tracker", "tensorboard")
    finally:
        (audio / "bad.wav").unlink()
    section = load_config(config).optimizer
    assert [row["step"] for row in rows(folder)] == list(range(1, 13))
    for row in rows(folder):
        assert set(row) == ROW and len(row["layer_losses"]) == 2
        assert row["loss"] == pytest.approx(np.mean(row["layer_losses"]))
        assert row["lr"] == learning_rate(section, row["step"]) and row["world_size"] == 1
        assert row["ema_decay"] == pytest.approx(1 - 1e-3 * np.exp(-row["step"] / 10))
        assert row["audio_seconds_per_second"] > 0
    assert rows(folder)[0]["epoch"] == 1 and rows(folder)[-1]["epoch"] == 2
    assert rows(folder)[-1]["loss"] < rows(folder)[0]["loss"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_12", "step_3", "step_6", "step_9"]
    assert (
        load_config(folder / "config.toml").to_dict() == load_config(config, ["--run.tracker", "tensorboard"]).to_dict()
    )
    assert [json.loads(line)["file"] for line in (folder / "skipped.jsonl").read_text().splitlines()] == ["bad"]
    assert list(folder.rglob("events.out.tfevents*"))
    # The result is a model folder like any other.
    model = SpidrForPretraining.from_pretrained(folder / "final")
    assert model.current_step.item() == 12
    SpidrModel.from_pretrained(folder / "final")
    SpidrFeatureExtractor.from_pretrained(folder / "final")
    card = (folder / "final" / "README.md").read_text()
    assert "A SpidR model" in card and "encoder_embed_dim = 32" in card and "12 updates" in card


def test_what_freezes_stands_still(pretrain):
    folder = pretrain("run")
    states = {step: load_file(folder / "checkpoints" / f"step_{step}" / "model.safetensors") for step in (6, 9, 12)}

    def moved(first, last):
        return {name for name in states[first] if not torch.equal(states[first][name], states[last][name])}

    frozen = {name for name in states[6] if name.startswith(("spidr.feature_extractor", "spidr.feature_projection"))}
    unread = {name for name in states[6] if "layers.2.final_layer_norm" in name}
    assert moved(6, 9) == set(states[6]) - unread
    assert moved(9, 12) == set(states[6]) - unread - frozen
    optimizer = load_file(folder / "checkpoints" / "step_9" / "optimizer.safetensors")
    assert not any("feature_" in name for name in optimizer) and any("encoder" in name for name in optimizer)


OPTIONS = {
    "plain": [],
    "accumulation and workers": ["--optimizer.gradient_accumulation_steps", "2", "--data.num_workers", "2"],
    "rows over several checkpoints": ["--run.log_interval", "4", "--run.save_interval", "2"],
    "bfloat16, padding": ["--optimizer.dtype", "bfloat16", "--data.enable_padding", "true"],
    "dinosr, uniform spans": ["--run.model_type", "dinosr", "--masking.mask_selection", "uniform"],
}
QUICK = ("accumulation and workers", "dinosr, uniform spans")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, options in OPTIONS.items()
    ],
)
def test_killed_and_started_again_it_is_the_same_run(pretrain, monkeypatch, options):
    """Killed in a step, while a batch is made, twice; then told to stop in time."""
    expected = pretrain("whole", *options)
    steps = {"count": 0}
    add, save = torch.optim.AdamW.step, Checkpoints.save

    def killed_step(self, *args, **kwargs):
        steps["count"] += 1
        if steps["count"] in (5, 9):  # after step 3's checkpoint; then in the second epoch, after the freeze
            raise Killed
        return add(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", killed_step)
        # Dead processes write nothing, but this one's thread would: after a later start has looked for checkpoints.
        patch.setattr(Checkpoints, "save", lambda *args: save(*args, wait=True))
        for _ in range(2):
            with pytest.raises(Killed):
                pretrain("killed", *options)
    told, asked = StopSignal.agreed, []

    def in_time(self):
        asked.append(told(self))
        self.received = "SIGTERM" if len(asked) == 2 else None  # a step is made, then it is seen
        return told(self)

    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", in_time)
        pretrain("killed", *options)
    assert len(asked) == 2
    assert not (expected.parent / "killed" / "final").exists()
    assert_same_run(pretrain("killed", *options), expected)


def test_killed_while_a_checkpoint_is_written(pretrain, monkeypatch):
    expected = pretrain("whole")
    save_file = sys.modules["spidr_hf.training.checkpoints"].save_file
    written = []

    def torn(tensors, path, metadata=None):
        written.append(path)
        if len(written) == 4:  # the optimizer's file of step 6
            Path(path).write_bytes(b"half a file")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr("spidr_hf.training.checkpoints.save_file", torn)
        with pytest.raises(RunFolderError, match=r"Cannot write a checkpoint .*No space left on device"):
            pretrain("torn")
    assert Checkpoints(expected.parent / "torn" / "checkpoints").steps() == [3]
    assert_same_run(pretrain("torn"), expected)


def test_a_full_disk_under_the_metrics(pretrain, monkeypatch):
    expected = pretrain("whole")
    write = MetricsFile.write

    def full(self, row):
        if row["step"] == 5:
            with self.path.open("ab") as file:
                file.write(b'{"step": 5, "lo')
            raise OSError(28, "No space left on device")
        write(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "write", full)
        with pytest.raises(OSError, match="No space left on device"):
            pretrain("full")
    assert_same_run(pretrain("full"), expected)


def test_a_full_disk_under_the_final_save(pretrain, monkeypatch):
    expected = pretrain("whole")

    def full(self, folder, **_):
        Path(folder, "model.safetensors").write_bytes(b"some")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(SpidrForPretraining, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left on device"):
            pretrain("full")
    assert [path.name for path in (expected.parent / "full").glob("*final*")] == []
    assert_same_run(pretrain("full"), expected)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_signal_between_accumulated_batches(pretrain, monkeypatch, capsys, number):
    """The update is made with all of its batches, then saved; the run resumes with the next one."""
    options = ["--optimizer.gradient_accumulation_steps", "3", "--optimizer.max_steps", "6"]
    expected = pretrain("whole", *options)
    getitem, count = PretrainingBatches.__getitem__, iter(range(1, 100))

    def signalled(self, key):
        if next(count) == 11:  # the second of the three batches of step 4
            os.kill(os.getpid(), number)
        return getitem(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingBatches, "__getitem__", signalled)
        folder = pretrain("told", *options)
    assert f"{number.name}: saved step 4." in capsys.readouterr().err and not (folder / "final").exists()
    assert Checkpoints(folder / "checkpoints").steps() == [3, 4] and len(rows(folder)) == 4
    assert_same_run(pretrain("told", *options), expected)


def test_stopped_before_the_first_step(pretrain, monkeypatch, capsys):
    """What there is to save are the first weights; the run resumes as if it had begun then."""
    expected = pretrain("whole", "--optimizer.max_steps", "4")
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", lambda self: bool(setattr(self, "received", "SIGINT") or True))
        folder = pretrain("told", "--optimizer.max_steps", "4")
        assert "SIGINT: saved step 0." in capsys.readouterr().err
        before = (folder / "checkpoints" / "step_0" / "trainer_state.json").stat().st_mtime_ns
        pretrain("told", "--optimizer.max_steps", "4")  # again at once: there is nothing to save anew
    assert (folder / "checkpoints" / "step_0" / "trainer_state.json").stat().st_mtime_ns == before
    assert_same_run(pretrain("told", "--optimizer.max_steps", "4"), expected)


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_complete_run_is_left_as_it_is(pretrain, capsys):
    """Also when it is started with another option, which would have no effect; a longer one continues it."""
    folder = pretrain("run", "--optimizer.max_steps", "4")
    before = snapshot(folder)
    for options, effect in (([], ""), (["--optimizer.lr", "1e-3"], "optimizer.lr 0.002 -> 0.001")):
        capsys.readouterr()
        pretrain("run", "--optimizer.max_steps", "4", *options)
        said = capsys.readouterr().err.strip()
        assert snapshot(folder) == before and "\n" not in said
        assert "is complete: 4 updates are made" in said and said.endswith(effect + ("." if effect else "run."))
    pretrain("run", "--optimizer.max_steps", "3")  # fewer than there are
    assert snapshot(folder) == before and "is complete: 4 updates" in capsys.readouterr().err
    with pytest.raises(RunFolderError, match=r"holds another run: model\.codebook_size"):
        pretrain("run", "--optimizer.max_steps", "4", "--model.codebook_size", "13")
    assert snapshot(folder) == before
    pretrain("run", "--optimizer.max_steps", "5")
    assert SpidrForPretraining.from_pretrained(folder / "final").current_step.item() == 5


def test_killed_between_the_last_checkpoint_and_the_final_model_of_a_longer_run(pretrain, monkeypatch):
    """`final` is there, but that of the shorter run."""
    folder = pretrain("run", "--optimizer.max_steps", "4")
    with monkeypatch.context() as patch:
        patch.setattr(SpidrFeatureExtractor, "save_pretrained", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pretrain("run")
    pretrain("run")
    assert SpidrForPretraining.from_pretrained(folder / "final").current_step.item() == 12


def test_killed_during_the_final_save(pretrain, monkeypatch):
    expected = pretrain("whole")
    with monkeypatch.context() as patch:
        patch.setattr(SpidrFeatureExtractor, "save_pretrained", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            pretrain("killed")
    assert not (expected.parent / "killed" / "final").exists()
    before = (expected.parent / "killed" / "metrics.jsonl").read_bytes()
    folder = pretrain("killed")
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert_same_run(folder, expected)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(pretrain, caplog):
    expected = pretrain("whole")
    folder = pretrain("cut", "--optimizer.max_steps", "9")
    assert [row["step"] for row in rows(folder)] == list(range(1, 10))
    kept = (folder / "metrics.jsonl").read_bytes().splitlines()[:6]
    file = folder / "checkpoints" / "step_9" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    pretrain("cut")
    assert "step_9 is damaged" in caplog.text
    assert (folder / "metrics.jsonl").read_bytes().splitlines()[:6] == kept
    assert_same_run(folder, expected)


def test_accumulated_batches_are_one_large_batch(pretrain):
    """The gradient of an update is that of the mean over all its masked frames, whatever batches they came in."""
    options = [
        "--model.encoder_dropout",
        "0",
        "--model.encoder_attention_dropout",
        "0",
        "--model.encoder_layer_drop",
        "0",
    ]
    folder = pretrain(
        "accumulated", *options, "--optimizer.gradient_accumulation_steps", "3", "--optimizer.max_steps", "2"
    )
    config = load_config(folder / "config.toml")
    torch.manual_seed(config.run.random_seed)
    model = SpidrForPretraining(config.model).train()
    from spidr_hf.data.batches import make_sampler
    from spidr_hf.data.manifests import open_manifest

    source = open_manifest(config.data.manifest, progress=False)
    keys = make_sampler(source, config.data, config.model, accumulation=3).epoch_batches(0)
    dataset = PretrainingBatches(source, config.data, config.masking, config.model)
    from spidr_hf.data.batching import BatchKey, Position

    batches = [dataset[BatchKey(0, index, keys[index], Position())] for index in range(3)]
    frames = sum(batch.mask_time_indices.numel() for batch in batches)
    for batch in batches:
        output = model(**batch.inputs)
        (output.loss * batch.mask_time_indices.numel() / frames).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    statistics = model.reduce_statistics()
    first = rows(folder)[0]
    assert first["grad_norm"] == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-4)
    assert first["loss"] == pytest.approx(statistics.loss.item(), rel=1e-5)
    assert first["target_ppl"] == pytest.approx(statistics.target_ppl.item(), rel=1e-5)


def test_a_run_without_masks(pretrain):
    assert rows(pretrain("run", "--masking.mask_prob", "0", "--optimizer.max_steps", "2"))[1]["loss"] > 0


def test_starting_from_existing_weights(pretrain, tmp_path):
    """From a checkpoint whose step is past the freeze: weights, codebooks and teacher, and everything begins anew."""
    torch.manual_seed(5)
    old = SpidrForPretraining(load_config(tmp_path / "tiny.toml").model)
    old.current_step.fill_(400_000)
    old.save_pretrained(tmp_path / "old")
    folder = pretrain("adapted", "--run.init_ckpt", str(tmp_path / "old"), "--optimizer.max_steps", "3")
    before, after = old.state_dict(), final(folder)
    assert after["current_step"].item() == 3
    for part in ("spidr.feature_extractor", "spidr.encoder.layers.0", "teacher.layers", "codebooks", "heads"):
        name = next(name for name in before if name.startswith(part))
        assert not torch.equal(before[name], after[name])
        if part != "codebooks":  # which move fast
            torch.testing.assert_close(before[name], after[name], atol=0.05, rtol=0.5)
    assert rows(folder)[0]["lr"] == pytest.approx(2e-5) and rows(folder)[0]["ema_decay"] < 0.9991


def test_init_ckpt_may_be_a_long_url(pretrain, tmp_path, monkeypatch):
    """As those are that a store signs, with parts longer than names of files can be."""
    fixture = Path(__file__).parents[1] / "fixtures" / "parity" / "spidr-tiny"
    section = json.loads((fixture / "config.json").read_text())["model"]
    overrides = [text for name, value in section.items() for text in (f"--model.{name}", json.dumps(value).strip('"'))]
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(fixture))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        start = f"http://127.0.0.1:{server.server_port}/checkpoint.pt?signature={'x' * 300}"
        folder = pretrain("signed", *overrides, "--run.init_ckpt", start, "--optimizer.max_steps", "1")
        server.shutdown()
    assert ModelCard.load(folder / "final" / "README.md").data.base_model is None


def test_what_init_ckpt_is_need_not_be_written(pretrain, config, tmp_path):
    """As adapt-to-language.toml has it; rates are the config's, and a resumed run no longer needs what it took."""
    fixture = Path(__file__).parents[1] / "fixtures" / "parity" / "spidr-tiny"
    shutil.copytree(fixture, tmp_path / "start")
    section = json.loads((fixture / "config.json").read_text())["model"]
    text = config.read_text()
    first, last = text.index("[model]"), text.index("[optimizer]")
    config.write_text(f"{text[:first]}[model]\nencoder_layer_drop = 0.0\nema_timescale = 7\n\n{text[last:]}")
    start = tmp_path / "start" / "checkpoint.pt"
    for steps in ("1", "2"):
        folder = pretrain("run", "--run.init_ckpt", str(start), "--optimizer.max_steps", steps)
        start.unlink(missing_ok=True)
    got = to_model_section(SpidrForPretraining.from_pretrained(folder / "final").config)
    assert got["ema_timescale"] == 7 and got["codebook_size"] == section["codebook_size"] == 24
    assert {name: got[name] for name in got if name not in TRAINING_FIELDS} == {
        name: section[name] for name in got if name not in TRAINING_FIELDS
    }
    with pytest.raises(ConfigError, match=r"codebook_size is 24 there and 7 here"):
        pretrain("other", "--model.codebook_size", "7", "--run.init_ckpt", str(fixture / "checkpoint.pt"))


def test_starting_from_a_spidr_checkpoint(pretrain, tmp_path):
    fixture = Path(__file__).parents[1] / "fixtures" / "parity" / "spidr-tiny"
    section = json.loads((fixture / "config.json").read_text())["model"]
    overrides = [text for name, value in section.items() for text in (f"--model.{name}", json.dumps(value).strip('"'))]
    folder = pretrain(
        "run", *overrides, "--run.init_ckpt", str(fixture / "full_checkpoint_ddp.pt"), "--optimizer.max_steps", "1"
    )
    assert to_model_section(SpidrForPretraining.from_pretrained(folder / "final").config) == section
    assert final(folder)["current_step"].item() == 1
    # Without a config.json beside it, [model] says what it is; with one, the two must agree on what shapes cannot tell.
    shutil.copy(fixture / "bare_state_dict.pt", tmp_path / "alone.pt")
    pretrain("alone", *overrides, "--run.init_ckpt", str(tmp_path / "alone.pt"), "--optimizer.max_steps", "1")
    with pytest.raises(ValueError, match=r"codebook_size is 24 there and 7 here"):
        pretrain("other", *overrides, "--model.codebook_size", "7", "--run.init_ckpt", str(fixture / "checkpoint.pt"))
    with pytest.raises(
        ConfigError, match=r"is another model than \[model\] says: encoder_num_heads is 4 there and 2 here"
    ):
        pretrain(
            "heads", *overrides, "--model.encoder_num_heads", "2", "--run.init_ckpt", str(fixture / "checkpoint.pt")
        )
    with pytest.raises(ValueError, match="codebook_size is 24 in the tensors, 7 in the configuration"):
        pretrain("sizes", *overrides, "--model.codebook_size", "7", "--run.init_ckpt", str(tmp_path / "alone.pt"))


def test_updates_with_non_finite_losses_are_skipped(pretrain, monkeypatch, capsys):
    getitem = PretrainingBatches.__getitem__

    def broken(steps):
        def batch(self, key):
            result = getitem(self, key)
            if key.index in steps:
                result.input_values[:] = float("nan")
            return result

        return batch

    with monkeypatch.context() as patch:
        patch.setattr(PretrainingBatches, "__getitem__", broken({2}))
        folder = pretrain("once", "--run.save_interval", "100")
    assert "Step 3: loss nan" in capsys.readouterr().err
    assert [row["step"] for row in rows(folder)] == list(range(1, 13))
    assert rows(folder)[2]["loss"] is None and all(row["loss"] is not None for row in rows(folder)[3:7])
    assert all(torch.isfinite(tensor).all() for tensor in final(folder).values())
    monkeypatch.setattr(PretrainingBatches, "__getitem__", broken(set(range(2, 100))))
    with pytest.raises(RunFolderError, match=r"4 updates in a row .* the last at step 6 .*lower optimizer\.lr"):
        pretrain("always", "--run.max_nonfinite_steps", "4")


def test_a_skipped_update_at_the_freeze_still_freezes(pretrain, monkeypatch):
    getitem = PretrainingBatches.__getitem__
    count = iter(range(100))

    def batch(self, key):
        result = getitem(self, key)
        if next(count) == 7:
            result.input_values[:] = float("nan")
        return result

    monkeypatch.setattr(PretrainingBatches, "__getitem__", batch)
    folder = pretrain("run")
    states = [load_file(folder / "checkpoints" / f"step_{step}" / "model.safetensors") for step in (9, 12)]
    name = "spidr.feature_projection.projection.weight"
    assert torch.equal(states[0][name], states[1][name])


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["--data.manifest", "/nowhere.csv"], ValueError, "/nowhere.csv: no such file or folder"),
        (["--data.min_sample_size", "8000", "--data.max_sample_size", "8000", "--data.max_skipped_share", "0.7"],
         None, None),
        (["--data.min_sample_size", "8000"], ValueError, "12 of 20 utterances cannot be used, more than"),
        (["--data.min_sample_size", "90000", "--data.max_sample_size", "90000", "--data.max_batch_length", "90000"],
         ValueError, "No utterance has the 90000 samples"),
        (["--run.init_ckpt", "/nowhere.pt"], ValueError, "/nowhere.pt does not exist"),
        (["--optimizer.dtype", "float16"], ConfigError, "float16 needs a GPU"),
        (["--run.tracker", "nonsense"], ConfigError, r"`run\.tracker` nonsense"),
    ],
)  # fmt: skip
def test_bad_input(pretrain, overrides, error, message):
    if error is None:
        assert rows(pretrain("run", *overrides, "--optimizer.max_steps", "1"))
        return
    with pytest.raises(error, match=message):
        pretrain("run", *overrides)
    assert not (Path("run") / "final").exists()


def test_another_model_in_the_same_folder_is_refused(pretrain, capsys):
    pretrain("run", "--optimizer.max_steps", "3")
    with pytest.raises(RunFolderError, match=r"holds another run: model\.codebook_size is 12 there and 13 here"):
        pretrain("run", "--model.codebook_size", "13")
    pretrain("run", "--optimizer.max_steps", "4", "--optimizer.lr", "1e-3")
    printed = capsys.readouterr().err
    assert "Changed since this run began: optimizer.lr 0.002 -> 0.001" in printed and "Continuing from" in printed


def test_beginning_anew(pretrain, tmp_path, capsys):
    """Asked for, what was there is kept in a folder of its own; where nothing can be read, it has to be asked for."""
    folder = pretrain("run", "--optimizer.max_steps", "3")
    for file in (folder / "checkpoints").rglob("model.safetensors"):
        file.write_bytes(b"damaged")
    with pytest.raises(RunFolderError, match=r"None of the checkpoints .* can be read .*--fresh"):
        pretrain("run")
    assert len(rows(folder)) == 3
    capsys.readouterr()
    pretrain("run", "--optimizer.max_steps", "4", fresh=True)
    assert f"Beginning anew. What was there is in {folder / 'earlier-1'}." in capsys.readouterr().err
    assert len(rows(folder)) == 4 and len(rows(folder / "earlier-1")) == 3
    assert SpidrForPretraining.from_pretrained(folder / "checkpoints" / "step_4").current_step.item() == 4
    SpidrFeatureExtractor.from_pretrained(folder / "checkpoints" / "step_4")
    with pytest.raises(ConfigError, match=r"init_ckpt. .*run is no model folder.*give .*final or .*step_4"):
        pretrain("other", "--run.init_ckpt", str(folder))


def test_a_requeued_job_begins_anew_once(pretrain, monkeypatch, capsys):
    """SLURM starts the same command again, `--fresh` included."""
    pretrain("run", "--optimizer.max_steps", "2")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for restarts, job, steps, earlier in ((0, "7", 2, 1), (1, "7", 4, 1), (2, "7", 5, 1), (1, "8", 1, 2)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        folder = pretrain("run", "--optimizer.max_steps", str(steps), fresh=True)
        assert len(rows(folder)) == steps and len(list(folder.glob("earlier-*"))) == earlier
        assert ("Beginning anew" in capsys.readouterr().err) == (steps < 4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--data.manifest", "absent.csv"], ManifestError),
        (["--data.min_sample_size", "16000", "--data.max_sample_size", "16000"], BatchingError),
        (["--run.init_ckpt", "absent"], ConfigError),
    ],
)
def test_a_refused_start_leaves_nothing_of_a_new_folder_and_all_of_an_old_one(pretrain, tmp_path, options, error):
    with pytest.raises(error):
        pretrain("new", *options)
    left = snapshot(tmp_path / "new") if (tmp_path / "new").exists() else {}
    assert {path.name for path in left} <= {"data.arrow"}
    folder = pretrain("old", "--optimizer.max_steps", "2")
    before = snapshot(folder)
    with pytest.raises(error):
        pretrain("old", *options, fresh=True)
    assert snapshot(folder) == before


def test_a_second_run_in_the_same_folder_is_refused(pretrain, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    code = "import fcntl, time\nf = open('.lock', 'a+')\nfcntl.lockf(f, fcntl.LOCK_EX)\nprint(1, flush=True)\n"
    code += "time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path / "run")
    try:
        other.stdout.readline()
        monkeypatch.setattr(RunLock.__init__, "__defaults__", (0.1,))
        with pytest.raises(RunFolderError, match="is in use by another run"):
            pretrain("run")
    finally:
        other.kill()
        other.wait()


def test_it_reads_like_an_essay():
    """Few parts, each of which says what it is."""
    names = {node.module for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.ImportFrom)} - {
        "pathlib"
    }
    assert len(names) <= 10 and all(name.startswith("spidr_hf.") for name in names)


@pytest.mark.slow
def test_the_command_says_what_is_wrong_in_one_line(config, tmp_path):
    command_line = [sys.executable, str(SCRIPT), "--config", str(config), "--output-dir", str(tmp_path / "run")]
    done = subprocess.run([*command_line, "--optimizer.lrr", "1"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.strip() == "error: Unknown field `optimizer.lrr`. Did you mean 'lr'?"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--num_processes", "1"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run([*launcher, *command_line[1:], "--optimizer.lrr", "1"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.strip() == "error: Unknown field `optimizer.lrr`. Did you mean 'lr'?"
    done = subprocess.run([*command_line, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "gradient_accumulation_steps" in done.stdout
