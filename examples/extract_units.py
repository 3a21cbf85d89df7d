#!/usr/bin/env python
"""Units of speech: one integer per 20 ms, from the codebook predictions of a model's layers.

    python examples/extract_units.py MODEL DATA OUT_DIR --layers 6

    OUT_DIR/6/units.jsonl               {"file": "<fileid>", "units": [17, 17, 203, ...]}, a line per utterance
    OUT_DIR/6/units.provenance.json     model, layer, options, version
    OUT_DIR/skipped.jsonl               what could not be read, if anything

Layers are counted from 1; by default all that have a codebook (spidr-base: 5 to 12; the paper's units are those of
layer 6, or 5 for language models). Units are the argmax of the student's prediction, one per frame: repeats stay unless
--deduplicate, which also writes their durations in frames.

--kmeans FILE gives the nearest of k-means centroids (train_kmeans.py) instead.
--teacher gives the labels that teacher and codebooks assign, the targets of pretraining.

--layout discophon writes OUT_DIR/<layer>/units-<language>-<split>.jsonl; --layout fastabx calls the utterance "audio",
as Dataset.from_item_and_units(ITEM, "OUT_DIR/6/units.jsonl", 50) expects.

Several GPUs or processes: accelerate launch --multi_gpu --num_processes N examples/extract_units.py ...
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

from accelerate import PartialState

from spidr_hf import SpidrForAudioTokenization, SpidrForPretraining, SpidrModel
from spidr_hf.hub.loading import load_model
from spidr_hf.system.allocation import keep_freed_memory
from spidr_hf.system.commands import HelpFormatter, clear_errors, user_path
from spidr_hf.system.files import file_hash
from spidr_hf.system.processes import device_of, start_processes
from spidr_hf.units.arguments import FILE_KEYS, add_extraction_arguments, extract_to, layout_of
from spidr_hf.units.extractor import cluster_outputs, teacher_outputs, unit_layers, unit_outputs
from spidr_hf.units.kmeans import load_kmeans
from spidr_hf.units.stores import UnitStore
from spidr_hf.units.unit_files import describe_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_extraction_arguments(parser)
    parser.add_argument("--deduplicate", action="store_true", help="collapse repeats, and write their durations")
    parser.add_argument("--key", choices=FILE_KEYS, help="what the utterance is called in a line (default: file)")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of units")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--kmeans",
        type=user_path,
        metavar="FILE",
        help="k-means of train_kmeans.py (default: the model's own codebooks)",
    )
    what.add_argument("--teacher", action="store_true", help="labels of teacher and codebooks")
    parser.add_argument("--after-residual", action="store_true", help="with --kmeans of features after the residual")
    args = parser.parse_args()
    with clear_errors():
        layout = layout_of(args)
        keep_freed_memory()
        start_processes()
        kmeans = load_kmeans(args.kmeans) if args.kmeans else None
        model_class = SpidrForPretraining if args.teacher else SpidrForAudioTokenization
        model, feature_extractor = load_model(
            SpidrModel if kmeans else model_class,
            args.model,
            revision=args.revision,
            dtype=args.dtype,
            device=device_of(args.device),
        )
        kind: dict[str, object]
        if kmeans is not None:
            layers = [kmeans.check_layer(args.layers, after_residual=args.after_residual)]
            if PartialState().is_main_process and (other := kmeans.other_model(describe_model(model))):
                print(
                    f"{args.kmeans} was trained on features of {other}: of any other encoder its units mean nothing.",
                    file=sys.stderr,
                )
            outputs = cluster_outputs(model, layers[0], kmeans.centroids, before_residual=not args.after_residual)
            kind = {
                "kind": "k-means units",
                "num_units": len(kmeans.centroids),
                "before_residual": not args.after_residual,
                "kmeans": str(args.kmeans.resolve()),
                "kmeans_sha256": file_hash(args.kmeans),
            }
        elif args.after_residual:
            raise ValueError("--after-residual needs --kmeans: prediction heads read what they were trained on.")
        else:
            layers = unit_layers(model.config, args.layers)
            outputs = (teacher_outputs if args.teacher else unit_outputs)(model, layers)
            name = "teacher labels" if args.teacher else "codebook predictions"
            kind = {"kind": name, "num_units": model.config.codebook_size}
        form = {"collapse": args.deduplicate, "suffix": f".{args.format}"}
        extract_to(UnitStore, args, layout, model, feature_extractor, layers, outputs, kind, **form)


if __name__ == "__main__":
    main()
