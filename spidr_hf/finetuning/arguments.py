"""What the commands `examples/finetune_*.py` share: arguments, opening model and data, choosing utterances."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState

from ..configuration_spidr import SpidrConfig
from ..data.labels import Labels, held_out, parse_hold_out
from ..data.open import open_data
from ..data.sources import AudioSource
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..hub.loading import load_feature_extractor, loading
from ..modeling_spidr_heads import SpidrHeadModel
from ..system.messages import counted
from ..system.names import find_names
from ..training.metrics import read_rows
from ..units.arguments import add_data_arguments
from .reporter import say
from .settings import Settings


def add_finetuning_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both commands."""
    add_data_arguments(parser, "the run's folder", data="audio to train on")
    parser.add_argument("--valid", required=True, metavar="DATA", help="audio to choose the best step by")
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[],
        metavar="FILE",
        help="where the labels are (see above); for training, validation and held-out audio together",
    )
    parser.add_argument("--column", help="column of the labels (default: see above)")
    parser.add_argument(
        "--tier",
        help="tier of TextGrids that has the phones (default: the one with phones in its name, or the only one)",
    )
    parser.add_argument(
        "--hold-out",
        metavar="COLUMN=VALUE",
        help="keep utterances with this value (speaker=slt) out of training and validation, and score those of --valid "
        "by themselves at the end; the column is one of --labels (give a table beside TextGrids) or of DATA",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--random-encoder",
        action="store_true",
        help="begin with random weights instead of MODEL's: what the head reaches without pretraining",
    )
    group.add_argument("--dropout", type=float, help="of layers, attention and head (default: the model's own)")
    group.add_argument("--mask-time-prob", type=float, default=0.05, help="SpecAugment over time")
    group.add_argument("--mask-time-length", type=int, default=10, help="frames of a span")
    group.add_argument("--mask-feature-prob", type=float, default=0.0, help="over channels")
    group.add_argument("--mask-feature-length", type=int, default=10, help="channels of a span")
    group = parser.add_argument_group("training")
    default = Settings()
    group.add_argument("--steps", type=int, default=default.steps, help="updates")
    group.add_argument("--lr", type=float, default=default.lr, help="the encoder's peak rate")
    group.add_argument("--head-lr", type=float, default=default.head_lr, help="the head's")
    group.add_argument("--warmup", type=float, default=default.warmup, help="share of the steps")
    group.add_argument(
        "--hold", type=float, default=default.hold, help="share of the steps at the peak; the rest decays"
    )
    group.add_argument(
        "--freeze-encoder-steps",
        type=int,
        default=default.freeze_encoder_steps,
        metavar="N",
        help="updates at first in which only the head trains",
    )
    group.add_argument("--freeze-encoder", action="store_true", help="only the head trains, to the end (probing)")
    group.add_argument("--train-extractor", action="store_true", help="the convolutional extractor trains, too")
    group.add_argument("--batch-seconds", type=float, default=default.batch_seconds, help="audio per batch")
    group.add_argument("--accumulation", type=int, default=1, help="batches per update")
    group.add_argument("--max-seconds", type=float, default=30.0, help="longest utterance")
    group.add_argument("--weight-decay", type=float, default=default.weight_decay)
    group.add_argument("--max-norm", type=float, default=default.max_norm, help="of the gradient")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), default=default.dtype, help="of training")
    group.add_argument("--eval-interval", type=int, default=default.eval_interval)
    group.add_argument("--log-interval", type=int, default=default.log_interval)
    group.add_argument("--num-workers", type=int, default=default.num_workers, help="that decode audio")
    group.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin anew; what OUT_DIR has of an earlier run goes to OUT_DIR/earlier-1",
    )


def settings_of(args: argparse.Namespace) -> Settings:
    """The training settings among the arguments. Raises `ValueError` for impossible ones."""
    return Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})


def config_changes(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of the model's config that the arguments set."""
    changes: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("mask_time_prob", "mask_time_length", "mask_feature_prob", "mask_feature_length")
    }
    if args.dropout is not None:
        changes |= dict.fromkeys(("hidden_dropout", "attention_dropout", "final_dropout"), args.dropout)
    return changes


def load_for_finetuning(
    model_class: type[SpidrHeadModel], args: argparse.Namespace, changes: Mapping[str, Any]
) -> tuple[SpidrHeadModel, SpidrFeatureExtractor]:
    """MODEL with a new head (the same on every process), and its feature extractor.

    Raises `ValueError` for what is no SpidR or DinoSR model, and for one whose encoder is not complete.
    """
    name = args.model
    torch.manual_seed(args.seed)
    with loading(name, args.revision) as place:
        extractor = load_feature_extractor(place, revision=args.revision)
        if args.random_encoder:
            config = SpidrConfig.from_pretrained(place, revision=args.revision, **changes)
            return model_class(config), extractor
        model, found = model_class.from_pretrained(
            place, revision=args.revision, dtype=torch.float32, output_loading_info=True, **changes
        )
    if missing := sorted(key for key in found["missing_keys"] if key.startswith("spidr.")):
        raise ValueError(f"{name} lacks weights of the encoder, for example {missing[0]}: it is not the whole of one.")
    return model, extractor


class Labelled(NamedTuple):
    """Utterances of a source that have labels, and the label of each by its index."""

    name: str
    source: AudioSource
    values: dict[int, Any]

    @property
    def indices(self) -> np.ndarray:
        """Which utterances they are (int64)."""
        return np.array(list(self.values), dtype=np.int64)


def open_splits(args: argparse.Namespace, read: Callable[[str, AudioSource], Mapping[str, Any]]) -> list[Labelled]:
    """Training, validation and, where there is one, what is held out of it.

    Args:
        read: labels by file id that belong to DATA (its name, and opened).
    """
    splits: list[Labelled] = []
    for name, data in (("training", args.data), ("validation", args.valid)):
        source = open_data(data, resample=args.resample, progress=PartialState().is_main_process)
        labels = read(data, source)
        kept, away = without_held_out(source, args.labels, data, args.hold_out)
        splits.append(Labelled(name, source, labelled(source, kept, labels, name)))
        if args.hold_out and name == "validation":
            values = labelled(source, away, labels, "the held-out test")
            splits.append(Labelled(f"held out, {args.hold_out}", source, values))
    return splits


def describe_run(args: argparse.Namespace, config: Mapping[str, Any], **particular: Any) -> dict[str, Any]:
    """What the run is about (`Task.description`): of every command, and what is `particular` to one."""
    common = {"model": args.model, "random_encoder": args.random_encoder, "hold_out": args.hold_out}
    return {**common, **particular, "config": config}


def without_held_out(
    source: AudioSource, files: Sequence[str], data: str, hold_out: str | None
) -> tuple[list[int], list[int]]:
    """Indices of the utterances that are not held out, and of those that are (by label files, or DATA's own column)."""
    if hold_out is None:
        return list(range(len(source))), []
    column, value = parse_hold_out(hold_out)
    labels = Labels(files, data, source)
    away = held_out(labels, column, value)
    known = own_labels(source, {fileid: fileid for fileid in labels.column(column)})
    if len(known) < len(source):
        say(f"{counted(len(source) - len(known), 'utterance', of=len(source))} without {column}: not held out.")
    kept = [index for index in range(len(source)) if known.get(index) not in away]
    return kept, [index for index in range(len(source)) if known.get(index) in away]


def own_labels(source: AudioSource, labels: Mapping[str, Any]) -> dict[int, Any]:
    """The label of each utterance that has one, by its index; ids match as those of alignments do (`find_names`)."""
    found = find_names([source.fileid(index) for index in range(len(source))], labels)
    return {index: labels[known[0]] for index, known in enumerate(found.values()) if len(known) == 1}


def labelled(source: AudioSource, indices: Sequence[int], labels: Mapping[str, Any], what: str) -> dict[int, Any]:
    """The labels of those of the utterances that have one; says how many have none.

    Raises `ValueError` where none has.
    """
    known = own_labels(source, labels)
    found = {index: known[index] for index in indices if index in known}
    if indices and not found:
        raise ValueError(
            f"{counted(0, 'utterance', of=len(indices))} for {what} has labels: are the file ids the same? One "
            f"of the audio is {source.fileid(indices[0])!r}, one of the labels {next(iter(labels), '(none)')!r}."
        )
    if len(found) < len(indices):
        say(f"{counted(len(indices) - len(found), 'utterance')} for {what} without labels: left out.")
    return found


def draw(folder: Path, results: Mapping[str, Any], weights: Sequence[float] | None = None) -> None:
    """Draw curves.png and, for a learned sum over layers, layer_weights.png."""
    from ..plots.figures import save_figure
    from .plots import curves_figure, layer_weights_figure

    save_figure(curves_figure(read_rows(folder / "metrics.jsonl"), results["best_step"]), folder / "curves.png")
    if weights:
        save_figure(layer_weights_figure(weights), folder / "layer_weights.png")


__all__ = [
    "Labelled",
    "add_finetuning_arguments",
    "config_changes",
    "describe_run",
    "draw",
    "load_for_finetuning",
    "open_splits",
    "own_labels",
    "settings_of",
]
