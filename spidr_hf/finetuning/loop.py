"""Fine-tuning a head on the encoder: the loop that `examples/finetune_ctc.py` and `finetune_classification.py` share.

What is particular to a kind of labels is a `Task`: its labels, how predictions are scored, what goes into the model
folder. The loop makes updates of labelled batches on any number of processes, validates, keeps the best weights, and
resumes after an interruption at the very next batch.
"""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn

from ..configuration_spidr import SAMPLING_RATE, frame_lengths
from ..data.batches import dropout_seed, make_loader, min_samples
from ..data.batching import BucketSampler, Position
from ..data.sections import DataSection
from ..hub.card import finetuned_card
from ..modeling_spidr_heads import SpidrHeadModel
from ..system.files import replaced_file, replaced_folder, write_text
from ..system.messages import counted, duration
from ..system.processes import RunLock
from ..system.tables import known_table
from ..training.checkpoints import Checkpoint, Checkpoints, TrainerState, agree, begins_anew, set_aside
from ..training.optimizing import UpdateGuard, scale_and_clip
from ..training.schedules import learning_rate
from ..training.sharding import distribute, gradient_sync
from ..training.stopping import StopSignal
from .batches import Split
from .reporter import Reporter, best_step, say
from .settings import Settings, settle
from .task import Task, evaluate, long_enough

BEST_FILE = "best.safetensors"
_MAX_NONFINITE = 10
_NUM_BUCKETS = 30


def finetune(
    task: Task,
    train: Split,
    valid: Split,
    tests: Sequence[Split],
    settings: Settings,
    folder: Path,
    fresh: bool = False,
) -> dict:
    """The whole run: begin or resume, train, then evaluate the best weights and leave a model folder in `folder/final`.

    Args:
        train, valid, tests: to train on, to choose the best step by, and to score once at the end.
        folder: the run's folder: metrics.jsonl, checkpoints/, settings.json, results.json, final/.
        fresh: begin anew, whatever is there, but once in a job (`checkpoints.begins_anew`).

    Returns:
        The results: `best_step`, and the scores of each split by its name. Empty where a signal stopped the run.
    """
    state_of_processes = PartialState()
    rank, world_size = state_of_processes.process_index, state_of_processes.num_processes
    device, is_main = state_of_processes.device, state_of_processes.is_main_process
    model, config = task.model, task.model.config

    train, valid, *tests = (long_enough(split, task) for split in (train, valid, *tests))

    # ---- the folder, and where an earlier start of this run stopped
    beside = {"preprocessor_config.json": task.feature_extractor.to_json_string()}
    checkpoints = Checkpoints(folder / "checkpoints", keep_latest=1, beside=beside)
    with state_of_processes.main_process_first():
        if is_main:
            lock = RunLock(folder)
            if begins_anew(folder, fresh) and (earlier := set_aside(folder)):
                say(f"Beginning anew. What was there is in {earlier}.")
            checkpoints.remove_partial()
        checkpoint = checkpoints.newest()
        results = results_of(folder, checkpoint, settings)
        if is_main:
            begun, complete = checkpoint is not None, results is not None
            for note in settle(folder, task.description, settings, begun, complete):
                say(note)
    agree(checkpoint, folder)
    if results is not None:
        model.load_state_dict(load_file(folder / BEST_FILE))
        model.to(device)
        if is_main:
            lock.release()
        state_of_processes.wait_for_everyone()
        return results
    state = checkpoint.state if checkpoint else TrainerState(data=train.source.fingerprint)
    if checkpoint:
        checkpoint.load_model(model)
        say(f"Continuing from {checkpoint.folder}.")

    # ---- model and optimizer
    model.to(device)
    set_trainable(model, settings, encoder=not settings.freeze_encoder)
    section = settings.schedule
    optimizer = make_optimizer(model, settings)
    if checkpoint:
        checkpoint.load_optimizer(optimizer, {parameter: name for name, parameter in model.named_parameters()})
    # The optimizer knows all that ever trains; what has no gradient yet it passes over.
    set_trainable(model, settings, encoder=settings.trains_encoder(state.step + 1))
    shared, parameters = share(task, state_of_processes)

    # ---- batches, and what is reported
    lengths = np.zeros_like(train.source.num_samples)
    lengths[train.indices] = train.source.num_samples[train.indices]
    sampler = BucketSampler(
        lengths,
        max_batch_length=round(settings.batch_seconds * SAMPLING_RATE),
        min_sample_size=min_samples(config),
        max_sample_size=task.max_samples,
        padding=True,
        num_buckets=_NUM_BUCKETS,
        bucket_method="percentile",
        seed=settings.seed,
        rank=rank,
        world_size=world_size,
        accumulation=settings.accumulation,
    )
    sampler.position = Position(state.epoch, state.batch)
    workers = DataSection(
        num_workers=settings.num_workers,
        max_batch_length=round(settings.batch_seconds * SAMPLING_RATE),
        enable_padding=True,
    )
    dataset = task.batches(train, training=True, seed=settings.seed)
    loader = make_loader(dataset, sampler, workers, pin_memory=device.type == "cuda")
    say(
        f"{counted(len(train), 'utterance')}, {duration(sampler.seconds)}; "
        f"{counted(sampler.updates_per_epoch(), 'update')} per epoch; {counted(world_size, 'process')} on {device.type}"
    )
    if not (settings.freeze_encoder or settings.trains_encoder(settings.steps)):
        frozen, steps = settings.freeze_encoder_steps, settings.steps
        say(f"Only the head trains, to the end: --freeze-encoder-steps is {frozen}, --steps {steps}.")
    reporter = Reporter(folder, settings, state, train.source)
    remedy = "Start anew with a lower --lr or with --dtype float32."
    guard = UpdateGuard(state, _MAX_NONFINITE, remedy, say)
    stop = StopSignal(device, folders=[checkpoints.folder])
    precision = torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16")
    batches = iter(loader) if state.step < settings.steps else None
    train_mode(model, settings)

    for step in range(state.step + 1, settings.steps + 1):
        lr = learning_rate(section, step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["relative_lr"]
        if step == settings.freeze_encoder_steps + 1 and step > state.step and settings.freeze_encoder_steps:
            set_trainable(model, settings, encoder=settings.trains_encoder(step))
            shared = None
            shared, parameters = share(task, state_of_processes)
            train_mode(model, settings)

        totals = torch.zeros(2, device=device)
        for number in range(settings.accumulation):
            batch = next(batches)  # type: ignore[arg-type]
            reporter.batch(batch)
            # Named after the batch, the random numbers of dropout and masks need not be saved.
            torch.manual_seed(dropout_seed(settings.seed, batch.key))
            with gradient_sync(shared, number == settings.accumulation - 1):
                with precision:
                    loss = shared(**batch.to(device).inputs).loss
                count = task.count(batch.labels)
                # A sum: over how many, only the whole update knows.
                (loss * count).backward()
            totals += torch.stack([loss.detach().float() * count, torch.as_tensor(count, device=device).float()])
        if world_size > 1:
            dist.all_reduce(totals)
        norm = scale_and_clip(parameters, world_size / totals[1], settings.max_norm)
        mean_loss, grad_norm = torch.stack([totals[0] / totals[1], norm]).tolist()
        if guard.finite(step, mean_loss, grad_norm):
            optimizer.step()
            reporter.averages.add({"loss": mean_loss, "grad_norm": grad_norm})
        optimizer.zero_grad()

        state.step, (state.epoch, state.batch) = step, batch.key.following
        evaluating = step % settings.eval_interval == 0 or step == settings.steps
        scores = {}
        if evaluating:
            scores = evaluate(task, valid, settings, device)
            train_mode(model, settings)
        reporter.update(step, batch.key.epoch, lr, scores)
        stopping = stop.agreed() and step < settings.steps
        if evaluating and is_main and reporter.is_best(step, scores[task.metric], task.lower_is_better):
            with replaced_file(folder / BEST_FILE) as partial:
                save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial)
        if (evaluating or stopping) and is_main:
            state.metrics = reporter.state()
            state.world_size, state.accumulation = world_size, settings.accumulation
            checkpoints.save(state, model, optimizer)
        if is_main:
            checkpoints.check()
        if stopping:
            break

    # ---- the end: the best weights, scored and saved
    stop.finish()
    reporter.close()
    del batches
    shared = None
    gc.collect()
    if is_main:
        checkpoints.wait()
    state_of_processes.wait_for_everyone()
    results = {}
    if state.step >= settings.steps:
        results = finish(task, [valid, *tests], settings, folder, device)
    else:
        say(f"{stop.received}: saved step {state.step}. The same command continues from there.")
    if is_main:
        lock.release()
    state_of_processes.wait_for_everyone()
    return results


def results_of(folder: Path, checkpoint: Checkpoint | None, settings: Settings) -> dict[str, Any] | None:
    """The results of a run that is complete, with no more updates wanted; None for any other."""
    results = known_table(folder / "results.json")
    step = 0 if checkpoint is None else checkpoint.state.step
    complete = step >= settings.steps and results.get("steps") == step
    return results if complete and (folder / "final").exists() and (folder / BEST_FILE).exists() else None


def finish(
    task: Task, splits: Sequence[Split], settings: Settings, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Score the best weights on each split, and write results.json and final/."""
    is_main = PartialState().is_main_process
    task.model.load_state_dict(load_file(folder / BEST_FILE))
    step = best_step(folder, task.metric, task.lower_is_better)
    results: dict[str, Any] = {"steps": settings.steps, "best_step": step, "scores": {}}
    for split in splits:
        scores = evaluate(task, split, settings, device)
        results["scores"][split.name] = {"utterances": len(split), **scores}
    if is_main:
        with replaced_folder(folder / "final") as partial:
            task.save(partial)
            card = finetuned_card(task.model.config, task.description, results, asdict(settings))
            (partial / "README.md").write_text(card, encoding="utf-8")
        write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def set_trainable(model: SpidrHeadModel, settings: Settings, *, encoder: bool) -> None:
    """Which parameters train: the head always, the encoder if said so, the feature extractor if settings say so."""
    model.requires_grad_(True)
    model._set_trainable()
    if not settings.train_extractor:
        model.freeze_feature_encoder()
    if not encoder:
        model.freeze_base_model()


def make_optimizer(model: SpidrHeadModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW over what ever trains, in two groups, encoder and head, with learning rates in a fixed proportion."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    encoder = [parameter for name, parameter in trained if name.startswith("spidr.")]
    head = [parameter for name, parameter in trained if not name.startswith("spidr.")]
    groups = [
        {"params": group, "relative_lr": relative}
        for group, relative in ((encoder, 1.0), (head, settings.head_lr / settings.lr))
        if group
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=settings.weight_decay, fused=True
    )


def train_mode(model: SpidrHeadModel, settings: Settings) -> None:
    """Train mode; of an encoder that never trains, eval mode: probing is on its features as they are."""
    model.train()
    if settings.freeze_encoder:
        model.spidr.eval()


def share(task: Task, processes: PartialState) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model as the processes share it, and what trains; anew whenever the latter changes."""
    model = task.model.train()
    labels = task.example_labels(frame_lengths(model.config, SAMPLING_RATE))
    shared = distribute(model, processes, {"input_values": torch.zeros(1, SAMPLING_RATE), "labels": labels})
    return shared, [parameter for parameter in model.parameters() if parameter.requires_grad]


__all__ = ["finetune", "set_trainable"]
