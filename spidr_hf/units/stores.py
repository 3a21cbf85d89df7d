"""Where extracted units and features go: names of files, what made them, and what of them is there already.

Results are known by what they depend on (`Store.provenance`): those of another model or other options are never mixed
with them.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..data.sources import AudioSource
from ..system.files import replaced_file, write_text
from ..system.messages import counted, shown
from ..system.tables import json_lines, known_table, parse_json, read_table
from .extractor import Extractor
from .kmeans import load_features
from .unit_files import FILE_KEYS, UNIT_SUFFIXES, UnitRows, provenance_path, unit_rows, units_of_row, write_units

LAYOUTS = ("plain", "discophon", "fastabx")
# What a result depends on; anything else in a sidecar may differ between a file and the run that resumes with it.
IDENTITY = (
    "sha256",
    "layer",
    "kind",
    "before_residual",
    "kmeans_sha256",
    "window_seconds",
    "context_seconds",
    "dtype",
    "resample",
    "resampler",
)


_LONGEST_NAME = 255  # bytes
LENGTHS_FILE = "lengths.jsonl"


class OtherLength(NamedTuple):
    """An utterance of another length than the data says: samples that it says, and that are there."""

    file: str
    said: int
    there: int


@dataclass(frozen=True)
class Layout:
    """Where files lie below the output folder, and what utterances are called in them.

    `plain`: `<layer>/units.jsonl`, `<layer>/<fileid>.pt`. `discophon`: `<layer>/units-<language>-<split>.jsonl` and
    `<layer>/<language>/<split>/<stem>.pt`, with ISO 639-3 languages. `fastabx`: as plain; unit files call the utterance
    `audio`. DiscoPhon and fastabx know utterances by the last part of their fileid, so those must differ.
    """

    name: Literal["plain", "discophon", "fastabx"] = "plain"
    language: str | None = None
    split: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.name not in LAYOUTS:
            raise ValueError(f"Unknown layout {self.name!r}: choose one of {', '.join(LAYOUTS)}.")
        if self.key is not None and self.key not in FILE_KEYS:
            raise ValueError(f"Unknown key {self.key!r}: choose one of {', '.join(FILE_KEYS)}.")
        given = self.language is not None or self.split is not None
        if given != (self.name == "discophon") or (given and not (self.language and self.split)):
            raise ValueError(
                "--layout discophon needs --language and --split (for example --language deu --split test), the other "
                "layouts take neither."
            )
        if self.language and not (len(self.language) == 3 and self.language.isalpha() and self.language.islower()):
            raise ValueError(f"{self.language!r} is no ISO 639-3 code: three small letters, as in deu or cmn.")
        if self.split and not self.split.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ValueError(f"{self.split!r} cannot be a split's name: it becomes part of a file's name.")

    @property
    def file_key(self) -> str:
        """What the utterance is called in a line of units."""
        return self.key or ("audio" if self.name == "fastabx" else "file")

    def units_path(self, root: Path, layer: int, suffix: str = ".jsonl") -> Path:
        """The units of one layer."""
        name = f"units-{self.language}-{self.split}.jsonl" if self.name == "discophon" else "units.jsonl"
        return root / str(layer) / Path(name).with_suffix(suffix)

    def features_folder(self, root: Path, layer: int) -> Path:
        """The folder of one layer's features."""
        folder = root / str(layer)
        return folder / str(self.language) / str(self.split) if self.name == "discophon" else folder

    def names(self, fileids: Sequence[str], *, units: bool) -> list[str]:
        """What the utterances are called. Raises `ValueError` where two would be called the same."""
        short = self.name == "discophon" or (units and self.name == "fastabx")
        names = [PurePosixPath(fileid).name if short else fileid for fileid in fileids]
        if len(set(names)) < len(names):
            seen: dict[str, str] = {}
            for fileid, name in zip(fileids, names, strict=True):
                if name in seen:
                    raise ValueError(
                        f"{self.name} knows utterances by the last part of their path, and {seen[name]!r} and "
                        f"{fileid!r} share {name!r}: rename one, or extract them into different folders."
                    )
                seen[name] = fileid
        for name in names:
            # Features would be written outside the output folder.
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise ValueError(
                    f"The fileid {name!r} leads out of the output folder: give the manifest other fileids."
                )
        return names

    def check_files(self, names: Sequence[str], suffix: str) -> None:
        """Raises `ValueError` where no file `<name><suffix>` could be written for each, beside those of the others."""
        folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
        for name in names:
            parts = PurePosixPath(f"{name}{suffix}").parts
            longest = max(parts, key=lambda part: len(os.fsencode(part)))
            if "\0" in name:
                problem = "has a NUL in it"
            elif len(os.fsencode(longest)) > _LONGEST_NAME:
                problem = f"gives a file's name of {len(os.fsencode(longest))} bytes, disks take {_LONGEST_NAME}"
            elif f"{name}{suffix}" in folders:
                problem = f"needs a file {name}{suffix}, which is the folder of another utterance"
            else:
                continue
            raise ValueError(f"The fileid {shown(name)} {shown(problem)}: give the manifest other fileids.")


@dataclass(eq=False)
class Store(ABC):
    """Results in a folder: what is there, what is missing, and where new ones go.

    Args:
        root: Output folder.
        layers: Layers, counted from 1.
        fileids: All utterances of the data.
        provenance: What made the results, for their sidecars; `layer` is added.
        layout: Names of files and keys.
        overwrite: Replace files made with other options or from other data.
    """

    root: Path
    layers: Sequence[int]
    fileids: Sequence[str]
    provenance: Mapping[str, Any]
    _: KW_ONLY
    layout: Layout = field(default_factory=Layout)
    overwrite: bool = False

    _units = True  # whether utterances are named by the rules for units

    def __post_init__(self) -> None:
        self.other_data: str | None = None  # DATA by another name, of which there are results already
        self.names = self.layout.names(self.fileids, units=self._units)

    @property
    @abstractmethod
    def _stem(self) -> str:
        """Of the name of the journals' folder."""

    @property
    def journal_folder(self) -> Path:
        """Where results wait until all are there, and what was skipped is noted."""
        return self.root / ".partial" / f"{self._stem}-{_fingerprint(self.provenance)}"

    def known_lengths(self, source: AudioSource) -> list[OtherLength]:
        """What was found out, by this run or an earlier one, about recordings that are not as long as the data says."""
        said = dict(zip(self.fileids, map(int, source.num_samples), strict=True))
        found: dict[str, OtherLength] = {}
        for path in (self.root / LENGTHS_FILE, *sorted(self.journal_folder.glob("*.jsonl"))):
            if not path.exists():
                continue
            with path.open("rb") as file:
                lines = (line for line in file if b'"there"' in line)
                # Lines that are no such rows were cut off when the run was killed.
                for _, entry in json_lines(path, lambda row: OtherLength(**row), lines=lines):
                    if said.get(entry.file) == entry.said:  # else the data says something else by now
                        found[entry.file] = entry
        return [found[fileid] for fileid in self.fileids if fileid in found]

    def expected_frames(self, extractor: Extractor, source: AudioSource) -> dict[str, int]:
        """Frames of each utterance, by its name."""
        there = {entry.file: entry.there for entry in self.known_lengths(source)}
        lengths = zip(self.names, self.fileids, source.num_samples, strict=True)
        return {name: extractor.frames(there.get(fileid, samples)) for name, fileid, samples in lengths}

    def is_of_other_data(self, sidecar: Path) -> bool:
        """Whether results were made from DATA by another name: moved, or other recordings, which lengths may tell."""
        data = known_table(sidecar).get("data")
        if data is None or data == self.provenance.get("data"):
            return False
        self.other_data = str(data)
        return True

    @abstractmethod
    def missing(self, extractor: Extractor, source: AudioSource) -> list[int]:
        """Utterances without a result yet. Raises `ValueError` where other results are in the way."""

    def start(self) -> None:  # noqa: B027 (not every store has something to do)
        """Prepare the folder, before anything is added."""

    @abstractmethod
    def add(self, name: str, result: Mapping[int, Tensor], journal: IO[str]) -> None:
        """Take in the results of one utterance, by layer."""

    @abstractmethod
    def finish(self) -> list[Path]:
        """All is there: complete the results. Returns what was made."""


@dataclass(eq=False)
class UnitStore(Store):
    """Units, one file per layer; `collapse` deduplicates them, with durations. The other arguments are `Store`'s."""

    collapse: bool = False
    suffix: str = ".jsonl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.suffix not in UNIT_SUFFIXES:
            raise ValueError(f"Units are written as {' or '.join(UNIT_SUFFIXES)}, not {self.suffix!r}.")
        if self.suffix != ".jsonl" and self.layout.name != "plain":
            raise ValueError(f"{self.layout.name} reads JSON lines: leave --format out, or use the plain layout.")
        if self.collapse and self.layout.name != "plain":
            raise ValueError(
                f"{self.layout.name} reads one unit per frame: leave --deduplicate out, or use the plain layout."
            )
        # Where each name's units lie: file and byte offset of a line, by layer.
        self._places: dict[int, dict[str, tuple[Path, int]]] = {layer: {} for layer in self.layers}

    @property
    def _stem(self) -> str:
        return self.layout.units_path(self.root, 0).stem

    def missing(self, extractor: Extractor, source: AudioSource) -> list[int]:
        """Utterances without a result yet. Raises `ValueError` where other results are in the way."""
        expected = self.expected_frames(extractor, source)
        for layer in self.layers:
            path = self.layout.units_path(self.root, layer, self.suffix)
            for suffix in set(UNIT_SUFFIXES) - {self.suffix}:
                if (other := path.with_suffix(suffix)).exists():
                    raise ValueError(f"{other} is there: give another OUT_DIR for units as {self.suffix[1:]}.")
            if not path.exists():
                continue
            try:
                _check_same(provenance_path(path), {**self.provenance, "layer": layer}, path)
                if not self.overwrite:
                    self._check_form(path)
            except ValueError:
                if not self.overwrite:
                    raise
            else:
                if not (self.is_of_other_data(provenance_path(path)) and self.overwrite):
                    self._index(path, [layer], expected, complain=not self.overwrite)
        for journal in sorted(self.journal_folder.glob("*.jsonl")):
            self._index(journal, self.layers, expected)
        return [i for i, name in enumerate(self.names) if not all(name in self._places[layer] for layer in self.layers)]

    def _check_form(self, path: Path) -> None:
        """Raises `ValueError` where the same units are there in another form of lines, which would be replaced."""
        _, row = next(json_lines(path, dict, lines=unit_rows(path)), (0, {}))
        if "units" in row and self.layout.file_key not in row:
            found = next((key for key in FILE_KEYS if key in row), None)
            form = f"in which the utterance is called {found!r}, not {self.layout.file_key!r}"
        elif "units" in row and ("durations" in row) != self.collapse:
            form = "without repeats (--deduplicate)" if "durations" in row else "with repeats (without --deduplicate)"
        else:
            return
        raise ValueError(f"{path} holds units {form}: give another OUT_DIR, or --overwrite to replace it.")

    def add(self, name: str, result: Mapping[int, Tensor], journal: IO[str]) -> None:
        """Take in the units of one utterance (T, by layer)."""
        row = {"file": name, "layers": {str(layer): units.tolist() for layer, units in result.items()}}
        journal.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self) -> list[Path]:
        """Write the unit files: the files made."""
        for journal in sorted(self.journal_folder.glob("*.jsonl")):
            self._index(journal, self.layers, None)
        files = []
        for layer in self.layers:
            if not self._places[layer]:
                continue
            path = self.layout.units_path(self.root, layer, self.suffix)
            provenance = {**self.provenance, "layer": layer, "layout": self.layout.name}
            write_units(path, self._pairs(layer), provenance, collapse=self.collapse, key=self.layout.file_key)
            files.append(path)
        return files

    def _index(
        self, path: Path, layers: Sequence[int], expected: Mapping[str, int] | None, complain: bool = False
    ) -> None:
        """Note where the units of each utterance lie in a journal or a units file, but those of another length."""
        # Unit files may call utterances otherwise than journals do.
        names: dict[str | None, str] = {} if expected is None else {self._written_name(name): name for name in expected}
        for place, line in UnitRows.places(path):
            written, units = _units_of(line, layers)
            name: Any = names.get(written, written)
            if complain and name is not None and name not in (expected or ()):
                raise ValueError(
                    f"{path} holds units of {name!r}, which is not among the data: give another OUT_DIR, or "
                    "--overwrite to replace them."
                )
            for layer, values in units.items():
                if complain and expected is not None and expected.get(name, len(values)) != len(values):
                    raise _another_recording(path, name, len(values), expected[name])
                if expected is None or expected.get(name) == len(values):
                    self._places[layer][name] = (path, place)

    def _pairs(self, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        files: dict[Path, UnitRows] = {}
        try:
            for name in self.names:
                if name not in self._places[layer]:
                    continue
                path, place = self._places[layer][name]
                if path not in files:
                    files[path] = UnitRows(path)
                _, units = _units_of(files[path].at(place), [layer])
                if layer not in units:
                    raise OSError(f"{path} changed while it was read. Start the command again.")
                yield self._written_name(name), units[layer]
        finally:
            for file in files.values():
                file.close()

    def _written_name(self, name: str) -> str:
        # fastabx takes everything after the last point for a suffix.
        return f"{name}.flac" if self.layout.name == "fastabx" and "." in name else name


@dataclass(eq=False)
class FeatureStore(Store):
    """Features, one file per utterance and layer: a tensor (T x H, float32, CPU).

    `suffix` is `.pt` (torch) or `.npy` (numpy). The other arguments are `Store`'s.
    """

    suffix: str = ".pt"

    _units = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.layout.check_files(self.names, self.suffix)
        self._stale: dict[int, bool] = {}  # layers to be replaced, and whether all of one is of other options

    @property
    def _stem(self) -> str:
        return "features"

    def _path(self, layer: int, name: str) -> Path:
        return self.layout.features_folder(self.root, layer) / f"{name}{self.suffix}"

    def _sidecar(self, layer: int) -> Path:
        return self.layout.features_folder(self.root, layer) / "features.provenance.json"

    def missing(self, extractor: Extractor, source: AudioSource) -> list[int]:
        """Utterances without a result yet. Raises `ValueError` where other results are in the way."""
        done = True
        for layer in self.layers:
            folder = self.layout.features_folder(self.root, layer)
            there = self._sidecar(layer).exists() or any(self._path(layer, name).exists() for name in self.names)
            done = done and there
            try:
                if there:
                    _check_same(self._sidecar(layer), {**self.provenance, "layer": layer}, folder)
            except ValueError:
                if not self.overwrite:
                    raise
                done, self._stale[layer] = False, True
                continue
            if there and self.is_of_other_data(self._sidecar(layer)):
                if self.overwrite:
                    done, self._stale[layer] = False, False
                else:
                    self._check_lengths(layer, self.expected_frames(extractor, source))
        if not done:
            return list(range(len(self.names)))
        return [
            i for i, name in enumerate(self.names) if not all(self._path(layer, name).exists() for layer in self.layers)
        ]

    def start(self) -> None:
        """Note what the features are made with; at no moment do they lie there without that, or with another's."""
        for layer, everything in self._stale.items():
            folder = self.layout.features_folder(self.root, layer)
            old = [self._path(layer, name) for name in self.names]
            # Where the sidecar is that of the whole folder, what it tells of goes with it.
            if everything and list(folder.rglob(self._sidecar(layer).name)) == [self._sidecar(layer)]:
                old += [path for suffix in (".pt", ".npy") for path in folder.rglob(f"*{suffix}")]
            for path in old:
                path.unlink(missing_ok=True)
        for layer in self.layers:
            for left_over in self.layout.features_folder(self.root, layer).rglob(f".*.partial{self.suffix}"):
                left_over.unlink(missing_ok=True)  # of a killed process
            self._write_sidecar(layer, None)

    def _check_lengths(self, layer: int, expected: Mapping[str, int]) -> None:
        """Raises `ValueError` where a layer has features of another recording of the same name."""
        for name, frames in expected.items():
            path = self._path(layer, name)
            if path.exists() and (found := len(load_features(path))) != frames:
                raise _another_recording(path.parent, name, found, frames)

    def add(self, name: str, result: Mapping[int, Tensor], journal: IO[str]) -> None:
        """Write the features of one utterance (T x H, by layer)."""
        for layer, features in result.items():
            path = self._path(layer, name)
            with replaced_file(path) as partial:
                if self.suffix == ".npy":
                    np.save(partial, features.numpy())
                else:
                    torch.save(features.contiguous(), partial)

    def finish(self) -> list[Path]:
        """Complete the sidecars: the folders of features."""
        for layer in self.layers:
            self._write_sidecar(layer, sum(self._path(layer, name).exists() for name in self.names))
        return [self.layout.features_folder(self.root, layer) for layer in self.layers]

    def _write_sidecar(self, layer: int, utterances: int | None) -> None:
        sidecar = {
            **self.provenance,
            "layer": layer,
            "layout": self.layout.name,
            "utterances": utterances,
            "complete": utterances is not None,
            "spidr_hf": __version__,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._sidecar(layer).parent.mkdir(parents=True, exist_ok=True)
        write_text(self._sidecar(layer), json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")


def _another_recording(place: Path, name: str, there: int, here: int) -> ValueError:
    return ValueError(
        f"{place} has results of another recording of the name {shown(name)!r}: {counted(there, 'frame')} there, "
        f"{here} here. Give another OUT_DIR, or --overwrite to replace them."
    )


def _units_of(line: bytes, layers: Sequence[int]) -> tuple[str | None, dict[int, np.ndarray]]:
    """Name and units by layer in a line of a journal or (of the one layer) a units file; nothing in other lines."""
    try:
        row = parse_json(line)
        if "layers" in row:
            found = {layer: row["layers"].get(str(layer)) for layer in layers}
            return row["file"], {layer: np.array(x, dtype=np.int64) for layer, x in found.items() if x is not None}
        name = next(row[key] for key in FILE_KEYS if key in row and "units" in row)
        return name, {layers[0]: units_of_row(row)}
    except (ValueError, KeyError, StopIteration):  # the last line of a killed run may be cut off
        return None, {}


def _identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    identity = {key: provenance.get(key) for key in IDENTITY if provenance.get(key) is not None}
    # A folder is known by its weights, wherever it lies; a repository by its name and revision.
    if "sha256" not in identity:
        identity |= {"model": provenance.get("model"), "revision": provenance.get("revision")}
    return identity


def _fingerprint(provenance: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_identity(provenance), sort_keys=True).encode()).hexdigest()[:12]


def _check_same(sidecar: Path, provenance: Mapping[str, Any], what: Path) -> None:
    """Raises `ValueError` unless what lies there was made as `provenance` says."""
    try:
        there, here = _identity(read_table(sidecar)), _identity(provenance)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{what} is there, but not how it was made ({sidecar.name}): give another OUT_DIR, or --overwrite to "
            "replace it."
        ) from error
    different = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"{what} was made with another {key.replace('_', ' ')} ({there.get(key)} there, {here.get(key)} now): give "
            "another OUT_DIR, or --overwrite to replace it."
        )


__all__ = ["IDENTITY", "LAYOUTS", "LENGTHS_FILE", "FeatureStore", "Layout", "OtherLength", "Store", "UnitStore"]
