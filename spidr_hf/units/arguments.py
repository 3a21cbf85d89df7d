"""What the commands in `examples/` share: arguments, opening models and data, and errors in one line."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from ..data.audio import resampler_name
from ..data.open import open_data
from ..data.sources import commonest
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..hub.loading import DTYPES
from ..system.commands import folder_path
from ..system.errors import NonFiniteError
from ..system.messages import counted
from .extraction_run import Shard, run_extraction
from .extractor import CONTEXT_SECONDS, WINDOW_SECONDS, Extractor, Outputs
from .stores import LAYOUTS, LENGTHS_FILE, Layout, Store
from .unit_files import FILE_KEYS, describe_model


def add_data_arguments(parser: argparse.ArgumentParser, out_dir: str, data: str = "") -> None:
    """What commands that run a model over audio have in common: MODEL DATA OUT_DIR, --resample, --revision.

    Args:
        out_dir: help of OUT_DIR.
        data: what DATA is for, where that needs to be said.
    """
    parser.add_argument("model", metavar="MODEL", help="model folder, name on the Hub, or published checkpoint")
    kinds = (
        "manifest (.csv, .jsonl, .parquet, .tsv), folder of audio files, .tar, or a data set: folder or "
        "name:config:split"
    )
    parser.add_argument("data", metavar="DATA", help=f"{data}: {kinds}" if data else kinds)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=folder_path, help=out_dir)
    parser.add_argument("--resample", action="store_true", help="take audio of any rate and number of channels")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: the main branch)")


def add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `extract_features.py` and `extract_units.py`."""
    add_data_arguments(parser, "where results go, a folder per layer")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="LAYER", help="layers, counted from 1 (default: all that there are)"
    )
    group = parser.add_argument_group("files")
    group.add_argument("--layout", choices=LAYOUTS, default="plain", help="names that other tools expect (see above)")
    group.add_argument("--language", help="ISO 639-3 code, for --layout discophon")
    group.add_argument("--split", help="name of the split, for --layout discophon")
    group.add_argument(
        "--overwrite", action="store_true", help="replace results of other options or other data in OUT_DIR"
    )
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--dtype",
        choices=["auto", *sorted(DTYPES)],
        default="float32",
        help="what the model computes in; auto: bfloat16 where the processor or GPU has it in hardware, which moves a "
        "few units",
    )
    group.add_argument("--device", help="for example cpu or cuda:1 (default: a GPU where there is one)")
    group.add_argument("--batch-seconds", type=float, help="audio per batch (default: 60; 600 on a GPU)")
    group.add_argument(
        "--window-seconds",
        type=float,
        default=WINDOW_SECONDS,
        help="longer recordings are computed in windows of about this length that overlap",
    )
    group.add_argument(
        "--context-seconds",
        type=float,
        default=CONTEXT_SECONDS,
        help="what is discarded beside every neighbouring window",
    )
    group.add_argument(
        "--shard",
        type=parse_shard,
        metavar="I/N",
        help="compute one of N parts (1/N to N/N, or 0/N to N-1/N), as several jobs; the last one writes the files. "
        "slurm: the part that SLURM_ARRAY_TASK_ID says (default: all of it)",
    )
    group.add_argument("--threads", type=int, default=2, help="files decoded at a time")


def parse_shard(text: str) -> Shard:
    """`i/n`, with i counted from 1 or from 0 (n/n is 0/n); or `slurm`, the task of a job array."""
    if text == "slurm":
        return _part_of_array()
    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        index, count = 0, 0
    if not (count > 0 and 0 <= index <= count):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: 1/8 to 8/8 are the parts of eight.")
    return Shard(index % count, count)


def _part_of_array() -> Shard:
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "COUNT", "MIN", "MAX", "STEP")]
    if names[0] not in os.environ or names[1] not in os.environ:
        raise argparse.ArgumentTypeError("slurm needs a job array: sbatch --array=1-8, for example, or give I/N.")
    try:
        task, count, first, last, step = (int(os.environ.get(name, "1")) for name in names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"SLURM's job array is none: {error}.") from error
    place, beside = divmod(task - first, max(1, step))
    # A task sees its own number, not those of the others.
    if beside or not 0 <= place < count or (names[3] in os.environ and (last - first) // max(1, step) + 1 != count):
        raise argparse.ArgumentTypeError(
            f"tasks of an array with gaps do not know which part is theirs: sbatch --array=1-{count} computes what is "
            "missing, whatever the array was before."
        )
    return Shard(place, count)


def layout_of(args: argparse.Namespace) -> Layout:
    """The layout that the arguments ask for."""
    return Layout(args.layout, args.language, args.split, getattr(args, "key", None))


def extract_to(
    store_class: type[Store],
    args: argparse.Namespace,
    layout: Layout,
    model: PreTrainedModel,
    feature_extractor: SpidrFeatureExtractor,
    layers: Sequence[int],
    outputs: Outputs,
    kind: Mapping[str, Any],
    **store_options: Any,
) -> None:
    """Run a model over DATA into OUT_DIR, as the arguments of `add_extraction_arguments` say, and print what was done.

    Args:
        layers, outputs: what is computed, and of which layers.
        kind: what that is, for the provenance.
        store_options: of `store_class` alone.
    """
    source = open_data(args.data, resample=args.resample, progress=PartialState().is_main_process)
    extractor = Extractor(
        model,
        feature_extractor,
        outputs,
        window=args.window_seconds,
        context=args.context_seconds,
        max_batch_seconds=args.batch_seconds,
    )
    provenance = {
        **describe_model(model),
        **kind,
        "data": str(Path(args.data).resolve()) if Path(args.data).exists() else args.data,
        "window_seconds": args.window_seconds,
        "context_seconds": args.context_seconds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "resample": args.resample or None,
        "resampler": resampler_name() if args.resample else None,
        "resampler_version": version("soxr") if args.resample else None,
    }
    fileids = [source.fileid(index) for index in range(len(source))]
    store = store_class(
        args.out_dir, layers, fileids, provenance, layout=layout, overwrite=args.overwrite, **store_options
    )
    if summary := run_extraction(source, extractor, store, threads=args.threads, shard=args.shard):
        report(summary)
        if store.other_data and summary.found:
            print(
                f"What was there before was made from {store.other_data}: the same names and lengths, so it was kept. "
                "If these are other recordings, give another OUT_DIR, or --overwrite.",
                file=sys.stderr,
            )
        if summary.not_finite:
            first = summary.not_finite[0]
            raise NonFiniteError(
                f"{counted(len(summary.not_finite), 'utterance')} without finite results skipped; the first, "
                f"{first.fileid}: {first.reason}"
            )


def report(summary: Any) -> None:
    """Prints what an extraction did, with what it skipped."""
    print(summary)
    if summary.skipped:
        how_many, first = commonest(summary.skipped)
        print(
            f"{counted(len(summary.skipped), 'file')} skipped (see skipped.jsonl); {how_many}the first, "
            f"{first.fileid}: {first.reason}",
            file=sys.stderr,
        )
    if summary.lengths:
        name, said, there = summary.lengths[0]
        print(
            f"{counted(len(summary.lengths), 'file', 'is', 'are')} not as long as DATA says (see {LENGTHS_FILE}); the "
            f"first, {name}: {there} samples instead of {said}. What is there was used; write the manifest anew.",
            file=sys.stderr,
        )
    for path in summary.files:
        print(f"  {path}")


__all__ = ["FILE_KEYS", "add_data_arguments", "add_extraction_arguments", "extract_to", "layout_of", "report"]
