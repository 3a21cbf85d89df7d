"""`pretrain.py --dry-run`: checks everything that a run needs, and says what it will take, before a cluster's time is
spent. It writes nothing.

What there is to say of a part, and every problem with it, its own `plan` tells. Here the parts are asked, and a few
real steps are timed on the machine at hand; where there is nothing to measure on, published runs give the time.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from ..configuration_spidr import SAMPLING_RATE, SpidrConfig, frame_lengths
from ..data.batches import Batch, PretrainingBatches
from ..data.batching import BatchKey, Position
from ..data.masking import masked_frames
from ..data.open import open_source
from ..data.sources import AudioSource, StreamedSource
from ..modeling_spidr import SpidrForPretraining
from ..system.errors import AudioError, ConfigError
from ..system.messages import counted, duration
from ..system.processes import gather_all
from ..training import trackers
from ..training.checkpoints import Checkpoint, Checkpoints, begins_anew
from ..training.folder_settings import CHANGED
from ..training.planning import Line, Plan, size
from . import curves_picture, hub_push, loaders, memory, start, validation
from .config import PretrainingConfig
from .loaders import ExpectedBatches
from .setup import Learner, choose_kernels, make_accelerator, recipe_notes

# Audio of a timed step on a CPU, in seconds: a whole update of a large config would take minutes.
_TIMED_SECONDS_CPU = 8.0
# SpidR's own code, spidr-base in bfloat16, compiled: 400 000 steps of 237.5 s per GPU on 16 GPUs (arXiv 2512.20308).
_PUBLISHED = {"A100": 23.0, "H100": 15.0}
_PUBLISHED_STEPS, _PUBLISHED_SECONDS = 400_000, 237.5


def dry_run(config: PretrainingConfig, output_dir: Path, fresh: bool = False) -> Plan:
    """Check a run and print its plan, from the first process; the others take part in the timed steps.

    Args:
        config, output_dir: those of the run.
        fresh: whether it begins anew.

    Raises `ConfigError`, after the plan is printed, where the run would fail.
    """
    plan = Plan()
    accelerator, notes = make_accelerator(config, output_dir)
    world_size, is_main = accelerator.num_processes, accelerator.is_main_process
    plan.notes += [note for note in (*notes, *config.notes) if note]
    plan.notes += choose_kernels(config, accelerator)
    model = source = batches = checkpoint = None
    with plan.trying():
        fresh = begins_anew(output_dir, fresh)
        checkpoint = None if fresh else Checkpoints(output_dir / "checkpoints").newest()
        start.complete_model(config, checkpoint)
        plan.notes += [CHANGED + change for change in start.config_changes(output_dir, config, checkpoint)]
        model, origin = start.make_model(config, checkpoint)
        plan.notes += recipe_notes(config, world_size)
        plan.add(memory.model_plan(config.model, origin))
    with plan.trying():
        source = open_source(config.data, cache=None, progress=is_main)
        plan.add(loaders.source_plan(source, config))
        batches = loaders.expected_batches(source, config, world_size)
        plan.add(loaders.plan(source, config, batches, world_size))
    if is_main:
        for lines in (
            validation.plan(config),
            start.plan(config, output_dir, running=checkpoint is not None),
            loaders.workers_plan(config.data),
            trackers.plan(config.run.tracker),
            curves_picture.plan(),
            hub_push.plan(config.run.push_to_hub),
        ):
            plan.add(lines)
    plan.add(memory.plan(config, accelerator, batches, checkpoint))
    # All of them time a step, or none.
    plan.problems = list(dict.fromkeys(gather_all(plan.problems)))
    if model is not None and source is not None and not plan.problems:
        with plan.trying():
            batch = _timed_batch(config, source, batches, accelerator)
            whole = batches.seconds if batches else config.data.max_batch_length / SAMPLING_RATE
            plan.add(_timing(config, accelerator, model, batch, whole, checkpoint))
    plan.add(published_times(config))
    if is_main:
        print(plan)
    if plan.problems:
        count = len(plan.problems)
        raise ConfigError(f"{count} problem{'s' * (count > 1)} (see above); the first: {plan.problems[0]}")
    if is_main:
        print("\nNothing was written. Without --dry-run the same command begins (or continues) the run.")
    return plan


def _timed_batch(
    config: PretrainingConfig,
    source: AudioSource | StreamedSource,
    batches: ExpectedBatches | None,
    accelerator: Accelerator,
) -> Batch:
    """The first batch of this process; on a CPU a part of it, so that the steps take seconds."""
    rank = accelerator.process_index
    if batches is None or isinstance(source, StreamedSource):  # streamed: any audio takes as long
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


def _timing(
    config: PretrainingConfig,
    accelerator: Accelerator,
    model: SpidrForPretraining,
    batch: Batch,
    whole: float,
    checkpoint: Checkpoint | None,
) -> Iterator[Line]:
    """Times two real steps after one to warm up, for batches of `whole` seconds. What they change is thrown away."""
    device, world_size = accelerator.device, accelerator.num_processes
    accumulation, begins = config.optimizer.gradient_accumulation_steps, checkpoint.state.step if checkpoint else 0
    learner = Learner(model, config, accelerator, checkpoint)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    passes, updates = [], []
    for _ in range(3):
        since = _now(device)
        with learner.gradient_sync(True):
            output = learner(batch)
            (output.loss * output.num_masked_frames).backward()  # type: ignore[operator]  # there is a loss
        middle = _now(device)
        statistics = model.reduce_statistics()
        learner.clip_gradients(world_size / statistics.num_masked_frames, config.optimizer.max_norm)
        learner.optimizer.step()
        model.update_teacher(max(begins, 1))
        learner.optimizer.zero_grad()
        passes.append(middle - since)
        updates.append(_now(device) - middle)
    audio = batch.input_values.numel() / SAMPLING_RATE
    # Passes grow with the audio; optimizer and teacher take what they take.
    pass_seconds, update_seconds = min(passes[1:]), min(updates[1:])
    step = accumulation * pass_seconds * whole / audio + update_seconds
    left = config.optimizer.max_steps - begins
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    yield Line(
        "time",
        f"measured here: {pass_seconds:.2f} s for {audio:.1f} s of audio and {update_seconds:.2f} s to update; so "
        f"{step:.2f} s per update of {world_size * accumulation * whole:.0f} s, {duration(step * left, days=True)} for "
        f"{counted(left, 'update')} on {world_size} x {name}"
        + (", compiling and loading left out" if device.type == "cuda" else ""),
    )
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        yield Line("memory", f"{size(peak)} allocated at the peak of these steps")


def published_times(config: PretrainingConfig) -> Iterator[Line]:
    """How long published runs of a model of that size took, for as much audio."""
    base = SpidrConfig()
    same = ("hidden_size", "num_hidden_layers", "intermediate_size", "conv_dim", "num_codebooks")
    if any(getattr(config.model, name) != getattr(base, name) for name in same) or config.optimizer.dtype == "float32":
        return
    audio = config.data.max_batch_length / SAMPLING_RATE * config.optimizer.gradient_accumulation_steps
    share = audio / _PUBLISHED_SECONDS * config.optimizer.max_steps / _PUBLISHED_STEPS
    hours = ", ".join(f"{duration(3600 * share * hours, days=True)} on {name}" for name, hours in _PUBLISHED.items())
    yield Line("time", f"at the speed of SpidR's own code (arXiv 2512.20308) on as many GPUs: {hours}")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


__all__ = ["dry_run", "published_times"]
