#!/usr/bin/env python
"""Features of speech: the representations of a model's layers, one file per utterance and layer.

    python examples/extract_features.py MODEL DATA OUT_DIR --layers 6

    OUT_DIR/6/<fileid>.pt                   float32 tensor, frames (20 ms) x hidden size
    OUT_DIR/6/features.provenance.json      model, options, version
    OUT_DIR/skipped.jsonl                   what could not be read, if anything

Layers are counted from 1 and taken before the residual, as in SpidR's papers and benchmarks (--after-residual: the
layer's full output; the two differ by about 100 %). Layers above the highest asked for are not computed.

--predictions writes what the layers' codebook heads predict, the probability of every codeword, instead.

--layout discophon writes OUT_DIR/<layer>/<language>/<split>/<stem>.pt. fastabx reads the plain layout:
Dataset.from_item(ITEM, "OUT_DIR/6", frequency=50).

Several GPUs or processes: accelerate launch --multi_gpu --num_processes N examples/extract_features.py ...
(on CPUs with ACCELERATE_USE_CPU=true before it). Started again after an interruption, the same command resumes.
As several jobs: --shard 1/8 to --shard 8/8, or a SLURM job array (examples/slurm/extract.sbatch).

A recording of more than --window-seconds is computed in overlapping windows, of which --context-seconds beside every
neighbour are discarded; it is standardised whole.
"""

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf import SpidrForAudioTokenization, SpidrModel
from spidr_hf.hub.loading import load_model
from spidr_hf.system.allocation import keep_freed_memory
from spidr_hf.system.commands import HelpFormatter, clear_errors
from spidr_hf.system.processes import device_of, start_processes
from spidr_hf.units.arguments import add_extraction_arguments, extract_to, layout_of
from spidr_hf.units.extractor import check_layers, feature_outputs, prediction_outputs, unit_layers
from spidr_hf.units.stores import FeatureStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_extraction_arguments(parser)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--after-residual", action="store_true", help="the layers' full outputs")
    what.add_argument("--predictions", action="store_true", help="probabilities of codewords (frames x codewords)")
    parser.add_argument("--format", choices=("pt", "npy"), default="pt", help="torch or numpy files")
    args = parser.parse_args()
    with clear_errors():
        layout = layout_of(args)
        keep_freed_memory()
        start_processes()
        model, feature_extractor = load_model(
            SpidrForAudioTokenization if args.predictions else SpidrModel,
            args.model,
            revision=args.revision,
            dtype=args.dtype,
            device=device_of(args.device),
        )
        if args.predictions:
            layers = unit_layers(model.config, args.layers)
            outputs, kind = prediction_outputs(model, layers), {"kind": "codebook probabilities"}
        else:
            last = model.config.num_hidden_layers
            layers = check_layers(args.layers or range(1, last + 1), 1, last, "representation")
            outputs = feature_outputs(model, layers, before_residual=not args.after_residual)
            kind = {"kind": "features", "before_residual": not args.after_residual}
        suffix = f".{args.format}"
        extract_to(FeatureStore, args, layout, model, feature_extractor, layers, outputs, kind, suffix=suffix)


if __name__ == "__main__":
    main()
