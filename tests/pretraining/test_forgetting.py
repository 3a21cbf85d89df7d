"""Active forgetting: held against autograd, the same on all processes, once at the start of a run and never again."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from runs import TINY, assert_same_run, final, finish, launch, pretrain_here, rows, write_audio, write_config
from tiny import random_mask, tiny_model

from spidr_hf import SpidrForPretraining
from spidr_hf.conversion.checkpoints import read_pretraining_checkpoint
from spidr_hf.pretraining import forgetting
from spidr_hf.pretraining.config import load_config
from spidr_hf.pretraining.forgetting import HEAD_LEARNING_RATE, HEAD_STEPS, fit_heads, forget
from spidr_hf.system.errors import ConfigError
from spidr_hf.system.fields import dump_toml


def batch(seed: int, rows: int = 2, samples: int = 6000) -> dict[str, torch.Tensor]:
    waveforms = torch.randn(rows, samples, generator=torch.Generator().manual_seed(seed))
    return {"input_values": waveforms, "mask_time_indices": random_mask(rows, 18, seed)}


def forgetful(*batches: dict, **changes) -> tuple[SpidrForPretraining, SpidrForPretraining]:
    """A model before and after."""
    before, after = (tiny_model(**changes) for _ in range(2))
    forget(after.train(), enumerate(batches), nullcontext(), seed=7)
    return before, after


@pytest.mark.parametrize("objective", ["spidr", "dinosr"])
def test_heads_are_those_of_plain_gradient_descent(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each head alone, by torch's own Linear, loss and SGD, on the representations that the ordinary forward gives."""
    first = batch(1)
    with monkeypatch.context() as patched:
        patched.setattr(forgetting, "HEAD_STEPS", 0)
        _, drawn = forgetful(first, objective=objective)
    _, model = forgetful(first, objective=objective)
    read = []
    model.heads.register_forward_pre_hook(lambda _heads, arguments: read.append(arguments[0]))
    with torch.no_grad():
        labels = model(**first, output_predictions=True).labels
    representations = read[0].expand(3, -1, -1) if objective == "dinosr" else read[0]
    for k in range(3):
        head = torch.nn.Linear(48, 24)
        head.load_state_dict({"weight": drawn.heads.weight[k].detach(), "bias": drawn.heads.bias[k].detach()})
        optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
        for _ in range(20):
            loss = torch.nn.functional.cross_entropy(head(representations[k]), labels[k])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(model.heads.weight[k], head.weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(model.heads.bias[k], head.bias, atol=1e-6, rtol=1e-5)
    assert (HEAD_STEPS, HEAD_LEARNING_RATE) == (20, 0.05)


def test_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codebooks as at initialisation, heads as PyTorch makes a Linear."""
    monkeypatch.setattr(forgetting, "HEAD_STEPS", 0)
    before, after = forgetful(batch(1))
    sums = after.codebooks.sums
    torch.testing.assert_close(sums.mean(1), torch.zeros(3, 48), atol=1e-5, rtol=0)
    torch.testing.assert_close(sums.var(1, correction=0), torch.ones(3, 48), atol=1e-3, rtol=0)
    assert torch.equal(after.codebooks.counts, torch.ones(3, 24))
    bound = 48**-0.5
    for tensor in (after.heads.weight, after.heads.bias):
        assert 0.9 * bound < tensor.abs().max() <= bound and tensor.mean().abs() < 0.1 * bound
    assert not torch.equal(sums, before.codebooks.sums)


def test_nothing_else_changes() -> None:
    before, after = forgetful(batch(1))
    new = {"heads.weight", "heads.bias", "codebooks.sums", "codebooks.counts"}
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == new
    assert all(parameter.grad is None for parameter in after.parameters())
    with pytest.raises(RuntimeError, match="no statistics"):
        after.reduce_statistics()


def test_several_batches_count_as_one_large_one() -> None:
    first, second = batch(1), batch(2)
    both = {name: torch.cat([first[name], second[name]]) for name in first}
    (_, one), (_, two) = forgetful(both), forgetful(first, second)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_numbers_are_float32_in_a_bfloat16_run() -> None:
    model = tiny_model().train()
    forget(model, [(0, batch(1))], torch.autocast("cpu", torch.bfloat16), seed=7)
    _, exact = forgetful(batch(1))
    assert model.heads.weight.dtype == torch.float32
    assert torch.equal(model.codebooks.sums, exact.codebooks.sums)
    assert not torch.equal(model.heads.weight, model.heads.weight.bfloat16().float())


def test_fitted_heads_predict_better() -> None:
    x, labels = torch.randn(2, 200, 8), torch.randint(0, 5, (2, 200))
    x[..., :5] += 3 * torch.nn.functional.one_hot(labels, 5)
    weight, bias = torch.zeros(2, 5, 8), torch.zeros(2, 5)
    fit_heads(weight, bias, [x], [labels])
    logits = torch.einsum("knh,kvh->knv", x, weight) + bias.unsqueeze(1)
    assert (logits.argmax(-1) == labels).double().mean() > 0.8


# ---- in a run


@pytest.fixture(scope="session")
def audio(tmp_path_factory) -> Path:
    return write_audio(tmp_path_factory.mktemp("forgetting") / "audio")


@pytest.fixture
def config(audio: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.toml", audio)


FORGET = ("--run.active_forgetting", "true")


def test_a_run_that_forgets(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    SpidrForPretraining(load_config(config).model).save_pretrained(tmp_path / "old")
    start = ("--run.init_ckpt", str(tmp_path / "old"), "--optimizer.lr", "1e-12")
    forgets, keeps = (
        pretrain_here(config, tmp_path / name, *start, *options, "--optimizer.max_steps", "1")
        for name, options in (("forgets", FORGET), ("keeps", ()))
    )
    old = SpidrForPretraining.from_pretrained(tmp_path / "old").state_dict()

    def moved(folder: Path, name: str) -> float:
        return float((final(folder)[name] - old[name]).abs().max())

    assert moved(keeps, "heads.weight") < 1e-6  # off unless asked for
    assert moved(forgets, "heads.weight") > 1e-2
    for folder in (forgets, keeps):
        assert moved(folder, "spidr.encoder.layers.0.attention.qkv.weight") < 1e-6
    # Fitted on the very batch of the first update, the heads do better there than heads that nobody fitted.
    monkeypatch.setattr(forgetting, "HEAD_STEPS", 0)
    unfitted = pretrain_here(config, tmp_path / "unfitted", *start, *FORGET, "--optimizer.max_steps", "1")
    assert rows(forgets)[0]["loss"] < rows(unfitted)[0]["loss"]


def test_a_resumed_run_does_not_forget_again(config: Path, tmp_path: Path) -> None:
    whole = pretrain_here(config, tmp_path / "whole", *FORGET, "--optimizer.max_steps", "5")
    for steps in ("2", "5"):
        resumed = pretrain_here(config, tmp_path / "resumed", *FORGET, "--optimizer.max_steps", steps)
    assert_same_run(resumed, whole)


def test_adapting_as_spidr_adapt_does(audio: Path, tmp_path: Path) -> None:
    """Its TOML and checkpoint, phone classifiers and all: encoder and new units learn, teacher and extractor stay."""
    fixture = Path(__file__).parents[1] / "fixtures" / "parity" / "spidr-adapt-sl"
    model = json.loads((fixture / "config.json").read_text())["model"]
    sections = {
        "run": {"model_type": "spidr_reset", "init_ckpt": str(fixture / "step_5.pt"), "log_interval": 1},
        "data": {**TINY["data"], "ssl": {"manifest": str(audio)}},
        "model": {**model, "ema_start_decay": 1.0, "freeze_step": 0, "codebook_decay": 0.8},
        "optimizer": {"lr": 1e-3, "dtype": "float32", "scheduler": "constant", "max_steps": 2, "warmup_steps": 1},
        "meta_update": {"task_interval": 1000},
    }
    (tmp_path / "adapt.toml").write_text(dump_toml(sections))
    folder = pretrain_here(tmp_path / "adapt.toml", tmp_path / "run")
    before, after = read_pretraining_checkpoint(fixture / "step_5.pt").tensors, final(folder)
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert {"heads.weight", "codebooks.sums", "spidr.encoder.layers.0.attention.qkv.weight"} <= changed
    assert not {name for name in changed if name.startswith(("teacher.", "spidr.feature_"))}
    assert [row["ema_decay"] for row in rows(folder)] == [1.0, 1.0]


@pytest.mark.slow
def test_processes_forget_alike(config: Path, tmp_path: Path) -> None:
    """Two processes, with the model whole on each or in shards, are one process with two batches."""
    options = [*FORGET, "--optimizer.max_steps", "3"]
    finish(launch(config, tmp_path / "one", *options, "--optimizer.gradient_accumulation_steps", "2"))
    finish(launch(config, tmp_path / "two", *options, processes=2))
    finish(launch(config, tmp_path / "sharded", *options, processes=2, sharded=True))
    for name in ("two", "sharded"):
        for left, right in zip(rows(tmp_path / name), rows(tmp_path / "one"), strict=True):
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        left, right = final(tmp_path / name), final(tmp_path / "one")
        for tensor in ("heads.weight", "heads.bias", "codebooks.sums", "codebooks.counts"):
            torch.testing.assert_close(left[tensor], right[tensor], atol=1e-4, rtol=1e-3)


def test_trainer_does_not_pretend_to_forget(config: Path) -> None:
    from spidr_hf.pretraining.hf_trainer import UpdateCollator

    with pytest.raises(ConfigError, match=r"`run\.active_forgetting`"):
        UpdateCollator(load_config(config, FORGET))
