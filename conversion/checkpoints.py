"""Reads a pretraining checkpoint of either format, found out by itself."""

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .fairseq_format import convert_fairseq, is_fairseq
from .safe_pickle import read_checkpoint
from .spidr_format import Converted, convert_spidr, spidr_state_dict


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """A configuration file (JSON, or TOML as SpidR's training reads it) as a dict."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        config = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConversionError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConversionError(f"The configuration {path} is not valid {path.suffix[1:].upper()}: {error}.") from None
    if not isinstance(config, dict):
        raise ConversionError(f"The configuration {path} must hold a table of fields, not {type(config).__name__}.")
    return config


def read_pretraining_checkpoint(
    path: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
    objective: str | None = None,
    *,
    config_beside: Mapping[str, Any] | None = None,
) -> Converted:
    """Configuration and `SpidrForPretraining` state dict of a SpidR or original DinoSR checkpoint file.

    No code from the file runs.

    Args:
        path: the file.
        config: the model's configuration in the format's own field names. It goes before everything found elsewhere.
        objective: "spidr" or "dinosr", where neither file nor configuration tells.
        config_beside: what came with the file; by default, a `config.json` in its folder.

    Raises:
        ConversionError: with one message that says what to do.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, Mapping):
        raise ConversionError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint of SpidR or DinoSR.")
    if is_fairseq(checkpoint):
        return convert_fairseq(checkpoint, config, objective, str(path))
    tensors = spidr_state_dict(checkpoint)
    if tensors is None:
        keys = ", ".join(repr(key) for key in list(checkpoint)[:8])
        raise ConversionError(f"{path} holds no SpidR or DinoSR pretraining model (it has {keys or 'nothing'}).")
    if config is None:
        config = config_beside
    if config is None and (beside := path.parent / "config.json").is_file():
        config = read_config(beside)
    return convert_spidr(tensors, config, objective, str(path))


__all__ = ["read_config", "read_pretraining_checkpoint"]
