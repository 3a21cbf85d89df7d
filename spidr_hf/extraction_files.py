"""Extraction to files: resumable, atomic, by one process or several.

While units are computed they go to a journal, `OUT_DIR/.partial/...`, one line per utterance; when all are there the
unit files are written in the order of the data and the journal goes. Feature files appear one by one, each complete.
Started again, the same command computes only what is missing. Several processes (started by `accelerate launch`) take
every n-th utterance by length; the first of them puts everything together.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from .extraction import Extractor, Throughput, extract
from .files import replaced_file, write_text
from .manifests import AudioSource, Skipped
from .run_state import RunFolderError, RunLock
from .units import FILE_KEYS, provenance_path, write_units

LAYOUTS = ("plain", "discophon", "fastabx")
SKIPPED_FILE = "skipped.jsonl"
# What a result depends on; anything else in a sidecar may differ between a file and the run that goes on with it.
_IDENTITY = (
    "sha256",
    "layer",
    "kind",
    "before_residual",
    "kmeans_sha256",
    "window_seconds",
    "context_seconds",
    "dtype",
    "resample",
)


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

    def units_path(self, root: Path, layer: int) -> Path:
        """The units of one layer."""
        name = f"units-{self.language}-{self.split}.jsonl" if self.name == "discophon" else "units.jsonl"
        return root / str(layer) / name

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


@dataclass
class Summary:
    """What an extraction did: utterances computed and found done, what was skipped, and where results lie."""

    computed: int
    found: int
    skipped: list[Skipped]
    seconds: float
    files: list[Path]
    throughput: str

    def __str__(self) -> str:
        text = f"{self.computed} utterances computed ({self.throughput})"
        if self.found:
            text += f", {self.found} were there before"
        return text


class UnitStore:
    """Units, one file per layer.

    Args:
        root: Output folder.
        layers: Layers, counted from 1.
        fileids: All utterances of the data.
        provenance: What made them, for the sidecar; `layer` is added.
        layout: Names of files and keys.
        collapse: Deduplicate, with durations.
        overwrite: Replace files made with other options or from other data.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        layers: Sequence[int],
        fileids: Sequence[str],
        provenance: Mapping[str, Any],
        *,
        layout: Layout | None = None,
        collapse: bool = False,
        overwrite: bool = False,
    ):
        self.root, self.layers, self.layout = Path(root), list(layers), layout or Layout()
        self.names = self.layout.names(fileids, units=True)
        self.provenance, self.collapse, self.overwrite = dict(provenance), collapse, overwrite
        if collapse and self.layout.name != "plain":
            raise ValueError(
                f"{self.layout.name} reads one unit per frame: leave --deduplicate out, or use the plain layout."
            )
        # Where each name's units lie: file and byte offset of a line, by layer.
        self._places: dict[int, dict[str, tuple[Path, int]]] = {layer: {} for layer in self.layers}

    @property
    def journal_folder(self) -> Path:
        """Where results wait until all are there."""
        stem = self.layout.units_path(self.root, 0).stem
        return self.root / ".partial" / f"{stem}-{_fingerprint(self.provenance)}"

    def missing(self, extractor: Extractor, source: AudioSource) -> list[int]:
        """Utterances without a result yet. Raises `ValueError` where other results are in the way."""
        expected = {
            name: extractor.frames(samples) for name, samples in zip(self.names, source.num_samples, strict=True)
        }
        for layer in self.layers:
            path = self.layout.units_path(self.root, layer)
            if not path.exists():
                continue
            try:
                _check_same(provenance_path(path), {**self.provenance, "layer": layer}, path)
            except ValueError:
                if not self.overwrite:
                    raise
            else:
                self._index(path, [layer], expected, complain=not self.overwrite)
        for journal in sorted(self.journal_folder.glob("*.jsonl")):
            self._index(journal, self.layers, expected)
        return [i for i, name in enumerate(self.names) if not all(name in self._places[layer] for layer in self.layers)]

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
            path = self.layout.units_path(self.root, layer)
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
        offset = 0
        with path.open("rb") as lines:
            for line in lines:
                written, units = _units_of(line, layers)
                name: Any = names.get(written, written)
                if complain and name is not None and name not in (expected or ()):
                    raise ValueError(
                        f"{path} holds units of {name!r}, which is not among the data: give another OUT_DIR, or "
                        "--overwrite to replace them."
                    )
                for layer, values in units.items():
                    if expected is None or expected.get(name) == len(values):
                        self._places[layer][name] = (path, offset)
                offset += len(line)

    def _pairs(self, layer: int) -> Iterator[tuple[str, np.ndarray]]:
        files: dict[Path, IO[bytes]] = {}
        try:
            for name in self.names:
                if name not in self._places[layer]:
                    continue
                path, offset = self._places[layer][name]
                if path not in files:
                    files[path] = path.open("rb")
                files[path].seek(offset)
                _, units = _units_of(files[path].readline(), [layer])
                if layer not in units:
                    raise OSError(f"{path} changed while it was read. Start the command again.")
                yield self._written_name(name), units[layer]
        finally:
            for file in files.values():
                file.close()

    def _written_name(self, name: str) -> str:
        # fastabx takes everything after the last point for a suffix.
        return f"{name}.flac" if self.layout.name == "fastabx" and "." in name else name


class FeatureStore:
    """Features, one file per utterance and layer: a tensor (T x H, float32, CPU).

    Arguments as for `UnitStore`; `suffix` is `.pt` (torch) or `.npy` (numpy).
    """

    def __init__(
        self,
        root: str | os.PathLike,
        layers: Sequence[int],
        fileids: Sequence[str],
        provenance: Mapping[str, Any],
        *,
        layout: Layout | None = None,
        suffix: str = ".pt",
        overwrite: bool = False,
    ):
        self.root, self.layers, self.layout = Path(root), list(layers), layout or Layout()
        self.names = self.layout.names(fileids, units=False)
        self.provenance, self.suffix, self.overwrite = dict(provenance), suffix, overwrite
        self._stale: list[int] = []  # layers with features of other options, to be replaced

    @property
    def journal_folder(self) -> Path:
        """Where skipped utterances are noted until the end."""
        return self.root / ".partial" / f"features-{_fingerprint(self.provenance)}"

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
                done, self._stale = False, [*self._stale, layer]
        if not done:
            return list(range(len(self.names)))
        return [
            i for i, name in enumerate(self.names) if not all(self._path(layer, name).exists() for layer in self.layers)
        ]

    def start(self) -> None:
        """Note what the features are made with; at no moment do they lie there without that, or with another's."""
        for layer in self._stale:
            for name in self.names:
                self._path(layer, name).unlink(missing_ok=True)
        for layer in self.layers:
            for left_over in self.layout.features_folder(self.root, layer).rglob(f".*.partial{self.suffix}"):
                left_over.unlink(missing_ok=True)  # of a killed process
            self._write_sidecar(layer, None)

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
            "spidr_hf": version("spidr_hf"),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._sidecar(layer).parent.mkdir(parents=True, exist_ok=True)
        write_text(self._sidecar(layer), json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n")


def run_extraction(
    source: AudioSource,
    extractor: Extractor,
    store: UnitStore | FeatureStore,
    *,
    threads: int = 2,
    progress: bool = True,
) -> Summary | None:
    """
    Extract what is missing in a store, on every process that was launched.

    Returns the summary on the main process and None on the others. Raises `ValueError` when not one utterance could be
    used, or other results are in the way.
    """
    state = PartialState()
    lock = _lock(store.root) if state.is_main_process else None
    try:
        todo = store.missing(extractor, source)
        earlier = list(store.journal_folder.glob("*.jsonl"))
        # All have looked before anyone writes: every process sees the same list.
        state.wait_for_everyone()
        throughput = Throughput()
        folder = store.journal_folder
        if todo:
            folder.mkdir(parents=True, exist_ok=True)
            if state.is_main_process and isinstance(store, FeatureStore):
                store.start()
            state.wait_for_everyone()
            lengths = np.asarray(source.num_samples)[todo]
            longest_first = np.asarray(todo)[np.argsort(-lengths, kind="stable")]
            mine = longest_first[state.process_index :: state.num_processes]
            started = time.time_ns()
            _extract_part(
                source,
                extractor,
                store,
                mine,
                folder / f"{started}-{state.process_index}.jsonl",
                threads,
                progress and state.is_main_process,
            )
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        return _finish(source, store, todo, earlier, throughput)
    finally:
        if lock is not None:
            lock.path.unlink(missing_ok=True)
            lock.release()


def _lock(folder: Path) -> RunLock:
    try:
        return RunLock(folder, patience=2.0)
    except RunFolderError as error:
        raise ValueError(
            f"Another extraction is writing into {folder}: wait for it, or give another OUT_DIR."
        ) from error


def _extract_part(
    source: AudioSource,
    extractor: Extractor,
    store: UnitStore | FeatureStore,
    indices: np.ndarray,
    journal_path: Path,
    threads: int,
    progress: bool,
) -> None:
    total = float(np.asarray(source.num_samples)[indices].sum()) / 16_000 + 1e-6  # sums of floats may exceed it
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"
    bar = tqdm(
        total=total, desc="Extracting", unit=" s of audio", bar_format=layout, disable=not progress, smoothing=0.05
    )
    with journal_path.open("w", encoding="utf-8") as journal, bar:
        for batch in extract(source, extractor, indices.tolist(), threads=threads):
            for index, result in batch.results:
                store.add(store.names[index], result, journal)
            for fileid, reason in batch.skipped:
                journal.write(json.dumps({"file": fileid, "skipped": reason}, ensure_ascii=False) + "\n")
            journal.write(json.dumps({"utterances": len(batch.results), "seconds": batch.seconds}) + "\n")
            journal.flush()
            bar.update(batch.planned_seconds)


def _finish(
    source: AudioSource,
    store: UnitStore | FeatureStore,
    todo: Sequence[int],
    earlier: Sequence[Path],
    throughput: Throughput,
) -> Summary:
    folder, computed, skipped = store.journal_folder, 0, {}
    journals = sorted(folder.glob("*.jsonl"))
    # Journals of interrupted runs are older; what they skipped was tried again.
    for path in journals:
        if path in earlier:
            continue
        for line in path.open(encoding="utf-8"):
            row = json.loads(line)
            if "skipped" in row:
                skipped[row["file"]] = row["skipped"]
            elif "seconds" in row:
                computed, throughput.seconds = computed + row["utterances"], throughput.seconds + row["seconds"]
    if len(skipped) == len(store.names):
        _clear(folder)
        fileid, reason = next(iter(skipped.items()))
        raise ValueError(f"None of the {len(skipped)} utterances can be used; the first, {fileid}: {reason}")
    files = store.finish()
    all_skipped = [*source.skipped, *(Skipped(*entry) for entry in skipped.items())]
    listing = store.root / SKIPPED_FILE
    if all_skipped:
        rows = (json.dumps({"file": f, "reason": reason}, ensure_ascii=False) for f, reason in all_skipped)
        write_text(listing, "".join(row + "\n" for row in rows))
    else:
        listing.unlink(missing_ok=True)
    _clear(folder)
    found = len(store.names) - len(todo)
    return Summary(computed, found, all_skipped, throughput.seconds, files, str(throughput))


def _clear(journal_folder: Path) -> None:
    shutil.rmtree(journal_folder, ignore_errors=True)
    if journal_folder.parent.exists() and not any(journal_folder.parent.iterdir()):
        journal_folder.parent.rmdir()


def _units_of(line: bytes, layers: Sequence[int]) -> tuple[str | None, dict[int, np.ndarray]]:
    """Name and units by layer in a line of a journal or (of the one layer) a units file; nothing in other lines."""
    try:
        row = json.loads(line)
        if "layers" in row:
            found = {layer: row["layers"].get(str(layer)) for layer in layers}
            return row["file"], {layer: np.array(x, dtype=np.int64) for layer, x in found.items() if x is not None}
        name = next(row[key] for key in FILE_KEYS if key in row and "units" in row)
        units = np.array(row["units"], dtype=np.int64)
        return name, {layers[0]: np.repeat(units, row["durations"]) if "durations" in row else units}
    except (ValueError, KeyError, StopIteration):  # the last line of a killed run may be cut off
        return None, {}


def _identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    identity = {key: provenance.get(key) for key in _IDENTITY if provenance.get(key) is not None}
    # A folder is known by its weights, wherever it lies; a repository by its name and revision.
    if "sha256" not in identity:
        identity |= {"model": provenance.get("model"), "revision": provenance.get("revision")}
    return identity


def _fingerprint(provenance: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_identity(provenance), sort_keys=True).encode()).hexdigest()[:12]


def _check_same(sidecar: Path, provenance: Mapping[str, Any], what: Path) -> None:
    """Raises `ValueError` unless what lies there was made as `provenance` says."""
    try:
        there, here = _identity(json.loads(sidecar.read_text(encoding="utf-8"))), _identity(provenance)
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


__all__ = [
    "LAYOUTS",
    "SKIPPED_FILE",
    "FeatureStore",
    "Layout",
    "Summary",
    "UnitStore",
    "run_extraction",
]
