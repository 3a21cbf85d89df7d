"""How far a model is from the recorded numbers of the reference implementation, tensor by tensor, on any device.

What is recorded, and under which names, is described beside the recordings (`tests/fixtures/parity/README.md`). The
functions `compare_*` compute everything that was recorded and return it in pairs; `judge` says what a pair may differ
by: in float32 rounding alone, under bfloat16 autocast what its eight bits of precision leave.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spidr_hf.kernels_spidr import true_float32
from spidr_hf.modeling_spidr import SpidrForPretraining
from spidr_hf.pretraining.setup import make_optimizer
from spidr_hf.training.optimizing import scale_and_clip
from spidr_hf.training.schedules import OptimizerSection

# What was computed and what was recorded, by the recording's name.
Pairs = dict[str, tuple[Tensor, Tensor]]

# In float32. Parameters after twelve steps have more of it: AdamW divides gradients near zero by their own size.
FLOAT32_TOLERANCE = 1e-4
TRAINED_TOLERANCE = 1e-3
# Under bfloat16 autocast, root mean square of the error in shares of that of the recorded values: twice the noise that
# the plain form has on a CPU (`examples/check_parity.py --device cpu` prints it), the first of these that is named in
# the tensor. A label moves where two codewords are nearly as near, and what counts labels moves with it, with 54 to 240
# masked frames by a lot.
BFLOAT16_NOISE = {
    "label": 0.15,
    "target_ppl": 0.36,
    "grad_norm": 0.36,
    "final.codebooks": 0.36,
    "target": 0.08,
    "training": 0.08,
    "loss": 0.06,
    "": 0.03,
}


@dataclass(frozen=True)
class Difference:
    """A recorded tensor beside ours.

    Attributes:
        largest: largest absolute error; of labels the share that differs.
        noise: root mean square of the error in shares of that of the recorded values.
        passed: whether that is within tolerance.
    """

    largest: float
    noise: float
    passed: bool


def judge(name: str, computed: Tensor, recorded: Tensor, dtype: str) -> Difference:
    """The difference of a pair. `dtype`: "float32", or "bfloat16" for autocast. A non-finite value never passes."""
    computed, recorded = computed.detach().cpu(), recorded.cpu()
    if computed.shape != recorded.shape:
        return Difference(float("inf"), float("inf"), False)
    if not recorded.is_floating_point():
        share = float((computed != recorded).double().mean())
        return Difference(share, share, share <= (0.0 if dtype == "float32" else noise_bound(name)))
    recorded = recorded.double()
    error = computed.double() - recorded
    largest = float(error.abs().max())
    noise = float(error.norm() / recorded.norm().clamp(min=1e-12))
    if dtype == "float32":
        relative = name.endswith("ppl")  # in the tens or hundreds
        value = float((error / recorded).abs().max()) if relative else largest
        trained = "final." in name and "codebooks" not in name
        return Difference(largest, noise, value <= (TRAINED_TOLERANCE if trained else FLOAT32_TOLERANCE))
    return Difference(largest, noise, noise <= noise_bound(name))


def noise_bound(name: str) -> float:
    """What the noise of a tensor may be under bfloat16 autocast."""
    return next(bound for part, bound in BFLOAT16_NOISE.items() if part in name)


@contextmanager
def whole_float32() -> Iterator[None]:
    """float32 products in full: TF32 off, in convolutions too, however the process was told to use it."""
    # The older setting refuses to answer a process that has used the newer ones.
    settings, name = torch.backends.cudnn, "allow_tf32"
    if hasattr(torch.backends.cudnn, "conv"):
        settings, name = torch.backends.cudnn.conv, "fp32_precision"
    before = getattr(settings, name)
    with true_float32():
        setattr(settings, name, False if name == "allow_tf32" else "ieee")
        try:
            yield
        finally:
            setattr(settings, name, before)


def precision(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast for "bfloat16", none for "float32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@torch.no_grad()
def compare_representations(model: SpidrForPretraining, recorded: Mapping[str, Tensor]) -> Pairs:
    """Representations and codebook predictions, for recordings of nothing else.

    Args:
        model: in eval mode.
        recorded: on any device.
    """
    waveform = recorded["waveform"].to(model.device)
    got = {f"layer.{i}.ffn": hidden for i, hidden in enumerate(model.spidr.get_intermediate_outputs(waveform), start=1)}
    predictions = enumerate(model.get_codebooks(waveform), start=1)
    got |= {f"codebook.{i}.proba": proba for i, proba in predictions if proba is not None}
    return {name: (got[name], tensor) for name, tensor in recorded.items() if name != "waveform"}


@torch.no_grad()
def compare_outputs(model: SpidrForPretraining, recorded: Mapping[str, Tensor]) -> Pairs:
    """Everything in a SpidR recording (`expected.safetensors`): features, representations, targets, labels, losses.

    Of padded rows, only valid frames. A group norm runs over time, and the reference lets padding into its statistics:
    there the rows alone take the place of what was recorded.

    Args:
        model: in eval mode.
        recorded: on any device.

    Raises:
        ValueError: something else was recorded.
    """
    device, config = model.device, model.config
    expected = dict(recorded)
    waveform, mask = expected.pop("waveform").to(device), expected.pop("mask").to(device)
    lengths, frames = expected.pop("padded.lengths"), expected.pop("padded.frame_lengths").tolist()
    padded_waveform = expected.pop("padded.waveform").to(device)

    got: dict[str, Tensor] = {}
    features, _ = model.spidr.extract_features(waveform)
    got["feature_extractor"] = features
    got["feature_projection"] = projected = model.spidr.project(features)
    got["pos_conv"] = model.spidr.encoder.pos_conv_embed(projected)
    for layer, hidden in enumerate(model.spidr.get_intermediate_outputs(waveform), start=1):
        got[f"layer.{layer}.ffn"] = hidden
    for layer, hidden in enumerate(model.spidr.get_intermediate_outputs(waveform, before_residual=False), start=1):
        got[f"layer.{layer}.output"] = hidden
    got["student_output"] = model.spidr(waveform).last_hidden_state
    for layer, probabilities in enumerate(model.get_codebooks(waveform), start=1):
        if probabilities is not None:
            got[f"codebook.{layer}.proba"] = probabilities
    rows = torch.arange(mask.numel(), device=device)
    targets = model.teacher_targets(projected, None, rows).view(config.num_codebooks, *mask.shape, -1)
    labels = model.get_teacher_labels(waveform)
    for k in range(config.num_codebooks):
        got[f"teacher.{k}.target"] = targets[k]
        got[f"teacher.{k}.label"] = labels[:, k][mask]
    for prefix, masked in (("", mask), ("nomask.", None)):
        output = model(waveform, None, masked)
        got[f"{prefix}target_ppl"], got[f"{prefix}pred_ppl"] = output.target_ppl, output.pred_ppl
        got[f"{prefix}loss_per_frame"] = _loss_per_frame(model, projected, labels, masked)
        got[f"{prefix}loss"] = output.loss
        expected[f"{prefix}loss"] = expected[f"{prefix}loss_per_frame"].mean()

    attention_mask = (torch.arange(waveform.shape[1]) < lengths[:, None]).long().to(device)
    padded = model.spidr.get_intermediate_outputs(padded_waveform, attention_mask)
    alone: list[Sequence[Tensor]] = []
    if config.feat_extract_norm == "group":
        alone = [
            model.spidr.get_intermediate_outputs(waveform[row : row + 1, :length])
            for row, length in enumerate(lengths.tolist())
        ]
    for index, hidden in enumerate(padded):
        name = f"padded.layer.{index + 1}.ffn"
        theirs = [layers[index][0] for layers in alone] or expected[name]
        got[name] = torch.cat([row[:count] for row, count in zip(hidden, frames, strict=True)])
        expected[name] = torch.cat([row[:count] for row, count in zip(theirs, frames, strict=True)])
    return _pairs(got, expected)


@torch.no_grad()
def compare_fairseq(model: SpidrForPretraining, recorded: Mapping[str, Tensor], case: str) -> Pairs:
    """Everything in a case ("nopad", "solo") of a recording of the original DinoSR, by the names of the file."""
    prefix = f"{case}."
    expected = {name: value for name, value in recorded.items() if name.startswith(prefix)}
    waveform, mask = (expected.pop(f"{prefix}{name}").to(model.device) for name in ("waveform", "mask"))
    features, _ = model.spidr.extract_features(waveform)
    projected = model.spidr.project(features)
    got = {"extractor": features, "projected": projected}
    encoder = model.spidr.encoder
    for name, hidden in (("masked", model.spidr.mask_frames(projected, mask)), ("unmasked", projected)):
        output = encoder(hidden, first_representation=1, output_layers=True)
        got[f"{name}.pos_conv"] = encoder.pos_conv_embed(hidden)
        got[f"{name}.student_output"] = output.last_hidden_state
        for layer, (f, after) in enumerate(zip(output.representations, output.layer_outputs, strict=True), start=1):
            got[f"{name}.layer.{layer}.ffn"], got[f"{name}.layer.{layer}.output"] = f, after
        if name == "masked":
            got["log_probs"] = model._logits(output, mask.flatten().nonzero().squeeze(1)).log_softmax(-1)
    rows = torch.arange(mask.numel(), device=model.device)
    got["teacher.targets"] = model.teacher_targets(projected, None, rows).view(-1, *projected.shape)
    got["labels"] = model.get_teacher_labels(waveform).transpose(0, 1)[:, mask]
    output = model(waveform, None, mask)
    got |= {"loss": output.loss, "target_ppl": output.target_ppl, "pred_ppl": output.pred_ppl}
    return _pairs({f"{prefix}{name}": value for name, value in got.items()}, expected)


def compare_training(
    model: SpidrForPretraining,
    recorded: Mapping[str, Tensor],
    trajectory: Mapping[str, Any],
    from_spidr: Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]],
    dtype: str = "float32",
) -> Pairs:
    """A recorded training (`trajectory.safetensors` and `.json`) made again from the start, as `pretrain.py` steps.

    Args:
        model: with the weights of the start and without dropout; it is trained.
        recorded, trajectory: the two files.
        from_spidr: SpidR's state dict and the number of codebooks to ours.
        dtype: of the forward passes, as for `precision`.

    Returns:
        loss, perplexities, gradient norm and teacher decay of all steps as one tensor each, and what the end has, in
        four groups: `final.student`, `final.heads`, `final.teacher`, `final.codebooks`.
    """
    options, log, device = trajectory["optimizer"], trajectory["log"], model.device
    model.train()
    model.current_step.zero_()
    section = {name: options[name] for name in ("lr", "eps", "weight_decay")} | {"betas": list(options["betas"])}
    optimizer = make_optimizer(model, OptimizerSection(**section))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    curves: dict[str, list[float]] = {name: [] for name in ("loss", "target_ppl", "pred_ppl", "grad_norm", "ema_decay")}
    for step in range(trajectory["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = log["lr"][step]
        waveform, mask = (recorded[name][step].to(device) for name in ("waveforms", "masks"))
        with precision(device, dtype):
            output = model(waveform, None, mask.bool())
        (output.loss * output.num_masked_frames).backward()
        statistics = model.reduce_statistics()
        norm = scale_and_clip(parameters, 1 / statistics.num_masked_frames, options["max_norm"])
        optimizer.step()
        optimizer.zero_grad()
        values = (statistics.loss, statistics.target_ppl, statistics.pred_ppl, norm, model.update_teacher(step + 1))
        for curve, value in zip(curves.values(), values, strict=True):
            curve.append(float(value))
    got = {name: torch.tensor(curve, dtype=torch.float64) for name, curve in curves.items()}
    expected = {name: torch.tensor(log[name], dtype=torch.float64) for name in curves}
    end = {name.removeprefix("final."): value for name, value in recorded.items() if name.startswith("final.")}
    tensors, state = from_spidr(end, model.config.num_codebooks), model.state_dict()
    groups: dict[str, list[str]] = {}
    for name in sorted(tensors.keys() - {"current_step"}):
        groups.setdefault("student" if name.startswith("spidr.") else name.partition(".")[0], []).append(name)
    for group, names in groups.items():
        got[f"final.{group}"] = torch.cat([state[name].flatten().cpu() for name in names])
        expected[f"final.{group}"] = torch.cat([tensors[name].flatten() for name in names])
    return _pairs(got, expected)


def _loss_per_frame(model: SpidrForPretraining, projected: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Cross-entropy of each masked frame, averaged over codebooks, from labels (B x K x T) and student alone."""
    student = projected if mask is None else model.spidr.mask_frames(projected, mask)
    log_probs = model._logits(model._encode(student, None)).log_softmax(-1)
    log_probs = log_probs.view(len(log_probs), *projected.shape[:2], -1)
    losses = -log_probs.gather(-1, labels.transpose(0, 1).unsqueeze(-1)).squeeze(-1).mean(0)
    return losses.flatten() if mask is None else losses[mask]


def _pairs(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Pairs:
    if unknown := expected.keys() ^ got.keys():
        raise ValueError(f"what is recorded is not what is compared; the difference: {', '.join(sorted(unknown))}.")
    # Some scalars were recorded as tensors of one element.
    return {name: (value, expected[name] if value.ndim else expected[name].squeeze()) for name, value in got.items()}


__all__ = [
    "BFLOAT16_NOISE",
    "FLOAT32_TOLERANCE",
    "TRAINED_TOLERANCE",
    "Difference",
    "Pairs",
    "compare_fairseq",
    "compare_outputs",
    "compare_representations",
    "compare_training",
    "judge",
    "noise_bound",
    "precision",
    "whole_float32",
]
