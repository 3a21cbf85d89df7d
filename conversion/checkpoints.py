"""Reads a pretraining checkpoint of either format, found out by itself."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spidr_hf.system.messages import shown

from .checkpoint_file import kind_of, open_checkpoint
from .errors import ConversionError
from .fairseq_format import convert_fairseq, fairseq_tensors, is_fairseq
from .spidr_format import Converted, convert_spidr, spidr_state_dict
from .tensors import check_finite
from .text_files import read_table as read_config


def read_pretraining_checkpoint(
    path: str | os.PathLike,
    config: Mapping[str, Any] | None = None,
    objective: str | None = None,
    *,
    config_beside: Mapping[str, Any] | None = None,
    allow_non_finite: bool = False,
) -> Converted:
    """Configuration and `SpidrForPretraining` state dict of a SpidR or original DinoSR checkpoint file.

    No code from the file runs.

    Args:
        path: the file.
        config: the model's configuration in the format's own field names. It goes before everything found elsewhere.
        objective: "spidr" or "dinosr", where neither file nor configuration tells.
        config_beside: what came with the file; by default, a `config.json` in its folder.
        allow_non_finite: whether tensors may hold NaN or infinite numbers.

    Raises:
        ConversionError: with one message that says what to do.
    """
    path = Path(path)
    with open_checkpoint(path) as checkpoint:
        content = checkpoint.content
        if not isinstance(content, Mapping):
            raise ConversionError(f"{shown(path)} holds {kind_of(content)}, not a checkpoint of SpidR or DinoSR.")
        what = shown(path)
        if is_fairseq(content):
            tensors = fairseq_tensors(content, what)
            converted = convert_fairseq(content, config, objective, what)
        else:
            state = spidr_state_dict(content)
            if state is None:
                keys = ", ".join(repr(shown(key)) for key in list(content)[:8])
                raise ConversionError(
                    f"{what} holds no SpidR or DinoSR pretraining model (it has {keys or 'nothing'})."
                )
            tensors = state
            if config is None:
                config = config_beside
            if config is None and (beside := path.parent / "config.json").is_file():
                config = read_config(beside)
            converted = convert_spidr(tensors, config, objective, what)
        # Tensors may be windows into the file: what was read so must be what was once written.
        checkpoint.check(tensors.values())
    converted.notes += check_finite(converted.tensors, what, allow=allow_non_finite)
    return converted


__all__ = ["read_config", "read_pretraining_checkpoint"]
