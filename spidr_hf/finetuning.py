"""Fine-tuning a head on the encoder: the loop that `examples/finetune_ctc.py` and `finetune_classification.py` share.

What is particular to a kind of labels is a `Task`: its labels, how predictions are scored, what goes into the model
folder. The loop makes updates of labelled batches on any number of processes, validates, keeps the best weights, and
goes on after an interruption at the very next batch.
"""

import dataclasses
import gc
import json
import math
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from .audio import SAMPLING_RATE
from .batching import BucketSampler, Position
from .data import SkippedFiles, dropout_seed, make_loader, min_samples
from .feature_extraction_spidr import SpidrFeatureExtractor
from .files import replaced_file, replaced_folder, write_text
from .finetuning_card import finetuned_card
from .finetuning_data import LabelledBatch, LabelledBatches, Part, evaluation_keys
from .layers_spidr import frame_lengths
from .modeling_spidr_heads import SpidrHeadModel
from .pretraining import gather_all, scale_and_clip
from .run_config import DataSection, OptimizerSection
from .run_metrics import Averages, MetricsFile
from .run_state import Checkpoints, RunFolderError, RunLock, StopSignal, TrainerState
from .schedules import learning_rate

BEST_FILE = "best.safetensors"
SETTINGS_FILE = "settings.json"
_MAX_NONFINITE = 10
_NUM_BUCKETS = 30


@dataclass(frozen=True)
class Settings:
    """How a head is trained.

    Attributes:
        steps: updates to make.
        lr, head_lr: of the encoder and of the head, at the peak of the tri-stage schedule: `warmup` and `hold` are
            shares of the steps, the rest decays to a hundredth.
        batch_seconds: audio in a batch of one process, padding included.
        accumulation: batches of each process in an update.
        freeze_encoder_steps: updates at first in which only the head trains. Without them the
            encoder follows the gradients of a head that knows nothing yet.
        freeze_encoder: only the head trains, from beginning to end, on features without dropout and masks.
        train_extractor: the convolutional feature extractor trains, too (whenever the encoder does).
        dtype: autocast precision of training, "bfloat16" or "float32"; validation is in float32.
        eval_interval: updates between validations, which checkpoints go with.
    """

    steps: int = 3000
    lr: float = 1e-4
    head_lr: float = 1e-3
    warmup: float = 0.1
    hold: float = 0.4
    batch_seconds: float = 40.0
    accumulation: int = 1
    freeze_encoder_steps: int = 200
    freeze_encoder: bool = False
    train_extractor: bool = False
    weight_decay: float = 0.01
    max_norm: float = 1.0
    dtype: str = "bfloat16"
    eval_interval: int = 200
    log_interval: int = 20
    num_workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "lr",
            "head_lr",
            "batch_seconds",
            "accumulation",
            "max_norm",
            "eval_interval",
            "log_interval",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)!r}.")
        for name in ("freeze_encoder_steps", "weight_decay", "num_workers", "seed", "warmup", "hold"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)!r}.")
        if self.warmup + self.hold > 1:
            raise ValueError(f"`warmup` and `hold` are shares of the steps: {self.warmup} + {self.hold} is above 1.")

    @property
    def schedule(self) -> OptimizerSection:
        """As a section of a pretraining config, which schedules read."""
        warmup, hold = round(self.warmup * self.steps), round(self.hold * self.steps)
        return OptimizerSection(
            lr=self.lr,
            max_steps=self.steps,
            warmup_steps=warmup,
            hold_steps=hold,
            decay_steps=max(1, self.steps - warmup - hold),
            scheduler="tristage",
        )

    def trains_encoder(self, step: int) -> bool:
        """Whether the encoder trains in this update, counted from 1."""
        return not self.freeze_encoder and step > self.freeze_encoder_steps


class Task(ABC):
    """A model with labels of one kind. Subclasses say what they are, how they are scored and what is saved.

    Args:
        model: the encoder with its head.
        feature_extractor: standardises waveforms.
        description: what the run is about, by which a run folder knows its own again.
    """

    metric: str  # the score by which the best step is chosen
    min_frames = 1  # of an utterance
    lower_is_better = True
    frames = False  # labels are one per frame
    max_samples: int | None = None  # longer utterances are cropped to this in training

    def __init__(self, model: SpidrHeadModel, feature_extractor: SpidrFeatureExtractor, description: Mapping[str, Any]):
        self.model = model
        self.feature_extractor = feature_extractor
        self.description = dict(description)

    def batches(self, part: Part, *, training: bool = False, seed: int = 0) -> LabelledBatches:
        """The batches of a part; cropped in training only."""
        return LabelledBatches(
            part,
            self.model.config,
            self.feature_extractor,
            max_samples=self.max_samples if training else None,
            frames=self.frames,
            seed=seed,
        )

    def count(self, labels: Tensor) -> int | Tensor:
        """How many things the loss of a batch is a mean over."""
        return len(labels)

    @abstractmethod
    def example_labels(self, frames: int) -> Tensor:
        """Labels of one utterance of this many frames, for a pass that only gets things going."""

    @abstractmethod
    def predict(self, output: Any, batch: LabelledBatch) -> list[Any]:
        """What is kept of a batch's outputs, per row, for `score`; small, and on the CPU."""

    @abstractmethod
    def score(self, predictions: Mapping[int, Any], part: Part) -> dict[str, float]:
        """Scores from predictions by utterance."""

    def save(self, folder: Path) -> None:
        """Write what the model folder holds, its card aside."""
        self.model.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)


def finetune(task: Task, train: Part, valid: Part, tests: Sequence[Part], settings: Settings, folder: Path) -> dict:
    """The whole run: train or go on, then evaluate the best weights and leave a model folder in `folder/final`.

    Args:
        train, valid, tests: to train on, to choose the best step by, and to score once at the end.
        folder: the run's folder: metrics.jsonl, checkpoints/, settings.json, results.json, final/.

    Returns:
        The results: `best_step`, and the scores of each part by its name. Empty where a signal stopped the run.
    """
    state_of_processes = PartialState()
    rank, world_size = state_of_processes.process_index, state_of_processes.num_processes
    device, is_main = state_of_processes.device, state_of_processes.is_main_process
    model, config = task.model, task.model.config

    train, valid, *tests = (long_enough(part, task) for part in (train, valid, *tests))

    # ---- the folder, and where an earlier start of this run stopped
    checkpoints = Checkpoints(folder / "checkpoints", keep_latest=1)
    with state_of_processes.main_process_first():
        if is_main:
            lock = RunLock(folder)
            checkpoints.remove_partial()
        checkpoint = checkpoints.newest()
        if is_main:
            for note in settle(folder, task.description, settings, checkpoint is not None):
                say(note)
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
    shared, parameters = share(task, device, world_size)

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
    workers = DataSection(num_workers=settings.num_workers)
    dataset = task.batches(train, training=True, seed=settings.seed)
    loader = make_loader(dataset, sampler, workers, pin_memory=device.type == "cuda")
    say(
        f"{len(train)} utterances, {sampler.hours:.2f} h; {sampler.updates_per_epoch()} updates per epoch; "
        f"{world_size} process{'es' * (world_size > 1)} on {device.type}"
    )
    reporter = Reporter(folder, settings, state, is_main)
    stop = StopSignal(device)
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
            shared, parameters = share(task, device, world_size)

        totals = torch.zeros(2, device=device)
        for turn in range(settings.accumulation):
            batch = next(batches)  # type: ignore[arg-type]
            reporter.batch(batch)
            # Named after the batch, the random numbers of dropout and masks need not be saved.
            torch.manual_seed(dropout_seed(settings.seed, batch.key))
            alone = world_size == 1 or turn == settings.accumulation - 1
            with nullcontext() if alone else shared.no_sync():
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
        if math.isfinite(mean_loss) and math.isfinite(grad_norm):
            optimizer.step()
            state.nonfinite_in_a_row = 0
            reporter.averages.add({"loss": mean_loss, "grad_norm": grad_norm})
        else:
            state.skipped_steps += 1
            state.nonfinite_in_a_row += 1
            say(f"Step {step}: loss {mean_loss}, gradient norm {grad_norm}. The update is skipped.")
            if state.nonfinite_in_a_row >= _MAX_NONFINITE:
                raise RunFolderError(
                    f"{_MAX_NONFINITE} updates in a row had a non-finite loss or gradient, the last at step {step}. "
                    "Start anew with a lower --lr or with --dtype float32."
                )
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
    results: dict[str, Any] = {}
    if state.step >= settings.steps:
        results = finish(task, [valid, *tests], settings, folder, device)
    else:
        say(f"{stop.received}: saved step {state.step}. The same command continues from there.")
    if is_main:
        lock.release()
    state_of_processes.wait_for_everyone()
    return results


def long_enough(part: Part, task: Task) -> Part:
    """The part without utterances that are too short for the head. Raises `ValueError` where none is left."""
    frames = frame_lengths(task.model.config, torch.from_numpy(part.source.num_samples[part.indices])).numpy()
    indices = part.indices[frames >= task.min_frames]
    if not len(indices):
        raise ValueError(f"There is no utterance for {part.name} that has {task.min_frames} frames.")
    if len(indices) < len(part):
        say(
            f"{len(part) - len(indices)} utterances for {part.name} have fewer than {task.min_frames} frames: left out."
        )
    return dataclasses.replace(part, indices=indices)


def finish(task: Task, parts: Sequence[Part], settings: Settings, folder: Path, device: torch.device) -> dict[str, Any]:
    """Score the best weights on each part, and write results.json and final/."""
    is_main = PartialState().is_main_process
    task.model.load_state_dict(load_file(folder / BEST_FILE))
    steps = best_step(folder, task)
    results: dict[str, Any] = {"steps": settings.steps, "best_step": steps, "scores": {}}
    for part in parts:
        scores = evaluate(task, part, settings, device)
        results["scores"][part.name] = {"utterances": len(part), **scores}
    if is_main:
        with replaced_folder(folder / "final") as partial:
            task.save(partial)
            card = finetuned_card(task.description, results, asdict(settings))
            (partial / "README.md").write_text(card, encoding="utf-8")
        write_text(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return results


def best_step(folder: Path, task: Task) -> int:
    """The step whose weights were kept, by metrics.jsonl."""
    rows = read_rows(folder / "metrics.jsonl")
    key = f"valid_{task.metric}"
    values = [(row[key] if task.lower_is_better else -row[key], -row["step"]) for row in rows if key in row]
    return -min(values)[1]


@torch.inference_mode()
def evaluate(task: Task, part: Part, settings: Settings, device: torch.device) -> dict[str, float]:
    """Scores of a part in float32, and its `loss`; the work is shared by all processes, the result the same on all."""
    processes = PartialState()
    model = task.model.eval()
    batches = task.batches(part)
    most = round(2 * settings.batch_seconds * SAMPLING_RATE)
    keys = list(evaluation_keys(part, most, processes.process_index, processes.num_processes))
    found: list[tuple[int, Any]] = []
    total = weight = 0.0
    for key in tqdm(keys, desc=part.name, unit="batch", leave=False, disable=not processes.is_main_process):
        batch = batches[key]
        output = model(**batch.to(device).inputs)
        found += zip(batch.utterances, task.predict(output, batch), strict=True)
        count = float(task.count(batch.labels))
        if count:
            total, weight = total + float(output.loss) * count, weight + count
    gathered = gather_all([(total, weight, found)])
    predictions = {index: value for _, _, items in gathered for index, value in items}
    if not predictions:
        raise ValueError(f"There is no utterance to evaluate on in {part.name}.")
    # In one order on any number of processes.
    predictions = {index: predictions[index] for index in sorted(predictions)}
    scores = task.score(predictions, part)
    weight = sum(entry[1] for entry in gathered)
    if weight:
        scores["loss"] = sum(entry[0] for entry in gathered) / weight
    return scores


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


def share(task: Task, device: torch.device, world_size: int) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model as the processes share it, and what trains; anew whenever the latter changes."""
    model = task.model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if world_size == 1:
        return model, parameters
    gc.collect()
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        shared = DistributedDataParallel(
            model,
            device_ids=[device] if device.type != "cpu" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    # After its first backward DDP arranges its buckets, and the order of its sums, anew: got over with here, a resumed
    # run sums as one never interrupted.
    silence = torch.zeros(1, SAMPLING_RATE, device=device)
    frames = int(model._get_feat_extract_output_lengths(SAMPLING_RATE))
    shared(silence, labels=task.example_labels(frames).to(device)).loss.backward()
    model.zero_grad()
    return shared, parameters


class Reporter:
    """metrics.jsonl, the progress bar, unusable audio, and which step was the best so far."""

    def __init__(self, folder: Path, settings: Settings, state: TrainerState, is_main: bool):
        self.settings = settings
        self.averages = Averages(state.metrics.get("averages"))
        self._best: float | None = state.metrics.get("best")
        self._file = MetricsFile(folder / "metrics.jsonl", state.step) if is_main else None
        self.skipped = SkippedFiles(folder / "skipped.jsonl" if is_main else None, 0.5)
        self._bar = tqdm(
            total=settings.steps,
            initial=state.step,
            desc="Fine-tuning",
            unit="step",
            disable=not is_main,
            mininterval=1,
        )
        self._restart()

    def batch(self, batch: LabelledBatch) -> None:
        """Take note of a batch of this process."""
        self._samples += batch.audio_samples
        self.skipped.add(batch.skipped, len(batch.key.utterances))

    def update(self, step: int, epoch: int, lr: float, scores: Mapping[str, float]) -> None:
        """Take note of an update, and write the row of a logged or validated step."""
        self._bar.update()
        if step % self.settings.log_interval and not scores:
            return
        means = self.averages.means()
        processes = PartialState().num_processes
        samples = sum(gather_all([self._samples]))
        row = {
            "step": step,
            "epoch": epoch + 1,
            "loss": means.get("loss"),
            "grad_norm": means.get("grad_norm"),
            "lr": lr,
            "audio_seconds_per_second": samples / SAMPLING_RATE / (time.perf_counter() - self._since),
            "world_size": processes,
            **{f"valid_{name}": value for name, value in scores.items()},
        }
        if self._file is not None:
            self._file.write(row)
        if scores:
            values = ", ".join(f"{name} {shown(name, value)}" for name, value in scores.items())
            say(f"Step {step}: training loss {means.get('loss', math.nan):.3f}; validation {values}")
        if means:
            self._bar.set_postfix_str(f"loss {means['loss']:.3f}", refresh=False)
        self.averages.reset()
        self._restart()

    def is_best(self, step: int, value: float, lower_is_better: bool) -> bool:
        """Whether this is the best score so far (of equals the later is better)."""
        better = self._best is None or (value <= self._best if lower_is_better else value >= self._best)
        if better:
            self._best = value
        return better

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"averages": self.averages.state(), "best": self._best}

    def close(self) -> None:
        """End of the updates."""
        self._bar.close()
        if self._file is not None:
            self._file.close()

    def _restart(self) -> None:
        self._samples, self._since = 0, time.perf_counter()


def settle(folder: Path, description: Mapping[str, Any], settings: Settings, resuming: bool) -> list[str]:
    """Write settings.json. When going on: say what changed, and refuse another task, model or set of labels."""
    path, notes = folder / SETTINGS_FILE, []
    now = json.loads(json.dumps({**description, **asdict(settings)}))
    if resuming and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in now if before.get(name) != now[name]]
        if fixed := [name for name in changed if name in description]:
            raise RunFolderError(
                f"{folder} holds another run ({', '.join(fixed)} differ, see {SETTINGS_FILE}). Choose another folder."
            )
        notes = [f"Changed since this run began: {name} {before.get(name)!r} -> {now[name]!r}" for name in changed]
    write_text(path, json.dumps(now, indent=2) + "\n")
    return notes


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shown(name: str, value: float) -> str:
    """A score for people: shares in per cent, losses as they are."""
    return f"{value:.3f}" if name == "loss" else f"{100 * value:.2f} %"


def describe_scores(results: Mapping[str, Any]) -> str:
    """One line per part."""
    return "\n".join(
        f"{name} ({scores['utterances']} utterances): "
        + ", ".join(f"{key} {shown(key, value)}" for key, value in scores.items() if key != "utterances")
        for name, scores in results["scores"].items()
    )


def say(message: str) -> None:
    """Print a line above the progress bar, from the first process only."""
    if PartialState().is_main_process:
        tqdm.write(message, file=sys.stderr)


__all__ = [
    "Reporter",
    "Settings",
    "Task",
    "describe_scores",
    "evaluate",
    "finetune",
    "read_rows",
    "say",
    "set_trainable",
]
