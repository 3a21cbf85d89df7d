"""Recordings that people bring to a page: read within limits, turned into units, and cut where a unit lies."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, SequenceFeatureExtractor

from spidr_hf.configuration_spidr import SAMPLING_RATE, SpidrConfig, receptive_field
from spidr_hf.data.audio import read_audio, read_info
from spidr_hf.system.errors import AudioError
from spidr_hf.system.messages import duration
from spidr_hf.units.extractor import unit_layers
from spidr_hf.units.unit_files import deduplicate, predict_units

from .comparison import compare_units

FRAME = 0.02  # seconds per unit
MAX_SECONDS = 60.0
_MOST_VALUES = 48_000 * 60 * 16  # samples of all channels that are decoded: 60 s of 16 channels at 48 kHz
_RATES = (4_000, 384_000)  # Hz: beyond them a header is broken, and resampling could take all memory
_RATE = "{} has {} samples per second; {} to {} can be used."
_PAUSE, _FADE = 0.15, 0.004  # seconds between the stretches of a unit, and at their ends against clicks
_FORMATS = "WAV, FLAC, OGG, Opus, MP3 or AIFF"


@dataclass(frozen=True)
class Recording:
    """A recording and the units of all layers that have a codebook.

    `waveform`: S samples, float32, 16 kHz. `units`: T units by layer, one per 20 ms.
    """

    name: str
    waveform: np.ndarray
    units: Mapping[int, np.ndarray]

    @property
    def seconds(self) -> float:
        """Length."""
        return len(self.waveform) / SAMPLING_RATE

    @property
    def silent(self) -> bool:
        """Whether no sample reaches a thousandth of full scale (-60 dB)."""
        return float(np.abs(self.waveform).max(initial=0)) < 0.001


def default_layer(config: SpidrConfig) -> int:
    """The layer to show first: 6, that of the paper's units (arXiv 2512.20308), or the last where 6 has none."""
    layers = unit_layers(config)
    return 6 if 6 in layers else layers[-1]


def read_recording(path: str | Path, *, min_samples: int = 1, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """
    Waveform of an uploaded file of any rate and number of channels: S samples, float32, mono, 16 kHz.

    The header decides before anything is decoded.

    Raises:
        AudioError: for what is no audio, empty, too short, too long or broken, with words for who uploaded it.
    """
    name = Path(path).name
    if not os.path.exists(path):
        raise AudioError(f"{name} is not here any more. Choose it again.")
    if os.path.getsize(path) == 0:
        raise AudioError(f"{name} is empty: the file has no content. Record again, or choose another file.")
    try:
        info = read_info(path, name=name, resample=True)
    except AudioError as error:
        if "holds no samples" in str(error):
            raise AudioError(f"{name} holds no sound. Record again, or choose another file.") from error
        if rate := re.search(r"claims (-?\d+) Hz", str(error)):
            raise AudioError(_RATE.format(name, rate[1], *_RATES)) from error
        raise AudioError(f"{name} is no audio file that can be read here. Use {_FORMATS}.") from error
    if not _RATES[0] <= info.sampling_rate <= _RATES[1]:
        raise AudioError(_RATE.format(name, info.sampling_rate, *_RATES))
    seconds = info.num_samples / info.sampling_rate
    if seconds > max_seconds:
        raise AudioError(
            f"{name} is {duration(seconds)} long; at most {max_seconds:g} seconds can be shown. Cut out a part, or "
            "use examples/extract_units.py for recordings of any length."
        )
    if info.num_samples * info.channels > _MOST_VALUES:
        raise AudioError(
            f"{name} has {info.channels} channels at {info.sampling_rate} Hz, more than can be read at this length. "
            "Mix them down to one, or cut out a part."
        )
    if info.num_samples_16k < min_samples:
        raise AudioError(
            f"{name} is too short: {1000 * seconds:.3g} ms. One unit needs {1000 * min_samples / SAMPLING_RATE:.3g} ms."
        )
    try:
        return read_audio(path, name=name, resample=True)  # block by block, and no further than the header says
    except AudioError as error:
        raise AudioError(f"{name} is damaged: it cannot be decoded to its end. Record or copy it again.") from error


def analyse_recording(
    path: str | Path, model: PreTrainedModel, feature_extractor: SequenceFeatureExtractor
) -> Recording:
    """An uploaded file and its units. Raises `AudioError` as `read_recording` does."""
    waveform = read_recording(path, min_samples=receptive_field(model.config))
    units = predict_units(model, feature_extractor, [waveform])
    return Recording(Path(path).name, waveform, {layer: sequences[0] for layer, sequences in units.items()})


def unit_stretches(units: Sequence[int] | np.ndarray | torch.Tensor) -> list[tuple[int, int, int]]:
    """Runs of the same unit: `(unit, first frame, frames)`."""
    kept, durations = deduplicate(units)
    starts = np.cumsum([0, *durations[:-1]]).tolist()
    return list(zip(kept, starts, durations, strict=True))


def cut_unit(recordings: Sequence[Recording], layer: int, unit: int) -> np.ndarray:
    """Everything that a unit of a layer covers, stretch after stretch with short pauses: samples at 16 kHz, float32."""
    samples, pause = round(FRAME * SAMPLING_RATE), np.zeros(round(_PAUSE * SAMPLING_RATE), np.float32)
    pieces: list[np.ndarray] = []
    for recording in recordings:
        for value, start, frames in unit_stretches(recording.units[layer]):
            if value == unit:
                pieces += [_faded(recording.waveform[start * samples : (start + frames) * samples]), pause]
    if not pieces:
        raise ValueError(f"Unit {unit} of layer {layer} is in none of the recordings.")
    return np.concatenate(pieces[:-1])


def _faded(piece: np.ndarray) -> np.ndarray:
    ramp = np.minimum(np.arange(1, len(piece) + 1) / (_FADE * SAMPLING_RATE), 1.0)
    return (piece * ramp * ramp[::-1]).astype(np.float32)


def units_report(recordings: Sequence[Recording], layer: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """What a page shows, for JSON: model, layer, units without repeats and their durations in frames of 20 ms; for two
    recordings also how they compare.

    Args:
        recordings: One or two.
        layer: Whose units.
        model: What made them, from `units.describe_model`.
    """
    rows: list[dict[str, Any]] = []
    for recording in recordings:
        kept, durations = deduplicate(recording.units[layer])
        rows.append({"file": recording.name, "seconds": recording.seconds, "units": kept, "durations": durations})
    report: dict[str, Any] = {**model, "layer": layer, "frame_seconds": FRAME, "recordings": rows}
    if len(recordings) == 2:
        first, second = recordings
        report["comparison"] = compare_units(first.units[layer], second.units[layer]).scores()
    return report


__all__ = [
    "FRAME",
    "MAX_SECONDS",
    "Recording",
    "analyse_recording",
    "cut_unit",
    "default_layer",
    "read_recording",
    "unit_stretches",
    "units_report",
]
