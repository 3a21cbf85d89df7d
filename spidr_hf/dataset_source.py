"""Data sets of the `datasets` library as an `AudioSource`.

Audio is decoded by soundfile from the stored bytes or files (`Audio(decode=False)`), so that torchcodec is not needed.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from .audio import AudioError, read_audio, read_info
from .manifests import AudioSource, ManifestError, Skipped, open_manifest

# Columns that name an utterance, in the order they are looked for.
_ID_COLUMNS = ("fileid", "id", "file_id", "utterance_id", "segment_id", "file", "path")
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_SCAN_THREADS = 8


class DatasetSource:
    """Utterances of a map-style data set with an `Audio` column.

    Args:
        dataset: A `datasets.Dataset`.
        resample: Take audio of any rate and number of channels.
        name: What error messages call it.
        progress: Show a bar while headers are read.

    Raises `ManifestError` where there is no audio column, or no audio that can be used.
    """

    def __init__(self, dataset: Any, *, resample: bool = False, name: str = "data set", progress: bool = True):
        from datasets import Audio

        columns = [column for column, feature in dataset.features.items() if isinstance(feature, Audio)]
        if not columns:
            raise ManifestError(
                f"{name}: has no column of the type Audio, only {', '.join(dataset.column_names)}. Cast the one that "
                "holds files: dataset.cast_column('audio', Audio())."
            )
        self.column, self.name, self.resample = columns[0], name, resample
        self.dataset = dataset.cast_column(self.column, Audio(decode=False))
        fileids = self._fileids()

        def length(index: int) -> int | AudioError:
            try:
                source, name = self._audio(index, fileids[index])
                return read_info(source, name=name, resample=resample).num_samples_16k
            except AudioError as error:
                return error

        with ThreadPoolExecutor(_SCAN_THREADS) as pool:
            found = pool.map(length, range(len(dataset)))
            bar = tqdm(found, total=len(dataset), desc="Reading headers", disable=not progress, unit="file")
            lengths = list(bar)
        self._rows = np.array(
            [i for i, entry in enumerate(lengths) if not isinstance(entry, AudioError)], dtype=np.int64
        )
        self.skipped = [Skipped(fileids[i], str(e)) for i, e in enumerate(lengths) if isinstance(e, AudioError)]
        if not len(self._rows):
            first = f"; the first: {self.skipped[0].reason}" if self.skipped else ""
            raise ManifestError(f"{name}: none of its {len(dataset)} rows holds audio that can be used{first}")
        # As an Arrow array: a list of a million names would be copied into every worker process.
        self._names = pa.array([fileids[i] for i in self._rows], pa.large_string())
        self.num_samples = np.array([lengths[i] for i in self._rows], dtype=np.int64)

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

    def _audio(self, row: int, fileid: str) -> tuple[Any, str]:
        audio = self.dataset[row][self.column] or {}
        source = audio.get("bytes") or audio.get("path")
        name = f"{self.name}, {fileid}"
        if not source:
            raise AudioError(f"{name}: there is no audio in this row.")
        return source, name

    def _fileids(self) -> list[str]:
        for column in _ID_COLUMNS:
            if column in self.dataset.column_names and column != self.column:
                values = [str(value) for value in self.dataset[column]]
                if len(set(values)) == len(values) and all(values):
                    return [os.path.splitext(v)[0].lstrip("/") if column in ("file", "path") else v for v in values]
        storage = self.dataset.data.column(self.column).combine_chunks()
        paths = storage.field("path").to_pylist() if self.dataset._indices is None else [None]
        stems = [os.path.splitext(os.path.basename(path or ""))[0] for path in paths]
        if all(stems) and len(set(stems)) == len(self.dataset):
            return stems
        width = len(str(len(self.dataset)))
        return [f"{i:0{width}d}" for i in range(len(self.dataset))]


def is_dataset(data: str | Path) -> bool:
    """Whether DATA names a data set: a folder that `save_to_disk` made, or a name on the Hub (`name:config:split`)."""
    text = str(data)
    folder = Path(text.split(":")[0])
    if Path(text).exists() or folder.exists():
        return folder.is_dir() and (any((folder / name).exists() for name in _SAVED) or ":" in text)
    # A path that is not there stays a path, so that the error speaks of files.
    return ":" in text or (text.count("/") == 1 and not text.startswith((".", "/", "~")) and not Path(text).suffix)


def open_dataset(data: str | Path, *, resample: bool = False, progress: bool = True) -> DatasetSource:
    """The data set `name:config:split` of the Hub, or of a folder (`folder`, `folder:split`, `folder:config:split`)."""
    import datasets

    text = str(data)
    name, *rest = text.split(":")
    if len(rest) > 2:
        raise ManifestError(f"{text}: a data set is given as name:config:split.")
    config, split = (rest[0] or None, rest[1] or None) if len(rest) == 2 else (None, rest[0] if rest else None)
    try:
        if any(Path(name, saved).exists() for saved in _SAVED):
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = _one_split(loaded, split, text)
        else:
            if len(rest) == 1 and not Path(name).exists():
                config, split = rest[0], None
            loaded = datasets.load_dataset(name, config, split=split)
            if isinstance(loaded, datasets.DatasetDict):
                loaded = _one_split(loaded, None, text)
    except ManifestError:
        raise
    except Exception as error:  # the library raises whatever its many readers raise
        lines = str(error).strip().splitlines() or [repr(error)]
        missing = "" if Path(name).exists() else "no such file or folder, and it "
        raise ManifestError(f"{text}: {missing}cannot be loaded as a data set ({lines[0]}).") from error
    return DatasetSource(loaded, resample=resample, name=text, progress=progress)


def _one_split(splits: Any, split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        folder = name.split(":")[0]
        raise ManifestError(
            f"{name}: has the splits {', '.join(splits)}. Choose one: {folder}::{next(iter(splits))}, for example."
        )
    return splits[split]


def open_data(
    data: str | Path, *, resample: bool = False, cache: str | Path | None = None, progress: bool = True
) -> AudioSource:
    """Utterances of DATA: a manifest, a folder of audio files, a tar, or a data set of `datasets`.

    Args:
        data: what the commands call DATA.
        resample: take audio of any rate and number of channels.
        cache: where the scan of a folder, a tar or a manifest is kept (see `open_manifest`).
        progress: show a bar while headers are read.

    Raises `ManifestError` with what to do where `data` cannot be used.
    """
    if is_dataset(data):
        return open_dataset(data, resample=resample, progress=progress)
    return open_manifest(data, resample=resample, cache=cache, progress=progress)


__all__ = ["DatasetSource", "is_dataset", "open_data", "open_dataset"]
