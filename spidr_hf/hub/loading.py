"""Models by name or folder, with an error of one line for what is none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..cpu_spidr import has_fast_bfloat16
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..modeling_spidr import SpidrConfig, SpidrPreTrainedModel
from ..system.tables import read_table
from .published import model_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_dtype(device: torch.device | str) -> str:
    """The name of the dtype in which a model runs fastest: bfloat16 where the device multiplies it in hardware."""
    device = torch.device(device)
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and has_fast_bfloat16() else "float32"


@contextmanager
def loading(name: str, revision: str | None = None) -> Iterator[str]:
    """Around a `from_pretrained`: what goes wrong becomes a `ValueError` of one line, as what is no such model does.

    Args:
        name, revision: MODEL, as the command got it.

    Yields what `from_pretrained` takes: of a published checkpoint's name its converted folder.
    """
    name = model_folder(os.path.expanduser(name))
    if name.endswith((".pt", ".ckpt")) and Path(name).is_file():
        raise ValueError(
            f"{name} is a checkpoint of the original code: convert it with conversion/convert_checkpoint.py."
        )
    if (Path(name).exists() or name.startswith((".", "/", "~"))) and not Path(name, "config.json").exists():
        raise ValueError(f"{name} is no model folder: there is no config.json in it.{run_hint(name)}")
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

    Args:
        dtype: one of `DTYPES`, or "auto" for `fast_dtype`.

    Raises `ValueError` for what is no SpidR or DinoSR model, and for one without the weights that the class needs.
    """
    dtype = fast_dtype(device) if dtype == "auto" else dtype
    with loading(name, revision) as place:
        model, found = model_class.from_pretrained(
            place, revision=revision, dtype=DTYPES[dtype], output_loading_info=True
        )
        extractor = load_feature_extractor(place, revision=revision)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{name} lacks weights that {model_class.__name__} needs, for example {missing[0]}: it is not a "
            "pretraining checkpoint, or not the whole of one."
        )
    return model.to(device).eval(), extractor


def load_feature_extractor(place: str, *, revision: str | None = None) -> SpidrFeatureExtractor:
    """The feature extractor of a model folder (or repository); of a checkpoint without one, that of its run.

    Args:
        place: as `loading` yields it.
    """
    folder = Path(place)
    if (folder / "trainer_state.json").exists() and not (folder / "preprocessor_config.json").exists():
        run = folder.resolve().parent.parent / "config.toml"
        data = read_table(run).get("data", {}) if run.exists() else {}
        return SpidrFeatureExtractor(do_normalize=data.get("normalize", True))
    return SpidrFeatureExtractor.from_pretrained(place, revision=revision)


def run_hint(folder: str | Path) -> str:
    """Which folders to name instead, where this one is a run's (a sentence after a blank); else nothing."""
    run = Path(folder)
    inside = [run / "final"] if (run / "final" / "config.json").exists() else []
    steps = [path for path in run.glob("checkpoints/step_*") if path.name[5:].isdecimal()]
    inside += sorted((path for path in steps if (path / "config.json").exists()), key=lambda path: -int(path.name[5:]))
    if not inside:
        return " It is a run that has no checkpoint yet." if (run / "metrics.jsonl").exists() else ""
    names = [str(path) for path in inside[:2]]
    return f" It is the folder of a run: give {' or '.join(names)}{', for example' if len(inside) > 2 else ''}."


__all__ = ["DTYPES", "fast_dtype", "load_feature_extractor", "load_model", "loading", "run_hint"]
