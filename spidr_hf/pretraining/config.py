# ruff: noqa: RUF009 (`option` is `dataclasses.field` with documentation)
"""The configuration of a pretraining run: SpidR's own sections and field names, in TOML or JSON.

`load_config` reads `[run]`, `[data]`, `[model]`, `[optimizer]`, `[masking]` and `[validation.<name>]`, applies
overrides from the command line, and refuses what it does not know. A file written for SpidR's own training code is
accepted as it is; fields that mean nothing here are named in `PretrainingConfig.notes`. `[model]` becomes a
`SpidrConfig` (`spidr_fields` has the table of names).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..configuration_spidr import SpidrConfig
from ..data.open import is_streamable
from ..data.sections import DataSection, MaskingSection
from ..hub.spidr_names import (
    ADAPT_FIELDS,
    MODEL_SECTION_FIELDS,
    MODEL_TYPES,
    SPIDR_FIELDS,
    to_model_section,
    to_spidr_config,
)
from ..objectives_spidr import fields_of_others, objective_names, objective_with_fields
from ..system.errors import ConfigError
from ..system.fields import (
    NOT_NEGATIVE,
    POSITIVE,
    dump_toml,
    hint,
    make_section,
    option,
    parsed,
    section_dict,
    toml_value,
)
from ..system.tables import parse_table
from ..training.schedules import OptimizerSection


@dataclass
class RunSection:
    """`[run]`: what is trained, how often it reports and saves."""

    model_type: str = option("dinosr", "objective: 'spidr' or 'dinosr' (SpidR's code defaults to 'dinosr')")
    random_seed: int = option(0, "seed of the initial weights, the masks and dropout", **NOT_NEGATIVE)
    log_interval: int = option(200, "steps between rows of metrics.jsonl", **POSITIVE)
    save_interval: int = option(2500, "steps between checkpoints", **POSITIVE)
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
        **NOT_NEGATIVE,
    )
    init_ckpt: str | None = option(
        None,
        "start from these weights, codebooks and teacher: a SpidR .pt file or a model folder; steps, schedules and "
        "freeze begin at 0. Sizes and layout of the model that [model] does not give are theirs",
    )
    active_forgetting: bool = option(
        False,
        "ours: before the first update draw codebooks and heads anew and fit the heads to them, as SpidR-Adapt does "
        "when it adapts a model to another language (arXiv 2512.21204)",
    )
    compile: bool = option(
        True,
        "compile the transformer layers (CUDA only; ignored on CPU, where it does not pay); what is compiled stays in "
        "the run's folder (with several machines, in the temporary folder of each) or in TORCHINDUCTOR_CACHE_DIR, for "
        "the next start",
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
        10, "ours: stop after this many updates in a row with a non-finite loss or gradient", **POSITIVE
    )
    plot_minutes: float = option(
        5.0, "ours: minutes between pictures of the curves, curves.png in the run's folder; 0: none", **NOT_NEGATIVE
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
class PretrainingConfig:
    """A run's whole configuration.

    Attributes:
        run, data, optimizer, masking: the sections.
        model: `[model]` as our own config, objective included.
        validation: further data sets by name, each with `[data]`'s fields (see `INHERITED`).
        notes: what a user should know about the file, one sentence each.
        written: the fields of `[model]` that the file has; of the others a run's start may take those of `init_ckpt`.
    """

    run: RunSection = field(default_factory=RunSection)
    data: DataSection = field(default_factory=DataSection)
    model: SpidrConfig = field(default_factory=SpidrConfig)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    masking: MaskingSection = field(default_factory=MaskingSection)
    validation: dict[str, DataSection] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    written: frozenset[str] = frozenset()

    def to_dict(self) -> dict[str, Any]:
        """Every field of every section, as a TOML or JSON file holds them; fields without a value are left out."""
        sections: dict[str, Any] = {
            "run": section_dict(self.run),
            "data": section_dict(self.data),
            "model": to_model_section(self.model),
            "optimizer": section_dict(self.optimizer),
            "masking": section_dict(self.masking),
        }
        if self.validation:
            sections["validation"] = {name: section_dict(data) for name, data in self.validation.items()}
        return sections

    def to_toml(self) -> str:
        """`to_dict` as TOML."""
        return dump_toml(self.to_dict())


@dataclass
class MetaUpdateSection:
    """`[meta_update]` of a SpidR-Adapt configuration, as far as it means adapting a model."""

    task_interval: int | None = option(
        None,
        "of SpidR-Adapt: beyond `optimizer.max_steps` the same as `run.active_forgetting`; within them it would be "
        "meta-training, which there is not here",
        **POSITIVE,
    )


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
        sections = parse_table(path.read_bytes(), str(path), ".json" if path.suffix == ".json" else ".toml")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not all(isinstance(section, dict) for section in sections.values()):
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
        if name not in (*_known_sections(), "meta_update"):
            raise ConfigError(f"Unknown section [{name}].{hint(name, _known_sections())}")
    sections = {**sections, "data": _with_manifest(sections.get("data", {}))}
    built = {name: make_section(cls, name, sections.get(name, {})) for name, cls in _SECTIONS.items()}
    inherited = {name: value for name, value in sections.get("data", {}).items() if name in INHERITED}
    validation = {
        name: make_section(DataSection, f"validation.{name}", {**inherited, **values})
        for name, values in sections.get("validation", {}).items()
        if _is_table(f"validation.{name}", values)
    }
    model_section = {name: parsed(value) for name, value in sections.get("model", {}).items()}
    run = built["run"]
    notes = []
    if "meta_update" in sections:
        run.active_forgetting |= _forgets(sections["meta_update"], built["optimizer"])
    if "model_type" not in sections.get("run", {}):
        # SpidR's code falls back to dinosr, whose [model] has no fields of its own.
        run.model_type = objective_with_fields(SPIDR_FIELDS.get(name, "") for name in model_section) or run.model_type
        notes.append(f"`run.model_type` is not given: the objective is {run.model_type}.")
    run.model_type = MODEL_TYPES.get(run.model_type, run.model_type)
    if run.model_type not in (known := objective_names()):
        raise ConfigError(
            f"`run.model_type` must be one of {', '.join(map(repr, known))}, got {run.model_type!r}."
            f"{hint(run.model_type, known)}"
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
    config = PretrainingConfig(
        model=model, validation=validation, notes=notes, written=frozenset(model_section), **built
    )
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
            shown = "" if default is None else f" (default: {toml_value(default)})"
            lines.append(f"  {f.name}: {f.metadata['doc']}{shown}")
    lines.append("[model]")
    lines.append(f"  SpidR's names: {', '.join(MODEL_SECTION_FIELDS)}")
    lines.append(
        "[validation.<name>]\n  data sets to validate on: fields of [data], whose values for "
        f"{', '.join(INHERITED)} hold here too; alignments_path: their phones, for the units' purity and PNMI"
    )
    return "\n".join(lines)


def _known_sections() -> tuple[str, ...]:
    return ("run", "data", "model", "optimizer", "masking", "validation")


def _with_manifest(data: Mapping[str, Any]) -> dict[str, Any]:
    """`[data]` with SpidR-Adapt's `ssl.manifest` under the name that it has here."""
    if "ssl" not in data:
        return dict(data)
    speech = data["ssl"] if isinstance(data["ssl"], Mapping) else {}
    if unknown := [f"`data.ssl.{name}`" for name in speech if name != "manifest"]:
        raise ConfigError(f"{', '.join(unknown)}: of SpidR-Adapt's `data.ssl` only `manifest` has a meaning here.")
    if "manifest" not in speech or data.get("manifest") is not None:
        raise ConfigError("`data.ssl` of SpidR-Adapt must be a table with `manifest`, in place of `data.manifest`.")
    return {name: value for name, value in data.items() if name != "ssl"} | {"manifest": speech["manifest"]}


def _forgets(meta_update: Mapping[str, Any], optimizer: OptimizerSection) -> bool:
    """Whether `[meta_update]` means to forget once, at the start; all else that it can mean is refused."""
    if unknown := [f"`meta_update.{name}`" for name in meta_update if name != "task_interval"]:
        raise ConfigError(
            f"{', '.join(unknown)}: this is SpidR-Adapt's meta-training, which there is not here. Only `task_interval` "
            "beyond `optimizer.max_steps`, which means adapting a model, is read."
        )
    interval = make_section(MetaUpdateSection, "meta_update", meta_update).task_interval
    if interval is not None and interval <= optimizer.max_steps:
        raise ConfigError(
            f"`meta_update.task_interval` ({interval}) lies within the {optimizer.max_steps} steps of "
            "`optimizer.max_steps`: that is SpidR-Adapt's meta-training, which there is not here. To adapt a model, "
            "make it larger, or set `run.active_forgetting = true` without [meta_update]."
        )
    return interval is not None


def _is_step_range(value: str) -> bool:
    first, _, last = value.partition(":")
    return first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)


def _is_table(name: str, values: Any) -> bool:
    if not isinstance(values, Mapping):
        raise ConfigError(f"[{name}] must be a table of fields, got {values!r}.")
    return True


def _check_together(config: PretrainingConfig) -> None:
    for name, data in (("data", config.data), *((f"validation.{n}", d) for n, d in config.validation.items())):
        if data.manifest is None:
            raise ConfigError(
                f"`{name}.manifest` is missing: a manifest (.csv, .jsonl, .parquet, .tsv), a folder of audio files, a "
                "tar, or a data set (name:config:split)."
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
    if data.streaming and not is_streamable(data.manifest):  # type: ignore[arg-type]  # there is one
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
    ignored += [f"model.{name}" for name in ADAPT_FIELDS if name in sections.get("model", {})]
    of_others = fields_of_others(config.model.objective)
    ignored += [f"model.{name}" for name in sections.get("model", {}) if SPIDR_FIELDS.get(name) in of_others]
    for name, values in sections.get("validation", {}).items():
        ignored += [f"validation.{name}.{field}" for field in values if field in _TRAINING_ONLY]
    return ignored


def _in_spidr_names(message: str) -> str:
    """A message about our config in the words of the file that the user wrote."""
    for spidr, ours in SPIDR_FIELDS.items():
        message = message.replace(f"`{ours}`", f"`{spidr}`")
    return message


def _beside(value: str | list[str] | None, config_path: Path) -> Any:
    """A path in a config (or several): in the working folder, else beside the config."""
    if isinstance(value, list):
        return [_beside(item, config_path) for item in value]
    if value is None or os.path.exists(value := os.path.expanduser(value)):
        return value
    beside = config_path.absolute().parent / value
    return str(beside) if os.path.exists(beside) else value  # False also of a name that no disk takes


__all__ = [
    "INHERITED",
    "PretrainingConfig",
    "RunSection",
    "describe_fields",
    "load_config",
    "make_config",
    "parse_overrides",
]
