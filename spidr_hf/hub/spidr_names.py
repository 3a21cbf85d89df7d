"""SpidR's names for the fields of a model, next to ours: the one table that configs and conversion read.

SpidR's own training code calls the fields of its `[model]` section (and of a checkpoint's `config.json`) differently
from transformers. `to_spidr_config` goes from there to a `SpidrConfig`, `to_model_section` the other way.
"""

from difflib import get_close_matches
from typing import Any

from ..configuration_spidr import SpidrConfig
from ..objectives_spidr import fields_of_others, get_objective

# SpidR's name -> ours, where one value is the other.
SPIDR_FIELDS = {
    "extractor_conv_bias": "conv_bias",
    "encoder_embed_dim": "hidden_size",
    "encoder_projection_dropout": "feat_proj_dropout",
    "encoder_pos_conv_kernel": "conv_pos_kernel_size",
    "encoder_pos_conv_groups": "num_conv_pos_embedding_groups",
    "encoder_pos_conv_depth": "conv_pos_depth",
    "encoder_num_layers": "num_hidden_layers",
    "encoder_num_heads": "num_attention_heads",
    "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_features": "intermediate_size",
    "encoder_ff_interm_dropout": "activation_dropout",
    "encoder_dropout": "hidden_dropout",
    "encoder_layer_norm_first": "do_stable_layer_norm",
    "encoder_layer_drop": "layerdrop",
    "encoder_qkv_bias": "attention_bias",
    "codebook_size": "codebook_size",
    "codebook_decay": "codebook_decay",
    "num_codebooks": "num_codebooks",
    "ema_start_decay": "ema_start_decay",
    "ema_final_decay": "ema_final_decay",
    "ema_final_step": "ema_final_step",
    "ema_exclude_layers": "ema_exclude_layers",
    "freeze_step": "freeze_step",
    "ema_timescale": "ema_timescale",
    "ema_threshold": "ema_threshold",
}
# `extractor_mode`, SpidR's value -> our `feat_extract_norm`.
EXTRACTOR_MODES = {"layer_norm": "layer", "group_norm": "group"}
# What `run.model_type` may say -> the objective. SpidR-Adapt's models are SpidR's.
MODEL_TYPES = {"spidr": "spidr", "dinosr": "dinosr", "spidr_reset": "spidr"}
# Fields of SpidR-Adapt's `[model]` section that are about how it was trained; no model that came out of it has them.
ADAPT_FIELDS = (
    "supervised_every_step",
    "supervised_layer",
    "num_supervised_layers",
    "supervised_languages",
    "adapt_heads",
)
# `extractor_mode` and `extractor_conv_layer_config` need more than a new name.
MODEL_SECTION_FIELDS = ("extractor_mode", "extractor_conv_layer_config", *SPIDR_FIELDS)
# Fields of how a model is trained, not of what it is: a checkpoint can be trained on with others.
TRAINING_FIELDS = (
    "encoder_projection_dropout",
    "encoder_attention_dropout",
    "encoder_ff_interm_dropout",
    "encoder_dropout",
    "encoder_layer_drop",
    "codebook_decay",
    "ema_start_decay",
    "ema_final_decay",
    "ema_final_step",
    "ema_exclude_layers",
    "ema_timescale",
    "ema_threshold",
    "freeze_step",
)
# What SpidR's format cannot express: these must hold for a config to be written in it.
_FIXED = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5, "conv_pos_norm": True}


def to_spidr_config(model_section: dict[str, Any], objective: str) -> SpidrConfig:
    """`SpidrConfig` of a `[model]` section in SpidR's own field names.

    Args:
        model_section: fields of SpidR's `[model]`; those left out have the defaults of the objective's recipe, those of
            SpidR-Adapt's training are passed over.
        objective: `"spidr"` or `"dinosr"`.

    Raises `ValueError` on unknown fields, naming the nearest known one, and on impossible values.
    """
    values: dict[str, Any] = dict(get_objective(objective).recipe)
    for name, value in model_section.items():
        if name in ADAPT_FIELDS and objective == MODEL_TYPES["spidr_reset"]:
            continue
        if name not in MODEL_SECTION_FIELDS:
            nearest = get_close_matches(name, MODEL_SECTION_FIELDS, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"Unknown model field {name!r}.{hint}")
        if name == "extractor_mode":
            if value not in EXTRACTOR_MODES:
                raise ValueError(
                    f"`extractor_mode` must be one of {', '.join(map(repr, EXTRACTOR_MODES))}, got {value!r}."
                )
            values["feat_extract_norm"] = EXTRACTOR_MODES[value]
        elif name == "extractor_conv_layer_config":
            if not value or not all(isinstance(row, (list, tuple)) and len(row) == 3 for row in value):
                raise ValueError(
                    "`extractor_conv_layer_config` must be a list of [channels, kernel, stride], one for each "
                    f"convolution, got {value!r}."
                )
            values["conv_dim"], values["conv_kernel"], values["conv_stride"] = map(list, zip(*value, strict=True))
        else:
            values[SPIDR_FIELDS[name]] = list(value) if isinstance(value, tuple) else value
    return SpidrConfig(objective=objective, **values)


def to_model_section(config: SpidrConfig) -> dict[str, Any]:
    """Every field of SpidR's `[model]` section for a `SpidrConfig`; the inverse of `to_spidr_config`.

    Raises `ValueError` where the config holds what SpidR's format cannot express.
    """
    for name, value in _FIXED.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"SpidR's format only knows `{name}` = {value!r}, this model has {getattr(config, name)!r}."
            )
    modes = {ours: spidr for spidr, ours in EXTRACTOR_MODES.items()}
    layers = zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)
    section: dict[str, Any] = {
        "extractor_mode": modes[config.feat_extract_norm],
        "extractor_conv_bias": config.conv_bias,
        "extractor_conv_layer_config": [list(layer) for layer in layers],
    }
    for name, ours in SPIDR_FIELDS.items():
        if ours in fields_of_others(config.objective):
            continue
        value = getattr(config, ours)
        section[name] = list(value) if isinstance(value, tuple) else value
    return section


def architecture_differences(first: SpidrConfig, second: SpidrConfig) -> dict[str, tuple[Any, Any]]:
    """Fields, in SpidR's names, in which two models compute differently with the same weights: name -> both values."""
    ours, theirs = to_model_section(first), to_model_section(second)
    names = [name for name in MODEL_SECTION_FIELDS if name not in TRAINING_FIELDS]
    return {name: (ours[name], theirs[name]) for name in names if ours[name] != theirs[name]}


__all__ = [
    "ADAPT_FIELDS",
    "EXTRACTOR_MODES",
    "MODEL_SECTION_FIELDS",
    "MODEL_TYPES",
    "SPIDR_FIELDS",
    "TRAINING_FIELDS",
    "architecture_differences",
    "to_model_section",
    "to_spidr_config",
]
