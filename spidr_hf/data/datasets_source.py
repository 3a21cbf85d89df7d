"""Data sets of the `datasets` library as an `AudioSource`.

Audio is decoded by soundfile from the stored bytes or files (`Audio(decode=False)`), so that torchcodec is not needed.
"""

import io
import logging
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ..system.errors import AudioError, ManifestError
from ..system.messages import counted
from .audio import AudioFile, read_audio, read_info
from .manifests import load_scan, save_scan
from .sources import Skipped, commonest

logger = logging.getLogger(__name__)

# Columns that name an utterance, in the order they are looked for.
_ID_COLUMNS = ("fileid", "id", "file_id", "utterance_id", "segment_id", "file", "path")
_PATH_COLUMNS = ("file", "path")
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
# A saved data set is one table; it is streamed in so many parts.
_SAVED_SHARDS = 64
_SCAN_THREADS = 8
_SCANNED = pa.schema({"row": pa.int64(), "fileid": pa.large_string(), "num_samples": pa.int64()})


class DatasetSource:
    """Utterances of a map-style data set with an `Audio` column.

    Args:
        dataset: A `datasets.Dataset`.
        resample: Take audio of any rate and number of channels.
        name: What error messages call it.
        cache: Arrow file that keeps what the headers say, so that the next start reads none; it is made anew when the
            data set changes. Audio files that its rows only name count as unchanged.
        progress: Show a bar while headers are read.

    Raises `ManifestError` where there is no audio column, or no audio that can be used.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        resample: bool = False,
        name: str = "data set",
        cache: str | Path | None = None,
        progress: bool = True,
    ):
        from datasets import Audio

        if dataset.format["type"] == "custom":
            logger.warning("%s: its transform is left out, audio is read as it is stored.", name)
        # A format may hide columns; what is read here is what is stored.
        dataset = dataset.with_format(None)
        self.column, self.name, self.resample = audio_column(dataset, name), name, resample
        self.dataset = dataset.cast_column(self.column, Audio(decode=False))
        self._hold_chunks()
        key = f"data set {dataset._fingerprint} {len(dataset)} {self.column} {resample}"
        found = None if cache is None else load_scan(cache, key)
        if found is None:
            table, self.skipped = self._scan(progress)
            if cache is not None:
                save_scan(cache, table, key, {"skipped": self.skipped})
                found = load_scan(cache, key)
        if found is not None:
            table, self.skipped = found[0], found[1]["skipped"]
        self._rows, self.num_samples = (table[column].to_numpy() for column in ("row", "num_samples"))
        # As an Arrow array: a list of a million names would be copied into every worker process.
        self._names = table["fileid"]

    def _hold_chunks(self) -> None:
        """The stored audio, piece by piece: put together, more than 2 GiB would overflow, and less be copied."""
        self._chunks = self.dataset.data.column(self.column).chunks
        self._chunk_ends = np.cumsum([len(chunk) for chunk in self._chunks])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_chunks"}  # the data set holds them

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._hold_chunks()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def fingerprint(self) -> str:
        """Changes with the utterances, their order and their lengths."""
        checksum = zlib.crc32("\n".join(self._names.to_pylist()).encode(), zlib.crc32(self.num_samples))
        return f"{len(self)}-{checksum:08x}"

    def fileid(self, index: int) -> str:
        """Unique name of the utterance: an id column, else the audio file's path without suffix, else its number."""
        return self._names[int(index)].as_py()

    def read(self, index: int) -> np.ndarray:
        """Waveform: S samples, float32, mono, 16 kHz. Raises `AudioError` where it cannot be had."""
        source, name = self._audio(int(self._rows[index]), self.fileid(index))
        return read_audio(source, name=name, resample=self.resample)

    def recording(self, index: int) -> AudioFile:
        """The same, to be decoded in parts."""
        source, name = self._audio(int(self._rows[index]), self.fileid(index))
        return AudioFile(source, name=name, resample=self.resample)

    def values(self, column: str) -> list[Any]:
        """A column's value of every utterance, in order, None where it has none; of a `ClassLabel` column by name."""
        if column not in self.dataset.column_names:
            raise ManifestError(f"{self.name}: has no column {column!r}, only {', '.join(self.dataset.column_names)}.")
        values = self.dataset.select(self._rows).select_columns(column)[column]
        names = getattr(self.dataset.features[column], "names", None)
        if not names:
            return list(values)
        return [None if value in (None, -1) else names[value] for value in values]  # -1: `datasets`' word for no label

    def _scan(self, progress: bool) -> tuple[pa.Table, list[Skipped]]:
        """The rows whose audio can be used, by their headers; and the others."""
        fileids = self._fileids()

        def length(row: int) -> int | AudioError:
            try:
                source, name = self._audio(row, fileids[row], copy=False)
                return read_info(source, name=name, resample=self.resample).num_samples_16k
            except AudioError as error:
                return error

        count = len(self.dataset)
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            found = pool.map(length, range(count))
            lengths = list(tqdm(found, total=count, desc="Reading headers", disable=not progress, unit="file"))
        skipped = [Skipped(fileids[row], str(e)) for row, e in enumerate(lengths) if isinstance(e, AudioError)]
        rows = [row for row, length in enumerate(lengths) if not isinstance(length, AudioError)]
        if not rows:
            how_many, first = commonest(skipped) if skipped else ("", None)
            why = f"; {how_many}the first: {first.reason}" if first else ""
            raise ManifestError(
                f"{self.name}: {counted(0, 'row', 'holds', 'hold', of=count)} audio that can be used{why}"
            )
        columns = {"row": rows, "fileid": [fileids[row] for row in rows], "num_samples": [lengths[row] for row in rows]}
        return pa.table(columns, _SCANNED), skipped

    def _audio(self, row: int, fileid: str, copy: bool = True) -> tuple[Any, str]:
        """What `read_audio` takes, and what messages call it. Without a copy, content is read where it lies."""
        name = f"{self.name}, {fileid}"
        indices = self.dataset._indices
        row = row if indices is None else indices.column(0)[row].as_py()
        chunk = int(np.searchsorted(self._chunk_ends, row, side="right"))
        stored = self._chunks[chunk]
        place = row - (int(self._chunk_ends[chunk - 1]) if chunk else 0)
        content = None if stored[place : place + 1].null_count else _content(stored.field("bytes"), place)
        audio = stored_audio({"bytes": content, "path": stored.field("path")[place].as_py()}, name)
        if not isinstance(audio, pa.Buffer):
            return audio, name
        return (audio.to_pybytes() if copy else io.BufferedReader(pa.BufferReader(audio))), name

    def _fileids(self) -> list[str]:
        for column in _ID_COLUMNS:
            if column in self.dataset.column_names and column != self.column:
                values = ["" if v is None else str(v) for v in self.dataset.select_columns(column)[column]]
                values = [_without_suffix(value) for value in values] if column in _PATH_COLUMNS else values
                if len(set(values)) == len(values) and all(values):
                    return values
        chunks = self._chunks if self.dataset._indices is None else ()
        paths = (path for chunk in chunks for path in chunk.field("path").to_pylist())
        stems = [os.path.splitext(os.path.basename(path or ""))[0] for path in paths]
        if all(stems) and len(set(stems)) == len(self.dataset):
            return stems
        width = len(str(len(self.dataset)))
        return [f"{i:0{width}d}" for i in range(len(self.dataset))]


def _content(column: pa.Array, row: int) -> pa.Buffer | None:
    """A row's bytes where they lie, which a scalar of Arrow would copy; None where there are none."""
    if not column[row : row + 1].is_valid()[0].as_py():
        return None
    kind = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    _, offsets, content = column.buffers()
    start, end = np.frombuffer(offsets, kind, 2, (column.offset + row) * np.dtype(kind).itemsize)
    return content.slice(int(start), int(end - start)) if end > start else None


def is_dataset(data: str | Path) -> bool:
    """Whether DATA names a data set: a folder that `save_to_disk` made, or a name on the Hub (`name:config:split`)."""
    text = str(data)
    folder = Path(text.split(":")[0])
    if Path(text).exists() or folder.exists():
        saved = any((folder / name).exists() for name in _SAVED) or _holds_parquet(folder)
        return folder.is_dir() and (saved or ":" in text)
    # A path that is not there stays a path, so that the error speaks of files.
    return ":" in text or (text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).suffix)


def _holds_parquet(folder: Path) -> bool:
    """Whether a folder is a data set in parquet files, as the Hub keeps them: in it or its folder `data`."""
    return any(next(place.glob("*.parquet"), None) is not None for place in (folder, folder / "data"))


def audio_column(dataset: Any, name: str) -> str:
    """The data set's first column of the type `Audio`. Raises `ManifestError` where there is none."""
    from datasets import Audio

    for column, feature in dataset.features.items():
        # As it is stored where no one said that it is audio (parquet files, for one).
        plain = isinstance(feature, dict) and {"bytes", "path"} == set(feature)
        if isinstance(feature, Audio) or plain:
            return column
    raise ManifestError(
        f"{name}: has no column of the type Audio, only {', '.join(dataset.features)}. Cast the one that holds files: "
        "dataset.cast_column('audio', Audio())."
    )


def stored_audio(audio: Mapping[str, Any] | None, name: str) -> bytes | str:
    """What `Audio(decode=False)` gives as `read_audio` takes it: content, or the path of a file on this machine."""
    content, path = (audio or {}).get("bytes"), (audio or {}).get("path")
    if not content and path and "://" in path:  # a streamed file, on the Hub or in an archive
        from datasets.utils.file_utils import xopen

        with xopen(path, "rb") as file:
            content = file.read()
    if not content and not path:
        raise AudioError(f"{name}: there is no audio in this row.")
    return content or path  # type: ignore[return-value]


def row_name(row: Mapping[str, Any], column: str) -> str:
    """What a row alone says its utterance is called: an id column, else the audio file's path; empty if neither."""
    for name in _ID_COLUMNS:
        if name != column and row.get(name) not in (None, ""):
            return _without_suffix(str(row[name])) if name in _PATH_COLUMNS else str(row[name])
    return os.path.splitext(os.path.basename((row[column] or {}).get("path") or ""))[0]


def open_dataset(
    data: str | Path, *, resample: bool = False, cache: str | Path | None = None, progress: bool = True
) -> DatasetSource:
    """The data set `name:config:split` of the Hub, or of a folder (`folder`, `folder:split`, `folder:config:split`)."""
    return DatasetSource(load_dataset(data), resample=resample, name=str(data), cache=cache, progress=progress)


def load_dataset(data: str | Path, *, streaming: bool = False) -> Any:
    """The `datasets.Dataset` that `name:config:split` names, or the `IterableDataset` that streams it."""
    import datasets

    text = str(data)
    name, *rest = text.split(":")
    if len(rest) > 2:
        raise ManifestError(f"{text}: a data set is given as name:config:split.")
    config, split = (rest[0] or None, rest[1] or None) if len(rest) == 2 else (None, rest[0] if rest else None)
    try:
        if any(Path(name, saved).exists() for saved in _SAVED):
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, dict):
                loaded = _one_split(loaded, split, text)
            return loaded.to_iterable_dataset(min(len(loaded), _SAVED_SHARDS)) if streaming else loaded
        if len(rest) == 1 and not Path(name).exists():
            config, split = rest[0], None
        loaded = datasets.load_dataset(name, config, split=split, streaming=streaming)
        return _one_split(loaded, None, text) if isinstance(loaded, dict) else loaded
    except ManifestError:
        raise
    except Exception as error:  # the library raises whatever its many readers raise
        lines = str(error).strip().splitlines() or [repr(error)]
        missing = "" if Path(name).exists() else "no such file or folder, and it "
        raise ManifestError(f"{text}: {missing}cannot be loaded as a data set ({lines[0]}).") from error


def _without_suffix(path: str) -> str:
    return os.path.splitext(path)[0].lstrip("/")


def _one_split(splits: Any, split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        folder = name.split(":")[0]
        raise ManifestError(
            f"{name}: has the splits {', '.join(splits)}. Choose one: {folder}::{next(iter(splits))}, for example."
        )
    return splits[split]


__all__ = ["DatasetSource", "audio_column", "is_dataset", "load_dataset", "open_dataset", "row_name", "stored_audio"]
