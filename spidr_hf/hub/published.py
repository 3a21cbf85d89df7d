"""Published checkpoints by name: converted on first use into the Hugging Face cache, and found there again."""

from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import WeakFileLock

from ..conversion.convert_checkpoint import convert
from ..conversion.sources import published
from ..system.files import check_place


def model_folder(name: str) -> str:
    """What `from_pretrained` takes for MODEL: a folder or a name on the Hub as it is, a published checkpoint's folder.

    Its first use says what is downloaded, from where, how large and under which licence, and converts it, every tensor
    read back bit for bit. Raises `ValueError` where it cannot be had.
    """
    if name not in published() or Path(name).exists():
        return name
    folder = Path(constants.HF_HOME) / "spidr_hf" / "models" / name
    there = folder / "config.json"
    if there.is_file():  # the folder is whole then; the cache may be one that can only be read
        return str(folder)
    try:
        check_place(folder, folder=True)
    except ValueError as error:
        raise ValueError(f"{error} HF_HOME may name another cache.") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{name}.lock")):  # processes that start together convert once
        if not there.is_file():
            convert(name, str(folder), model_id=name)
    return str(folder)


__all__ = ["model_folder"]
