"""SpidrConfig: its defaults are spidr-base, impossible values are refused by name, and it survives saving."""

import pytest
from transformers import AutoConfig

from spidr_hf import SpidrConfig

# Architecture, objective and rates of the published spidr-base.
SPIDR_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "feat_extract_norm": "layer",
    "feat_extract_activation": "gelu",
    "conv_dim": [512] * 7,
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "conv_pos_kernel_size": 95,
    "conv_pos_depth": 5,
    "attention_bias": False,
    "objective": "spidr",
    "codebook_size": 256,
    "num_codebooks": 8,
    "codebook_decay": 0.9,
    "ema_start_decay": 0.999,
    "ema_final_decay": 0.9999,
    "ema_final_step": 30_000,
    "ema_timescale": 20_000,
    "ema_threshold": 1e-7,
    "ema_exclude_layers": ["pos_conv_embed"],
    "freeze_step": 200_000,
}


def test_the_defaults_are_spidr_base():
    config = SpidrConfig()
    fields = {name: list(v) if isinstance(v := getattr(config, name), tuple) else v for name in SPIDR_BASE}
    assert fields == SPIDR_BASE
    assert config.model_type == "spidr"
    assert config.inputs_to_logits_ratio == 320
    assert config.pos_conv_kernel == 19
    assert config.first_codebook_layer == 5


def test_derived_values():
    config = SpidrConfig(conv_pos_kernel_size=95, conv_pos_depth=40, num_codebooks=0)
    assert config.pos_conv_kernel == 3
    assert config.first_codebook_layer == 13
    assert SpidrConfig(conv_dim=[8, 8], conv_kernel=[4, 2], conv_stride=[3, 2]).inputs_to_logits_ratio == 6


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", 0),
        ("hidden_size", 768.0),
        ("hidden_size", "768"),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("num_attention_heads", 7),
        ("num_conv_pos_embedding_groups", 5),
        ("intermediate_size", 0),
        ("conv_pos_kernel_size", 0),
        ("conv_pos_depth", 0),
        ("codebook_size", 0),
        ("num_codebooks", -1),
        ("num_codebooks", 13),
        ("num_codebooks", True),
        ("codebook_decay", -0.1),
        ("hidden_dropout", 1.5),
        ("attention_dropout", -0.1),
        ("activation_dropout", 2),
        ("feat_proj_dropout", 2),
        ("final_dropout", None),
        ("layerdrop", 1.1),
        ("layer_norm_eps", 0.0),
        ("layer_norm_eps", float("inf")),
        ("hidden_dropout", float("nan")),
        ("initializer_range", -1.0),
        ("ema_start_decay", 1.2),
        ("ema_final_decay", -1.0),
        ("ema_final_step", -1),
        ("ema_timescale", 0),
        ("ema_threshold", -1e-7),
        ("ema_exclude_layers", "pos_conv_embed"),
        ("ema_exclude_layers", [1]),
        ("freeze_step", 0.5),
        ("mask_time_prob", 1.2),
        ("mask_time_length", 0),
        ("mask_time_min_masks", -1),
        ("mask_feature_prob", -0.2),
        ("mask_feature_length", 0),
        ("mask_feature_min_masks", -1),
        ("classifier_proj_size", 0),
        ("xvector_output_dim", 0),
        ("vocab_size", 0),
        ("vocab_size", "32"),
        ("conv_bias", "no"),
        ("do_stable_layer_norm", None),
        ("attention_bias", 1),
        ("use_weighted_layer_sum", "true"),
        ("objective", "wav2vec2"),
        ("feat_extract_norm", "batch"),
        ("feat_extract_activation", "gellu"),
        ("hidden_act", "gellu"),
        ("ctc_loss_reduction", "none"),
        ("conv_dim", [512] * 6),
        ("conv_dim", []),
        ("conv_kernel", [10, 3, 3, 3, 3, 2, 0]),
        ("conv_kernel", [10, 3, 3, 3, 3, 2, True]),
        ("conv_stride", 2),
        ("tdnn_dim", [512]),
        ("tdnn_kernel", [5, 3, 3, 1, "1"]),
        ("tdnn_dilation", None),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        SpidrConfig(**{field: value})


def test_a_misspelt_choice_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"`objective` must be one of 'spidr', 'dinosr', got 'dinosaur'.* 'dinosr'\?"):
        SpidrConfig(objective="dinosaur")


def test_saves_and_loads(tmp_path):
    config = SpidrConfig(
        objective="dinosr",
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=3,
        num_codebooks=2,
        layerdrop=0.05,
        attention_bias=True,
        conv_dim=(8, 8),
        conv_kernel=(4, 2),
        conv_stride=(3, 2),
        ema_exclude_layers=[],
        vocab_size=None,
        id2label={0: "a", 1: "b", 2: "c"},
        use_weighted_layer_sum=True,
    )
    config.save_pretrained(tmp_path)
    for loaded in (SpidrConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SpidrConfig
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.objective == "dinosr" and loaded.vocab_size is None and loaded.num_labels == 3
        assert list(loaded.conv_dim) == [8, 8] and list(loaded.ema_exclude_layers) == []
    changed = SpidrConfig.from_pretrained(tmp_path, hidden_dropout=0.3)
    assert changed.hidden_dropout == 0.3
    with pytest.raises(ValueError, match="hidden_dropout"):
        SpidrConfig.from_pretrained(tmp_path, hidden_dropout=3)
