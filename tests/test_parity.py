"""The recorded numbers of the reference implementations (`tests/fixtures/parity`, described in its README)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spidr_hf import SpidrForPretraining
from spidr_hf.conversion.checkpoints import read_pretraining_checkpoint
from spidr_hf.conversion.spidr_format import from_spidr
from spidr_hf.examples.benchmarks.parity import (
    Pairs,
    compare_fairseq,
    compare_outputs,
    compare_representations,
    compare_training,
)

PARITY = Path(__file__).parent / "fixtures" / "parity"
SPIDR = ("spidr-tiny", "dinosr-tiny", "spidr-tiny-variant")
ADAPT = ("spidr-adapt-ssl", "spidr-adapt-sl")
ATTENTION = ("sdpa", "eager")


def load(path: Path, objective: str | None = None, **changes) -> SpidrForPretraining:
    converted = read_pretraining_checkpoint(path, objective=objective)
    config = converted.config
    for name, value in {"hidden_dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0, **changes}.items():
        setattr(config, name, value)
    model = SpidrForPretraining(config)
    model.load_state_dict(converted.tensors)
    return model.eval()


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5, rtol: float = 0.0) -> None:
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance, rtol=rtol)


@pytest.fixture(
    params=[(folder, attention) for folder in SPIDR for attention in ATTENTION], ids="-".join, scope="module"
)
def recorded(request):
    folder, attention = request.param
    model = load(PARITY / folder / "checkpoint.pt", folder.split("-")[0])
    model.set_attn_implementation(attention)
    return model, load_file(PARITY / folder / "expected.safetensors"), folder


def all_close(pairs: Pairs) -> None:
    for name, (got, expected) in pairs.items():
        if name.endswith(("label", "labels")):
            assert torch.equal(got, expected), name
        elif name.endswith("ppl"):
            close(got, expected.squeeze(), 0, rtol=1e-5)
        else:
            close(got, expected, 5e-5 if name.endswith(("target", "targets")) else 1e-5)


def test_every_recorded_tensor(recorded):
    model, expected, _ = recorded
    all_close(compare_outputs(model, expected))


@pytest.mark.parametrize("folder", SPIDR)
def test_twelve_training_steps(folder):
    recorded = load_file(PARITY / folder / "trajectory.safetensors")
    trajectory = json.loads((PARITY / folder / "trajectory.json").read_text())
    model = load(PARITY / folder / "checkpoint.pt", folder.split("-")[0])
    pairs = compare_training(model, recorded, trajectory, from_spidr)
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-4), ("ema_decay", 1e-7)):
        close(*pairs.pop(name), tolerance)
    for name in ("target_ppl", "pred_ppl"):
        close(*pairs.pop(name), 0, rtol=1e-4)
    assert pairs.keys() == {"final.student", "final.heads", "final.teacher", "final.codebooks"}
    for pair in pairs.values():
        close(*pair, 1e-3)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("file", ["checkpoint.ckpt", "checkpoint_namespace.ckpt"])
def test_original_dinosr(file, attention):
    folder = PARITY / "dinosr-fairseq"
    model = load(folder / file)
    model.set_attn_implementation(attention)
    recorded = load_file(folder / "expected.safetensors")
    for case in ("nopad", "solo"):
        all_close(compare_fairseq(model, recorded, case))


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("folder", ADAPT)
def test_spidr_adapt(folder, attention):
    """With and without phone classifiers, recognised by the config beside the checkpoint."""
    model = load(PARITY / folder / "step_5.pt")
    model.set_attn_implementation(attention)
    pairs = compare_representations(model, load_file(PARITY / folder / "expected.safetensors"))
    assert len(pairs) == 4 + 3
    all_close(pairs)
