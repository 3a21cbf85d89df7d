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
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..modeling_spidr_heads import SpidrHeadModel
from ..system.errors import AudioError
from ..system.processes import gather_all
from .batches import LabelledBatch, LabelledBatches, Part, evaluation_keys
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

    def batches(self, part: Part, *, training: bool = False, seed: int = 0) -> LabelledBatches:
        """The batches of a part; cropped in training only."""
        return LabelledBatches(
            part,
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
    def score(self, predictions: Mapping[int, Any], part: Part) -> dict[str, float]:
        """Scores from predictions by utterance."""

    def save(self, folder: Path) -> None:
        """Write what the model folder holds, its card aside."""
        self.model.save_pretrained(folder)
        self.feature_extractor.save_pretrained(folder)


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
        try:
            batch = batches[key]
        except AudioError as error:  # nothing of it can be read; what is missing of others is left out likewise
            say(f"{part.name}: {error}")
            continue
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


__all__ = ["Task", "evaluate", "long_enough"]
