"""Format B: checkpoints of the original DinoSR (fairseq)."""

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from spidr_hf import SpidrConfig
from spidr_hf.system.messages import shown

from .errors import ConversionError
from .safe_pickle import StandIn, plain
from .spidr_format import Converted, from_spidr, in_words_of_the_file, model_section, only_tensors, to_spidr
from .tensors import Shape, as_stored, check_sizes, check_tensors, expected_tensors

# Field of fairseq's configuration -> field of SpidrConfig.
_FIELDS = {
    "encoder_layers": "num_hidden_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_embed_dim": "intermediate_size",
    "encoder_attention_heads": "num_attention_heads",
    "layer_norm_first": "do_stable_layer_norm",
    "conv_bias": "conv_bias",
    "conv_pos": "conv_pos_kernel_size",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
    "pos_conv_depth": "conv_pos_depth",
    "dropout": "hidden_dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "feat_proj_dropout",
    "encoder_layerdrop": "layerdrop",
    "codebook_size": "codebook_size",
    "codebook_init_decay": "codebook_decay",
    "average_top_k_layers": "num_codebooks",
    "ema_decay": "ema_start_decay",
    "ema_end_decay": "ema_final_decay",
    "ema_anneal_end_step": "ema_final_step",
}
_NEEDED = (*_FIELDS, "extractor_mode", "conv_feature_layers", "freeze_teacher_step")
_EXTRACTOR_MODES = {"layer_norm": "layer", "default": "group"}
# Options of fairseq that leave no trace in the tensors, with the only value that these models have.
_FIXED = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "attn_type": "",
    "pos_enc_type": "abs",
    "conv_pos_batch_norm": False,
    "crop_seq_to_multiple": 1,
    "feature_grad_mult": 1.0,
    "discrete": True,
    "quantize_targets": False,
    "quantize_input": False,
    "target_glu": False,
    "instance_norm_target_layer": True,
    "layer_norm_target_layer": False,
    "batch_norm_target_layer": False,
    "group_norm_target_layer": False,
    "instance_norm_targets": False,
    "layer_norm_targets": False,
    "freeze_pre_enc_modules": True,
}
# Names in SpidR's format -> names in fairseq's; `{}` stands for the same number or rest on both sides. The teacher
# has the encoder's names without `encoder.` inside `_ema`. Query, key and value come separately: `{q,k,v}`.
_NAMES = (
    ("mask_embedding", "mask_emb"),
    ("feature_extractor.conv_layers.{}.conv.{}", "feature_extractor.conv_layers.{}.0.{}"),
    ("feature_projection.layer_norm.{}", "layer_norm.{}"),
    ("feature_projection.projection.{}", "post_extract_proj.{}"),
    ("heads.{}.0.{}", "heads.{}.{}"),
    ("codebooks.{}.codebook", "_codebook{}"),
    ("codebooks.{}.counts", "_codebook_cnts{}"),
)
_ENCODER_NAMES = (
    ("pos_conv_embed.convs.{}.{}", "pos_conv.{}.0.{}"),
    ("layer_norm.{}", "layer_norm.{}"),
    ("layers.{}.attention.qkv.{}", "layers.{}.self_attn.{q,k,v}_proj.{}"),
    ("layers.{}.attention.proj.{}", "layers.{}.self_attn.out_proj.{}"),
    ("layers.{}.layer_norm.{}", "layers.{}.self_attn_layer_norm.{}"),
    ("layers.{}.final_layer_norm.{}", "layers.{}.final_layer_norm.{}"),
    ("layers.{}.feed_forward.intermediate_dense.{}", "layers.{}.fc1.{}"),
    ("layers.{}.feed_forward.output_dense.{}", "layers.{}.fc2.{}"),
)
_EMA = "_ema."


def is_fairseq(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a loaded file has the structure of a fairseq checkpoint of this model."""
    model = checkpoint.get("model")
    return isinstance(model, Mapping) and any(
        isinstance(name, str) and (name == "mask_emb" or name.startswith(("_codebook", "_ema", "encoder.layers.")))
        for name in model
    )


# ---- configuration


def parse_conv_layers(expression: Any) -> list[tuple[int, int, int]]:
    """fairseq's `conv_feature_layers`, e.g. `"[(512,10,5)] + [(512,3,2)] * 4"`, as a list. Nothing is evaluated.

    Only numbers, lists, tuples, `+` between lists and `*` with a number are understood.
    """
    refused = ConversionError(
        f"`conv_feature_layers` must be a list of (channels, kernel, stride) built with + and *, got "
        f"{shown(expression)!r}."
    )

    def checked(layers: Any) -> list[tuple[int, int, int]]:
        if not isinstance(layers, (list, tuple)) or not layers:
            raise refused
        if not all(isinstance(layer, (list, tuple)) and len(layer) == 3 for layer in layers):
            raise refused
        return [tuple(layer) for layer in layers]

    if isinstance(expression, (list, tuple)):
        return checked(expression)
    if not isinstance(expression, str) or len(expression) > 10_000:
        raise refused
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise refused from None
    return checked(value)


def _evaluate(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.List(elts=entries):
            return [_evaluate(entry) for entry in entries]
        case ast.Tuple(elts=entries):
            return tuple(_evaluate(entry) for entry in entries)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            left, right = _evaluate(left), _evaluate(right)
            if isinstance(left, list) and isinstance(right, list) and len(left) + len(right) <= 1000:
                return left + right
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            left, right = _evaluate(left), _evaluate(right)
            if isinstance(left, int):
                left, right = right, left
            if isinstance(left, list) and isinstance(right, int) and len(left) * right <= 1000:
                return left * right
    raise ValueError


def settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The model's fields in a fairseq checkpoint: `cfg.model`, or `args`, whatever kind of object holds them."""
    cfg, args = plain(checkpoint.get("cfg")), plain(checkpoint.get("args"))
    if isinstance(cfg, Mapping) and isinstance(cfg.get("model"), Mapping):
        return {name: _resolve(value, cfg) for name, value in cfg["model"].items()}
    if isinstance(args, Mapping):
        return dict(args)
    raise ConversionError(
        "The fairseq checkpoint holds no settings (`cfg` or `args`). Give its model section with --config FILE.json."
    )


def _resolve(value: Any, root: Mapping[str, Any]) -> Any:
    """omegaconf's references, `"${optimization.max_update}"`."""
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if not reference:
        return value
    target: Any = root
    for part in reference[1].split("."):
        target = target.get(part) if isinstance(target, Mapping) else None
    return value if target is None else target


def config_from_fairseq(fields: Mapping[str, Any]) -> SpidrConfig:
    """`SpidrConfig` of fairseq's model section.

    Raises:
        ConversionError: missing fields, or options that these models do not have, by name.
    """
    missing = [name for name in _NEEDED if name not in fields]
    if missing:
        raise ConversionError(
            f"The fairseq settings lack {', '.join(missing)}. Give a complete model section with --config FILE.json."
        )
    problems = [
        f"{name} = {_value(fields[name])} (only {value!r} can be represented)"
        for name, value in _FIXED.items()
        if fields.get(name) is not None and fields[name] != value
    ]
    if fields.get("codebook_end_decay") not in (None, fields["codebook_init_decay"]):
        problems.append(
            f"codebook_end_decay = {_value(fields['codebook_end_decay'])} (only a constant decay can be represented, "
            f"and codebook_init_decay is {_value(fields['codebook_init_decay'])})"
        )
    layers_only = fields.get("ema_layers_only", True)
    if not layers_only and not fields.get("ema_transformer_only", True):
        problems.append("ema_transformer_only = False (the teacher has no feature extractor of its own)")
    if fields["extractor_mode"] not in tuple(_EXTRACTOR_MODES):
        problems.append(f"extractor_mode = {_value(fields['extractor_mode'])} (only 'layer_norm' or 'default')")
    freeze = fields["freeze_teacher_step"]
    if type(freeze) is not int or freeze < 1:
        problems.append(f"freeze_teacher_step = {_value(freeze)} (only a step of at least 1)")
    if problems:
        raise ConversionError("This DinoSR model has options that cannot be represented: " + "; ".join(problems) + ".")
    values = {ours: fields[theirs] for theirs, ours in _FIELDS.items()}
    layers = parse_conv_layers(fields["conv_feature_layers"])
    values["conv_dim"], values["conv_kernel"], values["conv_stride"] = map(list, zip(*layers, strict=True))
    values |= {
        "objective": "dinosr",
        "feat_extract_norm": _EXTRACTOR_MODES[fields["extractor_mode"]],
        "attention_bias": True,
        "ema_exclude_layers": ["pos_conv_embed"] if layers_only else [],
        # fairseq counts the first update without the teacher, we the last one with it.
        "freeze_step": freeze - 1,
    }
    if fields["pos_conv_depth"] == 1:
        # fairseq's single positional convolution is weight-normed instead of followed by a norm.
        values["conv_pos_norm"] = False
    names = {ours: theirs for theirs, ours in _FIELDS.items()}
    names |= dict.fromkeys(("conv_dim", "conv_kernel", "conv_stride"), "conv_feature_layers")
    with in_words_of_the_file(names):
        config = SpidrConfig(**values)
        check_sizes(config)
        return config


def _value(value: Any) -> str:
    return repr(shown(value)) if isinstance(value, str) else shown(value)


def update_count(checkpoint: Mapping[str, Any]) -> int | None:
    """Number of updates the checkpoint has seen, None where it does not tell."""
    history = plain(checkpoint.get("optimizer_history"))
    counts = [history[-1].get("num_updates")] if isinstance(history, list) and _is_table(history[-1:]) else []
    optimizer = checkpoint.get("last_optimizer_state")
    states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    if isinstance(states, Mapping) and states:
        first = states.get(0, next(iter(states.values())))
        counts.append(plain(first.get("step")) if isinstance(first, Mapping) else None)
    possible = (count for count in counts if isinstance(count, (int, float)) and 0 <= count < 2**63)
    return next((int(count) for count in possible), None)


def _is_table(entries: list) -> bool:
    return bool(entries) and isinstance(entries[0], Mapping)


# ---- tensors

Part = tuple[str, Shape]
Assembly = tuple[list[Part], Callable[[list[Tensor]], Tensor]]


def _only(parts: list[Tensor]) -> Tensor:
    return parts[0]


def _fold(parts: list[Tensor]) -> Tensor:
    """Weight of a weight-normed convolution from its magnitudes (1 x 1 x k) and directions."""
    return torch._weight_norm(parts[1], parts[0], 2)


def _translate(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for theirs, fairseq in table:
        match = re.fullmatch(re.escape(theirs).replace(r"\{\}", "(.+?)" if theirs.count("{}") > 1 else "(.+)"), name)
        if match:
            for value in match.groups():
                fairseq = fairseq.replace("{}", value, 1)
            return fairseq
    raise KeyError(name)


def _assembly(name: str, shape: Shape, config: SpidrConfig) -> Assembly:
    """What in a fairseq file makes up the tensor that SpidR's format calls `name`."""
    for prefix, fairseq_prefix in (("student.", "encoder."), ("teacher.", _EMA)):
        if not name.startswith(prefix):
            continue
        inner = name.removeprefix(prefix)
        if config.conv_pos_depth == 1 and inner.startswith("pos_conv_embed."):
            if inner.endswith("bias"):
                return [(f"{fairseq_prefix}pos_conv.0.bias", shape)], _only
            magnitudes = (f"{fairseq_prefix}pos_conv.0.weight_g", (1, 1, shape[-1]))
            return [magnitudes, (f"{fairseq_prefix}pos_conv.0.weight_v", shape)], _fold
        fairseq = fairseq_prefix + _translate(inner, _ENCODER_NAMES)
        if "{q,k,v}" in fairseq:
            third = (shape[0] // 3, *shape[1:])
            return [(fairseq.replace("{q,k,v}", part), third) for part in "qkv"], torch.cat
        return [(fairseq, shape)], _only
    norm = re.fullmatch(r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.(\w+)", name)
    if norm:
        position = "2.1" if config.feat_extract_norm == "layer" else "2"
        return [(f"feature_extractor.conv_layers.{norm[1]}.{position}.{norm[2]}", shape)], _only
    return [(_translate(name, _NAMES), shape)], _only


def fairseq_tensors(checkpoint: Mapping[str, Any], what: str) -> dict[str, Tensor]:
    """The tensors of a fairseq checkpoint in one dict, the teacher's under `_ema.`.

    Raises:
        ConversionError: there are other things among them, or a feature extractor of the teacher's own.
    """
    model = checkpoint["model"]
    ema = model.get("_ema")
    if isinstance(ema, StandIn):  # a kind of dict that is not loaded
        ema = ema.items
    flat = {str(name): value for name, value in model.items() if name != "_ema"}
    if isinstance(ema, Mapping):
        flat |= {f"{_EMA}{name}": value for name, value in ema.items()}
    own = sorted(name for name in flat if name.startswith("_pre_encoder"))
    if own:
        raise ConversionError(
            f"{what} has a feature extractor of the teacher's own ({', '.join(map(shown, own[:3]))}, ...), from a run "
            "with freeze_pre_enc_modules=False. These models share the student's extractor and cannot represent it."
        )
    only_tensors(flat, what)
    # PyTorch's newer spelling of weight norm.
    renamed = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    for new, old in renamed.items():
        flat = {name.replace(new, old): tensor for name, tensor in flat.items()}
    return flat


def convert_fairseq(
    checkpoint: Mapping[str, Any],
    raw_config: Mapping[str, Any] | None = None,
    objective: str | None = None,
    what: str = "the file",
) -> Converted:
    """A loaded fairseq checkpoint -> ours. `raw_config` (fairseq's field names) replaces the stored settings.

    The stored teacher is kept as it is; it lacks the teacher update of the last step, which fairseq does at the start
    of the next one: `update_teacher(step)` before continuing the run.
    """
    if objective not in (None, "dinosr"):
        raise ConversionError(f"{what} is an original DinoSR checkpoint: its objective is dinosr, not {objective}.")
    tensors = fairseq_tensors(checkpoint, what)
    config = config_from_fairseq(settings(checkpoint) if raw_config is None else model_section(raw_config))
    reference = expected_tensors(config)
    assemblies = {
        name: _assembly(name, tuple(tensor.shape), config)
        for name, tensor in to_spidr(reference).items()
        if name != "current_step"
    }
    shapes = {part: shape for parts, _ in assemblies.values() for part, shape in parts}
    check_tensors(tensors, shapes, what=what)
    state = {name: assemble([tensors[part] for part, _ in parts]) for name, (parts, assemble) in assemblies.items()}
    step, notes = update_count(checkpoint), []
    if step is None:
        notes.append("The file does not tell how many updates it has seen; current_step is 0.")
    state["current_step"] = torch.tensor([step or 0], dtype=torch.int64)
    result, stored_notes = as_stored(from_spidr(state, config.num_codebooks), reference)
    return Converted(config, result, notes + stored_notes)


__all__ = [
    "config_from_fairseq",
    "convert_fairseq",
    "fairseq_tensors",
    "is_fairseq",
    "parse_conv_layers",
    "settings",
    "update_count",
]
