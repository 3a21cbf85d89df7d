#!/usr/bin/env python
"""Validate the checkpoints of a pretraining run, in a process of its own: training does not stop for it.

    python examples/validate.py --run-dir runs/spidr-base            # the checkpoints there are
    python examples/validate.py --run-dir runs/spidr-base --watch    # and those to come, until the run has finished

The data sets are those of the run's config, each with the fields of [data]:

    [validation.dev-clean]
    manifest = "dev-clean.csv"
    alignments_path = "dev-clean-alignments.jsonl"    # phones, if known

or, for a run without them: --data DATA [--alignments FILE].

Every checkpoint and data set gives a row of RUN_DIR/validation.jsonl: loss, perplexities of targets and predictions,
overall and per codebook, on the same masked frames for every checkpoint; with alignments also purity and PNMI of the
units of each codebook's layer (with and without silence). The curves go to the run's tracker too (TensorBoard shows
them beside training's), and to RUN_DIR/validation.png.

RUN_DIR/best is the model of the best checkpoint so far, by the score that --select names: loss, or with alignments
per (phone errors of the units read as phones), f1, r_val, pnmi and the others of a row; of a score with a value for
every layer the best layer's counts. It stays when `run.keep_latest` deletes the checkpoint.

Start it before, beside or after training, on another machine or in another job that sees the folder; stop it at any
time. Started again it continues with what is missing. A checkpoint that `run.keep_latest` deletes meanwhile is passed
over. With --watch it waits for a run that has not begun yet, and for one that was interrupted.
"""

import argparse
import logging
import sys
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import torch

from spidr_hf.pretraining.validation_run import RunFollower
from spidr_hf.system.commands import HelpFormatter, clear_errors, user_path
from spidr_hf.system.processes import device_of
from spidr_hf.training.schedules import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--run-dir", type=user_path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--watch", action="store_true", help="continue until the run has finished")
    parser.add_argument("--poll", type=float, default=30, metavar="SECONDS", help="how often to look")
    parser.add_argument("--data", metavar="DATA", help="validate on this (default: the config's data sets)")
    parser.add_argument("--alignments", metavar="FILE", help="phones of --data (see evaluate_units.py)")
    parser.add_argument(
        "--select",
        default="loss",
        metavar="SCORE",
        help="what best/ is chosen by, SCORE or DATASET/SCORE (default: loss)",
    )
    parser.add_argument("--device", help="for example cpu or cuda:1 (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="precision (default: the run's)")
    args = parser.parse_args()
    if args.alignments and not args.data:
        parser.error("--alignments are those of --data: give both, or put alignments_path into the run's config.")
    if args.poll <= 0:
        parser.error("--poll must be positive.")
    logging.basicConfig(format="%(message)s")
    with clear_errors():
        follower = RunFollower(
            args.run_dir,
            data=(args.data, args.alignments) if args.data else None,
            device=device_of(args.device),
            dtype=args.dtype,
            select=args.select,
            wait=args.poll if args.watch else None,
        )
        try:
            if args.watch:
                follower.follow(args.poll)
            elif not follower.catch_up():
                print(f"Nothing to do: {follower.state()}")
        except torch.OutOfMemoryError:
            sys.exit("error: the device's memory is full: lower max_batch_length in [validation.<name>].")
        finally:
            follower.close()


if __name__ == "__main__":
    main()
