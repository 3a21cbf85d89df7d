"""Format A: checkpoints of SpidR's own training code, for both objectives."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spidr_hf import SpidrConfig
from spidr_hf.hub.spidr_names import ADAPT_FIELDS, MODEL_TYPES, SPIDR_FIELDS, to_model_section, to_spidr_config
from spidr_hf.system.messages import shown

from .errors import ConversionError
from .tensors import as_stored, check_sizes, check_tensors, expected_tensors

# Prefix (or whole name) in a SpidR file <-> in ours.
_PREFIXES = (
    ("mask_embedding", "spidr.masked_spec_embed"),
    ("current_step", "current_step"),
    ("feature_extractor.", "spidr.feature_extractor."),
    ("feature_projection.", "spidr.feature_projection."),
    ("student.", "spidr.encoder."),
    ("teacher.", "teacher."),
)
# One tensor per codebook in a SpidR file <-> one tensor for all in ours, stacked along the first axis.
_STACKED = (
    ("heads.{}.0.weight", "heads.weight"),
    ("heads.{}.0.bias", "heads.bias"),
    ("codebooks.{}.codebook", "codebooks.sums"),
    ("codebooks.{}.counts", "codebooks.counts"),
)
_CLASSIFIER = re.compile(r"supervised_classifiers\.([^.]+)\.output_layer\.(?:weight|bias)")
# Sections of a whole run's configuration, besides `model`.
_RUN_SECTIONS = ("run", "data", "optimizer", "masking", "validation")


@dataclass
class Converted:
    """A checkpoint in this project's terms."""

    config: SpidrConfig
    tensors: dict[str, Tensor]  # the state dict of SpidrForPretraining
    notes: list[str] = field(default_factory=list)


# ---- configuration


def objective_of(
    raw: Mapping[str, Any] | None, objective: str | None = None, *, classifiers: bool = False
) -> str | None:
    """The objective that a configuration file (or `objective`, the user's own word) tells, else None.

    Args:
        classifiers: whether phone classifiers lie beside the model's tensors.

    Raises:
        ConversionError: they contradict each other.
    """
    raw = raw or {}
    if is_transformers_config(raw):
        raw = {"model_type": raw.get("objective")}
    run: Mapping[str, Any] = raw["run"] if isinstance(raw.get("run"), Mapping) else {}
    said = {"run.model_type": run.get("model_type"), "model_type": raw.get("model_type"), "--objective": objective}
    for name in ("ema_timescale", *ADAPT_FIELDS):
        said[f"the field {name}"] = "spidr" if name in model_section(raw) else None
    said["a phone classifier of SpidR-Adapt's"] = "spidr" if classifiers else None
    said = {where: value for where, value in said.items() if value is not None}
    for where, value in said.items():
        if value not in tuple(MODEL_TYPES):
            raise ConversionError(f"The objective must be 'spidr' or 'dinosr', but {where} says {shown(value)!r}.")
        said[where] = MODEL_TYPES[value]
    if len(set(said.values())) > 1:
        contradiction = ", ".join(f"{where} says {value}" for where, value in said.items())
        raise ConversionError(f"The objective is contradictory: {contradiction}. Correct the one that is wrong.")
    return next(iter(said.values()), None)


def is_transformers_config(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of this project's models rather than one of SpidR's own code."""
    return "hidden_size" in raw and raw.get("model_type") == SpidrConfig.model_type


def model_section(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own fields of a configuration file: its `model` section, or all of it if it has no sections."""
    if "model" not in raw and any(isinstance(raw.get(section), Mapping) for section in _RUN_SECTIONS):
        return {}
    if "model" in raw:
        if not isinstance(raw["model"], Mapping):
            raise ConversionError(f"The configuration's `model` must be a table of fields, got {shown(raw['model'])}.")
        return dict(raw["model"])
    return {name: value for name, value in raw.items() if name != "model_type"}


def config_from_spidr(fields: Mapping[str, Any], objective: str) -> SpidrConfig:
    """`SpidrConfig` of a SpidR model section; what is not set has SpidR's defaults.

    Raises:
        ConversionError: unknown fields, or values that no model can have.
    """
    names = {ours: theirs for theirs, ours in SPIDR_FIELDS.items()}
    names |= dict.fromkeys(("conv_dim", "conv_kernel", "conv_stride"), "extractor_conv_layer_config")
    with in_words_of_the_file(names):
        config = to_spidr_config(dict(fields), objective)
        check_sizes(config)
        return config


@contextmanager
def in_words_of_the_file(names: Mapping[str, str]) -> Iterator[None]:
    """Turns a configuration's refusals into a `ConversionError` with the file's field names (`names`: ours -> its)."""
    try:
        yield
    except Exception as error:  # whatever a wrong value makes of the code that reads it
        message = str(error)
        for ours, theirs in names.items():
            message = message.replace(f"`{ours}`", f"`{theirs}`")
        raise ConversionError(f"The configuration cannot be right: {message}") from None


def config_to_spidr(config: SpidrConfig) -> dict[str, Any]:
    """A configuration as SpidR's tools read it: `{"run": {"model_type": ...}, "model": {...}}`.

    Raises:
        ConversionError: it has something that SpidR's models cannot have.
    """
    if not getattr(config, "conv_pos_norm", True):
        raise ConversionError(
            "SpidR's format cannot hold this model: its single positional convolution has no norm after it "
            "(`conv_pos_norm` is False, from a fairseq checkpoint with pos_conv_depth = 1)."
        )
    if config.objective not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ConversionError(
            f"SpidR's format cannot hold this model: its objective is {config.objective}, not {known}."
        )
    try:
        return {"run": {"model_type": config.objective}, "model": to_model_section(config)}
    except ValueError as error:
        raise ConversionError(f"SpidR's format cannot hold this model: {error}") from None


# ---- tensors


def from_spidr(tensors: Mapping[str, Tensor], num_codebooks: int) -> dict[str, Tensor]:
    """Tensors of a SpidR file under our names. All must be there (`check_tensors`)."""
    result = {}
    for name, tensor in tensors.items():
        for theirs, ours in _PREFIXES:
            if name == theirs or (theirs.endswith(".") and name.startswith(theirs)):
                result[ours + name[len(theirs) :]] = tensor
    for theirs, ours in _STACKED:
        result[ours] = torch.stack([tensors[theirs.format(k)] for k in range(num_codebooks)])
    return result


def to_spidr(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under SpidR's names; unknown names are left out."""
    result = {}
    for theirs, ours in _PREFIXES:
        for name, tensor in tensors.items():
            if name == ours or (ours.endswith(".") and name.startswith(ours)):
                result[theirs + name[len(ours) :]] = tensor
    for theirs, ours in _STACKED:
        if ours in tensors:
            result |= {theirs.format(k): tensor.clone() for k, tensor in enumerate(tensors[ours].unbind(0))}
    return result


def spidr_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The model's tensors in a loaded file (wrapped or bare, `module.` prefixes taken off), None if it has none."""
    for candidate in (checkpoint.get("model"), checkpoint):
        if isinstance(candidate, Mapping) and any(isinstance(value, Tensor) for value in candidate.values()):
            # What DistributedDataParallel and torch.compile put before the names.
            names = [re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)) for name in candidate]
            state = dict(zip(names, candidate.values(), strict=True))
            if "mask_embedding" in state or any(name.startswith(("student.", "teacher.")) for name in state):
                return state
    return None


def only_tensors(tensors: Mapping[str, Any], what: str) -> None:
    """Refuses a state dict with anything else in it, by name."""
    others = [shown(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        raise ConversionError(f"{what} holds things among its tensors that are none: {', '.join(others[:8])}{more}.")


def evident_fields(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a SpidR file alone tell about its configuration."""

    def count(prefix: str, suffix: str = "") -> int:
        indices = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
        return len({index for index in indices if not suffix or f"{prefix}{index}{suffix}" in tensors})

    def size(name: str, axis: int) -> int | None:
        return tensors[name].shape[axis] if name in tensors and tensors[name].dim() > axis else None

    blocks = range(count("feature_extractor.conv_layers."))
    convs = [tensors.get(f"feature_extractor.conv_layers.{i}.conv.weight") for i in blocks]
    pos_conv = tensors.get("student.pos_conv_embed.convs.0.weight")
    hidden_size = size("mask_embedding", 0)
    facts = {
        "extractor_mode": "group_norm"
        if count("feature_extractor.conv_layers.", ".layer_norm.weight") < len(blocks)
        else "layer_norm",
        "extractor_conv_bias": "feature_extractor.conv_layers.0.conv.bias" in tensors,
        "channels and kernels in extractor_conv_layer_config": [
            [conv.shape[0], conv.shape[-1]] for conv in convs if conv is not None
        ]
        if all(conv is not None and conv.dim() == 3 for conv in convs)
        else None,
        "encoder_embed_dim": hidden_size,
        "encoder_pos_conv_depth": count("student.pos_conv_embed.convs."),
        "encoder_num_layers": count("student.layers."),
        "encoder_ff_interm_features": size("student.layers.0.feed_forward.intermediate_dense.weight", 0),
        "encoder_qkv_bias": "student.layers.0.attention.qkv.bias" in tensors,
        "codebook_size": size("codebooks.0.counts", 0),
        "num_codebooks": count("codebooks."),
    }
    if hidden_size and pos_conv is not None and pos_conv.dim() == 3 and pos_conv.shape[1]:
        facts["encoder_pos_conv_groups"] = hidden_size // pos_conv.shape[1]
        facts["kernel of each positional convolution (from encoder_pos_conv_kernel)"] = pos_conv.shape[-1]
    return {name: value for name, value in facts.items() if value is not None}


def contradictions(tensors: Mapping[str, Tensor], config: SpidrConfig) -> list[str]:
    """Each field in which the tensors are evidently not of this configuration."""
    fields = to_model_section(config)
    fields["channels and kernels in extractor_conv_layer_config"] = [
        layer[:2] for layer in fields["extractor_conv_layer_config"]
    ]
    fields["kernel of each positional convolution (from encoder_pos_conv_kernel)"] = config.pos_conv_kernel
    return [
        f"{name} is {json.dumps(value)} in the tensors, {json.dumps(fields[name])} in the configuration"
        for name, value in evident_fields(tensors).items()
        if value != fields[name]
    ]


def convert_spidr(
    tensors: Mapping[str, Tensor], raw_config: Mapping[str, Any] | None, objective: str | None, what: str = "the file"
) -> Converted:
    """SpidR's state dict and configuration file (None: SpidR's defaults) -> ours.

    Args:
        objective: "spidr" or "dinosr" where the caller knows it.
        what: the file's name, for error messages.
    """
    only_tensors(tensors, what)
    tensors, languages = without_classifiers(tensors)
    known_objective = objective_of(raw_config, objective, classifiers=bool(languages))
    if known_objective is None:
        raise ConversionError(
            f"{what} does not tell its training objective (the tensors of SpidR and DinoSR have the same names). "
            "Say it with --objective spidr or --objective dinosr."
        )
    if is_transformers_config(raw_config or {}):
        with in_words_of_the_file({}):
            config = SpidrConfig.from_dict({**(raw_config or {}), "objective": known_objective})
            check_sizes(config)
    else:
        config = config_from_spidr(model_section(raw_config or {}), known_objective)
    differences = contradictions(tensors, config)
    if raw_config is None and differences:
        listed = "; ".join(difference.replace("in the configuration", "by default") for difference in differences)
        raise ConversionError(
            f"There is no config.json beside {what}, and its tensors are not those of SpidR's default sizes: {listed}. "
            "Give the model's configuration with --config FILE.json."
        )
    reference = expected_tensors(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in to_spidr(reference).items()}
    hints = ["The configuration is that of another model: " + "; ".join(differences) + "."] if differences else []
    check_tensors(tensors, shapes, hints, what=what)
    result, notes = as_stored(from_spidr(tensors, config.num_codebooks), reference)
    if languages:
        notes.append(
            f"The phone classifiers of SpidR-Adapt's training ({', '.join(map(shown, languages[:8]))}"
            f"{', ...' if len(languages) > 8 else ''}) are left out: the model does not use them."
        )
    return Converted(config, result, notes)


def without_classifiers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict without the phone classifiers that SpidR-Adapt trains beside the model, and their languages."""
    languages = {name: match[1] for name in tensors if (match := _CLASSIFIER.fullmatch(name))}
    return {name: tensor for name, tensor in tensors.items() if name not in languages}, sorted({*languages.values()})


__all__ = [
    "Converted",
    "config_from_spidr",
    "config_to_spidr",
    "contradictions",
    "convert_spidr",
    "from_spidr",
    "in_words_of_the_file",
    "model_section",
    "objective_of",
    "only_tensors",
    "spidr_state_dict",
    "to_spidr",
    "without_classifiers",
]
