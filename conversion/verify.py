"""Runs a converted model beside the released `spidr` package and measures how far apart they are."""

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from spidr_hf import SpidrFeatureExtractor, SpidrForPretraining

from .errors import ConversionError
from .spidr_format import config_to_spidr, to_spidr

TOLERANCE = 1e-3
_SECONDS = (1.0, 3.7)


def require_spidr() -> None:
    """Refuses where the `spidr` package is missing, or cannot be used."""
    try:
        import spidr.models  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ConversionError(
            f"--verify compares with the `spidr` package, which cannot be imported ({error}): pip install spidr "
            "(Python >= 3.12)."
        ) from error


def compare_with_spidr(folder: str | os.PathLike, waveforms: Iterable[Tensor] | None = None) -> dict[str, float]:
    """Largest absolute difference per quantity between the model in `folder` and `spidr` on the same audio.

    `spidr` gets the tensors that `export_checkpoint.py` writes, which for a checkpoint of its own are the original's.

    Args:
        folder: a converted model.
        waveforms: audio at 16 kHz, one tensor of S samples each; by default two made-up signals.
    """
    require_spidr()
    from spidr.config import DinoSRConfig, SpidRConfig
    from spidr.models import DinoSR, SpidR

    ours = SpidrForPretraining.from_pretrained(folder, local_files_only=True).eval()
    raw = config_to_spidr(ours.config)
    model_class, config_class = {"spidr": (SpidR, SpidRConfig), "dinosr": (DinoSR, DinoSRConfig)}[ours.config.objective]
    theirs = model_class(config_class(**raw["model"])).eval()
    theirs.load_state_dict(to_spidr(ours.state_dict()))
    extractor = SpidrFeatureExtractor.from_pretrained(folder, local_files_only=True)
    differences: dict[str, float] = {}

    def note(what: str, left: Tensor, right: Tensor) -> None:
        largest = (left.float() - right.float()).abs().max().item() if left.shape == right.shape else float("inf")
        differences[what] = max(differences.get(what, 0.0), largest)

    for waveform in _signals() if waveforms is None else waveforms:
        values = extractor(waveform.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt").input_values
        with torch.inference_mode():
            for number, pair in enumerate(
                zip(ours.spidr.get_intermediate_outputs(values), theirs.get_intermediate_outputs(values), strict=True),
                1,
            ):
                note(f"layer {number}", *pair)
            for number, (left, right) in enumerate(
                zip(ours.get_codebooks(values), theirs.get_codebooks(values), strict=True), 1
            ):
                if left is not None:
                    note(f"codebook probabilities of layer {number}", left.squeeze(0), _probabilities(right.squeeze(0)))
            output, (loss, *_) = ours(values), theirs(values)
            note("loss without a mask", output.loss, torch.as_tensor(loss).mean())
    return differences


def _probabilities(predictions: Tensor) -> Tensor:
    """Some releases give log-probabilities."""
    return predictions.exp() if predictions.max() <= 0 else predictions


def _signals() -> list[Tensor]:
    """A gliding tone and noise with pauses, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    signals = []
    for seconds in _SECONDS:
        time = torch.arange(int(16_000 * seconds)) / 16_000
        tone = torch.sin(2 * torch.pi * (120 * time + 200 * time.square()))
        noise = torch.randn(len(time), generator=generator) * (torch.sin(7 * time) > 0)
        signals.append(0.3 * tone + 0.1 * noise)
    return signals


__all__ = ["TOLERANCE", "compare_with_spidr", "require_spidr"]
