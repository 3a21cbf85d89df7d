"""What the commands in `examples/` share: arguments, opening models and data, and errors in one line."""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..data.dataset_source import open_data
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..modeling_spidr import SpidrConfig, SpidrPreTrainedModel
from ..training.run_state import RunFolderError
from .extraction_run import run_extraction
from .extractor import CONTEXT_SECONDS, WINDOW_SECONDS, Extractor, Outputs
from .stores import LAYOUTS, Layout, Store
from .unit_files import FILE_KEYS, describe_model, provenance_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def clear_errors(extra: str = "eval") -> Iterator[None]:
    """Ends the command with one line and a non-zero status on bad input, a full disk, or Ctrl-C.

    Where a module is missing, the line names the pip extra that brings it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. The extra {extra} brings what this command needs: pip install 'spidr_hf[{extra}]'.")
    except (ValueError, OSError, RunFolderError, SafetensorError) as error:  # a full disk is safetensors' own error
        # Of several processes that stumble over the same thing one speaks.
        if int(os.environ.get("RANK", "0")):
            sys.exit(1)
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.OutOfMemoryError:
        sys.exit("error: the device's memory is full: lower --batch-seconds (or --batch-size), and start again.")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here.")
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def add_data_arguments(parser: argparse.ArgumentParser, out_dir: str, data: str = "") -> None:
    """What commands that run a model over audio have in common: MODEL DATA OUT_DIR, --resample, --revision.

    Args:
        out_dir: help of OUT_DIR.
        data: what DATA is for, where that needs to be said.
    """
    parser.add_argument("model", metavar="MODEL", help="model folder, or a name on the Hub")
    kinds = "manifest (.csv, .jsonl, .tsv), folder of audio files, .tar, or a data set: folder or name:config:split"
    parser.add_argument("data", metavar="DATA", help=f"{data}: {kinds}" if data else kinds)
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help=out_dir)
    parser.add_argument("--resample", action="store_true", help="take audio of any rate and number of channels")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")


def add_extraction_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `extract_features.py` and `extract_units.py`."""
    add_data_arguments(parser, "where results go, a folder per layer")
    parser.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="layers, counted from 1")
    group = parser.add_argument_group("files")
    group.add_argument("--layout", choices=LAYOUTS, default="plain", help="names that other tools expect (see above)")
    group.add_argument("--language", help="ISO 639-3 code, for --layout discophon")
    group.add_argument("--split", help="name of the split, for --layout discophon")
    group.add_argument(
        "--overwrite", action="store_true", help="replace results of other options or other data in OUT_DIR"
    )
    group = parser.add_argument_group("computing")
    group.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="what the model computes in")
    group.add_argument("--device", help="for example cpu or cuda:1 (default: a GPU where there is one)")
    group.add_argument("--batch-seconds", type=float, help="audio per batch (default: 60; 600 on a GPU)")
    group.add_argument(
        "--window-seconds",
        type=float,
        default=WINDOW_SECONDS,
        help="longer recordings are computed in windows of about this length that overlap (default: %(default)g)",
    )
    group.add_argument(
        "--context-seconds",
        type=float,
        default=CONTEXT_SECONDS,
        help="what is discarded beside every neighbouring window (default: %(default)g)",
    )
    group.add_argument("--threads", type=int, default=2, help="files decoded at a time (default: %(default)s)")


def layout_of(args: argparse.Namespace) -> Layout:
    """The layout that the arguments ask for."""
    return Layout(args.layout, args.language, args.split, getattr(args, "key", None))


def start_processes() -> PartialState:
    """The processes of `accelerate launch`, or this one alone. They wait for each other for as long as it takes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState()
    # Without being told, PartialState would start several lone processes on a machine without a GPU.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def device_of(name: str | None) -> torch.device:
    """The device of that name; without one, this process's."""
    try:
        return PartialState().device if name is None else torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device: cpu, cuda or cuda:1, for example.") from error


@contextmanager
def loading(name: str, revision: str | None = None) -> Iterator[None]:
    """Around a `from_pretrained`: what goes wrong becomes a `ValueError` of one line, as what is no such model does.

    Args:
        name, revision: MODEL, as the command got it.
    """
    if name.endswith((".pt", ".ckpt")) and Path(name).is_file():
        raise ValueError(
            f"{name} is a checkpoint of the original code: convert it with conversion/convert_checkpoint.py."
        )
    if (Path(name).exists() or name.startswith((".", "/", "~"))) and not Path(name, "config.json").exists():
        raise ValueError(f"{name} is no model folder: there is no config.json in it.")
    try:
        config_type = SpidrConfig.get_config_dict(name, revision=revision)[0].get("model_type")
        if config_type != SpidrConfig.model_type:
            raise ValueError(f"{name} holds a model of type {config_type}, not {SpidrConfig.model_type}.")
        yield
    except (OSError, HFValidationError, HfHubHTTPError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(f"The model {name} cannot be loaded: {first_line}") from error


def load_model(
    model_class: type[SpidrPreTrainedModel],
    name: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, SpidrFeatureExtractor]:
    """Model in eval mode and its feature extractor.

    Raises `ValueError` for what is no SpidR or DinoSR model, and for one without the weights that the class needs.
    """
    with loading(name, revision):
        model, found = model_class.from_pretrained(
            name, revision=revision, dtype=DTYPES[dtype], output_loading_info=True
        )
        extractor = SpidrFeatureExtractor.from_pretrained(name, revision=revision)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name} lacks weights that {model_class.__name__} needs, for example {missing[0]}: it is not a "
            "pretraining checkpoint, or not the whole of one."
        )
    return model.to(device).eval(), extractor


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
        "dtype": args.dtype,
        "resample": args.resample or None,
    }
    fileids = [source.fileid(index) for index in range(len(source))]
    store = store_class(
        args.out_dir, layers, fileids, provenance, layout=layout, overwrite=args.overwrite, **store_options
    )
    if summary := run_extraction(source, extractor, store, threads=args.threads):
        report(summary)


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unit_files(path: Path) -> dict[int | None, Path]:
    """The units file, under None; or those of a folder with one per layer, by layer."""
    if path.is_file():
        return {None: path}
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of units (`examples/extract_units.py` makes them).")
    files: dict[int | None, Path] = {}
    for folder in sorted((p for p in path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)):
        found = sorted(folder.glob("units*.jsonl"))
        if len(found) > 1:
            raise ValueError(f"{folder} holds {len(found)} files of units: give one of them.")
        if found:
            files[int(folder.name)] = found[0]
    if not files:
        raise ValueError(f"{path}: no units in this folder; expected <layer>/units.jsonl.")
    return files


def known_units(path: Path) -> int | None:
    """How many units there can be, by the provenance beside a units file."""
    try:
        return json.loads(provenance_path(path).read_text(encoding="utf-8")).get("num_units")
    except (OSError, ValueError):
        return None


def report(summary: Any) -> None:
    """Prints what an extraction did, with what it skipped."""
    print(summary)
    if summary.skipped:
        first = summary.skipped[0]
        print(
            f"{len(summary.skipped)} files skipped (see skipped.jsonl); the first, {first.fileid}: {first.reason}",
            file=sys.stderr,
        )
    for path in summary.files:
        print(f"  {path}")


__all__ = [
    "DTYPES",
    "FILE_KEYS",
    "add_data_arguments",
    "add_extraction_arguments",
    "clear_errors",
    "device_of",
    "extract_to",
    "file_hash",
    "known_units",
    "layout_of",
    "load_model",
    "loading",
    "report",
    "start_processes",
    "unit_files",
]
