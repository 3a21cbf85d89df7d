#!/usr/bin/env python
"""Labels of utterances or of frames, and speaker embeddings.

    python examples/finetune_classification.py MODEL DATA OUT_DIR --task utterance --column emotion \\
        --valid DEV_DATA --labels labels.csv dev-labels.csv

    --task utterance   one label per utterance (keywords, emotions, languages, speakers): accuracy
    --task speaker     speaker embeddings, x-vectors trained with AM-softmax: equal error rate on all pairs of
                       validation utterances; --column defaults to speaker
    --task frame       the phone of every frame of 20 ms, from alignments: accuracy over frames, silence included

    OUT_DIR/final           the model with its feature extractor; of utterance labels for
                            pipeline("audio-classification", model=...)
    OUT_DIR/results.json    scores of the best step on the validation audio, and on what was held out
    OUT_DIR/metrics.jsonl   a row per logged step; curves.png draws them
    OUT_DIR/checkpoints     to resume from: the same command continues at the very next batch

Labels of utterances are a column of a table (.jsonl, .csv, .tsv, with a column fileid or id), or without --labels of
DATA itself. Phones are alignments (.jsonl, .TextGrid files or a folder of them, .ctm).

Probing as in SUPERB: --freeze-encoder --weighted-layer-sum trains the head alone, on a learned sum of the encoder's
input and every layer's output. These are the model's hidden states, after the residual, as SUPERB takes them from other
models, not the representations before it that units come from. layer_weights.png shows the weights.

Several GPUs: accelerate launch --multi_gpu --num_processes N examples/finetune_classification.py ... (on CPUs with
ACCELERATE_USE_CPU=true before it).
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)
    # On CPUs, threads that spin while they wait stall each other. It counts only before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from spidr_hf import SpidrForAudioFrameClassification, SpidrForSequenceClassification, SpidrForXVector
from spidr_hf.configuration_spidr import SAMPLING_RATE
from spidr_hf.data.labels import Labels, plain_label, read_phones
from spidr_hf.data.sources import AudioSource
from spidr_hf.finetuning.arguments import (
    add_finetuning_arguments,
    config_changes,
    describe_run,
    draw,
    load_for_finetuning,
    open_splits,
    settings_of,
)
from spidr_hf.finetuning.batches import Split
from spidr_hf.finetuning.classification import FrameTask, SpeakerTask, UtteranceTask, label_fields, layer_weights
from spidr_hf.finetuning.loop import finetune
from spidr_hf.finetuning.reporter import describe_scores
from spidr_hf.system.allocation import prepare_training_process
from spidr_hf.system.commands import HelpFormatter, clear_errors
from spidr_hf.system.processes import die_with_launcher, start_processes

TASKS = {
    "utterance": (UtteranceTask, SpidrForSequenceClassification),
    "speaker": (SpeakerTask, SpidrForXVector),
    "frame": (FrameTask, SpidrForAudioFrameClassification),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_finetuning_arguments(parser)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument(
        "--weighted-layer-sum", action="store_true", help="the head reads a learned sum of all layers' outputs"
    )
    args = parser.parse_args()
    die_with_launcher()
    with clear_errors("finetune", needs=["matplotlib"]):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Opens everything, trains, and prints the scores."""
    settings = settings_of(args)
    prepare_training_process()
    state = start_processes()
    if args.task != "frame" and not args.column:
        if args.task == "utterance":
            raise ValueError("--task utterance needs --column: which column has the labels.")
        args.column = "speaker"
    splits = open_splits(args, lambda data, source: read_labels(args, data, source))
    seen = splits[0].values.values()
    names = sorted(
        {phone for phones in seen for phone, _, _ in phones} if args.task == "frame" else set(map(str, seen))
    )
    if len(names) < 2:
        raise ValueError(f"There is one label only, {names[0]!r}: nothing can be learned.")
    task_class, model_class = TASKS[args.task]
    changes = config_changes(args) | {"use_weighted_layer_sum": args.weighted_layer_sum}
    model, feature_extractor = load_for_finetuning(model_class, args, changes | label_fields(names))
    description = describe_run(args, changes, task=args.task, names=names)
    max_samples = round(args.max_seconds * SAMPLING_RATE)
    task = task_class(model, feature_extractor, names, description, max_samples)
    made = [
        Split(split.name, split.source, split.indices, task.labels(split.source, split.values), split.values)
        for split in splits
    ]
    if args.task == "utterance" and (unknown := {task.name_of(i, made[1]) for i in made[1].indices} - set(names)):
        raise ValueError(f"The label {min(unknown)!r} of the validation audio does not occur in training.")
    results = finetune(task, made[0], made[1], made[2:], settings, args.out_dir, args.fresh)
    if results and state.is_main_process:
        weights = layer_weights(task.model)
        draw(args.out_dir, results, weights)
        print(f"Best step {results['best_step']} of {results['steps']}.\n{describe_scores(results)}")
        if weights:
            shares = ", ".join(f"{layer or 'input'} {weight:.3f}" for layer, weight in enumerate(weights))
            print(f"Weights of the layers: {shares}")
        print(args.out_dir / "final")


def read_labels(args: argparse.Namespace, data: str, source: AudioSource) -> dict[str, Any]:
    """The label of every utterance that has one, or its phones, by file id."""
    if args.task == "frame":
        return read_phones(args.labels, args.tier)
    return {
        fileid: plain_label(value) for fileid, value in Labels(args.labels, data, source).column(args.column).items()
    }


if __name__ == "__main__":
    main()
