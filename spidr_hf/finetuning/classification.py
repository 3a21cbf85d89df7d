"""Labels of utterances, of frames, and speaker embeddings: tasks for `finetuning.finetune`, and how they are scored."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..configuration_spidr import frame_lengths, receptive_field
from ..data.alignments import Phones
from ..data.labels import frame_phones
from ..data.sources import AudioSource
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..modeling_spidr_heads import SpidrHeadModel
from .batches import NO_LABEL, LabelledBatch, Split
from .task import Task


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Fields of a model's config for these labels, numbered in this order."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: number for number, name in enumerate(names)},
        "num_labels": len(names),
    }


def equal_error_rate(scores: np.ndarray, same: np.ndarray) -> float:
    """
    Where as many pairs of one speaker are refused as pairs of two are accepted, between the two nearest thresholds.

    Args:
        scores: Similarity of each pair.
        same: Whether both are of one speaker (bool).
    """
    if not (same.any() and (~same).any()):
        raise ValueError("An equal error rate needs pairs of one speaker and pairs of two.")
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # pairs of one score are accepted together
    refused = 1 - np.cumsum(same[order])[last] / same.sum()
    accepted = np.cumsum(~same[order])[last] / (~same).sum()
    # Both ends: nothing is accepted, everything is.
    refused, accepted = np.append(1.0, refused), np.append(0.0, accepted)
    place = int(np.argmax(accepted >= refused))
    before, after = refused[place - 1] - accepted[place - 1], accepted[place] - refused[place]
    share = before / (before + after)
    return float(accepted[place - 1] + share * (accepted[place] - accepted[place - 1]))


class ClassificationTask(Task):
    """What the three have in common.

    Args:
        names: the labels, in the order of their numbers.
        max_samples: longer utterances are cropped in training.
    """

    metric = "accuracy"
    lower_is_better = False

    def __init__(
        self,
        model: SpidrHeadModel,
        feature_extractor: SpidrFeatureExtractor,
        names: Sequence[str],
        description: Mapping[str, Any],
        max_samples: int | None = None,
    ):
        super().__init__(model, feature_extractor, description)
        self.names, self.max_samples = list(names), max_samples
        self.numbers = {name: number for number, name in enumerate(names)}

    def labels(self, source: AudioSource, values: Mapping[int, Any]) -> Callable[[int], np.ndarray]:
        """Label numbers of an utterance of the source, by its index; -100 where training knows no such label.

        `values`: the labels themselves (phones, for frames), likewise.
        """
        return lambda index: np.array(self.numbers.get(str(values[index]), NO_LABEL))

    def count(self, labels: Tensor) -> int | Tensor:
        return (labels != NO_LABEL).sum()

    def example_labels(self, frames: int) -> Tensor:
        return torch.zeros(1, dtype=torch.int64)


class UtteranceTask(ClassificationTask):
    """One label per utterance."""

    def predict(self, output: Any, batch: LabelledBatch) -> list[int]:
        return output.logits.argmax(-1).tolist()

    def score(self, predictions: Mapping[int, int], split: Split) -> dict[str, float]:
        right = [self.names[number] == self.name_of(index, split) for index, number in predictions.items()]
        return {"accuracy": float(np.mean(right))}

    def name_of(self, index: int, split: Split) -> str:
        """The label of an utterance, by name."""
        return str(split.values[index])


class SpeakerTask(UtteranceTask):
    """Speaker embeddings (x-vectors); scored on all pairs of utterances, of speakers seen in training or not."""

    metric = "eer"
    lower_is_better = True

    @property
    def min_frames(self) -> int:  # type: ignore[override]  # set by the model here
        """Frames that the head's convolutions span."""
        config = self.model.config
        return 1 + sum((k - 1) * d for k, d in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))

    def predict(self, output: Any, batch: LabelledBatch) -> list[np.ndarray]:  # type: ignore[override]
        return list(torch.nn.functional.normalize(output.embeddings.float(), dim=-1).cpu().numpy())

    def score(  # type: ignore[override]
        self, predictions: Mapping[int, np.ndarray], split: Split
    ) -> dict[str, float]:
        embeddings = np.stack(list(predictions.values()))
        names = np.array([self.name_of(index, split) for index in predictions])
        first, second = np.triu_indices(len(names), k=1)
        similarities = (embeddings @ embeddings.T)[first, second]
        return {"eer": equal_error_rate(similarities, names[first] == names[second])}


class FrameTask(ClassificationTask):
    """The phone at the middle of each frame's window; frames without one do not count."""

    frames = True

    def labels(self, source: AudioSource, values: Mapping[int, Phones]) -> Callable[[int], np.ndarray]:
        config = self.model.config
        hop, window = config.inputs_to_logits_ratio, receptive_field(config)

        def numbers(index: int) -> np.ndarray:
            num_frames = int(frame_lengths(config, int(source.num_samples[index])))
            names = frame_phones(values[index], num_frames, hop, window)
            return np.array([self.numbers.get(name, NO_LABEL) for name in names], dtype=np.int64)

        return numbers

    def example_labels(self, frames: int) -> Tensor:
        return torch.zeros(1, frames, dtype=torch.int64)

    def predict(self, output: Any, batch: LabelledBatch) -> list[tuple[int, int]]:
        labels = batch.labels.to(output.logits.device)
        counted = labels != NO_LABEL
        right = ((output.logits.argmax(-1) == labels) & counted).sum(1)
        return list(zip(right.tolist(), counted.sum(1).tolist(), strict=True))

    def score(self, predictions: Mapping[int, tuple[int, int]], split: Split) -> dict[str, float]:
        right, counted = np.array(list(predictions.values())).sum(0)
        if not counted:
            raise ValueError(f"No frame of {split.name} has a label that training knows.")
        return {"accuracy": float(right / counted)}


def layer_weights(model: SpidrHeadModel) -> list[float] | None:
    """Shares of the encoder's input and of every layer's output in the learned sum; None where there is none."""
    if not hasattr(model, "layer_weights"):
        return None
    return model.layer_weights.detach().float().softmax(-1).tolist()


__all__ = [
    "ClassificationTask",
    "FrameTask",
    "SpeakerTask",
    "UtteranceTask",
    "equal_error_rate",
    "label_fields",
    "layer_weights",
]
