#!/usr/bin/env python
"""Speech recognition by CTC, on characters or phones.

    python examples/finetune_ctc.py MODEL DATA OUT_DIR --units phones \\
        --valid DEV_DATA --labels alignments.jsonl dev-alignments.jsonl

    OUT_DIR/final           the model with its processor, for pipeline("automatic-speech-recognition", model=...)
    OUT_DIR/results.json    error rates of the best step on the validation audio, and on what was held out
    OUT_DIR/metrics.jsonl   a row per logged step; curves.png draws them
    OUT_DIR/checkpoints     to resume from: the same command continues at the very next batch

Labels. For phones: alignments (.jsonl, .TextGrid files or a folder of them, .ctm), whose silences are left out, or a
table with phones between spaces. For characters: a table (.jsonl, .csv, .tsv) with a column fileid (or id) and one of
texts. Without --labels, DATA's own column (--column, default: text for characters, phones for phones). Texts are
lower-cased and freed of punctuation (--keep-text: as they are).

The convolutional extractor stays as it was pretrained (--train-extractor: it trains), SpecAugment masks frames, the
learning rate rises, holds and falls. --ngram decodes the best step with a language model as well (ARPA or KenLM, over
words, or over phones), where pyctcdecode and kenlm are installed.

Several GPUs: accelerate launch --multi_gpu --num_processes N examples/finetune_ctc.py ... (on CPUs with
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

from transformers import Wav2Vec2Processor

from spidr_hf import SpidrForCTC
from spidr_hf.configuration_spidr import SAMPLING_RATE
from spidr_hf.data.labels import Labels, plain_label, read_phones, spoken_phones, without_silence
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
from spidr_hf.finetuning.ctc import (
    UNITS,
    CTCTask,
    NgramDecoder,
    blank_share,
    check_ngram,
    expect_blanks,
    make_tokenizer,
    normalize_text,
    usable,
)
from spidr_hf.finetuning.loop import finetune
from spidr_hf.finetuning.reporter import describe_scores, say
from spidr_hf.finetuning.task import evaluate
from spidr_hf.system.allocation import prepare_training_process
from spidr_hf.system.commands import HelpFormatter, clear_errors
from spidr_hf.system.messages import counted
from spidr_hf.system.processes import die_with_launcher, start_processes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_finetuning_arguments(parser)
    parser.add_argument("--units", choices=UNITS, default="characters")
    parser.add_argument("--keep-text", action="store_true", help="do not touch case and punctuation")
    group = parser.add_argument_group("decoding with a language model")
    group.add_argument("--ngram", metavar="FILE", help="ARPA or KenLM file")
    group.add_argument("--alpha", type=float, default=0.5, help="weight of the language model")
    group.add_argument("--beta", type=float, default=1.5, help="score of each word or phone")
    group.add_argument("--beam-width", type=int, default=100)
    args = parser.parse_args()
    die_with_launcher()
    with clear_errors("finetune", needs=["jiwer", "matplotlib"]):
        run(args)


def run(args: argparse.Namespace) -> None:
    """Opens everything, trains, and prints the error rates."""
    settings = settings_of(args)
    if args.ngram:
        check_ngram(args.ngram)
    prepare_training_process()
    state = start_processes()
    splits = open_splits(args, lambda data, source: read_targets(args, data, source))
    tokenizer = make_tokenizer(args.units, splits[0].values.values())
    changes = config_changes(args) | {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": None,
        "ctc_loss_reduction": "mean",
        "ctc_zero_infinity": True,
    }
    model, feature_extractor = load_for_finetuning(SpidrForCTC, args, changes)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    description = describe_run(args, changes, task="ctc", units=args.units, tokens=tokens)
    task = CTCTask(model, Wav2Vec2Processor(feature_extractor, tokenizer), args.units, description)
    made: list[Split] = []
    for split in splits:
        name, source, targets = split
        labels = task.labels(targets)
        indices, left_out = usable(source, split.indices, model.config, labels, round(args.max_seconds * SAMPLING_RATE))
        for reason, count in left_out.items():
            say(f"{counted(count, 'utterance')} for {name} {reason}: left out.")
        if not len(indices):
            raise ValueError(f"No utterance is left for {name}.")
        made.append(Split(name, source, indices, labels, targets))
    expect_blanks(model, blank_share(made[0], model.config))
    # The language model is opened first: what is missing should be known before hours of training.
    ngram = None
    if args.ngram:
        ngram = NgramDecoder(tokenizer, args.ngram, alpha=args.alpha, beta=args.beta, beam_width=args.beam_width)
    results = finetune(task, made[0], made[1], made[2:], settings, args.out_dir, args.fresh)
    if not results:
        return
    lines = [f"Best step {results['best_step']} of {results['steps']}.", describe_scores(results)]
    if ngram:
        task.decode = ngram
        decoded: dict[str, Any] = {"scores": {}}
        for split in made[1:]:
            scores = evaluate(task, split, settings, state.device)
            decoded["scores"][f"{split.name}, {args.ngram}"] = {"utterances": len(split), **scores}
        lines.append(describe_scores(decoded))
    if state.is_main_process:
        draw(args.out_dir, results)
        print("\n".join(lines) + f"\n{args.out_dir / 'final'}")


def read_targets(args: argparse.Namespace, data: str, source: AudioSource) -> dict[str, str]:
    """Text, or phones between spaces, of every utterance with labels, by file id."""
    tables = args.labels and all(str(file).lower().endswith((".csv", ".tsv")) for file in args.labels)
    if args.units == "phones" and args.labels and not tables and args.column is None:
        phones = read_phones(args.labels, args.tier)
        return {fileid: " ".join(without_silence(entry)) for fileid, entry in phones.items()}
    column = args.column or ("phones" if args.units == "phones" else "text")
    values = Labels(args.labels, data, source).column(column)
    if args.units == "phones":
        return {fileid: spoken_phones(value) for fileid, value in values.items()}
    values = {fileid: plain_label(value) for fileid, value in values.items()}
    return values if args.keep_text else {fileid: normalize_text(value) for fileid, value in values.items()}


if __name__ == "__main__":
    main()
