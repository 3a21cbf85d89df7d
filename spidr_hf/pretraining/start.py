"""How a run begins: with random weights, with those of a checkpoint in any format, or where it was stopped; and how it
leaves its folder."""

import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configuration_spidr import SpidrConfig
from ..conversion.checkpoints import read_config, read_pretraining_checkpoint
from ..conversion.errors import ConversionError
from ..conversion.model_folder import is_model_folder, load_folder
from ..conversion.sources import find_source
from ..conversion.spidr_format import objective_of
from ..conversion.tensors import check_tensors
from ..data.open import open_source
from ..data.sources import AudioSource, StreamedSource
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..hub.loading import run_hint
from ..hub.spidr_names import architecture_differences, to_model_section, to_spidr_config
from ..modeling_spidr import SpidrForPretraining
from ..system.errors import ConfigError
from ..system.files import nearest_existing, write_text
from ..system.messages import counted
from ..system.processes import RunLock, lock
from ..system.tables import read_table
from ..training.checkpoints import MODEL_FILE, Checkpoint, Checkpoints, TrainerState, agree, begins_anew, set_aside
from ..training.folder_settings import CHANGED, setting_changes
from ..training.metrics import read_rows
from ..training.planning import PROBLEM, Line, size
from ..training.stopping import StopSignal
from ..training.trackers import check_tracker, end_trackers
from .config import PretrainingConfig, make_config
from .hub_push import check_push
from .memory import checkpoint_bytes, model_bytes
from .setup import Learner, make_accelerator, recipe_notes, save_final, whole_model

# Lies in the folder of a finished run until all is done that follows its last update: scores in the card, an upload.
_ENDING = ".ending"


@dataclass
class Run:
    """A run on its processes: what is asked for, where it lies, and where it stands.

    Attributes:
        config, output_dir, accelerator, checkpoints: what they are everywhere.
        checkpoint: where it resumes; None: it begins.
        source: the audio.
        model: on the CPU, the same on every process.
        state: what the next checkpoint begins with.
        notes: what the user should know first, one line each; None is passed over.
        fresh: it begins anew, whatever lies there.
    """

    config: PretrainingConfig
    output_dir: Path
    accelerator: Accelerator
    checkpoints: Checkpoints
    checkpoint: Checkpoint | None
    source: AudioSource | StreamedSource
    model: SpidrForPretraining
    state: TrainerState
    notes: list[str | None] = field(default_factory=list)
    fresh: bool = False
    _lock: RunLock | None = None

    @property
    def layout(self) -> dict[str, int]:
        """Which process this is, of how many, and how many micro-batches of each make an update."""
        accelerator, accumulation = self.accelerator, self.config.optimizer.gradient_accumulation_steps
        return {
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "accumulation": accumulation,
        }

    def settle(self) -> None:
        """From now on the folder is this run's: config.toml is written; before, nothing of it was touched.

        Of a run that begins anew what was there is set aside (`checkpoints.set_aside`).
        """
        if self._lock is None:
            return
        if self.fresh and (earlier := set_aside(self.output_dir)):
            self.notes.append(f"Beginning anew. What was there is in {earlier}.")
        self.checkpoints.remove_partial()
        first = "# The whole configuration of this run. The command that began it continues it."
        write_text(self.output_dir / "config.toml", f"{first}\n\n{self.config.to_toml()}")

    def stop_signal(self) -> StopSignal:
        """From now on, signals and Ctrl-C ask the run to save and stop."""
        return StopSignal(self.accelerator.device, folders=[self.checkpoints.folder, self.output_dir])

    def end(self, learner: Learner, data: str) -> Path | None:
        """Leave the model of a run that is finished in `final`, whose card says on what `data` it was trained; then let
        go of the trackers and the other processes. Every process calls it. Returns the model's folder, None where the
        run is not finished."""
        finished, final = self.state.step >= self.config.optimizer.max_steps, self.output_dir / "final"
        whole = whole_model(self.model, keep=self._lock is not None) if finished else None
        if self._lock is not None:
            self.checkpoints.wait()
            if whole is not None:
                summary = f"Pretrained for {counted(self.state.step, 'update')} on {data}."
                write_text(self.output_dir / _ENDING, "")
                save_final(whole, final, self.config, summary)
        self.accelerator.wait_for_everyone()
        learner.release()
        self.accelerator.end_training()
        end_trackers()
        return final if finished else None

    def close(self) -> None:
        """Let go of the folder. What was to be done after `end` is done: a run that is finished is complete."""
        if self._lock is not None:
            (self.output_dir / _ENDING).unlink(missing_ok=True)
            self._lock.release()


def open_run(config: PretrainingConfig, output_dir: Path, fresh: bool = False) -> Run | None:
    """Processes, audio and weights of a run that begins, or resumes from its newest checkpoint.

    Its folder is locked, and nothing is written there but data.arrow until the run is settled.

    Args:
        config, output_dir: what is asked for.
        fresh: begin anew, whatever is there, but once in a job (`checkpoints.begins_anew`).

    Returns None, and leaves the folder as it is, where the run is complete; a line says so. Raises an error of
    `system.errors` for what cannot be run.
    """
    check_tracker(config.run.tracker)
    accelerator, warnings = make_accelerator(config, output_dir)
    world_size, is_main = accelerator.num_processes, accelerator.is_main_process
    notes: list[str | None] = [*warnings, *config.notes]
    if config.run.use_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    beside = {"preprocessor_config.json": SpidrFeatureExtractor(do_normalize=config.data.normalize).to_json_string()}
    checkpoints = Checkpoints(output_dir / "checkpoints", config.run.keep_latest, writes=is_main, beside=beside)
    held, fresh = None, begins_anew(output_dir, fresh)
    # The first process takes the folder, the others then find everything there.
    with accelerator.main_process_first():
        if is_main:
            held = RunLock(output_dir)
        checkpoint = None if fresh else checkpoints.newest()
        complete_model(config, checkpoint)
        complete = complete_note(output_dir, config, checkpoint)
        if complete is None:
            notes += [CHANGED + change for change in config_changes(output_dir, config, checkpoint)]
            if is_main and config.run.push_to_hub and checkpoint is None:
                check_push(config.run.push_to_hub, make=True)
            source = open_source(config.data, cache=output_dir / "data.arrow", progress=is_main)
            model, origin = make_model(config, checkpoint)
            notes += recipe_notes(config, world_size)
    if complete is not None:
        if held is not None:
            print(complete, file=sys.stderr)
            held.release()
        accelerator.end_training()
        return None
    agree(checkpoint, output_dir)
    state = checkpoint.state if checkpoint else TrainerState(data=source.fingerprint)
    if checkpoint:
        notes += resume_notes(state, source.fingerprint, world_size, config.optimizer.gradient_accumulation_steps)
        state.data = source.fingerprint
    notes.append(origin)
    return Run(config, output_dir, accelerator, checkpoints, checkpoint, source, model, state, notes, fresh, held)


def make_model(config: PretrainingConfig, checkpoint: Checkpoint | None) -> tuple[SpidrForPretraining, str]:
    """The model to begin or resume with, and where it comes from. `config.model` is what it is from then on."""
    if checkpoint is not None:
        model = initial_model(config.model, config.run.random_seed)
        checkpoint.load_model(model)
        return model, f"Continuing from {checkpoint.folder}."
    start = config.run.init_ckpt
    if start is None:
        return initial_model(config.model, config.run.random_seed), "Beginning with random weights."
    if os.path.isdir(start) and not (Path(start) / "config.json").exists() and (hint := run_hint(start)):
        raise ConfigError(f"`run.init_ckpt` {start} is no model folder.{hint}")
    try:
        if is_model_folder(start):
            stored, tensors = load_folder(start)
        else:
            stored, tensors = read_original(start, config)
        take_model(config, stored)
        if differing := architecture_differences(stored, config.model):
            values = ", ".join(
                f"{name} is {theirs!r} there and {ours!r} here" for name, (theirs, ours) in differing.items()
            )
            raise ConfigError(f"`run.init_ckpt` {start} is another model than [model] says: {values}.")
        model = initial_model(config.model, config.run.random_seed)
        check_tensors(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}, what=start)
    except ConversionError as error:
        raise ConfigError(str(error)) from error
    model.load_state_dict(tensors)
    # Weights, codebooks and teacher are taken over; steps, and with them every schedule and the freeze, begin anew.
    model.current_step.zero_()
    return model, f"Beginning with the weights, codebooks and teacher of {start}."


def complete_model(config: PretrainingConfig, checkpoint: Checkpoint | None) -> None:
    """What a run took from `init_ckpt` when it began (`take_model`), it takes from its checkpoint when it resumes."""
    if checkpoint is not None and config.run.init_ckpt is not None:
        take_model(config, SpidrConfig.from_pretrained(checkpoint.folder))


def take_model(config: PretrainingConfig, stored: SpidrConfig) -> None:
    """Of what makes a model another one (sizes, not rates), what `[model]` does not say is that of `stored`."""
    differing = architecture_differences(stored, config.model)
    taken = {name: theirs for name, (theirs, _) in differing.items() if name not in config.written}
    if taken:
        config.model = to_spidr_config({**to_model_section(config.model), **taken}, config.model.objective)


def read_original(start: str, config: PretrainingConfig) -> tuple[SpidrConfig, dict[str, Tensor]]:
    """Config and tensors of a checkpoint in an original format. One that comes without config has that of [model]."""
    found = find_source(start)
    beside = found.config or (read_config(path) if (path := found.path.with_name("config.json")).is_file() else None)
    given = to_model_section(config.model) if beside is None else None
    objective = found.objective or (None if beside and objective_of(beside) else config.model.objective)
    with found.reading():
        converted = read_pretraining_checkpoint(found.path, given, objective, config_beside=beside)
    return converted.config, converted.tensors


def config_changes(output_dir: Path, config: PretrainingConfig, checkpoint: Checkpoint | None) -> list[str]:
    """What is not as it was when the run in this folder began, `name old -> new` each. Another model is refused."""
    path = output_dir / "config.toml"
    if checkpoint is None or not path.exists():
        return []
    before = make_config(read_table(path)).to_dict()
    advice = "Choose another --output-dir; its checkpoint can be that run's `run.init_ckpt`."
    return setting_changes(output_dir, before, config.to_dict(), fixed=("model", "run.model_type"), advice=advice)


def final_step(output_dir: Path) -> int | None:
    """Updates that the model in `final` has seen; None where there is none."""
    try:
        with safe_open(output_dir / "final" / MODEL_FILE, framework="pt") as file:
            return int(file.get_tensor("current_step").item())
    except (OSError, SafetensorError):
        return None


def complete_note(output_dir: Path, config: PretrainingConfig, checkpoint: Checkpoint | None) -> str | None:
    """What to tell the user where nothing is left to do: no update, no final model, nothing to do with that."""
    if checkpoint is None or not config.optimizer.max_steps <= checkpoint.state.step == final_step(output_dir):
        return None
    if (output_dir / _ENDING).exists():
        return None
    step, rows = checkpoint.state.step, output_dir / "validation.jsonl"
    if config.run.validate_interval:
        validated = {row["name"] for row in read_rows(rows) if row["step"] == step} if rows.exists() else set()
        if not validated.issuperset(config.validation):
            return None
    changes = config_changes(output_dir, config, checkpoint)
    return (
        f"{output_dir} is complete: {counted(step, 'update', 'is', 'are')} made, and {output_dir / 'final'} is their "
        "model. All is left as it is; a larger optimizer.max_steps continues the run."
        + (f" Of no effect, therefore: {', '.join(changes)}." if changes else "")
    )


def plan(config: PretrainingConfig, output_dir: Path, running: bool) -> Iterator[Line]:
    """Whether the run's folder is free, and what will lie there; `running`: it holds a part of it already."""
    existing = nearest_existing(output_dir)
    if _locked(output_dir / ".lock"):
        yield Line(PROBLEM, f"{output_dir} is in use by another run at present. Stop it first.")
    kept, each = config.run.keep_latest, checkpoint_bytes(config.model)
    written = math.ceil(config.optimizer.max_steps / config.run.save_interval)
    # While one is written, the one that it replaces is still there.
    needed = (written if kept < 0 else min(written, kept + 1)) * each + model_bytes(config.model)
    free = shutil.disk_usage(existing).free
    there = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file()) if running else 0
    yield Line(
        "disk",
        f"{counted(written, 'checkpoint')} of {size(each)}, {'all' if kept < 0 else kept} kept: {size(needed)} at "
        f"most; {size(free)} free at {existing}",
    )
    if needed > free + there:
        yield Line(
            PROBLEM,
            f"{existing} has {size(free)} free, the run's checkpoints need {size(needed)}: set run.keep_latest, a "
            "larger run.save_interval, or another --output-dir.",
        )


def _locked(path: Path) -> bool:
    try:
        with open(path, "r+") as file:
            return not lock(file)
    except OSError:  # there is none, or it cannot be written to, which is told elsewhere
        return False


def resume_notes(state: TrainerState, data: str, world_size: int, accumulation: int) -> list[str]:
    """What will not be as it would have been without the interruption."""
    notes = []
    if (state.world_size, state.accumulation) != (world_size, accumulation):
        notes.append(
            f"Updates were made of {state.world_size} x {state.accumulation} batches (processes x accumulation) and "
            f"now are of {world_size} x {accumulation}. The order of the utterances stays as it was."
        )
    if state.data != data:
        notes.append("The audio is not what it was when the run began, so this epoch's order is another.")
    return notes


def initial_model(config: SpidrConfig, seed: int) -> SpidrForPretraining:
    """A new model; the same on every process."""
    torch.manual_seed(seed)
    return SpidrForPretraining(config)


__all__ = [
    "Run",
    "complete_model",
    "complete_note",
    "config_changes",
    "final_step",
    "initial_model",
    "make_model",
    "open_run",
    "plan",
    "read_original",
    "resume_notes",
    "take_model",
]
