"""Tiny configurations that cover every option of the architecture."""

import torch

from spidr_hf import SpidrConfig, SpidrForPretraining

SMALL = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "conv_dim": [32] * 7,
    "num_conv_pos_embedding_groups": 4,
    "codebook_size": 24,
    "num_codebooks": 3,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ema_timescale": 10,
    "freeze_step": 100,
    "mask_time_prob": 0.0,
}

VARIANTS = {
    "spidr": {},
    "dinosr": {"objective": "dinosr", "attention_bias": True, "layerdrop": 0.05},
    "group norm, pre-norm, even kernel": {
        "feat_extract_norm": "group",
        "conv_bias": True,
        "do_stable_layer_norm": True,
        "conv_pos_kernel_size": 80,
        "ema_exclude_layers": [],
    },
    "other strides": {
        "conv_dim": [24, 32, 24],
        "conv_kernel": [12, 7, 2],
        "conv_stride": [5, 3, 4],
        "conv_pos_depth": 1,
        "conv_pos_kernel_size": 9,
        "objective": "dinosr",
        "do_stable_layer_norm": True,
    },
}


def tiny_config(**changes) -> SpidrConfig:
    return SpidrConfig(**{**SMALL, **changes})


def tiny_model(seed: int = 0, **changes) -> SpidrForPretraining:
    """A model whose norms, biases and codebooks have moved away from their initial values, in eval mode."""
    torch.manual_seed(seed)
    model = SpidrForPretraining(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.codebooks.counts.uniform_(0.5, 3)
    return model.eval()


def random_mask(batch: int, frames: int, seed: int = 0, share: float = 0.5) -> torch.Tensor:
    """B x T (bool) with the same number of masked frames in every row."""
    scores = torch.rand(batch, frames, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(-1) < max(1, int(share * frames))
