"""A kind of labels: the model that learns them, its batches, and how its predictions are scored."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from ..configuration_spidr import SAMPLING_RATE, frame_lengths
from ..data.sources import Skipped
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..modeling_spidr_heads import SpidrHeadModel
from ..system.messages import counted
from ..system.processes import gather_all
from .batches import LabelledBatch, LabelledBatches, NoAudioError, Split, evaluation_keys
from .reporter import say
from .settings import Settings


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
        self.left_out: set[str] = set()  # of evaluations so far, since it cannot be read

    def batches(self, split: Split, *, training: bool = False, seed: int = 0) -> LabelledBatches:
        """The batches of a split; cropped in training only."""
        return LabelledBatches(
            split,
            self.model.config,
            self.feature_extractor,
            max_samples=self.max_samples if training else None,
            frames=self.frames,
            seed=seed,
            replace=training,
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
    def score(self, predictions: Mapping[int, Any], split: Split) -> dict[str, float]:
        """Scores from predictions by utterance."""

    def save(self, folder: Path) -> None:
        """Write what the model folder holds, its card aside."""
        self.model.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)


def long_enough(split: Split, task: Task) -> Split:
    """The split without utterances that are too short for the head. Raises `ValueError` where none is left."""
    frames = frame_lengths(task.model.config, torch.from_numpy(split.source.num_samples[split.indices])).numpy()
    indices = split.indices[frames >= task.min_frames]
    if not len(indices):
        raise ValueError(f"There is no utterance for {split.name} that has {counted(task.min_frames, 'frame')}.")
    if len(indices) < len(split):
        fewer = counted(len(split) - len(indices), "utterance")
        say(f"{fewer} for {split.name} with fewer than {counted(task.min_frames, 'frame')}: left out.")
    return dataclasses.replace(split, indices=indices)


@torch.inference_mode()
def evaluate(task: Task, split: Split, settings: Settings, device: torch.device) -> dict[str, float]:
    """Scores of a split in float32, and its `loss`; the work is shared by all processes, the result the same on all."""
    processes = PartialState()
    model = task.model.eval()
    batches = task.batches(split)
    most = round(2 * settings.batch_seconds * SAMPLING_RATE)
    keys = list(evaluation_keys(split, most, processes.process_index, processes.num_processes))
    found: list[tuple[int, Any]] = []
    total = weight = 0.0
    skipped: list[Skipped] = []
    for key in tqdm(keys, desc=split.name, unit="batch", leave=False, disable=not processes.is_main_process):
        try:
            batch = batches[key]
        except NoAudioError as error:
            skipped += error.skipped
            continue
        skipped += batch.skipped
        output = model(**batch.to(device).inputs)
        found += zip(batch.utterances, task.predict(output, batch), strict=True)
        count = float(task.count(batch.labels))
        if count:
            total, weight = total + float(output.loss) * count, weight + count
    gathered = gather_all([(total, weight, found)])
    for entry in gather_all(skipped):
        if entry.fileid not in task.left_out:
            task.left_out.add(entry.fileid)
            say(f"{split.name}: left out, {entry.reason}")
    predictions = {index: value for _, _, items in gathered for index, value in items}
    if not predictions:
        raise ValueError(f"There is no utterance to evaluate on in {split.name}.")
    # In one order on any number of processes.
    predictions = {index: predictions[index] for index in sorted(predictions)}
    scores = task.score(predictions, split)
    weight = sum(entry[1] for entry in gathered)
    if weight:
        scores["loss"] = sum(entry[0] for entry in gathered) / weight
    return scores


__all__ = ["Task", "evaluate", "long_enough"]
