"""Models by name or folder, with an error of one line for what is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..modeling_spidr import SpidrConfig, SpidrPreTrainedModel
from .published import model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def loading(name: str, revision: str | None = None) -> Iterator[str]:
    """Around a `from_pretrained`: what goes wrong becomes a `ValueError` of one line, as what is no such model does.

    Args:
        name, revision: MODEL, as the command got it.

    Yields what `from_pretrained` takes: of a published checkpoint's name its converted folder.
    """
    name = model_folder(name)
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
        yield name
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
    with loading(name, revision) as place:
        model, found = model_class.from_pretrained(
            place, revision=revision, dtype=DTYPES[dtype], output_loading_info=True
        )
        extractor = SpidrFeatureExtractor.from_pretrained(place, revision=revision)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name} lacks weights that {model_class.__name__} needs, for example {missing[0]}: it is not a "
            "pretraining checkpoint, or not the whole of one."
        )
    return model.to(device).eval(), extractor


__all__ = ["DTYPES", "load_model", "loading"]
