#!/usr/bin/env python
"""Accuracy of a language model of units on pairs: sWUGGY, sBLIMP, tSC.

    python examples/score_pairs.py MODEL PAIRS_CSV --units UNITS_JSONL --json scores.json

PAIRS_CSV has the columns positive and negative (the more probable sequence first), or ZeroSpeech's id, filename,
correct and voice. They name files of UNITS_JSONL, or, without --units, hold the units themselves: "17 203 5".
A pair counts as right where the positive sequence has the higher log-probability per unit (--no-normalize: in all);
ties count half, and pairs of one id (a word in several voices) are averaged first.

Where the model was trained on deduplicated units, those of the pairs are deduplicated too.
"""

import argparse
import csv
import io
import json
import sys
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from transformers import AutoModelForCausalLM, AutoTokenizer

from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path, user_path
from spidr_hf.system.files import write_text
from spidr_hf.system.messages import counted
from spidr_hf.system.processes import device_of
from spidr_hf.units.language_model import (
    Pair,
    collapses,
    read_pairs,
    score_pairs,
    text_to_units,
    trained_on,
    units_to_text,
)
from spidr_hf.units.unit_files import check_same_units, read_units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of a language model (train_unit_lm.py: OUT_DIR/final)")
    parser.add_argument("pairs", type=user_path, metavar="PAIRS_CSV")
    parser.add_argument(
        "--units",
        type=user_path,
        metavar="UNITS_JSONL",
        help="units of the files that the pairs name (default: the pairs hold units)",
    )
    parser.add_argument("--group", metavar="COLUMN", help="accuracy by this column, too")
    parser.add_argument("--no-normalize", action="store_true", help="log-probabilities of whole sequences")
    parser.add_argument("--device", help="for example cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--json", type=output_path, metavar="OUT", help="write accuracies there")
    parser.add_argument(
        "--scores", type=output_path, metavar="OUT", help="write the log-probabilities of each pair: .csv"
    )
    args = parser.parse_args()
    with clear_errors():
        device = device_of(args.device)
        if not args.pairs.is_file():
            raise ValueError(f"{args.pairs}: no such file of pairs.")
        if Path(args.model).exists() and not Path(args.model, "config.json").exists():
            raise ValueError(f"{args.model} is no model folder: there is no config.json in it.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            model = AutoModelForCausalLM.from_pretrained(args.model).to(device)
        except (OSError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise ValueError(f"The language model {args.model} cannot be loaded: {first_line}") from error
        if args.units:
            check_same_units(args.units, trained_on(args.model), "those that the language model was trained on")
        pairs = read_pairs(args.pairs, read_units(args.units) if args.units else None, args.group)
        if collapses(args.model):
            pairs = [Pair(shortened(p.positive), shortened(p.negative), p.name, p.group) for p in pairs]
        accuracy, both = score_pairs(model, tokenizer, pairs, normalize=not args.no_normalize)
        if args.scores:
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows([("positive", "negative"), *both])
            args.scores.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.scores, table.getvalue())
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.json, json.dumps({**accuracy, "pairs": len(pairs)}, indent=2) + "\n")
        for name, value in accuracy.items():
            print(f"{name}: {100 * value:.2f} %" + (f" of {counted(len(pairs), 'pair')}" if name == "accuracy" else ""))


def shortened(text: str) -> str:
    """The text of units without repeats."""
    return units_to_text(text_to_units(text), collapse=True)


if __name__ == "__main__":
    main()
