"""The stock `transformers.Trainer` with our callback pretrains as `examples/pretrain.py` does."""

import json
import logging

import pytest
import torch
from runs import final, finish, forget_processes, launch, pretrain_here, rows, write_audio, write_config
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from spidr_hf import SpidrForPretraining
from spidr_hf.data.batches import PretrainingBatches
from spidr_hf.data.manifests import open_manifest
from spidr_hf.pretraining.config import load_config
from spidr_hf.pretraining.hf_trainer import SpidrTrainerCallback, UpdateCollator, make_trainer

QUIET = {"use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    return write_config(folder / "tiny.toml", write_audio(folder / "audio"))


@pytest.fixture(autouse=True)
def no_processes_left():
    yield
    forget_processes()


def trainer_of(config_file, folder, *overrides, **arguments) -> Trainer:
    forget_processes()
    config = load_config(config_file, overrides)
    return make_trainer(config, open_manifest(config.data.manifest, progress=False), folder, **{**QUIET, **arguments})


def assert_the_same(history: list[dict], expected: list[dict]) -> None:
    """What Trainer logged, against the rows of metrics.jsonl."""
    ours = [row for row in history if "loss" in row]
    assert [row["step"] for row in ours] == list(range(1, 21))
    for left, right in zip(ours, expected, strict=True):
        for name in ("loss", "target_ppl", "pred_ppl", "grad_norm"):
            assert left[name] == pytest.approx(right[name], rel=1e-4), (left["step"], name)
        assert left["learning_rate"] == pytest.approx(right["lr"])
        assert left["ema_decay"] == pytest.approx(right["ema_decay"])
        for k in range(2):
            assert left[f"layer_losses/{k}"] == pytest.approx(right["layer_losses"][k], rel=1e-4)


def assert_close(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


OPTIONS = {
    "accumulation, through the freeze": ["--optimizer.gradient_accumulation_steps", "3"],
    "padding, no mask": ["--data.enable_padding", "true", "--masking.mask_prob", "0"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_losses_of_trainer_are_those_of_the_command(config_file, tmp_path, options):
    options = [*options, "--optimizer.max_steps", "20", "--run.save_interval", "20"]
    pretrain_here(config_file, tmp_path / "command", *options)
    trainer = trainer_of(config_file, tmp_path / "trainer", *options)
    trainer.train()

    assert_the_same(trainer.state.log_history, rows(tmp_path / "command"))
    state = trainer.model.state_dict()
    assert_close(state, final(tmp_path / "command"))
    # What it saved is a model like any other, with everything in it.
    saved = SpidrForPretraining.from_pretrained(tmp_path / "trainer" / "checkpoint-20")
    assert saved.current_step.item() == 20
    assert all(torch.equal(value, saved.state_dict()[name]) for name, value in state.items())


def test_a_resumed_trainer_goes_on_where_it_was(config_file, tmp_path):
    options = ["--run.save_interval", "5", "--optimizer.gradient_accumulation_steps", "2", "--data.num_workers", "1"]
    whole = trainer_of(config_file, tmp_path / "whole", *options)
    whole.train()
    trainer_of(config_file, tmp_path / "cut", *options, max_steps=10).train()
    resumed = trainer_of(config_file, tmp_path / "cut", *options)
    resumed.train(resume_from_checkpoint=True)
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_updates_that_are_not_finite_are_skipped(config_file, tmp_path, monkeypatch, caplog):
    getitem = PretrainingBatches.__getitem__
    broken = {2}

    def batch(self, key):
        result = getitem(self, key)
        if key.index in broken:
            result.input_values[:] = float("nan")
        return result

    monkeypatch.setattr(PretrainingBatches, "__getitem__", batch)
    trainer = trainer_of(config_file, tmp_path, "--optimizer.max_steps", "5", max_steps=5)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "Step 3: loss nan, gradient norm nan. The update is skipped (1 so far)." in caplog.text
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert "target_ppl" not in history[2] and "target_ppl" in history[3]
    broken |= set(range(100))
    with pytest.raises(RuntimeError, match=r"3 updates in a row had a non-finite .* Lower the learning rate\."):
        trainer_of(config_file, tmp_path / "always", "--run.max_nonfinite_steps", "3").train()


def test_what_does_not_go_together_is_refused(config_file, tmp_path):
    def assemble(**changes):
        trainer = trainer_of(config_file, tmp_path, "--optimizer.gradient_accumulation_steps", "2")
        for name, value in changes.items():
            setattr(trainer, name, value)
        return trainer

    with pytest.raises(ValueError, match=r"Pass `compute_loss_func=callback\.compute_loss`"):
        assemble(compute_loss_func=None).train()
    trainer = assemble()
    collate = trainer.data_collator

    def unlabelled(items):
        return {name: value for name, value in collate(items).items() if name != "labels"}

    trainer.data_collator = unlabelled
    with pytest.raises(ValueError, match="must add `labels`"):
        trainer.train()
    with pytest.raises(ValueError, match="`per_device_train_batch_size` to 1"):
        UpdateCollator(load_config(config_file))([None, None])
    callback, args = SpidrTrainerCallback(), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match="for SpidrForPretraining, got Linear"):
        callback.on_train_begin(args, trainer.state, trainer.control, model=torch.nn.Linear(1, 1))


def test_the_logs_reach_the_trackers(config_file, tmp_path):
    """The callback comes first, so that those of trackers see what it adds."""
    trainer = trainer_of(
        config_file, tmp_path / "run", "--optimizer.max_steps", "4", report_to="tensorboard", logging_steps=2
    )
    trainer.train()
    assert isinstance(trainer.callback_handler.callbacks[0], SpidrTrainerCallback)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    assert b"target_ppl" in events.read_bytes()
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"]] == [2, 4] and "target_ppl" in state["log_history"][1]


# A command like `examples/pretrain.py`, with Trainer in it. The last options are whether it resumes, and its steps.
TRAINER = """
import sys
from spidr_hf.data.manifests import open_manifest
from spidr_hf.pretraining.config import load_config
from spidr_hf.pretraining.hf_trainer import make_trainer

_, _, config, _, folder, *overrides, resume, steps = sys.argv
config = load_config(config, overrides)
source = open_manifest(config.data.manifest, progress=False)
trainer = make_trainer(config, source, folder, use_cpu=True, disable_tqdm=True, max_steps=int(steps))
assert trainer.args.world_size == 2
trainer.train(resume_from_checkpoint=resume == "resume")
"""


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", ["1", "3"])
def test_two_processes(config_file, tmp_path, accumulation):
    """As many as share an update: losses and state are those of the command with two, also after a resume."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    options = ["--optimizer.gradient_accumulation_steps", accumulation, "--optimizer.max_steps", "20"]
    options += ["--run.save_interval", "5", "--model.freeze_step", "100", "--data.num_workers", "1"]
    finish(launch(config_file, tmp_path / "command", *options, processes=2))
    for folder, resume, steps in (("whole", "begin", "20"), ("cut", "begin", "10"), ("cut", "resume", "20")):
        finish(launch(config_file, tmp_path / folder, *options, resume, steps, processes=2, script=script))
    for folder in ("whole", "cut"):
        saved = tmp_path / folder / "checkpoint-20"
        assert_the_same(
            json.loads((saved / "trainer_state.json").read_text())["log_history"], rows(tmp_path / "command")
        )
        assert_close(load_file(saved / "model.safetensors"), final(tmp_path / "command"))
