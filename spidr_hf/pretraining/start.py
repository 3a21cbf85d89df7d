"""How a run begins: with random weights, with those of a checkpoint in any format, or where it was stopped."""

import tomllib
from pathlib import Path

import torch
from torch import Tensor

from ..configuration_spidr import SpidrConfig
from ..conversion.checkpoints import read_config, read_pretraining_checkpoint
from ..conversion.model_folder import is_model_folder, load_folder
from ..conversion.sources import find_source
from ..conversion.spidr_format import objective_of
from ..conversion.tensors import check_tensors
from ..hub.spidr_names import architecture_differences, to_model_section
from ..modeling_spidr import SpidrForPretraining
from ..system.errors import ConfigError
from ..system.fields import differences
from ..system.files import write_text
from ..training.checkpoints import Checkpoint, TrainerState
from .config import PretrainingConfig, make_config


def make_model(config: PretrainingConfig, checkpoint: Checkpoint | None) -> tuple[SpidrForPretraining, str]:
    """The model to begin (or go on) with, and where it comes from."""
    model = initial_model(config.model, config.run.random_seed)
    if checkpoint is not None:
        checkpoint.load_model(model)
        return model, f"Continuing from {checkpoint.folder}."
    start = config.run.init_ckpt
    if start is None:
        return model, "Beginning with random weights."
    if is_model_folder(start):
        stored, tensors = load_folder(start)
    else:
        stored, tensors = read_original(start, config)
    if differing := architecture_differences(stored, config.model):
        values = ", ".join(
            f"{name} is {theirs!r} there and {ours!r} here" for name, (theirs, ours) in differing.items()
        )
        raise ConfigError(f"`run.init_ckpt` {start} is another model than [model] says: {values}.")
    check_tensors(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}, what=start)
    model.load_state_dict(tensors)
    # Weights, codebooks and teacher are taken over; steps, and with them every schedule and the freeze, begin anew.
    model.current_step.zero_()
    return model, f"Beginning with the weights, codebooks and teacher of {start}."


def read_original(start: str, config: PretrainingConfig) -> tuple[SpidrConfig, dict[str, Tensor]]:
    """Config and tensors of a checkpoint in an original format. One that comes without config has that of [model]."""
    found = find_source(start)
    beside = found.config or (read_config(path) if (path := found.path.with_name("config.json")).is_file() else None)
    given = to_model_section(config.model) if beside is None else None
    objective = found.objective or (None if beside and objective_of(beside) else config.model.objective)
    converted = read_pretraining_checkpoint(found.path, given, objective, config_beside=beside)
    return converted.config, converted.tensors


def settle_config(output_dir: Path, config: PretrainingConfig, checkpoint: Checkpoint | None) -> list[str]:
    """Write config.toml; when resuming, say what is not as it was, and refuse another model."""
    notes = config_changes(output_dir, config, checkpoint)
    write_text(
        output_dir / "config.toml",
        f"# The whole configuration of this run. The command that began it continues it.\n\n{config.to_toml()}",
    )
    return notes


def config_changes(output_dir: Path, config: PretrainingConfig, checkpoint: Checkpoint | None) -> list[str]:
    """What is not as it was when the run in this folder began. Another model is refused."""
    path = output_dir / "config.toml"
    if checkpoint is None or not path.exists():
        return []
    before = make_config(tomllib.loads(path.read_text(encoding="utf-8"))).to_dict()
    changed = differences(before, config.to_dict())
    if model := [name for name in changed if name.startswith("model.") or name == "run.model_type"]:
        raise ConfigError(
            f"{output_dir} holds a run of another model ({', '.join(model)} differ). Choose another --output-dir; "
            "its checkpoint can be that run's `run.init_ckpt`."
        )
    return [f"Changed since this run began: {name} {old!r} -> {new!r}" for name, (old, new) in changed.items()]


def resume_notes(state: TrainerState, data: str, world_size: int, accumulation: int) -> list[str]:
    """What will not be as it would have been without the interruption."""
    notes = []
    if (state.world_size, state.accumulation) != (world_size, accumulation):
        notes.append(
            f"Updates were made of {state.world_size} x {state.accumulation} batches (processes x accumulation) and "
            f"now are of {world_size} x {accumulation}. The order of the utterances goes on as it was."
        )
    if state.data != data:
        notes.append("The audio is not what it was when the run began, so this epoch's order is another.")
    return notes


def initial_model(config: SpidrConfig, seed: int) -> SpidrForPretraining:
    """A new model; the same on every process."""
    torch.manual_seed(seed)
    return SpidrForPretraining(config)


__all__ = ["config_changes", "initial_model", "make_model", "read_original", "resume_notes", "settle_config"]
