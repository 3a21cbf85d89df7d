"""Writes a model folder that is complete or not there, and reads the tensors of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spidr_hf import SpidrConfig, SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.system.files import check_place, replaced_folder
from spidr_hf.system.messages import shown

from .errors import ConversionError, writing
from .spidr_format import Converted
from .tensors import check_finite, check_sizes, same_bits
from .text_files import read_table, refuse_lfs_pointer

_INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 8 << 20  # of a safetensors file


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well, and vanishes otherwise.

    Raises:
        ConversionError: `target` is a file, or a folder with something in it.
    """
    target = Path(target).absolute()
    check_free(target)
    with writing(target), replaced_folder(target, new=True) as partial:
        yield partial


def check_free(target: Path) -> None:
    """Refuses to write over anything."""
    if target.is_dir() and any(target.iterdir()):
        raise ConversionError(f"{shown(target)} exists and is not empty. Remove it or give another folder.")
    try:
        check_place(target, folder=True)
    except ValueError as error:
        raise ConversionError(str(error)) from error


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


def is_model_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder with a configuration and weights as `save_pretrained` writes them."""
    weights = ("model.safetensors", _INDEX)
    # Unlike Path's these take URLs, whose parts may be longer than names of files can be.
    return os.path.isfile(Path(path) / "config.json") and any(os.path.exists(Path(path) / name) for name in weights)


def load_folder(folder: str | os.PathLike, *, allow_non_finite: bool = False) -> tuple[SpidrConfig, dict[str, Tensor]]:
    """Configuration and tensors of a model folder, exactly as stored.

    Raises:
        ConversionError: it is none of this model family, damaged, or (unless `allow_non_finite`) holds numbers that are
            not finite.
    """
    folder = Path(folder)
    name = shown(folder)
    if not (folder / "config.json").is_file():
        raise ConversionError(f"{name} is not a model folder: it has no config.json.")
    fields = read_table(folder / "config.json")
    if fields.get("model_type") != SpidrConfig.model_type:
        raise ConversionError(f"{name} does not hold a model of this family (`model_type` is not 'spidr').")
    try:
        config = SpidrConfig.from_dict(fields)
        check_sizes(config)
    except Exception as error:  # whatever a wrong value makes of the code that reads it
        raise ConversionError(f"{shown(folder / 'config.json')} cannot be right: {error}") from None
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        tensors |= _read_safetensors(file)
    check_finite(tensors, name, allow=allow_non_finite)
    return config, tensors


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: the one, or those that its index names."""
    index = folder / _INDEX
    if not index.is_file():
        return [folder / "model.safetensors"]
    places = read_table(index).get("weight_map")
    names = set(places.values()) if isinstance(places, dict) and all(map(_is_file_name, places.values())) else set()
    if not names:
        raise ConversionError(f"{shown(index)} must have a `weight_map` of tensors to names of files in its folder.")
    return [folder / name for name in sorted(names)]


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name and "\0" not in name


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    name = shown(path)
    if not path.is_file():
        raise ConversionError(f"{shown(path.parent)} has no {shown(path.name)}.")
    try:
        refuse_lfs_pointer(path)
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _LARGEST_HEADER:
            raise ConversionError(
                f"{name} is no safetensors file, or a damaged one (its header is {header} bytes long)."
            )
        return load_file(path)
    except OSError as error:
        raise ConversionError(f"{name} cannot be read: {error.strerror or error}.") from None
    except SafetensorError as error:
        raise ConversionError(
            f"{name} is no safetensors file, or a damaged one ({error}). Compare its size with the original's and "
            "download it again."
        ) from None


__all__ = ["check_free", "is_model_folder", "load_folder", "save_model", "whole_folder"]
