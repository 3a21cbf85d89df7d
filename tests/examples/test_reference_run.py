"""The run by the `spidr` package, with a stand-in for it that draws from every random state: interrupted, it goes on as
if it had not been, and what it saves is a checkpoint."""

import json
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import nn

from spidr_hf.conversion.checkpoints import read_pretraining_checkpoint
from spidr_hf.conversion.spidr_format import to_spidr
from spidr_hf.examples import reference_run
from spidr_hf.hub.spidr_names import to_model_section

TRAINED, FROZEN = "mask_embedding", "feature_projection.layer_norm.weight"


class SpidR(nn.Module):
    """Tensors under the names of SpidR. Two of them train, one only until it is frozen in the second update."""

    def __init__(self, config):
        super().__init__()
        for name, tensor in to_spidr(tiny_model().state_dict()).items():
            module, (*path, leaf) = self, name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]
            module.register_buffer(leaf, tensor)
        self.mask_embedding = nn.Parameter(self._buffers.pop("mask_embedding"))
        norm = self.feature_projection.layer_norm
        norm.weight = nn.Parameter(norm._buffers.pop("weight"))

    def forward(self, waveforms, *, mask_indices, attention_mask):
        noise = torch.rand(()) + random.random() + np.random.rand()
        loss = (waveforms.mean() * noise * self.mask_embedding).square().sum()
        loss = loss + (self.feature_projection.layer_norm.weight - noise).square().sum()
        return loss[None], {"target_ppl": loss.detach()}

    def update_ema(self, step):
        if step == 2:
            self.feature_projection.layer_norm.weight.requires_grad_(False)
        return 0.5


class Loader:
    """Three batches an epoch, drawn from the random state as a worker's are."""

    batch_sampler = SimpleNamespace(set_epoch=lambda epoch: None)

    def __iter__(self):
        generator = torch.Generator().manual_seed(int(torch.randint(1000, ())))
        for _ in range(3):
            yield torch.rand(2, 100, generator=generator), None, None


@pytest.fixture
def spidr(monkeypatch, tmp_path):
    """Runs the command with the stand-in installed."""
    section = SimpleNamespace(random_seed=0, log_interval=2, save_interval=100, extractor_conv_layer_config=[])
    section.num_workers = section.max_steps = 0
    section.max_norm, section.dtype = 10.0, "float32"
    config = SimpleNamespace(run=section, data=section, model=section, masking=None, optimizer=section)

    def build_optimizer(model, _):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return optimizer, None, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    public = {
        "config": {"read_config": lambda path: config},
        "data": {"build_dataloader": lambda *args, **options: Loader()},
        "environment": {"set_seed": lambda seed: (torch.manual_seed(seed), random.seed(seed), np.random.seed(seed))},
        "models": {"SpidR": SpidR},
        "optimizer": {"build_optimizer": build_optimizer},
    }
    for name, attributes in public.items():
        module = ModuleType(f"spidr.{name}")
        module.__dict__.update(attributes)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "spidr", ModuleType("spidr"))
    monkeypatch.setattr(reference_run, "replace", lambda section, **changes: section)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    torch.save({"model": SpidR(None).state_dict()}, tmp_path / "init.pt")

    def run(name, steps, *options, save=True):
        saved = ["--save", str(tmp_path / f"{name}.pt")] if save else []
        files = ["--config", "c.toml", "--init-ckpt", str(tmp_path / "init.pt"), "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["reference_run.py", *files, "--max-steps", str(steps), *saved, *options])
        reference_run.main()
        return (tmp_path / name).read_text()

    return run


@pytest.mark.parametrize("stop", [3, 5])  # at the end of an epoch and between two rows; within an epoch
def test_a_run_goes_on_as_if_it_had_not_stopped(spidr, tmp_path, stop):
    whole = spidr("whole", 8)
    assert [json.loads(row)["step"] for row in whole.splitlines()] == [2, 4, 6, 8]
    spidr("parts", stop)
    (tmp_path / "parts").write_text((tmp_path / "parts").read_text() + '{"step": 6, "loss": 1}\n{"ste')  # lost updates
    assert spidr("parts", 8) == whole == spidr("unsaved", 8, save=False)
    states = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "parts")]
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])
    assert states[0]["frozen"] == [FROZEN] and not torch.equal(
        states[0]["model"][TRAINED], SpidR(None).state_dict()[TRAINED]
    )


def test_what_is_saved_is_a_checkpoint(spidr, tmp_path):
    spidr("run", 4)
    config = to_model_section(tiny_model().config)
    found = read_pretraining_checkpoint(tmp_path / "run.pt", {"model": config}, "spidr")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)["model"]
    assert torch.equal(found.tensors["spidr.masked_spec_embed"], saved[TRAINED])


def test_another_run_is_not_continued(spidr, tmp_path):
    spidr("run", 2)
    with pytest.raises(SystemExit, match="seed 0, not 1"):
        spidr("run", 4, "--seed", "1")
    with pytest.raises(SystemExit, match="is at update 2"):
        spidr("run", 2)
    torch.save(torch.load(tmp_path / "init.pt"), tmp_path / "run.pt")
    with pytest.raises(SystemExit, match="no run to resume"):
        spidr("run", 4)
