"""The obvious forms of what the package computes in fast ones: slow, short, and the oracle of the tests."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_encoder(model, waveform: Tensor) -> Tensor:
    """Extractor on one utterance of S samples, convolution by convolution: T x C."""
    x = waveform.view(1, 1, -1)
    for layer in model.feature_extractor.conv_layers:
        x = F.conv1d(x, layer.conv.weight, layer.conv.bias, layer.conv.stride)
        norm = layer.layer_norm
        if isinstance(norm, torch.nn.LayerNorm):
            x = F.layer_norm(x.transpose(1, 2), norm.normalized_shape, norm.weight, norm.bias, norm.eps).transpose(1, 2)
        elif norm is not None:
            x = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        x = F.gelu(x)
    return x[0].t()


def positional_convolutions(module, hidden_states: Tensor) -> Tensor:
    """Positional stack on one utterance T x H."""
    x = hidden_states.t()[None]
    for conv in module.convs:
        length = x.shape[-1]
        x = F.conv1d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, groups=conv.groups)[..., :length]
        x = F.gelu(F.layer_norm(x.transpose(1, 2), x.shape[1:2]).transpose(1, 2))
    return x[0].t()


def attention(module, hidden_states: Tensor) -> Tensor:
    """Self-attention on one utterance T x H, head by head."""
    query, key, value = F.linear(hidden_states, module.qkv.weight, module.qkv.bias).chunk(3, dim=-1)
    width = query.shape[-1] // module.num_heads
    heads = []
    for head in range(module.num_heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[:, part] @ key[:, part].t() / math.sqrt(width)
        heads.append(scores.softmax(-1) @ value[:, part])
    return F.linear(torch.cat(heads, -1), module.proj.weight, module.proj.bias)


def encoder(module, features: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Transformer on one utterance T x H: representations, layer outputs, final output."""
    pre_norm = module.config.do_stable_layer_norm
    x = features + positional_convolutions(module.pos_conv_embed, features)
    if not pre_norm:
        x = module.layer_norm(x)
    representations, outputs = [], []
    for layer in module.layers:
        feed_forward = layer.feed_forward
        if pre_norm:
            x = x + attention(layer.attention, layer.layer_norm(x))
            inputs = layer.final_layer_norm(x)
        else:
            inputs = x = layer.layer_norm(x + attention(layer.attention, x))
        f = feed_forward.output_dense(F.gelu(feed_forward.intermediate_dense(inputs)))
        x = x + f if pre_norm else layer.final_layer_norm(x + f)
        representations.append(f)
        outputs.append(x)
    return representations, outputs, module.layer_norm(x) if pre_norm else x


def instance_norm(representation: Tensor, eps: float = 1e-5) -> Tensor:
    """T x H normalised over time."""
    mean = representation.mean(0, keepdim=True)
    var = ((representation - mean) ** 2).mean(0, keepdim=True)
    return (representation - mean) / torch.sqrt(var + eps)


def one_hot_statistics(labels: Tensor, targets: Tensor, codewords: int) -> tuple[Tensor, Tensor]:
    """Counts V and sums V x H of one codebook, through a one-hot matrix N x V."""
    onehot = F.one_hot(labels, codewords).to(targets.dtype)
    return onehot.sum(0), onehot.t() @ targets


def objective(model, waveforms: list[Tensor], masks: list[Tensor]) -> dict[str, Tensor]:
    """Loss, labels, codebook statistics and perplexities, utterance by utterance, codebook by codebook (eval mode)."""
    config = model.config
    first = config.num_hidden_layers - config.num_codebooks
    losses, all_labels, all_targets, log_probs = [], [], [], []
    for k in range(config.num_codebooks):
        codewords = model.codebooks.sums[k] / model.codebooks.counts[k][:, None]
        labels_k, targets_k, log_probs_k = [], [], []
        for waveform, mask in zip(waveforms, masks, strict=True):
            features = model.spidr.feature_projection(feature_encoder(model.spidr, waveform))
            target = instance_norm(encoder(model.teacher, features)[0][first + k])[mask]
            student_input = features.clone()
            student_input[mask] = model.spidr.masked_spec_embed
            representations, _, final = encoder(model.spidr.encoder, student_input)
            prediction = representations[first + k] if config.objective == "spidr" else final
            logits = prediction[mask] @ model.heads.weight[k].t() + model.heads.bias[k]
            labels_k.append(torch.cdist(target, codewords).argmin(-1))
            targets_k.append(target)
            log_probs_k.append(logits.log_softmax(-1))
        all_labels.append(torch.cat(labels_k))
        all_targets.append(torch.cat(targets_k))
        log_probs.append(torch.cat(log_probs_k))
        losses.append(F.nll_loss(log_probs[-1], all_labels[-1]))
    statistics = [
        one_hot_statistics(labels, targets, config.codebook_size)
        for labels, targets in zip(all_labels, all_targets, strict=True)
    ]
    counts = torch.stack([c for c, _ in statistics])
    return {
        "loss": torch.stack(losses).mean(),
        "layer_losses": torch.stack(losses),
        "labels": torch.stack(all_labels),
        "counts": counts,
        "sums": torch.stack([s for _, s in statistics]),
        "target_ppl": torch.stack([_perplexity(c / c.sum()) for c in counts]).mean(),
        "pred_ppl": torch.stack([_perplexity(p.exp().mean(0)) for p in log_probs]).mean(),
    }


def _perplexity(distribution: Tensor) -> Tensor:
    entropy = -sum(p * math.log2(p) for p in distribution.tolist() if p > 0)
    return torch.tensor(2.0**entropy)


def update_codebooks(sums: Tensor, counts: Tensor, new_sums: Tensor, new_counts: Tensor, decay: float) -> None:
    """Moving averages of K codebooks, codeword by codeword, in place."""
    for k in range(len(counts)):
        for v in range(counts.shape[1]):
            if new_counts[k, v] > 0:
                counts[k, v] = decay * counts[k, v] + (1 - decay) * new_counts[k, v]
                sums[k, v] = decay * sums[k, v] + (1 - decay) * new_sums[k, v]


def update_teacher(teacher: dict, student: dict, decay: float, excluded: tuple[str, ...]) -> None:
    """Teacher parameters, one by one, in place."""
    if decay == 1:
        return
    for name, parameter in teacher.items():
        if any(name.startswith(prefix) for prefix in excluded):
            parameter.copy_(student[name])
        else:
            parameter.copy_(decay * parameter + (1 - decay) * student[name])
