"""Writes a model folder back in SpidR's own format, for tools built on it.

    python conversion/export_checkpoint.py facebook/spidr-base spidr_base.pt

OUTPUT.pt holds {"model": state_dict}; the configuration goes into config.json beside it. The tensors are those of the
folder bit for bit, and those of the checkpoint it was converted from.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.conversion"  # what relative imports start from (PEP 366)

import torch

from spidr_hf.system.commands import HelpFormatter, end, output_path
from spidr_hf.system.files import new_parents, publish, unfinished
from spidr_hf.system.messages import one_line, shown

from .errors import ConversionError, TensorMismatchError, writing
from .model_folder import load_folder
from .spidr_format import config_to_spidr, to_spidr
from .tensors import ALLOW_NON_FINITE, check_tensors, expected_tensors


def export(folder: str | os.PathLike, output: str | os.PathLike, *, allow_non_finite: bool = False) -> None:
    """Writes the pretraining model in `folder` as SpidR's checkpoint `output`, with its config.json beside it.

    Args:
        allow_non_finite: whether tensors may hold NaN or infinite numbers.

    Raises:
        ConversionError: the folder holds no pretraining model, or one that SpidR's format cannot hold; or files are in
            the way. Nothing has been written then.
    """
    output = Path(output)
    config, tensors = load_folder(folder, allow_non_finite=allow_non_finite)
    raw = config_to_spidr(config)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in expected_tensors(config).items()}
        check_tensors(tensors, shapes, what=shown(folder))
    except TensorMismatchError as error:
        if not any(name.startswith("teacher.") for name in tensors):
            raise ConversionError(
                f"{shown(folder)} holds no pretraining model (no teacher and codebooks), which SpidR's format needs."
            ) from error
        raise
    if output.is_dir():
        raise ConversionError(f"{shown(output)} is a folder. Give a file, such as {shown(output / 'checkpoint.pt')}.")
    text = json.dumps(raw, indent=1) + "\n"
    beside = output.parent / "config.json"
    if output.name == beside.name:
        raise ConversionError(f"{shown(output)} is where the configuration goes. Give the checkpoint another name.")
    kept = beside.is_file() and beside.read_bytes() == text.encode()
    for path, unchanged in ((output, False), (beside, kept)):
        if path.exists() and not unchanged:
            raise ConversionError(f"{shown(path)} exists already. Remove it or write somewhere else.")
    with writing(output), new_parents(output), unfinished(output) as tensor_file, unfinished(beside) as config_file:
        with tensor_file.open("wb") as file:  # by its name, PyTorch would write the temporary one into it
            torch.save({"model": to_spidr(tensors)}, file)
        config_file.write_text(text, encoding="utf-8")
        for partial in (tensor_file, config_file):
            publish(partial)
        if not kept:
            config_file.rename(beside)
        try:
            tensor_file.rename(output)
        except OSError:
            if not kept:
                beside.unlink()
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", help="a converted or trained pretraining model")
    parser.add_argument("output", type=output_path, metavar="OUTPUT.pt", help="the checkpoint to write")
    parser.add_argument("--allow-non-finite", action="store_true", help=ALLOW_NON_FINITE)
    options = parser.parse_args(arguments)
    try:
        export(options.folder, options.output, allow_non_finite=options.allow_non_finite)
    except (ConversionError, OSError, MemoryError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        end("Interrupted. The same command starts again.")
    print(f"Wrote {options.output} and {Path(options.output).parent / 'config.json'}.")
    return 0


__all__ = ["export", "main"]

if __name__ == "__main__":
    sys.exit(main())
