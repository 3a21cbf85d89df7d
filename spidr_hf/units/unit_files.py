"""Units: one integer per frame of speech, from a layer's codebook prediction, and the files that hold them.

Units are the argmax of a layer's prediction head (arXiv 2512.20308), one per 20 ms frame. Layers are counted from 1.
Repeats are kept unless `deduplicate` is called.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel, SequenceFeatureExtractor

from .. import __version__
from ..data.audio import AUDIO_SUFFIXES
from ..system.files import replaced_file, write_text
from ..system.messages import counted, one_line, shown
from ..system.tables import json_lines, known_table
from .extractor import Extractor, unit_layers, unit_outputs

# What the utterance is called in unit files: DiscoPhon's name, fastabx's default, and a common third.
FILE_KEYS = ("file", "audio", "name")
UNIT_SUFFIXES = (".jsonl", ".parquet")
# What of their provenance makes units with the same numbers the same units, and what messages call it.
_MADE_BY = {"layer": "layer", "kind": "kind", "sha256": "model", "kmeans_sha256": "k-means"}
_LONGEST = 100_000_000  # frames: three weeks
_ROWS = 1000  # utterances in a row group of a Parquet file


def predict_units(
    model: PreTrainedModel,
    feature_extractor: SequenceFeatureExtractor,
    waveforms: Sequence[np.ndarray | torch.Tensor],
    layers: Sequence[int] | None = None,
    *,
    sampling_rate: int = 16_000,
    max_batch_seconds: float = 60.0,
) -> dict[int, list[np.ndarray]]:
    """
    Units of several utterances of any lengths.

    Args:
        model: A `SpidrForPretraining` or a `SpidrForAudioTokenization`. It runs in eval mode on its own device.
        feature_extractor: The model's feature extractor.
        waveforms: One array of samples per utterance, mono.
        layers: The layers wanted, counted from 1; every layer with a codebook by default.
        sampling_rate: The waveforms' samples per second. The feature extractor refuses a rate that is not its own.
        max_batch_seconds: How much audio, padding included, one batch may hold. A longer utterance is a batch alone.
            Units do not depend on it. Recordings of more than a minute are computed in windows (see `extraction`).

    Returns:
        For each layer the units of each utterance, in the order given: int64 arrays of T frames.
    """
    feature_extractor._check_sampling_rate(sampling_rate)
    layers = unit_layers(model.config, layers)
    extractor = Extractor(model, feature_extractor, unit_outputs(model, layers), max_batch_seconds=max_batch_seconds)
    results = extractor([extractor.standardize(np.asarray(waveform)) for waveform in waveforms])
    return {layer: [result[layer].numpy() for result in results] for layer in layers}


def deduplicate(units: Sequence[int] | np.ndarray | torch.Tensor) -> tuple[list[int], list[int]]:
    """
    Collapse consecutive repeats in the units of one utterance.

    Returns:
        The units without repeats, and for how many frames each of them lasted: `np.repeat` of both gives the input.
    """
    values = torch.as_tensor(units)
    if values.ndim != 1:
        raise ValueError(f"`units` must be those of one utterance (1 dimension), got the shape {tuple(values.shape)}.")
    if values.is_floating_point() and len(values):
        raise ValueError(f"`units` must be integers, got {values.dtype}.")
    kept, durations = torch.unique_consecutive(values, return_counts=True)
    return kept.tolist(), durations.tolist()


def describe_model(model: PreTrainedModel) -> dict[str, str | None]:
    """Where a model is from: its name or path, and the Hub's revision or, of a folder, the hash of its weights."""
    name, revision = model.config._name_or_path, getattr(model.config, "_commit_hash", None)
    weights = sorted(Path(name).glob("*.safetensors")) if name and Path(name).is_dir() else []
    if not weights:
        return {"model": name or None, "revision": revision}
    digest = hashlib.sha256()
    for file in weights:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return {"model": str(Path(name).resolve()), "sha256": digest.hexdigest()}


def provenance_path(path: str | os.PathLike) -> Path:
    """Where the provenance of a units file lies: `units.jsonl` -> `units.provenance.json`."""
    return Path(path).with_suffix(".provenance.json")


def write_units(
    path: str | os.PathLike,
    units: Mapping[str, Any] | Iterable[tuple[str, Sequence[int] | np.ndarray | torch.Tensor]],
    provenance: Mapping[str, Any],
    *,
    collapse: bool = False,
    key: str = "file",
) -> None:
    """
    Write units as JSON lines, `{"file": fileid, "units": [...]}`, or as Parquet with these columns, and
    beside them how they were made.

    Both files appear complete or not at all; existing ones are replaced.

    Args:
        path: The file; `.parquet` makes it Parquet, anything else JSON lines. Its folder is made if need be.
        units: The units of each utterance, one per frame, by file id; pairs may come one by one.
        provenance: What made them: model, layer, options. The version of this package, the time and the number of
            utterances and frames are added.
        collapse: Write units without consecutive repeats, and their `durations` in frames.
        key: What the file id is called in the lines: one of `FILE_KEYS`.
    """
    path = Path(path)
    utterances = frames = 0
    with replaced_file(path) as partial:
        with _writer(path.suffix, partial, key, collapse) as write:
            for fileid, sequence in units.items() if isinstance(units, Mapping) else units:
                values = torch.as_tensor(sequence)
                if values.ndim != 1 or not len(values) or values.is_floating_point() or values.min() < 0:
                    raise ValueError(
                        f"The units of {fileid!r} must be one or more integers of at least 0 in one dimension."
                    )
                utterances, frames = utterances + 1, frames + len(values)
                row: dict[str, Any] = {key: fileid, "units": values.tolist()}
                if collapse:
                    row["units"], row["durations"] = deduplicate(values)
                write(row)
        sidecar = {
            **provenance,
            "deduplicated": collapse,
            "utterances": utterances,
            "frames": frames,
            "spidr_hf": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        # The sidecar first: at no moment do units lie there without one.
        write_text(provenance_path(path), json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _writer(suffix: str, path: Path, key: str, collapse: bool) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """Writes rows one by one, as JSON lines or into a Parquet file."""
    if suffix != ".parquet":
        with path.open("w", encoding="utf-8") as file:
            yield lambda row: file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return
    lists = {name: pa.list_(pa.int64()) for name in (("units", "durations") if collapse else ("units",))}
    schema = pa.schema({key: pa.string(), **lists})
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[dict[str, Any]] = []

        def write(row: dict[str, Any]) -> None:
            rows.append(row)
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows.clear()

        yield write
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def unit_rows(path: Path) -> Iterator[bytes]:
    """The lines of a units file; of a Parquet file what they would be."""
    if path.suffix != ".parquet":
        with path.open("rb") as lines:
            yield from lines
        return
    try:
        for batch in pq.ParquetFile(path).iter_batches(_ROWS):
            yield from (json.dumps(row).encode() + b"\n" for row in batch.to_pylist())
    except (pa.ArrowException, ValueError, TypeError, OSError) as error:  # damaged metadata: no number
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} cannot be read as units ({one_line(error)}).") from error


def units_of_row(row: Mapping[str, Any]) -> np.ndarray:
    """The units of a row, one per frame: repeats are put back. Raises what taking a row to pieces raises."""
    units = _integers(row["units"], least=0)
    if "durations" not in row:
        return units
    durations = _integers(row["durations"], least=1)
    if durations.sum(dtype=np.float64) > _LONGEST:
        raise ValueError(f"its durations are those of more than {_LONGEST} frames")
    return np.repeat(units, durations)


def _integers(values: Any, least: int) -> np.ndarray:
    numbers = np.array(values) if values else np.zeros(0, dtype=np.int64)
    whole = isinstance(values, list) and numbers.ndim == 1 and numbers.dtype == np.int64
    if not whole or numbers.min(initial=least) < least:
        raise TypeError(f"{shown(values, 60)} is no list of integers of at least {least}")
    return numbers


class UnitRows:
    """The lines of a units file in any order: at byte offsets, of a Parquet file at the rows' numbers."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._parquet = pq.ParquetFile(self._file) if path.suffix == ".parquet" else None
        self._group, self._lines = -1, list[bytes]()
        if self._parquet is not None:
            metadata = self._parquet.metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._starts = np.cumsum([0, *counts])

    def at(self, place: int) -> bytes:
        """The line that begins at a place of `places`."""
        if self._parquet is None:
            self._file.seek(place)
            return self._file.readline()
        group = int(np.searchsorted(self._starts, place, side="right")) - 1
        if group != self._group:
            self._group = group
            self._lines = [json.dumps(row).encode() for row in self._parquet.read_row_group(group).to_pylist()]
        return self._lines[place - int(self._starts[group])]

    @staticmethod
    def places(path: Path) -> Iterator[tuple[int, bytes]]:
        """Every line with its place."""
        place = 0
        for line in unit_rows(path):
            yield place, line
            place += 1 if path.suffix == ".parquet" else len(line)

    def close(self) -> None:
        self._file.close()


def read_units(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """
    Units of a JSON lines or Parquet file by file id (one of the keys `FILE_KEYS`; under "audio", fastabx's, the audio's
    suffix is none of it), one per frame: int64 arrays. Where the file has `durations`, repeats are put back.
    """
    units: dict[str, np.ndarray] = {}

    def entry(row: dict[str, Any]) -> tuple[str, np.ndarray]:
        key = next((key for key in FILE_KEYS if key in row), "file")
        name, suffix = os.path.splitext(str(row[key]))
        return name if key == "audio" and suffix.lower() in AUDIO_SUFFIXES else str(row[key]), units_of_row(row)

    path, form = Path(path), '{"file": "...", "units": [1, 2, ...]}'
    for number, (fileid, values) in json_lines(path, entry, form, unit_rows(path)):
        if fileid in units:
            raise ValueError(f"{path}, line {number}: the file id {shown(fileid)!r} was there before.")
        units[fileid] = values
    return units


def unit_files(path: Path) -> dict[int | None, Path]:
    """The units file, under None; or those of a folder with one per layer, by layer."""
    if path.is_file():
        return {None: path}
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder of units (`examples/extract_units.py` makes them).")
    files: dict[int | None, Path] = {}
    for folder in sorted((p for p in path.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)):
        found = sorted(path for suffix in UNIT_SUFFIXES for path in folder.glob(f"units*{suffix}"))
        if len(found) > 1:
            raise ValueError(f"{folder} holds {counted(len(found), 'file')} of units: give one of them.")
        if found:
            files[int(folder.name)] = found[0]
    if not files:
        raise ValueError(f"{path}: no units in this folder; expected <layer>/units.jsonl.")
    return files


def known_units(path: Path) -> int | None:
    """How many units there can be, by the provenance beside a units file."""
    number = known_table(provenance_path(path)).get("num_units")
    return number if isinstance(number, int) else None


def made_by(path: Path) -> dict[str, Any]:
    """What made the units of a file, by the provenance beside it: layer, kind and weights, where they are known."""
    known = known_table(provenance_path(path))
    return {key: known[key] for key in _MADE_BY if known.get(key) is not None}


def check_same_units(path: Path, expected: Mapping[str, Any], whose: str) -> None:
    """Raises `ValueError` where a file's units are known to be others than those that `made_by` told `expected` of."""
    for key, value in made_by(path).items():
        if expected.get(key, value) != value:
            told = "" if "sha256" in key else f" ({value})"
            other = "" if "sha256" in key else f" ({expected[key]})"
            raise ValueError(
                f"{path} holds units of another {_MADE_BY[key]}{told} than {whose}{other}: the same numbers mean other "
                "sounds."
            )


__all__ = [
    "FILE_KEYS",
    "UNIT_SUFFIXES",
    "UnitRows",
    "check_same_units",
    "deduplicate",
    "describe_model",
    "known_units",
    "made_by",
    "predict_units",
    "provenance_path",
    "read_units",
    "unit_files",
    "unit_rows",
    "units_of_row",
    "write_units",
]
