"""Writes a model folder back in SpidR's own format, for tools built on it.

    python conversion/export_checkpoint.py facebook/spidr-base spidr_base.pt

OUTPUT.pt holds {"model": state_dict}; the configuration goes into config.json beside it. The tensors are those of the
folder bit for bit, and those of the checkpoint it was converted from.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.conversion"  # what relative imports start from (PEP 366)

import torch

from .errors import ConversionError, TensorMismatchError
from .model_folder import load_folder
from .spidr_format import config_to_spidr, to_spidr
from .tensors import check_tensors, expected_tensors


def export(folder: str | os.PathLike, output: str | os.PathLike) -> None:
    """Writes the pretraining model in `folder` as SpidR's checkpoint `output`, with its config.json beside it.

    Raises:
        ConversionError: the folder holds no pretraining model, or one that SpidR's format cannot hold; or files are in
            the way. Nothing has been written then.
    """
    output = Path(output)
    config, tensors = load_folder(folder)
    raw = config_to_spidr(config)
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in expected_tensors(config).items()}
        check_tensors(tensors, shapes, what=str(folder))
    except TensorMismatchError as error:
        if not any(name.startswith("teacher.") for name in tensors):
            raise ConversionError(
                f"{folder} holds no pretraining model (no teacher and codebooks), which SpidR's format needs."
            ) from error
        raise
    if output.is_dir():
        raise ConversionError(f"{output} is a folder. Give the file to write, for example {output / 'checkpoint.pt'}.")
    text = json.dumps(raw, indent=1) + "\n"
    beside = output.parent / "config.json"
    for path, unchanged in ((output, False), (beside, beside.is_file() and beside.read_text() == text)):
        if path.exists() and not unchanged:
            raise ConversionError(f"{path} exists already. Remove it or write somewhere else.")
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(beside, lambda path: path.write_text(text, encoding="utf-8"))
    _write_whole(output, lambda path: torch.save({"model": to_spidr(tensors)}, path))


def _write_whole(target: Path, write) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="export_checkpoint.py"
    )
    parser.add_argument("folder", metavar="FOLDER", help="a converted or trained pretraining model")
    parser.add_argument("output", metavar="OUTPUT.pt", help="the checkpoint to write")
    options = parser.parse_args(arguments)
    try:
        export(options.folder, options.output)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {options.output} and {Path(options.output).parent / 'config.json'}.")
    return 0


__all__ = ["export", "main"]

if __name__ == "__main__":
    sys.exit(main())
