"""Active forgetting (SpidR-Adapt, arXiv 2512.21204): codebooks and heads begin anew, the encoder stays.

A model that goes to another language keeps what it has learned about speech, and loses the units of the languages that
it comes from. New codebooks alone would leave it with heads that predict nothing, whose loss would undo the encoder;
so the heads are first fitted to the labels that the new codebooks give.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..modeling_spidr import SpidrForPretraining
from ..training.sharding import shard_like

HEAD_STEPS = 20
HEAD_LEARNING_RATE = 0.05


def forget(
    model: SpidrForPretraining,
    batches: Iterable[tuple[int, Mapping[str, Any]]],
    precision: AbstractContextManager,
    seed: int,
) -> None:
    """Draws codebooks and heads anew and fits the heads to the first update's batches, before that update is made.

    Every process must call it, each with batches of its own, and gets the same codebooks and heads: all frames of all
    processes count alike.

    Args:
        model: in train mode, on its device, perhaps in shards (but not in DDP).
        batches: the first update's, in turn: the seed of the batch's dropout, and the model's inputs.
        precision: the run's autocast, for the representations. Targets and heads are float32.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same numbers wherever the model lies
    weight, bias = _draw(model, generator)
    inputs, labels = zip(*(_first_look(model, *batch, precision) for batch in batches), strict=True)
    model.discard_statistics()
    fit_heads(weight, bias, inputs, labels)
    with torch.no_grad():
        for parameter, tensor in ((model.heads.weight, weight), (model.heads.bias, bias)):
            parameter.copy_(shard_like(tensor.to(parameter.dtype), parameter))


@torch.no_grad()
def _draw(model: SpidrForPretraining, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """New codebooks, in place, and weight (K x V x H) and bias (K x V) of new heads, float32."""
    codebooks, config, device = model.codebooks, model.config, model.codebooks.sums.device
    codebooks.sums.copy_(codebooks.draw(generator))
    codebooks.counts.fill_(1)
    bound = config.hidden_size**-0.5  # of `torch.nn.Linear`, for weights and biases alike
    shape = (config.num_codebooks, config.codebook_size)
    weight = torch.empty(*shape, config.hidden_size).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return weight.to(device), bias.to(device)


@torch.no_grad()
def _first_look(
    model: SpidrForPretraining, dropout_seed: int, inputs: Mapping[str, Any], precision: AbstractContextManager
) -> tuple[Tensor, Tensor]:
    """What the heads will read in the ordinary forward of a batch, and the labels K x N that they have to predict."""
    read: list[Tensor] = []
    hook = model.heads.register_forward_pre_hook(lambda _heads, arguments: read.append(arguments[0].float()))
    try:
        torch.manual_seed(dropout_seed)
        with precision:
            labels = model(**inputs, output_predictions=True).labels
    finally:
        hook.remove()
    return read[0], labels


@torch.no_grad()
def fit_heads(weight: Tensor, bias: Tensor, inputs: Iterable[Tensor], labels: Iterable[Tensor]) -> None:
    """Plain gradient descent, in place: each head alone on its mean negative log-likelihood over all frames.

    Args:
        weight, bias: K x V x H and K x V, float32, the same on every process.
        inputs: representations of several batches, K x N x H each (or N x H, where all heads read the same).
        labels: K x N each.
    """
    inputs = [x.expand(len(weight), -1, -1) if x.dim() == 2 else x for x in inputs]
    gradient = torch.empty(*weight.shape[:2], weight.shape[2] + 1, device=weight.device)
    frames = torch.tensor(float(sum(x.shape[1] for x in inputs)), device=weight.device)
    _sum_over_processes(frames)
    with torch.autocast(weight.device.type, enabled=False):
        for _ in range(HEAD_STEPS):
            gradient.zero_()
            for x, targets in zip(inputs, labels, strict=True):
                # Of the negative log-likelihood by the logits: probabilities less the one-hot label.
                logits = torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))
                errors = logits.softmax(-1) - F.one_hot(targets, weight.shape[1])
                gradient[..., :-1].baddbmm_(errors.transpose(1, 2), x)
                gradient[..., -1] += errors.sum(1)
            _sum_over_processes(gradient)
            weight.sub_(gradient[..., :-1] * (HEAD_LEARNING_RATE / frames))
            bias.sub_(gradient[..., -1] * (HEAD_LEARNING_RATE / frames))


def _sum_over_processes(tensor: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)


__all__ = ["HEAD_LEARNING_RATE", "HEAD_STEPS", "fit_heads", "forget"]
