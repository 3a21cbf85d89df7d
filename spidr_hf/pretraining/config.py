# ruff: noqa: RUF009 (`option` is `dataclasses.field` with documentation)
"""The configuration of a pretraining run: SpidR's own sections and field names, in TOML or JSON.

`load_config` reads `[run]`, `[data]`, `[model]`, `[optimizer]`, `[masking]` and `[validation.<name>]`, applies
overrides from the command line, and refuses what it does not know. A file written for SpidR's own training code is
accepted as it is; fields that mean nothing here are named in `PretrainingConfig.notes`. `[model]` becomes a
`SpidrConfig` (`spidr_fields` has the table of names).
"""

import json
import math
import os
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..configuration_spidr import OBJECTIVES, SpidrConfig
from ..data.batching import BUCKET_METHODS
from ..data.masking import SpanMask
from ..training.schedules import SCHEDULES
from .spidr_names import MODEL_SECTION_FIELDS, SPIDR_FIELDS, SPIDR_ONLY_FIELDS, to_model_section, to_spidr_config

DTYPES = ("bfloat16", "float32", "float16")
# What freezes at `freeze_step`; the model itself does it.
FREEZABLE = ("feature_extractor", "feature_projection")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field and says what to do."""


def option(default: Any, doc: str, check: Callable[[Any], bool] | None = None, allowed: str = "") -> Any:
    """A documented field. `check` tells whether a value is possible; `allowed` says in words what it tests."""
    metadata = {"doc": doc, "check": check, "allowed": allowed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _one_of(choices: Sequence[str]) -> dict[str, Any]:
    return {"check": lambda value: value in choices, "allowed": "one of " + ", ".join(map(repr, choices))}


_POSITIVE: dict[str, Any] = {"check": lambda value: value > 0, "allowed": "positive"}
_NOT_NEGATIVE: dict[str, Any] = {"check": lambda value: value >= 0, "allowed": "at least 0"}
_SHARE: dict[str, Any] = {"check": lambda value: 0 <= value <= 1, "allowed": "in [0, 1]"}


@dataclass
class RunSection:
    """`[run]`: what is trained, how often it reports and saves."""

    model_type: str = option("dinosr", "objective: 'spidr' or 'dinosr' (SpidR's code defaults to 'dinosr')")
    random_seed: int = option(0, "seed of the initial weights, the masks and dropout", **_NOT_NEGATIVE)
    log_interval: int = option(200, "steps between rows of metrics.jsonl", **_POSITIVE)
    save_interval: int = option(2500, "steps between checkpoints", **_POSITIVE)
    keep_latest: int = option(
        -1,
        "how many checkpoints to keep; -1 keeps all",
        check=lambda value: value == -1 or value > 0,
        allowed="-1 or positive",
    )
    validate_interval: int = option(
        0,
        "ours: steps between validations on [validation.<name>] by the training processes themselves; 0: leave it to "
        "examples/validate.py, which does not stop training",
        **_NOT_NEGATIVE,
    )
    init_ckpt: str | None = option(
        None,
        "start from these weights, codebooks and teacher: a SpidR .pt file or a model folder; steps, schedules and "
        "freeze begin at 0",
    )
    compile: bool = option(
        True,
        "compile the transformer layers (CUDA only; ignored on CPU, where it does not pay); what is compiled stays in "
        "the run's folder, or in TORCHINDUCTOR_CACHE_DIR, for the next start",
    )
    compile_convolutions: bool = option(
        False,
        "ours: with `compile`, compile feature extractor and positional convolutions, too; examples/benchmark_cuda.py "
        "tells whether that is faster",
    )
    kernels: bool = option(
        True, "ours: own Triton kernels for norms, positional convolutions and codebooks (CUDA with Triton only)"
    )
    use_deterministic: bool = option(False, "deterministic algorithms on GPU too, at some cost in speed")
    tracker: str = option(
        "auto",
        "ours: where curves go besides metrics.jsonl: 'tensorboard', 'wandb', any other accelerate tracker, 'none', or "
        "'auto' for TensorBoard where it is installed",
    )
    max_nonfinite_steps: int = option(
        10, "ours: stop after this many updates in a row with a non-finite loss or gradient", **_POSITIVE
    )
    plot_minutes: float = option(
        5.0, "ours: minutes between pictures of the curves, curves.png in the run's folder; 0: none", **_NOT_NEGATIVE
    )
    profile_steps: str | None = option(
        None,
        "ours: profile these steps, for example '100:105', into profile/ in the run's folder",
        check=lambda value: _is_step_range(value),
        allowed="the first and the last step, for example '100:105'",
    )
    push_to_hub: str | None = option(
        None,
        "ours: 'user/name' of a repository on the Hub (made private where there is none) that gets the model of every "
        "checkpoint, in the background, and the final one",
        check=lambda value: value.count("/") <= 1 and all(value.split("/")),
        allowed="a repository's name, 'user/name'",
    )
    workdir: str | None = option(
        None, "no meaning here: `--output-dir` says where the run goes (examples/slurm/submit.py reads it)"
    )
    wandb_project: str | None = option(None, "project name, with any tracker but TensorBoard (default: 'spidr')")
    wandb_name: str | None = option(None, "run name, with `tracker = 'wandb'` or 'trackio' (default: the run's folder)")
    wandb_mode: str | None = option(None, "'online' or 'offline', with `tracker = 'wandb'`")
    slurm_validation: dict[str, Any] | None = option(
        None, "options of sbatch for a validation job of its own, which examples/slurm/submit.py submits"
    )


@dataclass
class DataSection:
    """`[data]`: the audio and how it becomes batches."""

    manifest: str | list[str] | None = option(
        None,
        "manifest (.csv, .jsonl, .tsv), folder of audio files, uncompressed tar, or data set (name:config:split); "
        'ours: several of these as a list, for example \'["a.csv", "b.csv"]\'',
        check=lambda value: len(value) > 0,
        allowed="a source, or a list of at least one",
    )
    weights: list[float] | None = option(
        None,
        "ours: with a list, how many times an epoch has each utterance of each source, for example '[2, 0.5]': the "
        "first twice (other crops), the second in every other epoch. A source's share of the audio is in proportion to "
        "weight x hours. Default: 1 each",
        check=lambda value: all(weight > 0 for weight in value),
        allowed="a list of positive numbers (leave out a source that is not wanted)",
    )
    enable_padding: bool = option(False, "pad batches to their longest utterance instead of cropping to the shortest")
    rand_crop: bool = option(True, "crop at a random place; otherwise utterances keep their beginning")
    normalize: bool = option(True, "standardise every utterance over its own samples, before cropping")
    num_buckets: int = option(1000, "buckets that group utterances by length", **_POSITIVE)
    bucket_method: str = option(
        "uniform", "'uniform' (equal width) or 'percentile' (equal count)", **_one_of(BUCKET_METHODS)
    )
    min_sample_size: int = option(2000, "shorter utterances are dropped, in samples", **_NOT_NEGATIVE)
    max_sample_size: int = option(320_000, "longer utterances are cropped, in samples", **_POSITIVE)
    max_batch_length: int = option(3_800_000, "most samples in a batch of one process", **_POSITIVE)
    drop_last: bool = option(False, "leave out the end of an epoch that does not fill an update")
    random_seed: int = option(0, "seed of the order of utterances and of crops", **_NOT_NEGATIVE)
    num_workers: int = option(10, "processes that decode audio, per training process", **_NOT_NEGATIVE)
    prefetch_factor: int = option(2, "batches that each of them prepares ahead", **_POSITIVE)
    pin_memory: bool = option(True, "batches in page-locked memory, for faster copies to the GPU")
    resample: bool = option(False, "ours: take audio of any rate and number of channels, instead of refusing it")
    streaming: bool = option(
        False,
        "ours: read the data set (name:config:split) as it comes instead of downloading it; order and batches then "
        "depend on the numbers of processes and workers, which must stay the same when a run is resumed",
    )
    shuffle_buffer: int = option(
        1000,
        "ours, with `streaming`: utterances that each worker holds, as they are stored, to make batches of similar "
        "length from (256 MiB of them at most)",
        **_POSITIVE,
    )
    max_skipped_share: float = option(
        0.5,
        "ours: stop when more than this share of the audio cannot be read (it is listed in skipped.jsonl)",
        **_SHARE,
    )
    persistent_workers: bool = option(True, "no meaning here: workers always persist")
    alignments_path: str | None = option(None, "phones, in [validation.<name>]; no meaning in [data]")


@dataclass
class OptimizerSection:
    """`[optimizer]`: AdamW, its schedule, and how an update is made."""

    lr: float = option(5e-4, "peak learning rate", **_POSITIVE)
    betas: list[float] = option(
        [0.9, 0.95],
        "AdamW's betas",
        check=lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        allowed="two numbers in [0, 1)",
    )
    weight_decay: float = option(0.01, "AdamW's weight decay, on everything", **_NOT_NEGATIVE)
    eps: float = option(1e-6, "AdamW's epsilon", **_POSITIVE)
    max_norm: float = option(10.0, "gradient norm to clip at", **_POSITIVE)
    dtype: str = option("bfloat16", "autocast precision: 'bfloat16', 'float32' or 'float16'", **_one_of(DTYPES))
    init_lr_scale: float = option(0.01, "share of `lr` at the start of the warm-up", **_NOT_NEGATIVE)
    final_lr_scale: float = option(0.01, "share of `lr` at the end of the decay", **_NOT_NEGATIVE)
    max_steps: int = option(400_000, "updates to make; may be fewer than the schedule has", **_POSITIVE)
    warmup_steps: int = option(12_000, "updates of linear warm-up", **_NOT_NEGATIVE)
    hold_steps: int = option(188_000, "updates at the peak (tristage, rsqrt)", **_NOT_NEGATIVE)
    decay_steps: int = option(200_000, "updates of decay (tristage)", **_NOT_NEGATIVE)
    rsqrt_timescale: float = option(10_000, "time constant of rsqrt, in updates", **_POSITIVE)
    rsqrt_shift: float = option(0, "shift of rsqrt, in updates", **_NOT_NEGATIVE)
    scheduler: str = option("tristage", ", ".join(SCHEDULES), **_one_of(SCHEDULES))
    exclude_from_optimizer: list[str] = option(
        ["teacher"], "parameters, by the beginning of SpidR's names for them, that are not trained"
    )
    to_freeze: list[str] = option(
        list(FREEZABLE),
        "what no longer trains after `model.freeze_step` updates",
        check=lambda value: set(value) == set(FREEZABLE),
        allowed=f"{list(FREEZABLE)} (to train these throughout, set model.freeze_step beyond the run's end)",
    )
    gradient_accumulation_steps: int = option(
        1, "ours: batches of each process in one update; counts as one large batch", **_POSITIVE
    )


@dataclass
class MaskingSection:
    """`[masking]`: what the student does not see (see `masking.SpanMask`)."""

    mask_prob: float = option(
        0.8, "share of the frames in spans, if they did not overlap; 0: no mask, every frame is predicted", **_SHARE
    )
    mask_selection: str = option("static", "span lengths: 'static', 'uniform', 'normal' or 'poisson'")
    mask_other: float = option(0.0, "second parameter of 'uniform' and 'normal'")
    mask_length: int = option(10, "span length in frames", **_POSITIVE)
    no_mask_overlap: bool = option(False, "spans do not overlap")
    mask_min_space: int = option(1, "frames between spans that do not overlap", **_NOT_NEGATIVE)
    mask_channel_prob: float = option(0.0, "no meaning here: SpidR offers channel masks and never applies them")
    mask_channel_selection: str = option("static", "see mask_channel_prob")
    mask_channel_other: float = option(0.0, "see mask_channel_prob")
    mask_channel_length: int = option(10, "see mask_channel_prob")
    no_mask_channel_overlap: bool = option(False, "see mask_channel_prob")
    mask_channel_min_space: int = option(1, "see mask_channel_prob")

    def spans(self) -> SpanMask | None:
        """How masks are drawn; None for no mask."""
        if self.mask_prob == 0:
            return None
        return SpanMask(
            prob=self.mask_prob,
            length=self.mask_length,
            selection=self.mask_selection,
            other=self.mask_other,
            no_overlap=self.no_mask_overlap,
            min_space=self.mask_min_space,
        )


@dataclass
class PretrainingConfig:
    """A run's whole configuration.

    Attributes:
        run, data, optimizer, masking: the sections.
        model: `[model]` as our own config, objective included.
        validation: further data sets by name, each with `[data]`'s fields (see `INHERITED`).
        notes: what a user should know about the file, one sentence each.
    """

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: SpidrConfig = field(default_factory=SpidrConfig)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    masking: MaskingSection = field(default_factory=MaskingSection)
    validation: dict[str, DataSection] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Every field of every section, as a TOML or JSON file holds them; fields without a value are left out."""
        sections: dict[str, Any] = {
            "run": _section_dict(self.run),
            "data": _section_dict(self.data),
            "model": to_model_section(self.model),
            "optimizer": _section_dict(self.optimizer),
            "masking": _section_dict(self.masking),
        }
        if self.validation:
            sections["validation"] = {name: _section_dict(data) for name, data in self.validation.items()}
        return sections

    def to_toml(self) -> str:
        """`to_dict` as TOML."""
        return dump_toml(self.to_dict())


_SECTIONS = {"run": RunSection, "data": DataSection, "optimizer": OptimizerSection, "masking": MaskingSection}
_NO_MEANING = {
    "run": ("workdir",),
    "data": ("persistent_workers", "alignments_path"),
    "masking": tuple(f.name for f in fields(MaskingSection) if "channel" in f.name),
}
_WANDB = ("wandb_project", "wandb_name", "wandb_mode")
# What [validation.<name>] takes over from [data] where it does not say otherwise.
INHERITED = (
    "normalize",
    "resample",
    "min_sample_size",
    "max_sample_size",
    "max_batch_length",
    "num_workers",
    "max_skipped_share",
)
# What a data set that is only validated on has no use for: its batches are padded, in a fixed order, made once.
_TRAINING_ONLY = (
    "enable_padding",
    "num_buckets",
    "bucket_method",
    "drop_last",
    "prefetch_factor",
    "pin_memory",
    "persistent_workers",
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainingConfig:
    """Configuration from a TOML or JSON file.

    Args:
        path: the file. Relative paths in it are looked for in the working folder, then beside the file.
        overrides: `--section.field value` or `--section.field=value`, as they come from the command line.

    Raises `ConfigError`, naming the field, for what is unknown (with the nearest known name), of the wrong type, or
    impossible.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        sections = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid {'JSON' if path.suffix == '.json' else 'TOML'} ({error}).") from error
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        raise ConfigError(f"{path}: expected the sections {', '.join(_known_sections())}.")
    for section, name, value in parse_overrides(overrides):
        target = sections.setdefault(section[0], {})
        for part in section[1:]:
            target = target.setdefault(part, {})
        target[name] = value
    config = make_config(sections)
    for data in (config.data, *config.validation.values()):
        data.manifest = _beside(data.manifest, path)
        data.alignments_path = _beside(data.alignments_path, path)
    config.run.init_ckpt = _beside(config.run.init_ckpt, path)
    return config


def make_config(sections: Mapping[str, Mapping[str, Any]]) -> PretrainingConfig:
    """Configuration from sections as a TOML file holds them (see `load_config`)."""
    for name in sections:
        if name not in _known_sections():
            raise ConfigError(f"Unknown section [{name}].{_hint(name, _known_sections())}")
    built = {name: _section(cls, name, sections.get(name, {})) for name, cls in _SECTIONS.items()}
    inherited = {name: value for name, value in sections.get("data", {}).items() if name in INHERITED}
    validation = {
        name: _section(DataSection, f"validation.{name}", {**inherited, **values})
        for name, values in sections.get("validation", {}).items()
        if _is_table(f"validation.{name}", values)
    }
    model_section = {name: _parsed(value) for name, value in sections.get("model", {}).items()}
    run = built["run"]
    notes = []
    if "model_type" not in sections.get("run", {}):
        # SpidR's code falls back to dinosr, whose [model] has no such fields.
        if any(name in model_section for name in SPIDR_ONLY_FIELDS):
            run.model_type = "spidr"
        notes.append(f"`run.model_type` is not given: the objective is {run.model_type}.")
    if run.model_type not in OBJECTIVES:
        raise ConfigError(
            f"`run.model_type` must be one of {', '.join(map(repr, OBJECTIVES))}, got {run.model_type!r}."
            f"{_hint(run.model_type, OBJECTIVES)}"
        )
    try:
        model = to_spidr_config(model_section, run.model_type)
    except ValueError as error:
        raise ConfigError(f"[model]: {_in_spidr_names(str(error))}") from error
    try:
        if (spans := built["masking"].spans()) is not None:
            spans.check()
    except ValueError as error:
        raise ConfigError(f"[masking]: {error}") from error
    config = PretrainingConfig(model=model, validation=validation, notes=notes, **built)
    _check_together(config)
    if ignored := _without_meaning(sections, config):
        notes.append(f"These fields have no meaning here: {', '.join(ignored)}.")
    return config


def parse_overrides(arguments: Sequence[str]) -> list[tuple[tuple[str, ...], str, str]]:
    """(section, field, value) of every `--section.field value` or `--section.field=value`."""
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or "." not in name:
            raise ConfigError(f"Unknown argument {argument!r}. Fields are set with `--section.field value`.")
        if not equals:
            if not rest:
                raise ConfigError(f"{argument} needs a value.")
            value = rest.pop(0)
        *section, last = name.split(".")
        overrides.append((tuple(section), last, value))
    return overrides


def describe_fields() -> str:
    """Every field with its default and what it is for, for `--help`."""
    lines = []
    for name, cls in _SECTIONS.items():
        lines.append(f"[{name}]")
        for f in fields(cls):
            default = f.default_factory() if callable(f.default_factory) else f.default
            shown = "" if default is None else f" (default: {_toml_value(default)})"
            lines.append(f"  {f.name}: {f.metadata['doc']}{shown}")
    lines.append("[model]")
    lines.append(f"  SpidR's names: {', '.join(MODEL_SECTION_FIELDS)}")
    lines.append(
        "[validation.<name>]\n  data sets to validate on: fields of [data], whose values for "
        f"{', '.join(INHERITED)} hold here too; alignments_path: their phones, for the units' purity and PNMI"
    )
    return "\n".join(lines)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields in which two `PretrainingConfig.to_dict` differ: name -> (old value, new value)."""
    changed: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changed |= differences(before, after, f"{prefix}{name}.")
        elif before != after:
            changed[prefix + name] = (before, after)
    return changed


def dump_toml(sections: Mapping[str, Any]) -> str:
    """Nested tables of strings, numbers, booleans and lists as TOML; None is left out."""
    lines: list[str] = []
    _dump_table(sections, "", lines)
    return "\n".join(lines).strip() + "\n"


def _dump_table(table: Mapping[str, Any], name: str, lines: list[str]) -> None:
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            lines.append(f"{_toml_key(key)} = {_toml_value(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            full = f"{name}.{_toml_key(key)}" if name else _toml_key(key)
            lines += ["", f"[{full}]"]
            _dump_table(value, full, lines)


def _toml_key(key: str) -> str:
    return key if key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key) else json.dumps(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # JSON's strings are TOML's, but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    return repr(value)


def _known_sections() -> tuple[str, ...]:
    return ("run", "data", "model", "optimizer", "masking", "validation")


def _is_step_range(value: str) -> bool:
    first, _, last = value.partition(":")
    return first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)


def _hint(name: Any, known: Sequence[str]) -> str:
    nearest = get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else f" Known: {', '.join(known)}."


def _is_table(name: str, values: Any) -> bool:
    if not isinstance(values, Mapping):
        raise ConfigError(f"[{name}] must be a table of fields, got {values!r}.")
    return True


def _section(cls: type, section: str, values: Mapping[str, Any]) -> Any:
    known = {f.name: f for f in fields(cls)}
    types_ = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        full = f"{section}.{name}"
        if name not in known:
            raise ConfigError(f"Unknown field `{full}`.{_hint(name, tuple(known))}")
        value = _convert(full, types_[name], value)
        check = known[name].metadata["check"]
        if check is not None and value is not None and not check(value):
            raise ConfigError(f"`{full}` must be {known[name].metadata['allowed']}, got {value!r}.")
        checked[name] = value
    return cls(**checked)


def _convert(name: str, kind: Any, value: Any) -> Any:
    """The value in the field's type; strings from the command line are read as that type."""
    arguments = typing.get_args(kind)
    optional = isinstance(kind, types.UnionType) and type(None) in arguments
    if optional:
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "")):
            return None
        kinds = [argument for argument in arguments if argument is not type(None)]
        # Of `str | list[str]`, what is a list or spells one is a list.
        spelled = _parsed(value) if isinstance(value, str) and value.startswith("[") else value
        kind = next((k for k in kinds if typing.get_origin(k) is list and isinstance(spelled, list)), kinds[0])
    if kind is str:
        if isinstance(value, str):
            return value
        raise ConfigError(f"`{name}` must be a string, got {value!r}.")
    value = _parsed(value)
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, bool):
            return value
        raise ConfigError(f"`{name}` must be true or false, got {value!r}.")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        if number and float(value).is_integer():
            return int(value)
        raise ConfigError(f"`{name}` must be an integer, got {value!r}.")
    if kind is float:
        if number and math.isfinite(value):
            return value
        raise ConfigError(f"`{name}` must be a number, got {value!r}.")
    origin = typing.get_origin(kind)
    if origin is list:
        if isinstance(value, (list, tuple)):
            return [_convert(name, typing.get_args(kind)[0], item) for item in value]
        raise ConfigError(f"`{name}` must be a list, for example `[...]`, got {value!r}.")
    if isinstance(value, Mapping):
        return dict(value)
    raise ConfigError(f"`{name}` must be a table, got {value!r}.")


def _parsed(value: Any) -> Any:
    """A string as the TOML value that it spells, where it does."""
    if not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _check_together(config: PretrainingConfig) -> None:
    for name, data in (("data", config.data), *((f"validation.{n}", d) for n, d in config.validation.items())):
        if data.manifest is None:
            raise ConfigError(
                f"`{name}.manifest` is missing: a manifest (.csv, .jsonl, .tsv), a folder of audio files, or a tar."
            )
        _check_sources(name, data)
        if data.min_sample_size > data.max_sample_size:
            raise ConfigError(
                f"`{name}.min_sample_size` ({data.min_sample_size}) exceeds `max_sample_size` ({data.max_sample_size})."
            )
        if data.max_sample_size > data.max_batch_length:
            raise ConfigError(
                f"`{name}.max_batch_length` ({data.max_batch_length}) is too small for one utterance of "
                f"`max_sample_size` ({data.max_sample_size}) samples: lower `max_sample_size` too."
            )
    optimizer = config.optimizer
    if optimizer.scheduler == "cosine" and optimizer.max_steps <= optimizer.warmup_steps:
        raise ConfigError("`optimizer.max_steps` must exceed `warmup_steps` with the cosine schedule.")
    if optimizer.scheduler == "tristage" and optimizer.final_lr_scale == 0:
        raise ConfigError(
            "`optimizer.final_lr_scale` must be positive with the tristage schedule: its decay is exponential."
        )
    if config.model.num_codebooks == 0:
        raise ConfigError("[model]: `num_codebooks` is 0: there is nothing to predict.")


def _check_sources(name: str, data: DataSection) -> None:
    count = len(data.manifest) if isinstance(data.manifest, list) else None
    if count is not None and name != "data":
        raise ConfigError(f"`{name}.manifest` takes one source. Give each a section of its own.")
    if data.streaming and (count is not None or Path(str(data.manifest)).suffix in (".csv", ".jsonl", ".tsv", ".tar")):
        raise ConfigError(
            f"`{name}.streaming` takes one data set, name:config:split, in `{name}.manifest`. Manifests and tars are "
            "read where they lie, without it."
        )
    if data.streaming and name != "data":
        raise ConfigError(f"`{name}.streaming`: validation needs lengths beforehand. Download the data set.")
    if data.weights is not None and count is None:
        raise ConfigError(f"`{name}.weights` goes with a list of sources in `{name}.manifest`.")
    if data.weights is not None and len(data.weights) != count:
        raise ConfigError(f"`{name}.weights` has {len(data.weights)} numbers for {count} sources.")


def _without_meaning(sections: Mapping[str, Mapping[str, Any]], config: PretrainingConfig) -> list[str]:
    """The fields of a file that nothing reads."""
    no_meaning = dict(_NO_MEANING)
    if config.run.tracker != "wandb":
        no_meaning["run"] += _WANDB if config.run.tracker in ("auto", "tensorboard", "none") else _WANDB[2:]
    ignored = [
        f"{section}.{name}"
        for section, names in no_meaning.items()
        for name in sections.get(section, {})
        if name in names
    ]
    if config.model.objective == "dinosr":
        ignored += [f"model.{name}" for name in SPIDR_ONLY_FIELDS if name in sections.get("model", {})]
    for name, values in sections.get("validation", {}).items():
        ignored += [f"validation.{name}.{field}" for field in values if field in _TRAINING_ONLY]
    return ignored


def _section_dict(section: Any) -> dict[str, Any]:
    values = {f.name: getattr(section, f.name) for f in fields(section)}
    return {name: value for name, value in values.items() if value is not None}


def _in_spidr_names(message: str) -> str:
    """A message about our config in the words of the file that the user wrote."""
    for spidr, ours in SPIDR_FIELDS.items():
        message = message.replace(f"`{ours}`", f"`{spidr}`")
    return message


def _beside(value: str | list[str] | None, config_path: Path) -> Any:
    """A path in a config (or several): in the working folder, else beside the config."""
    if isinstance(value, list):
        return [_beside(item, config_path) for item in value]
    if value is None or os.path.exists(value):
        return value
    beside = config_path.absolute().parent / value
    return str(beside) if beside.exists() else value


__all__ = [
    "DTYPES",
    "INHERITED",
    "ConfigError",
    "DataSection",
    "MaskingSection",
    "OptimizerSection",
    "PretrainingConfig",
    "RunSection",
    "describe_fields",
    "differences",
    "dump_toml",
    "load_config",
    "make_config",
    "parse_overrides",
]
