"""`pretrain.py --dry-run`: checks everything that a run needs, and says what it will take, before a cluster's time is
spent. It writes nothing.

Every problem that is found is told, not only the first. Memory comes from the formula of `memory`; time from a few real
steps on the machine at hand, and from published runs where there is nothing to measure on.
"""

import importlib.util
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ..configuration_spidr import SAMPLING_RATE, SpidrConfig, frame_lengths
from ..data.batches import Batch, PretrainingBatches, SkippedFiles, make_sampler
from ..data.batching import BatchKey, BucketSampler, Position
from ..data.masking import masked_frames
from ..data.open import open_source
from ..data.sources import AudioSource
from ..kernels_spidr import kernels_run, use_kernels
from ..modeling_spidr import SpidrForPretraining
from ..system.errors import AudioError, ConfigError, RunFolderError
from ..system.processes import gather_all, lock
from ..training.checkpoints import Checkpoint, Checkpoints
from ..training.optimizing import scale_and_clip
from ..training.sharding import distribute, gradient_sync, shard, sharding_plugin
from .config import PretrainingConfig
from .loaders import unusable
from .memory import MASKED_SHARE, parameter_counts, training_memory
from .setup import autocast, exclude_parameters, make_accelerator, make_optimizer, small_batch_note
from .start import config_changes, make_model
from .validation import ValidationSet

# Audio of a timed step on a CPU, in seconds: a whole update of a large config would take minutes.
_TIMED_SECONDS_CPU = 8.0
_SAMPLED_FILES = 16
_BATCHES_LOOKED_AT = 50
# SpidR's own code, spidr-base in bfloat16, compiled: 400 000 steps of 237.5 s per GPU on 16 GPUs (arXiv 2512.20308).
_PUBLISHED = {"A100": 23.0, "H100": 15.0}
_PUBLISHED_STEPS, _PUBLISHED_SECONDS = 400_000, 237.5
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


@dataclass(frozen=True)
class Batches:
    """Batches of a run: who makes them, samples in the largest and in each of its rows, mean seconds of audio."""

    sampler: BucketSampler
    samples: int
    row: int
    seconds: float


@dataclass
class Plan:
    """What was found: lines by topic, and what is wrong."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def say(self, topic: str, text: str) -> None:
        """A line."""
        self.lines.append((topic, text))

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What goes wrong inside is a problem, and the rest is looked at all the same."""
        try:
            yield
        except (ValueError, OSError, RunFolderError) as error:
            self.problems.append(" ".join(str(error).split()))
        except torch.OutOfMemoryError:
            self.problems.append(
                "the device's memory is full: lower data.max_batch_length, and raise "
                "optimizer.gradient_accumulation_steps by as much."
            )

    def __str__(self) -> str:
        shown, text = "", []
        for topic, line in self.lines:
            text.append(f"{'' if topic == shown else topic:12}{line}")
            shown = topic
        text += [f"{'Note':12}{note}" for note in self.notes]
        return "\n".join([*text, *(f"{'PROBLEM':12}{problem}" for problem in self.problems)])


def dry_run(config: PretrainingConfig, output_dir: Path) -> Plan:
    """Check a run and print its plan, from the first process; the others take part in the timed steps.

    Args:
        config, output_dir: those of the run.

    Raises `ConfigError`, after the plan is printed, where the run would fail.
    """
    plan = Plan()
    accelerator, notes = make_accelerator(config, output_dir)
    world_size, is_main = accelerator.num_processes, accelerator.is_main_process
    plan.notes += [*notes, *config.notes]
    if note := small_batch_note(config, world_size):
        plan.notes.append(note)

    checkpoint = Checkpoints(output_dir / "checkpoints").newest()
    model = source = None
    with plan.trying():
        changes = config_changes(output_dir, config, checkpoint)
        plan.notes += [f"Changed since this run began: {change}" for change in changes]
        model, origin = make_model(config, checkpoint)
        _model_lines(plan, config, origin)
    with plan.trying():
        source = open_source(config.data, cache=None, progress=is_main)
    batches = None
    if config.data.streaming:
        plan.say("data", f"{config.data.manifest}, streamed: how much it is shows while it is read")
    elif source is not None:
        batches = _data_lines(plan, source, config, world_size)
    if is_main:
        _validation_lines(plan, config)
        _folder_lines(plan, config, output_dir, running=checkpoint is not None)
        _tracker_lines(plan, config)
    _memory_lines(plan, config, accelerator, batches, checkpoint)
    # All of them time a step, or none.
    plan.problems = list(dict.fromkeys(gather_all(plan.problems)))
    if model is not None and not plan.problems:
        begins = checkpoint.state.step if checkpoint else 0
        with plan.trying():
            batch = _timed_batch(config, source, batches, accelerator)
            seconds = batches.seconds if batches else config.data.max_batch_length / SAMPLING_RATE
            _time_lines(plan, config, accelerator, model, batch, seconds, begins)
    _published_line(plan, config)
    if is_main:
        print(plan)
    if plan.problems:
        count = len(plan.problems)
        raise ConfigError(f"{count} problem{'s' * (count > 1)} (see above); the first: {plan.problems[0]}")
    if is_main:
        print("\nNothing was written. Without --dry-run the same command begins (or continues) the run.")
    return plan


# ---- what there is


def _model_lines(plan: Plan, config: PretrainingConfig, origin: str) -> None:
    counts, model = parameter_counts(config.model), config.model
    plan.say(
        "model",
        f"{model.objective}: {counts['trained'] / 1e6:.1f} M trained parameters, {counts['teacher'] / 1e6:.1f} M in "
        f"the teacher, {model.num_codebooks} codebooks of {model.codebook_size}",
    )
    plan.say("model", origin)


def _data_lines(plan: Plan, source: AudioSource, config: PretrainingConfig, world_size: int) -> Batches | None:
    """Says what there is to train on."""
    data, optimizer = config.data, config.optimizer
    accumulation = optimizer.gradient_accumulation_steps
    _decode(plan, source, data.max_skipped_share, "data")
    skipped, tried = unusable(source, data, config.model)
    if skipped:
        plan.notes.append(f"{len(skipped)} files cannot be used; the first: {skipped[0].reason}")
    sampler = None
    with plan.trying():
        sampler = make_sampler(source, data, config.model, world_size=world_size, accumulation=accumulation)
    if sampler is None:
        return None
    with plan.trying():
        SkippedFiles(None, data.max_skipped_share).add(skipped, tried)
    plan.say("data", f"{sampler}")
    lengths = np.minimum(np.asarray(source.num_samples), data.max_sample_size)
    keys = sampler.epoch_batches(0)
    shapes = []
    for utterances in keys[:_BATCHES_LOOKED_AT]:
        rows = lengths[np.asarray(utterances)]
        shapes.append((len(rows), int(rows.max() if data.enable_padding else rows.min())))
    spans, rng = config.masking.spans(), np.random.default_rng(0)
    masked, seconds = [], []
    for rows, samples in shapes:
        frames = np.full(rows, frame_lengths(config.model, samples))
        masked.append(masked_frames(frames, spans, rng).size if spans else int(frames.sum()))
        seconds.append(rows * samples / SAMPLING_RATE)
    per_update = world_size * accumulation
    total_masked = per_update * float(np.mean(masked))
    plan.say(
        "update",
        f"{world_size} process{'es' * (world_size > 1)} x {accumulation} batch{'es' * (accumulation > 1)} of "
        f"{np.mean(seconds):.1f} s ({np.mean([rows for rows, _ in shapes]):.0f} utterances): "
        f"{per_update * np.mean(seconds):.0f} s of audio, {total_masked:.0f} masked frames, "
        f"{total_masked / config.model.codebook_size:.1f} for each codeword of a codebook",
    )
    updates = sampler.updates_per_epoch()
    plan.say(
        "schedule",
        f"{optimizer.max_steps} updates = {optimizer.max_steps / updates:.1f} epochs = "
        f"{optimizer.max_steps * per_update * np.mean(seconds) / 3600:.0f} h of audio heard; lr {optimizer.lr:g}, "
        f"{optimizer.scheduler}",
    )
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    return Batches(sampler, largest[0] * largest[1], largest[1], float(np.mean(seconds)))


def _decode(plan: Plan, source: AudioSource, max_share: float, topic: str) -> None:
    """Reads a few utterances from all over the source; too many that cannot be read are a problem."""
    indices = np.unique(np.linspace(0, len(source) - 1, _SAMPLED_FILES).astype(int))
    failures, samples, start = [], 0, time.perf_counter()
    for index in indices:
        try:
            samples += len(source.read(int(index)))
        except AudioError as error:
            failures.append(str(error))
    seconds = time.perf_counter() - start
    if len(failures) > max_share * len(indices) or len(failures) == len(indices):
        plan.problems.append(f"{len(failures)} of {len(indices)} files tried cannot be used. The first: {failures[0]}")
    elif failures:
        plan.notes.append(f"{len(failures)} of {len(indices)} files tried cannot be used. The first: {failures[0]}")
    if samples:
        plan.say(
            topic,
            f"{len(indices) - len(failures)} of {len(indices)} files tried can be read, "
            f"{samples / SAMPLING_RATE / seconds:.0f} s of audio per second in one process",
        )


def _validation_lines(plan: Plan, config: PretrainingConfig) -> None:
    for name, section in config.validation.items():
        with plan.trying():
            validation = ValidationSet(name, section, config)
            _decode(plan, validation.source, section.max_skipped_share, "validation")
            phones = "phones known" if section.alignments_path else "phones not known"
            plan.say("validation", f"{name}: {validation.num_utterances} utterances, {phones}")
            plan.notes += [f"[validation.{name}]: {note}." for note in validation.new_notes()]
    interval = config.run.validate_interval
    if config.validation and not interval:
        plan.say("validation", "by `examples/validate.py --run-dir DIR --watch`, beside the run")
    elif config.validation:
        plan.say("validation", f"by the training processes, every {interval} updates")
    elif interval:
        plan.problems.append(f"`run.validate_interval` is {interval}, and there is no section [validation.<name>].")


# ---- where it goes


def checkpoint_bytes(config: SpidrConfig) -> int:
    """Size of a checkpoint: weights, teacher, codebooks, and two moments of what trains."""
    counts = parameter_counts(config)
    return 4 * (counts["all"] + counts["teacher"] + counts["buffers"] + 2 * counts["trained"])


def _folder_lines(plan: Plan, config: PretrainingConfig, output_dir: Path, running: bool) -> None:
    existing = output_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        plan.problems.append(f"{existing} is a file: choose another --output-dir.")
        return
    read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
    if read_only or not os.access(existing, os.W_OK | os.X_OK):
        plan.problems.append(f"{existing} cannot be written to: choose another --output-dir.")
    if _locked(output_dir / ".lock"):
        plan.problems.append(f"{output_dir} is in use by another run at present. Stop it first.")
    run, steps = config.run, config.optimizer.max_steps
    size, counts = checkpoint_bytes(config.model), parameter_counts(config.model)
    written = math.ceil(steps / run.save_interval)
    # While one is written, the one that it replaces is still there.
    kept = written if run.keep_latest < 0 else min(written, run.keep_latest + 1)
    needed = kept * size + 4 * (counts["all"] + counts["teacher"] + counts["buffers"])
    free = shutil.disk_usage(existing).free
    there = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file()) if running else 0
    plan.say(
        "disk",
        f"{written} checkpoints of {_size(size)}, {'all' if run.keep_latest < 0 else run.keep_latest} kept: "
        f"{_size(needed)} at most; {_size(free)} free at {existing}",
    )
    if needed > free + there:
        plan.problems.append(
            f"{existing} has {_size(free)} free, the run's checkpoints need {_size(needed)}: set run.keep_latest, a "
            "larger run.save_interval, or another --output-dir."
        )


def _locked(path: Path) -> bool:
    try:
        with open(path, "r+") as file:
            return not lock(file)
    except OSError:  # there is none, or it cannot be written to, which is told elsewhere
        return False


def _tracker_lines(plan: Plan, config: PretrainingConfig) -> None:
    tracker = config.run.tracker
    if tracker == "auto":
        found = importlib.util.find_spec("tensorboard") is not None
        tracker = "tensorboard" if found else "metrics.jsonl alone (pip install tensorboard for more)"
    elif (package := _PACKAGES.get(tracker)) and importlib.util.find_spec(package) is None:
        plan.problems.append(f"`run.tracker` is {tracker}, which is not installed: pip install {package}.")
    plan.say("curves", tracker)
    if importlib.util.find_spec("matplotlib") is None:
        plan.notes.append("no pictures of the curves: pip install 'spidr_hf[train]' brings matplotlib.")


# ---- what it takes


def _memory_lines(
    plan: Plan,
    config: PretrainingConfig,
    accelerator: Accelerator,
    batches: Batches | None,
    checkpoint: Checkpoint | None,
) -> None:
    device, data, optimizer = accelerator.device, config.data, config.optimizer
    longest = min(data.max_sample_size, data.max_batch_length)
    samples, row = (batches.samples, batches.row) if batches else (data.max_batch_length // longest * longest, longest)
    sharding = sharding_plugin(accelerator)
    spans = config.masking.spans()
    options: dict[str, Any] = {
        "batch_samples": samples,
        "utterance_samples": row,
        "masked_share": MASKED_SHARE if spans else 1.0,
        "dtype": optimizer.dtype,
        "keeps_gradients": accelerator.num_processes > 1 or optimizer.gradient_accumulation_steps > 1,
        "gradient_checkpointing": bool(sharding and sharding.activation_checkpointing),
        "shards": accelerator.num_processes if sharding else 1,
        "frozen": (checkpoint.state.step if checkpoint else 0) >= config.model.freeze_step,
    }
    fused = config.run.kernels and kernels_run(torch.empty(0, device=device))
    memory = training_memory(config.model, device=device.type, kernels=fused, **options)
    parts = [
        ("weights, teacher, codebooks", memory.parameters + memory.teacher + memory.codebooks + memory.weight_copies),
        ("gradients and optimizer", memory.gradients + memory.optimizer),
        ("activations of the extractor", memory.extractor),
        ("of the encoder", memory.positional + memory.layers + memory.objective),
        ("batch and passing", memory.batch + memory.transient),
        ("CUDA and fragmentation", memory.allowance),
    ]
    shown = ", ".join(f"{name} {_size(size)}" for name, size in parts if size)
    plan.say("memory", f"{_size(memory.total)} on each {device.type.upper()} ({shown})")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if memory.total > total:
            plan.problems.append(
                f"a step needs about {_size(memory.total)}, {torch.cuda.get_device_name(device)} has {_size(total)}: "
                "lower data.max_batch_length, and raise optimizer.gradient_accumulation_steps by as much."
            )
    else:
        gpu = training_memory(config.model, device="cuda", kernels=config.run.kernels, **options)
        plain = training_memory(config.model, device="cuda", kernels=False, **options)
        plan.say("memory", f"on a GPU {_size(gpu.total)} ({_size(plain.total)} without the fused kernels)")
        if (free := _free_memory()) is not None and memory.total * accelerator.num_processes > free:
            plan.notes.append(f"this machine has {_size(free)} of memory to spare, which is too little to run it here.")


def _timed_batch(
    config: PretrainingConfig,
    source: AudioSource | None,
    batches: Batches | None,
    accelerator: Accelerator,
) -> Batch:
    """The first batch of this process; on a CPU a part of it, so that the steps take seconds."""
    rank = accelerator.process_index
    if batches is None or source is None:  # streamed: any audio takes as long
        samples = min(config.data.max_sample_size, int(_TIMED_SECONDS_CPU * SAMPLING_RATE))
        frames = np.array([frame_lengths(config.model, samples)])
        spans = config.masking.spans()
        mask = None if spans is None else torch.from_numpy(masked_frames(frames, spans, np.random.default_rng(0)))
        return Batch(torch.randn(1, samples), mask, None, BatchKey(0, rank, np.array([0]), Position()), samples)
    utterances = batches.sampler.epoch_batches(0)[rank]
    if accelerator.device.type == "cpu":
        lengths = np.minimum(np.asarray(source.num_samples)[utterances], config.data.max_sample_size)
        fits = np.searchsorted(np.cumsum(lengths), _TIMED_SECONDS_CPU * SAMPLING_RATE, side="right")
        utterances = utterances[: max(1, int(fits))]
    dataset = PretrainingBatches(source, config.data, config.masking, config.model, config.run.random_seed)
    batch = dataset[BatchKey(0, rank, utterances, Position())]
    if batch.failure:
        raise AudioError(batch.failure)
    return batch


def _time_lines(
    plan: Plan,
    config: PretrainingConfig,
    accelerator: Accelerator,
    model: SpidrForPretraining,
    batch: Batch,
    whole: float,
    begins: int,
) -> None:
    """Times two real steps after one to warm up, for batches of `whole` seconds. What they change is thrown away."""
    device, world_size, accumulation = (
        accelerator.device,
        accelerator.num_processes,
        config.optimizer.gradient_accumulation_steps,
    )
    use_kernels(config.run.kernels)
    model.to(device).train()
    exclude_parameters(model, config)
    if begins >= config.model.freeze_step:
        model.freeze_feature_encoder()
    if sharding := sharding_plugin(accelerator):
        shard(model, sharding)
    optimizer = make_optimizer(model, config.optimizer)
    distributed = distribute(model, accelerator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    precision, inputs = autocast(config, device), batch.to(device).inputs
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    passes, updates = [], []
    for _ in range(3):
        start = _now(device)
        with gradient_sync(distributed, True):
            with precision:
                output = distributed(**inputs)
            (output.loss * output.num_masked_frames).backward()
        middle = _now(device)
        statistics = model.reduce_statistics()
        scale_and_clip(parameters, world_size / statistics.num_masked_frames, config.optimizer.max_norm)
        optimizer.step()
        model.update_teacher(max(begins, 1))
        optimizer.zero_grad()
        passes.append(middle - start)
        updates.append(_now(device) - middle)
    audio = batch.input_values.numel() / SAMPLING_RATE
    # Passes grow with the audio; optimizer and teacher take what they take.
    pass_seconds, update_seconds = min(passes[1:]), min(updates[1:])
    step = accumulation * pass_seconds * whole / audio + update_seconds
    left = config.optimizer.max_steps - begins
    plan.say(
        "time",
        f"measured here: {pass_seconds:.2f} s for {audio:.1f} s of audio and {update_seconds:.2f} s to update; so "
        f"{step:.2f} s per update of {world_size * accumulation * whole:.0f} s, {_duration(step * left)} for "
        f"{left} updates on {world_size} x {_device_name(device)}"
        + (", compiling and loading left out" if device.type == "cuda" else ""),
    )
    if device.type == "cuda":
        plan.say("memory", f"{_size(torch.cuda.max_memory_allocated(device))} allocated at the peak of these steps")


def _published_line(plan: Plan, config: PretrainingConfig) -> None:
    base = SpidrConfig()
    same = ("hidden_size", "num_hidden_layers", "intermediate_size", "conv_dim", "num_codebooks")
    if any(getattr(config.model, name) != getattr(base, name) for name in same) or config.optimizer.dtype == "float32":
        return
    audio = config.data.max_batch_length / SAMPLING_RATE * config.optimizer.gradient_accumulation_steps
    share = audio / _PUBLISHED_SECONDS * config.optimizer.max_steps / _PUBLISHED_STEPS
    hours = ", ".join(f"{_duration(3600 * share * hours)} on {name}" for name, hours in _PUBLISHED.items())
    plan.say("time", f"at the speed of SpidR's own code (arXiv 2512.20308) on as many GPUs: {hours}")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type.upper()}"


def _free_memory() -> int | None:
    """Bytes that programs may still take, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 72 * 3600 else f"{seconds / 86400:.1f} days"


__all__ = ["Batches", "Plan", "checkpoint_bytes", "dry_run"]
