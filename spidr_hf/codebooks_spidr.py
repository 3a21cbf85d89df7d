"""Codebooks, prediction heads and the statistics of one update: the online clustering of DinoSR and SpidR.

All codebooks are stacked (K x V x H), so that K labels, counts and losses are one operation each. Targets, distances
and averages are float32 whatever the autocast or the dtype of the model: rounding moves labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_spidr import SpidrConfig
from .kernels_spidr import codeword_statistics, kernels_run, nearest_codewords, normalized_rows
from .layers_spidr import SpidrEncoder, masked_var_mean


class KeepFloat32(nn.Module):
    """A module that moves between devices but keeps its dtype under `.half()`, `.bfloat16()` and `.to(dtype)`."""

    def _apply(self, fn, recurse=True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            return moved.to(tensor.dtype) if moved.is_meta or tensor.is_meta else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class SpidrTeacher(KeepFloat32, SpidrEncoder):
    """The slowly moving copy of the encoder: always in eval mode, in float32, without gradients."""

    def __init__(self, config: SpidrConfig):
        # `from_config(dtype=...)` makes everything in the dtype of the student.
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            super().__init__(config)
        finally:
            torch.set_default_dtype(default)

    def train(self, mode: bool = True):
        return super().train(False)


def instance_norm_rows(
    representations: Sequence[Tensor], rows: Tensor, lengths: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Targets of the frames `rows` (N indices into B * T) of K representations B x T x H: K x N x H, float32.

    Each channel is normalised over the valid frames of its own utterance; only the frames asked for are written.
    """
    if kernels_run(representations[0]):
        return normalized_rows(list(representations), rows, lengths, eps)
    return torch.stack([_plain_norm_rows(x, rows, lengths, eps) for x in representations])


def _plain_norm_rows(x: Tensor, rows: Tensor, lengths: Tensor | None, eps: float) -> Tensor:
    batch, length, width = x.shape
    x = x.float()
    mean, var = masked_var_mean(x, lengths)
    utterances = torch.div(rows, length, rounding_mode="floor")
    scale = torch.rsqrt(var.view(batch, width) + eps)
    selected = x.reshape(batch * length, width)[rows]
    return (selected - mean.view(batch, width)[utterances]) * scale[utterances]


class SpidrCodebooks(KeepFloat32):
    """K codebooks of V codewords as moving sums and counts (DinoSR section 3.2); a codeword is their quotient."""

    def __init__(self, config: SpidrConfig):
        super().__init__()
        shape = (config.num_codebooks, config.codebook_size)
        self.decay = config.codebook_decay
        self.register_buffer("sums", torch.empty(*shape, config.hidden_size, dtype=torch.float32))
        self.register_buffer("counts", torch.empty(shape, dtype=torch.float32))

    def reset(self) -> None:
        """Initial state: counts of 1, and sums as they are drawn."""
        init.copy_(self.sums, self.draw())
        init.ones_(self.counts)

    def draw(self, generator: torch.Generator | None = None) -> Tensor:
        """Initial sums K x V x H: standard normal, normalised over the codewords for each dimension.

        They lie where the generator does; without one, where the codebooks do.
        """
        device = self.sums.device if generator is None else generator.device
        sums = torch.randn(self.sums.shape, dtype=torch.float32, device=device, generator=generator)
        if sums.numel() and not sums.is_meta:
            var, mean = torch.var_mean(sums, dim=1, correction=0, keepdim=True)
            sums = (sums - mean) * torch.rsqrt(var + 1e-5)
        return sums

    def forward(self, targets: Tensor) -> Tensor:
        """Nearest codeword in L2 distance of targets K x N x H: labels K x N."""
        return self.assign(targets)

    def assign(self, targets: Tensor) -> Tensor:
        """The same, past what hangs on the module."""
        return nearest_codewords(targets, self.sums / self.counts.unsqueeze(-1))

    @torch.no_grad()
    def update(self, counts: Tensor, sums: Tensor, where: Tensor | None = None) -> None:
        """Moves the codewords that were assigned (`counts` K x V, `sums` K x V x H); the others stay untouched.

        With `where` (a bool on the device) False, all of them do.
        """
        if self.decay >= 1:
            return
        if where is not None:
            counts, sums = torch.where(where, counts, 0), torch.where(where, sums, 0)
        weight = (1 - self.decay) * (counts > 0).to(counts.dtype)
        self.counts.lerp_(counts, weight)
        self.sums.lerp_(sums, weight.unsqueeze(-1))


class SpidrPredictionHeads(nn.Module):
    """K linear heads H -> V as one batched product."""

    def __init__(self, config: SpidrConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_codebooks, config.codebook_size, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_codebooks, config.codebook_size))

    def forward(self, hidden_states: Tensor | Sequence[Tensor], numbers: Sequence[int] | None = None) -> Tensor:
        """K x N x H (each head its own input) or N x H (all heads the same) -> logits K x N x V.

        `numbers`: only these heads, counted from 0, each on its own entry of `hidden_states` (... x H).
        """
        if numbers is not None:
            pairs = zip(hidden_states, numbers, strict=True)
            return torch.stack([F.linear(x, self.weight[number], self.bias[number]) for x, number in pairs])
        assert isinstance(hidden_states, Tensor)
        if hidden_states.dim() == 2:
            logits = F.linear(hidden_states, self.weight.flatten(0, 1), self.bias.flatten())
            return logits.view(len(hidden_states), *self.bias.shape).transpose(0, 1)
        # baddbmm is no autocast operation everywhere; bmm is.
        return torch.bmm(hidden_states, self.weight.transpose(1, 2)) + self.bias.unsqueeze(1)


def perplexity(distributions: Tensor) -> Tensor:
    """2 ** entropy of distributions (K x V), averaged over the K codebooks."""
    return torch.exp(torch.special.entr(distributions.float()).sum(-1)).mean()


@dataclass
class SpidrTrainingStatistics:
    """What all processes together saw since the last update. Tensors on the model's device, float32.

    Attributes:
        loss: mean over masked frames and codebooks.
        layer_losses: K, mean over masked frames.
        target_ppl, pred_ppl: perplexity of the assigned and of the predicted codewords, averaged over codebooks.
        num_masked_frames: number of masked frames.
        active_codewords: K, codewords that were assigned at least once.

    A field that is added here is reported as the others are (`metrics`).
    """

    loss: Tensor
    layer_losses: Tensor
    target_ppl: Tensor
    pred_ppl: Tensor
    num_masked_frames: Tensor
    active_codewords: Tensor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """What a run reports, by name: scalars, or one value per codebook."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "num_masked_frames"}


class StatisticsBuffer:
    """One flat float32 buffer for everything that the processes share in an update, so that one all-reduce does."""

    frames: Tensor
    loss_sums: Tensor
    counts: Tensor
    prediction_sums: Tensor
    sums: Tensor

    def __init__(self, config: SpidrConfig, device: torch.device):
        codebooks, codewords, width = config.num_codebooks, config.codebook_size, config.hidden_size
        shapes = {
            "frames": (1,),
            "loss_sums": (codebooks,),
            "counts": (codebooks, codewords),
            "prediction_sums": (codebooks, codewords),
            "sums": (codebooks, codewords, width),
        }
        sizes = [torch.Size(shape).numel() for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        for (name, shape), part in zip(shapes.items(), self.flat.split(sizes), strict=True):
            setattr(self, name, part.view(shape))
        self.empty = True
        self.reduced = False

    def add(self, labels: Tensor, targets: Tensor, losses: Tensor, prediction_means: Tensor) -> None:
        """Adds a forward: labels K x N, targets K x N x H, losses K (means), prediction_means K x V.

        To be called without gradients (a decorator here would keep the compiler out).
        """
        if self.reduced:
            self.clear()
        frames = labels.shape[1]
        if kernels_run(targets):
            counts, sums = codeword_statistics(labels, targets, self.counts.shape[1])
            self.counts.add_(counts)
            self.sums.add_(sums)
        else:
            flat_labels = _flat_labels(labels, self.counts.shape[1])
            ones = torch.ones((), device=labels.device).expand(flat_labels.shape)
            self.counts.view(-1).index_add_(0, flat_labels, ones)
            self.sums.view(-1, self.sums.shape[-1]).index_add_(0, flat_labels, targets.flatten(0, 1))
        self.loss_sums.add_(losses.float(), alpha=frames)
        self.prediction_sums.add_(prediction_means.float(), alpha=frames)
        self.frames.add_(frames)
        self.empty = False

    def share(self) -> None:
        """Sums over all processes, in the update's one collective; a second call does nothing."""
        if not self.reduced and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.flat)
        self.reduced = True

    def reduce(self) -> SpidrTrainingStatistics:
        """What all processes saw, after `share`."""
        self.share()
        layer_losses = self.loss_sums / self.frames
        return SpidrTrainingStatistics(
            loss=layer_losses.mean(),
            layer_losses=layer_losses,
            target_ppl=perplexity(self.counts / self.frames),
            pred_ppl=perplexity(self.prediction_sums / self.frames),
            num_masked_frames=self.frames[0].clone(),
            active_codewords=(self.counts > 0).sum(-1),
        )

    def clear(self) -> None:
        self.flat.zero_()
        self.empty, self.reduced = True, False


def _flat_labels(labels: Tensor, codewords: int) -> Tensor:
    """Labels K x N as N * K positions in the stacked codebooks K * V."""
    offsets = torch.arange(len(labels), device=labels.device).unsqueeze(1) * codewords
    return (labels + offsets).flatten()


def label_distributions(labels: Tensor, codewords: int) -> Tensor:
    """Share of each codeword among labels K x N: K x V, without one-hot matrices."""
    flat_labels = _flat_labels(labels, codewords)
    counts = torch.zeros(len(labels) * codewords, device=labels.device)
    counts.index_add_(0, flat_labels, torch.ones((), device=labels.device).expand(flat_labels.shape))
    return counts.view(len(labels), codewords) / labels.shape[1]


__all__ = [
    "KeepFloat32",
    "SpidrCodebooks",
    "SpidrPredictionHeads",
    "SpidrTeacher",
    "SpidrTrainingStatistics",
    "StatisticsBuffer",
    "instance_norm_rows",
    "label_distributions",
    "perplexity",
]
