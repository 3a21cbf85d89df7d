"""The recorded numbers of the reference implementations (`tests/fixtures/parity`, described in its README)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.checkpoints import read_pretraining_checkpoint
from conversion.spidr_format import from_spidr
from spidr_hf import SpidrForPretraining

PARITY = Path(__file__).parent / "fixtures" / "parity"
SPIDR = ("spidr-tiny", "dinosr-tiny", "spidr-tiny-variant")
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


@torch.no_grad()
def test_every_recorded_tensor(recorded):
    model, expected, folder = recorded
    waveform, mask = expected.pop("waveform"), expected.pop("mask")
    lengths, frame_lengths = expected.pop("padded.lengths"), expected.pop("padded.frame_lengths")
    config, got = model.config, {}

    features, _ = model.spidr.extract_features(waveform)
    got["feature_extractor"] = features
    got["feature_projection"] = model.spidr.project(features)
    got["pos_conv"] = model.spidr.encoder.pos_conv_embed(got["feature_projection"])
    for layer, hidden in enumerate(model.spidr.get_intermediate_outputs(waveform), start=1):
        got[f"layer.{layer}.ffn"] = hidden
    for layer, hidden in enumerate(model.spidr.get_intermediate_outputs(waveform, before_residual=False), start=1):
        got[f"layer.{layer}.output"] = hidden
    got["student_output"] = model.spidr(waveform).last_hidden_state
    for layer, probabilities in enumerate(model.get_codebooks(waveform), start=1):
        if probabilities is not None:
            got[f"codebook.{layer}.proba"] = probabilities
    rows = torch.arange(mask.numel())
    targets = model._targets(got["feature_projection"], None, rows).view(config.num_codebooks, *mask.shape, -1)
    labels = model.get_teacher_labels(waveform)
    for k in range(config.num_codebooks):
        got[f"teacher.{k}.target"] = targets[k]
        got[f"teacher.{k}.label"] = labels[:, k][mask]
    for prefix, masked in (("", mask), ("nomask.", None)):
        output = model(waveform, None, masked)
        got[f"{prefix}target_ppl"], got[f"{prefix}pred_ppl"] = output.target_ppl, output.pred_ppl
        got[f"{prefix}loss_per_frame"] = loss_per_frame(model, waveform, masked)
        close(output.loss, expected[f"{prefix}loss_per_frame"].mean())
    attention_mask = (torch.arange(waveform.shape[1]) < lengths[:, None]).long()
    padded = model.spidr.get_intermediate_outputs(expected.pop("padded.waveform"), attention_mask)

    for layer, hidden in enumerate(padded, start=1):
        recording = expected.pop(f"padded.layer.{layer}.ffn")
        for row, frames in enumerate(frame_lengths.tolist()):
            if folder == "spidr-tiny-variant":
                # The reference lets padding into the statistics of the group norm; ours equals the row alone.
                alone = waveform[row : row + 1, : lengths[row]]
                close(hidden[row, :frames], model.spidr.get_intermediate_outputs(alone)[layer - 1][0])
            else:
                close(hidden[row, :frames], recording[row, :frames])
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if name.endswith("label"):
            assert torch.equal(got[name], value), name
        elif name.endswith("ppl"):
            close(got[name], value.squeeze(), 0, rtol=1e-5)
        else:
            close(got[name], value, 5e-5 if name.endswith("target") else 1e-5)


def loss_per_frame(model: SpidrForPretraining, waveform: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Cross-entropy of each masked frame, averaged over codebooks, from labels and student alone."""
    features, _ = model.spidr.extract_features(waveform)
    student = model.spidr.project(features)
    if mask is not None:
        student = model.spidr.mask_frames(student, mask)
    log_probs = (
        model._logits(model._encode(student, None))
        .log_softmax(-1)
        .view(-1, *features.shape[:2], model.config.codebook_size)
    )
    labels = model.get_teacher_labels(waveform).transpose(0, 1)
    losses = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).mean(0)
    return losses.flatten() if mask is None else losses[mask]


@pytest.mark.parametrize("folder", SPIDR)
def test_twelve_training_steps(folder):
    recorded = load_file(PARITY / folder / "trajectory.safetensors")
    trajectory = json.loads((PARITY / folder / "trajectory.json").read_text())
    options, log = trajectory["optimizer"], trajectory["log"]
    model = load(PARITY / folder / "checkpoint.pt", folder.split("-")[0]).train()
    model.current_step.zero_()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=options["lr"], betas=options["betas"], eps=options["eps"], weight_decay=options["weight_decay"]
    )
    for step in range(trajectory["steps"]):
        optimizer.param_groups[0]["lr"] = log["lr"][step]
        output = model(recorded["waveforms"][step], None, recorded["masks"][step].bool())
        output.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, options["max_norm"])
        optimizer.step()
        optimizer.zero_grad()
        decay = model.update_teacher(step + 1)
        assert output.loss.item() == pytest.approx(log["loss"][step], abs=1e-4)
        assert norm.item() == pytest.approx(log["grad_norm"][step], abs=1e-4)
        assert output.target_ppl.item() == pytest.approx(log["target_ppl"][step], rel=1e-4)
        assert output.pred_ppl.item() == pytest.approx(log["pred_ppl"][step], rel=1e-4)
        assert decay == pytest.approx(log["ema_decay"][step], abs=1e-7)
    final = {name.removeprefix("final."): value for name, value in recorded.items() if name.startswith("final.")}
    for name, value in from_spidr(final, model.config.num_codebooks).items():
        close(model.state_dict()[name], value, 1e-3)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("file", ["checkpoint.ckpt", "checkpoint_namespace.ckpt"])
@torch.no_grad()
def test_original_dinosr(file, attention):
    folder = PARITY / "dinosr-fairseq"
    model = load(folder / file)
    model.set_attn_implementation(attention)
    recorded = load_file(folder / "expected.safetensors")
    for case in ("nopad", "solo"):
        expected = {name.removeprefix(f"{case}."): v for name, v in recorded.items() if name.startswith(f"{case}.")}
        compare_with_fairseq(model, expected)


def compare_with_fairseq(model: SpidrForPretraining, expected: dict[str, torch.Tensor]) -> None:
    waveform, mask = expected.pop("waveform"), expected.pop("mask")
    features, _ = model.spidr.extract_features(waveform)
    projected = model.spidr.project(features)
    got = {"extractor": features, "projected": projected}
    for name, hidden in (("masked", model.spidr.mask_frames(projected, mask)), ("unmasked", projected)):
        encoder = model.spidr.encoder
        output = encoder(hidden, first_representation=1, output_layers=True)
        got[f"{name}.pos_conv"] = encoder.pos_conv_embed(hidden)
        got[f"{name}.student_output"] = output.last_hidden_state
        for layer, (f, after) in enumerate(zip(output.representations, output.layer_outputs, strict=True), start=1):
            got[f"{name}.layer.{layer}.ffn"], got[f"{name}.layer.{layer}.output"] = f, after
        if name == "masked":
            got["log_probs"] = model._logits(output, mask.flatten().nonzero().squeeze(1)).log_softmax(-1)
    rows = torch.arange(mask.numel())
    got["teacher.targets"] = model._targets(projected, None, rows).view(-1, *projected.shape)
    got["labels"] = model.get_teacher_labels(waveform).transpose(0, 1)[:, mask]
    output = model(waveform, None, mask)
    got |= {"loss": output.loss, "target_ppl": output.target_ppl, "pred_ppl": output.pred_ppl}
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        if name == "labels":
            assert torch.equal(got[name], value)
        elif name.endswith("ppl"):
            close(got[name], value, 0, rtol=1e-5)
        else:
            close(got[name], value, 5e-5 if name == "teacher.targets" else 1e-5)
