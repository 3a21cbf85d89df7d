"""Writes a model folder that is complete or not there, and reads the tensors of one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from spidr_hf import SpidrConfig, SpidrFeatureExtractor, SpidrForPretraining

from .errors import ConversionError
from .spidr_format import Converted
from .tensors import same_bits


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        ConversionError: `target` is a file, or a folder with something in it.
    """
    target = Path(target).absolute()
    check_free(target)
    created = [folder for folder in target.parents if not folder.exists()]
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        yield partial
        # Temporary folders and some of what is written into them are private; this one is not to stay so.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        for path in partial.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in created:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def check_free(target: Path) -> None:
    """Refuses to write over anything."""
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{target} exists and is not empty. Remove it or give another folder.")
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file. Give a folder.")


def save_model(converted: Converted, folder: Path) -> None:
    """Saves a pretraining model into `folder` as `save_pretrained` does, with its feature extractor and code files.

    The result is loaded again, and every tensor compared bit for bit.
    """
    with torch.device("meta"):
        model = SpidrForPretraining(converted.config)
    model.load_state_dict(converted.tensors, strict=True, assign=True)
    model.save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    reloaded = SpidrForPretraining.from_pretrained(folder, local_files_only=True).state_dict()
    changed = [name for name, tensor in converted.tensors.items() if not same_bits(tensor, reloaded[name])]
    if changed or set(reloaded) != set(converted.tensors):
        raise ConversionError(f"Reading the written folder back gives other tensors: {', '.join(changed)}.")


def load_folder(folder: str | os.PathLike) -> tuple[SpidrConfig, dict[str, Tensor]]:
    """Configuration and tensors of a model folder, exactly as stored.

    Raises:
        ConversionError: it is none of this model family.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{folder} is not a model folder: it has no config.json.")
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{folder / 'config.json'} is not valid JSON: {error}.") from None
    if not isinstance(fields, dict) or fields.get("model_type") != SpidrConfig.model_type:
        raise ConversionError(f"{folder} does not hold a model of this family (`model_type` is not 'spidr').")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise ConversionError(f"{folder} has no {name}.")
        tensors |= load_file(folder / name)
    try:
        return SpidrConfig.from_dict(fields), tensors
    except ValueError as error:
        raise ConversionError(f"{folder / 'config.json'} cannot be right: {error}") from None


__all__ = ["check_free", "load_folder", "save_model", "whole_folder"]
