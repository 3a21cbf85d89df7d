"""The parts of a pretraining step: gradient scaling, optimizer groups, loss scale, warnings."""

import os
import tempfile
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import forget_processes
from tiny import random_mask, tiny_model
from torch._inductor.runtime import cache_dir_utils

from spidr_hf.kernels_spidr import use_kernels
from spidr_hf.pretraining import setup
from spidr_hf.pretraining.config import make_config
from spidr_hf.pretraining.setup import (
    CollapseWatch,
    exclude_parameters,
    keep_compiled,
    make_accelerator,
    make_optimizer,
    recipe_notes,
    spidr_name,
)
from spidr_hf.pretraining.updates import StepResult
from spidr_hf.system.processes import gather_all
from spidr_hf.training.optimizing import LossScale, drop_frozen, scale_and_clip


def config(**sections):
    return make_config({"run": {"model_type": "spidr"}, "data": {"manifest": "x"}, **sections})


@pytest.mark.parametrize(("world", "local", "shared"), [(None, None, False), (8, 8, False), (16, 8, True)])
def test_compiled_code_never_lies_where_machines_share_it(monkeypatch, tmp_path, world, local, shared):
    for name, value in {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": local}.items():
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, str(value))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    keep_compiled(tmp_path / "run")
    found = [Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_HOME")]
    expected = Path(tempfile.gettempdir()) if shared else tmp_path / "run"
    assert all(path.is_relative_to(expected) for path in found)
    assert all(path.is_relative_to(tmp_path / "run") != shared for path in found)
    # PyTorch has a folder of compiled kernels for each GPU, unless it is told of one for all.
    assert Path(cache_dir_utils.triton_cache_dir(0)) == found[0] / "triton" / "0"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled(tmp_path / "run")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"


@pytest.mark.parametrize("trouble", [None, "Triton cannot start: no compiler."])
@pytest.mark.parametrize("kernels", [True, False])
def test_kernels_and_compiled_layers_where_they_can_run(monkeypatch, tmp_path, trouble, kernels):
    compiled = []
    monkeypatch.setattr(setup, "kernel_trouble", lambda: compiled.append("start") or trouble)
    monkeypatch.setattr(setup, "keep_compiled", compiled.append)
    monkeypatch.setattr(setup, "compile_layers", lambda model, convolutions: compiled.append(model))
    before = use_kernels(True)
    try:
        on_gpu = SimpleNamespace(device=torch.device("cuda"))
        notes = setup.choose_code("model", config(run={"model_type": "spidr", "kernels": kernels}), on_gpu, tmp_path)
        enabled = use_kernels(True)
        on_cpu = SimpleNamespace(device=torch.device("cpu"))
        assert "no effect" in setup.choose_code("model", config(), on_cpu, tmp_path)[0]
    finally:
        use_kernels(before)
    assert enabled == (kernels and trouble is None)
    # Where it is kept comes first: a home that cannot be written to keeps Triton from starting.
    assert compiled == [tmp_path, "start", *([] if trouble else ["model"])]
    assert len(notes) == (trouble is not None) and all(trouble in note for note in notes)


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_gradients_are_scaled_then_clipped(max_norm):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn(3, 4)
    scaled = [parameter.grad * 0.3 for parameter in parameters[:2]]
    norm = scale_and_clip(parameters, torch.tensor(0.3), max_norm)
    expected = torch.cat([gradient.flatten() for gradient in scaled])
    torch.testing.assert_close(norm, expected.norm())
    if max_norm < 1:
        expected *= max_norm / expected.norm()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in parameters[:2]]), expected, rtol=1e-4, atol=1e-7)
    assert parameters[2].grad is None


def test_the_optimizer_holds_what_trains_and_lets_go_what_freezes():
    model = tiny_model().train()
    optimizer = make_optimizer(model, config(optimizer={"lr": 1.0, "weight_decay": 0.5}).optimizer)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad} and len(optimizer.param_groups) == 2
    assert not held & set(model.teacher.parameters())
    model(torch.randn(2, 4000), mask_time_indices=random_mask(2, 12)).loss.backward()
    optimizer.step()
    model.freeze_feature_encoder()
    drop_frozen(optimizer)
    frozen = [*model.spidr.feature_extractor.parameters(), *model.spidr.feature_projection.parameters()]
    assert len(optimizer.param_groups) == 1 and not {*optimizer.state} & {*frozen}
    before = [parameter.clone() for parameter in frozen]
    optimizer.step()  # weight decay would move them
    assert all(torch.equal(parameter, old) for parameter, old in zip(frozen, before, strict=True))


def test_parameters_are_excluded_by_the_names_spidr_has_for_them():
    assert spidr_name("spidr.encoder.layers.0.attention.qkv.weight") == "student.layers.0.attention.qkv.weight"
    assert spidr_name("spidr.feature_projection.projection.bias") == "feature_projection.projection.bias"
    assert spidr_name("spidr.masked_spec_embed") == "mask_embedding" and spidr_name("heads.weight") == "heads.weight"
    model = tiny_model()
    exclude_parameters(model, config(optimizer={"exclude_from_optimizer": ["teacher", "student.layers.0"]}))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any("encoder.layers.0" in name for name in trained) and "spidr.masked_spec_embed" in trained
    exclude_parameters(model, config(masking={"mask_prob": 0}))
    assert not model.spidr.masked_spec_embed.requires_grad


def test_loss_scale():
    scale = LossScale(enabled=True)
    start = scale.value
    assert scale.explains_overflow
    scale.update(finite=False)
    assert scale.value == start / 2
    for _ in range(1999):
        scale.update(finite=True)
    again = LossScale(enabled=True, state=scale.state())
    again.update(finite=True)
    assert again.value == start
    for _ in range(10):
        scale.update(finite=False)
    assert scale.value == 1.0 and not scale.explains_overflow  # the scale is no excuse any more
    off = LossScale(enabled=False, state=scale.state())
    off.update(finite=False)
    assert off.value == 1.0 and not off.explains_overflow


def test_a_collapse_is_noticed_once_per_halving():
    watch = CollapseWatch()
    assert watch.look(40.0, [60, 60]) is None and watch.look(50.0, [62, 61]) is None
    assert watch.look(13.0, [30, 30]) is None
    warning = watch.look(12.0, [29, 28])
    assert "COLLAPSING: target perplexity 12.0 (50.0 at its best)" in warning and "codebook_decay" in warning
    watch = CollapseWatch(watch.state())
    assert watch.look(11.0, [29, 28]) is None and watch.look(6.0, [20, 20]) is None
    assert "active codewords per codebook 29, 5." in watch.look(30.0, [29, 5])  # one codebook is enough


def test_small_batches_are_warned_about():
    def note(world_size=1, **sections):
        return next(recipe_notes(config(**sections), world_size), None)

    assert note(world_size=16) is None
    small = {"max_batch_length": 320_000, "max_sample_size": 320_000, "manifest": "x"}
    warning = note(data=small)
    assert "551 masked frames, 2.2 for each of 256 codewords" in warning and "gradient_accumulation_steps" in warning
    assert note(data=small, optimizer={"gradient_accumulation_steps": 8}) is None
    assert note(world_size=8, data=small) is None
    assert note(data=small, model={"codebook_decay": 0.6}) is None
    assert note(data=small, model={"codebook_decay": 1}) is None


def test_a_warm_up_longer_than_the_run_is_warned_about():
    for warmup, count in ((99, 0), (100, 1)):
        notes = list(recipe_notes(config(optimizer={"max_steps": 100, "warmup_steps": warmup}), 16))
        assert len(notes) == count and all("still rising at the end" in note for note in notes)


def test_results_are_fetched_in_one_piece():
    model = tiny_model().train()
    model(torch.randn(2, 4000), mask_time_indices=random_mask(2, 12))
    statistics = model.reduce_statistics()
    result = StepResult.send(statistics, torch.tensor(2.0)).result()
    assert result.finite and result.grad_norm == 2.0 and result.loss == statistics.loss.item()
    assert result.values["layer_losses"] == statistics.layer_losses.tolist()
    assert result.values["active_codewords"] == statistics.active_codewords.tolist()
    assert not StepResult.send(statistics, torch.tensor(float("inf"))).result().finite
    assert gather_all([1, 2]) == [1, 2]


def test_processes_wait_for_one_that_scans_for_long(tmp_path):
    """NCCL would end a run after ten minutes."""
    forget_processes()
    try:
        accelerator, _ = make_accelerator(config(optimizer={"dtype": "float32"}), tmp_path)
        assert accelerator.init_handler.timeout >= timedelta(hours=1)
    finally:
        forget_processes()
