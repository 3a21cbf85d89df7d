"""Manifests: which utterances there are, how long each is and where its samples lie.

A `Manifest` holds its rows in one Arrow table, never in Python objects, so that a million utterances cost a worker
process nothing. It comes from a CSV, JSON-lines or fairseq TSV file, from a folder of audio files, or from an
uncompressed tar, and is one `AudioSource`: whatever else offers audio (say, a `datasets` data set) has the same few
methods.
"""

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from tqdm import tqdm

from ..system.errors import AudioError, ManifestError
from ..system.files import replaced_file
from ..system.messages import counted, one_line, shown
from .audio import AudioFile, Member, Source, audio_suffixes, read_audio, read_info, read_window, unreadable_suffixes
from .containers import FileWindow, tar_members
from .manifest_files import (
    SCHEMA,
    explain,
    read_csv,
    read_jsonl,
    read_parquet,
    read_tsv,
    rows_of,
    write_csv,
    write_jsonl,
)
from .sources import Skipped, commonest

_TAR_COLUMNS = ("archive", "byte_offset", "byte_size")
_SCAN_THREADS = 8


class Manifest:
    """Utterances with their lengths and places, backed by an Arrow table.

    Args:
        table: columns `fileid`, `path`, `num_samples` (samples at 16 kHz), and for members of an uncompressed tar
            `archive`, `byte_offset`, `byte_size`.
        root: folder where relative paths and archives are looked for before the working folder.
        resample: take audio of any rate and number of channels (see `read_audio`).
        skipped: what was left out while the table was made.
        name: what error messages call it.

    Raises `ManifestError` for missing columns or values, duplicate fileids, and a table without rows.
    """

    def __init__(
        self,
        table: pa.Table,
        root: str | Path,
        *,
        resample: bool = False,
        skipped: Sequence[Skipped] = (),
        name: str = "manifest",
    ):
        self._hold(_checked(table, name), root, resample, skipped, name)

    def _hold(
        self, table: pa.Table, root: str | Path, resample: bool, skipped: Sequence[Skipped], name: str, file: Any = None
    ) -> None:
        """`file` is (path, key) of the Arrow file that the table is mapped from, where it is."""
        self.root = Path(root).absolute()
        self.resample = resample
        self.skipped = list(skipped)
        self.name = name
        self.table = table
        self.num_samples = _int64(table, "num_samples")
        self._offsets = _int64(table, "byte_offset")
        self._sizes = _int64(table, "byte_size")
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        # Processes that are not forked map the file as this one does, instead of getting a copy of the table.
        if self._file is not None:
            return _mapped_again, self._file
        return _held_again, (self.table, self.root, self.resample, self.skipped, self.name)

    def __len__(self) -> int:
        return self.table.num_rows

    def fileid(self, index: int) -> str:
        """Unique name of the utterance."""
        return self._value("fileid", index)

    def describe(self, index: int) -> str:
        """Where the utterance lies, for messages."""
        archive = self._archive(index)
        path = self._value("path", index)
        return f"{self._resolve(archive)}:{path}" if archive else str(self._resolve(path))

    def read(self, index: int) -> np.ndarray:
        """Waveform: S samples, float32, mono, 16 kHz. Raises `AudioError` where it cannot be had."""
        archive = self._archive(index)
        if archive:
            offset, size = int(self._offsets[index]), int(self._sizes[index])
            name = self.describe(index)
            return read_window(self._resolve(archive), offset, size, name=name, resample=self.resample)
        return read_audio(self._resolve(self._value("path", index)), resample=self.resample)

    def recording(self, index: int) -> AudioFile:
        """The same, to be decoded in parts."""
        if archive := self._archive(index):
            place: Source = Member(str(self._resolve(archive)), int(self._offsets[index]), int(self._sizes[index]))
        else:
            place = self._resolve(self._value("path", index))
        return AudioFile(place, name=self.describe(index), resample=self.resample)

    @property
    def fingerprint(self) -> str:
        """Changes with the utterances, their order and their lengths."""
        checksum = zlib.crc32(np.ascontiguousarray(self.num_samples))
        for batch in self.table.select(["fileid"]).to_batches():
            # Arrow's buffers are longer than what they hold, so the part in use is taken by its offsets.
            names = batch.column(0)
            _, offsets, text = names.buffers()
            bounds = np.frombuffer(offsets, dtype=np.int64)[names.offset : names.offset + len(names) + 1]
            checksum = zlib.crc32(memoryview(text)[bounds[0] : bounds[-1]], checksum)
            checksum = zlib.crc32(np.diff(bounds), checksum)
        return f"{len(self)}-{checksum:08x}"

    def write(self, path: str | Path) -> None:
        """Write a manifest file (`.csv`, `.jsonl`, `.parquet` or `.tsv`); an interrupted write leaves nothing behind.

        Paths below the file's folder are written relative to it, others as absolute paths.
        """
        path = Path(path)
        writers: dict[str, Callable[[IO[str], pa.Table], None]] = {
            ".csv": write_csv,
            ".jsonl": write_jsonl,
            ".tsv": self._write_tsv,
        }
        if path.suffix == ".parquet":
            with replaced_file(path) as partial:
                pyarrow.parquet.write_table(self._relative_to(path.absolute().parent), partial)
            return
        if path.suffix not in writers:
            raise ManifestError(f"{path}: a manifest is written as .csv, .jsonl, .parquet or .tsv.")
        if path.suffix == ".tsv" and "archive" in self.table.column_names:
            raise ManifestError(f"{path}: fairseq's TSV has no place for byte offsets in a tar. Write .csv or .jsonl.")
        table = self.table if path.suffix == ".tsv" else self._relative_to(path.absolute().parent)
        with replaced_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            writers[path.suffix](file, table)

    def save(self, path: str | Path, key: str = "") -> None:
        """Write the table as an Arrow file that `Manifest.load` maps into memory. `key` says what it was made from."""
        metadata = {"root": str(self.root), "resample": self.resample, "skipped": self.skipped, "name": self.name}
        save_scan(path, self.table, key, metadata)

    @classmethod
    def load(cls, path: str | Path, key: str = "") -> "Manifest | None":
        """What `save` wrote with the same `key`, memory-mapped; None where there is no such file."""
        if (found := load_scan(path, key, ("root", "resample", "name"))) is None:
            return None
        table, metadata = found
        # `save` had a table that was checked: ten million rows are not looked at again.
        manifest = cls.__new__(cls)
        file = (str(path), key)
        manifest._hold(table, metadata["root"], metadata["resample"], metadata["skipped"], metadata["name"], file)
        return manifest

    def _value(self, column: str, index: int) -> Any:
        return self.table.column(column)[int(index)].as_py()

    def _archive(self, index: int) -> str | None:
        return self._value("archive", index) if "archive" in self.table.column_names else None

    def _resolve(self, path: str) -> Path:
        beside = self.root / path  # os.path, unlike Path, takes names that no disk takes
        return beside if os.path.exists(beside) or not os.path.exists(path) else Path(path)

    def _relative_to(self, folder: Path) -> pa.Table:
        """The table with paths (or archives) relative to `folder` where they lie below it, else absolute."""
        column = "archive" if "archive" in self.table.column_names else "path"
        prefix = str(self.root.relative_to(folder)) if self.root.is_relative_to(folder) else str(self.root)
        if prefix == ".":
            return self.table
        paths = self.table.column(column)
        joined = pc.binary_join_element_wise(pa.scalar(prefix, paths.type), paths, pa.scalar("/", paths.type))
        joined = pc.if_else(pc.starts_with(paths, "/"), paths, joined)
        return self.table.set_column(self.table.column_names.index(column), column, joined)

    def _write_tsv(self, file: IO[str], table: pa.Table) -> None:
        file.write(f"{self.root}\n")
        for row in rows_of(table):
            file.write(f"{row['path']}\t{row['num_samples']}\n")


def save_scan(path: str | Path, table: pa.Table, key: str, metadata: Mapping[str, Any]) -> None:
    """Keep what was found out about audio as an Arrow file; an interrupted write leaves nothing behind.

    Args:
        path: of the file.
        table: the utterances.
        key: what it was made from; `load_scan` asks for the same.
        metadata: anything else, as JSON; `skipped` is a list of `Skipped`.
    """
    schema = table.schema.with_metadata({"spidr_hf": json.dumps({**metadata, "key": key})})
    with (
        replaced_file(path) as partial,
        pa.OSFile(str(partial), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        writer.write_table(table.replace_schema_metadata(schema.metadata))


def load_scan(path: str | Path, key: str, fields: Sequence[str] = ()) -> tuple[pa.Table, dict[str, Any]] | None:
    """The table that `save_scan` wrote with the same `key`, memory-mapped, and its metadata with at least `fields`.

    None where there is no such file, or a damaged one.
    """
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        metadata = json.loads((table.schema.metadata or {})[b"spidr_hf"])
        if metadata["key"] != key:
            return None
        metadata["skipped"] = [Skipped(*entry) for entry in metadata["skipped"]]
        return table, {field: metadata[field] for field in ("skipped", *fields)}
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None


def open_manifest(
    data: str | Path,
    *,
    resample: bool = False,
    suffixes: Sequence[str] | None = None,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Manifest:
    """Utterances of a manifest file, a folder of audio files, or an uncompressed tar.

    Args:
        data: `.csv`, `.jsonl` or `.tsv` file, folder, or `.tar`.
        resample: take audio of any rate and number of channels.
        suffixes: which files of a folder or tar are audio; those that can be read here by default.
        cache: Arrow file that keeps the result, so that the next start reads (and scans) nothing; it is made anew
            when the file behind `data` changes. A folder's contents count as unchanged.
        progress: show a bar while headers are read.

    Raises `ManifestError` with what to do where `data` cannot be used.
    """
    data = Path(data)
    if not data.exists():
        raise ManifestError(
            f"{data}: no such file or folder. Data is a manifest (.csv, .jsonl, .parquet, .tsv), a folder of audio "
            "files, a tar, or a data set (name:config:split)."
        )
    status = data.stat()
    change = "" if data.is_dir() else f"{status.st_size} {status.st_mtime_ns}"
    key = f"{data.absolute()} {change} {resample} {suffixes}"
    if cache is not None and (cached := Manifest.load(cache, key)) is not None:
        return cached
    if data.is_dir():
        manifest = scan_folder(data, resample=resample, suffixes=suffixes, progress=progress)
    elif data.suffix.lower() == ".tar":
        manifest = scan_tar(data, resample=resample, suffixes=suffixes, progress=progress)
    else:
        manifest = read_manifest(data, resample=resample)
    if cache is not None:
        manifest.save(cache, key)
        manifest = Manifest.load(cache, key) or manifest
        pa.default_memory_pool().release_unused()  # what reading and checking took
    return manifest


def read_manifest(path: str | Path, *, resample: bool = False) -> Manifest:
    """Manifest file in one of the formats `.csv`, `.jsonl`, `.parquet` (same columns) or `.tsv` (fairseq)."""
    path = Path(path)
    readers = {".csv": read_csv, ".jsonl": read_jsonl, ".json": read_jsonl, ".parquet": read_parquet, ".tsv": read_tsv}
    if path.suffix.lower() not in readers:
        raise ManifestError(
            f"{path}: unknown kind of data. Manifests end in .csv, .jsonl, .parquet or .tsv; audio comes as a folder "
            "or as a .tar without compression."
        )
    try:
        table, root = readers[path.suffix.lower()](path)
        return Manifest(table, root, resample=resample, name=str(path))
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read as a manifest ({one_line(error)}).") from error
    except (ValueError, pa.ArrowException) as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: Exception) -> ManifestError:
    """What is wrong with a manifest file: the line, where it is one."""
    try:
        explain(path)
    except ValueError as found:
        error = found
    known = isinstance(error, ValueError) and str(error).startswith(str(path))
    return ManifestError(one_line(error) if known else f"{path}: cannot be read as a manifest ({one_line(error)}).")


def scan_folder(
    folder: str | Path, *, resample: bool = False, suffixes: Sequence[str] | None = None, progress: bool = True
) -> Manifest:
    """Manifest of the audio files below a folder; their headers are read. Fileids are paths without suffix.

    Links to folders are followed, each folder once. What cannot be read (folders, names that are no UTF-8, kinds of
    audio) is in `skipped`.
    """
    folder, wanted = Path(folder), _suffixes(suffixes)
    found, skipped = _files_below(folder)
    paths = []
    for path in found:
        if reason := _left_out(path, wanted, suffixes is None):
            skipped.append(Skipped(shown(path), f"{shown(folder / path)}: {reason}"))
        elif path.lower().endswith(wanted) and not _is_apples(path):
            paths.append(path)
    if not paths:
        raise ManifestError(
            f"{folder}: no audio files ({', '.join(wanted)}) in this folder or below it.{_first(skipped)}"
        )

    def length(path: str) -> int | AudioError:
        try:
            return read_info(folder / path, resample=resample).num_samples_16k
        except AudioError as error:
            return error

    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        bar = tqdm(pool.map(length, paths), total=len(paths), desc="Reading headers", disable=not progress, unit="file")
        rows = [(path, result) for path, result in zip(paths, bar, strict=True)]
    columns, more = _split(rows, str(folder))
    return Manifest(pa.table(columns), folder, resample=resample, skipped=skipped + more, name=str(folder))


def _files_below(folder: Path) -> tuple[list[str], list[Skipped]]:
    """Paths of all files below a folder, sorted, and the folders that cannot be read.

    Every folder comes once, under its own name where it lies in this one, and links may lead anywhere.
    """
    skipped: list[Skipped] = []
    paths: list[str] = []
    seen: set[tuple[int, int]] = set()

    def note(error: OSError) -> None:
        name = os.path.relpath(error.filename, folder)
        skipped.append(Skipped(shown(name), f"{shown(error.filename)}: cannot be looked into ({error.strerror})."))

    waiting = [os.fspath(folder)]
    while waiting:
        links: list[str] = []
        for start in waiting:
            for parent, folders, names in os.walk(start, onerror=note):
                status = os.stat(parent)
                if (status.st_dev, status.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((status.st_dev, status.st_ino))
                folders.sort()
                links += (path for name in folders if os.path.islink(path := os.path.join(parent, name)))
                paths += (os.path.relpath(os.path.join(parent, name), folder) for name in names)
        # Links come when all that lies here itself has its name.
        waiting = sorted(links)
    return sorted(paths), skipped


def _left_out(path: str, wanted: tuple[str, ...], all_kinds: bool) -> str | None:
    """Why a file that is audio by its name is not used; None for those that are used or are none."""
    if _is_apples(path):
        return None
    suffix = os.path.splitext(path)[1].lower()
    if all_kinds and (advice := unreadable_suffixes().get(suffix)):
        return f"{suffix} cannot be read here: {advice}."
    if not path.lower().endswith(wanted):
        return None
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is no UTF-8: rename it (convmv does so for whole folders)."
    return None


def _is_apples(path: str) -> bool:
    """What macOS puts beside the files in archives and on foreign disks: no audio, whatever it is called."""
    return os.path.basename(path).startswith("._") or "__MACOSX" in path.split(os.sep)


def _first(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    how_many, first = commonest(skipped)
    return f" {counted(len(skipped), 'file')} left out; {how_many}the first: {first.reason}"


def scan_tar(
    path: str | Path, *, resample: bool = False, suffixes: Sequence[str] | None = None, progress: bool = True
) -> Manifest:
    """Manifest of the audio files in an uncompressed tar, which is never unpacked: samples are read by offset.

    Members that lie there in pieces and links to others are in `skipped`.
    """
    path, wanted = Path(path), _suffixes(suffixes)
    rows: list[tuple[str, int | AudioError]] = []
    skipped: list[Skipped] = []
    places: dict[str, tuple[int, int]] = {}
    names: dict[int, str] = {}
    with open(path, "rb") as file:
        for name, offset, size, problem in tar_members(path, progress):
            if not problem:
                problem = _left_out(name, wanted, suffixes is None)
            if (not name.lower().endswith(wanted) and not problem) or _is_apples(name):
                continue
            if not problem and offset in names:
                problem = f"is a link to {shown(names[offset])}, which is used itself"
            if problem:
                if name.lower().endswith((*wanted, *unreadable_suffixes())):
                    skipped.append(Skipped(shown(name), f"{path}:{shown(name)}: {problem}"))
                continue
            if name in places:
                raise ManifestError(f"{path}: holds {shown(name)} twice. Remove one of them.")
            places[name], names[offset] = (offset, size), name
            try:
                window = FileWindow(file, offset, size)
                length = read_info(cast(BinaryIO, window), name=f"{path}:{name}", resample=resample).num_samples_16k
            except AudioError as error:
                rows.append((name, error))
            else:
                rows.append((name, length))
    if not rows:
        raise ManifestError(f"{path}: no audio files ({', '.join(wanted)}) in this tar.{_first(skipped)}")
    columns, more = _split(rows, str(path))
    columns["archive"] = [path.name] * len(columns["path"])
    columns["byte_offset"] = [places[name][0] for name in columns["path"]]
    columns["byte_size"] = [places[name][1] for name in columns["path"]]
    root, skipped = path.absolute().parent, skipped + more
    return Manifest(pa.table(columns), root, resample=resample, skipped=skipped, name=str(path))


def _suffixes(suffixes: Sequence[str] | None) -> tuple[str, ...]:
    return tuple("." + suffix.lower().lstrip(".") for suffix in suffixes or audio_suffixes())


def _split(rows: Iterable[tuple[str, int | AudioError]], name: str) -> tuple[dict[str, Any], list[Skipped]]:
    """Columns of what can be read, and what cannot."""
    columns: dict[str, Any] = {"path": [], "num_samples": []}
    skipped, rows = [], list(rows)
    fileids = Counter(os.path.splitext(path)[0] for path, _ in rows)
    for path, result in rows:
        if isinstance(result, AudioError):
            fileid = os.path.splitext(path)[0]
            # Of two files of one name but for the suffix, the other may be used.
            skipped.append(Skipped(fileid if fileids[fileid] == 1 else path, str(result)))
        else:
            columns["path"].append(path)
            columns["num_samples"].append(result)
    if not columns["path"]:
        how_many, first = commonest(skipped)
        nothing = counted(0, "audio file", of=len(skipped))
        raise ManifestError(f"{name}: {nothing} can be used; {how_many}the first: {first.reason}")
    return columns, skipped


def _mapped_again(path: str, key: str) -> Manifest:
    if (manifest := Manifest.load(path, key)) is None:
        raise ManifestError(f"{path}: was changed while it was in use. Start again.")
    return manifest


def _held_again(*content: Any) -> Manifest:
    manifest = Manifest.__new__(Manifest)
    manifest._hold(*content)
    return manifest


def _checked(table: pa.Table, name: str) -> pa.Table:
    """The table with every column in its type, one chunk each, after the checks that `Manifest` promises."""
    missing = [column for column in ("path", "num_samples") if column not in table.column_names]
    if table.num_rows == 0 and not missing:
        raise ManifestError(f"{name}: holds no utterances.")
    present = [column for column in _TAR_COLUMNS if column in table.column_names]
    if present and len(present) < len(_TAR_COLUMNS):
        missing += [column for column in _TAR_COLUMNS if column not in present]
    if missing:
        raise ManifestError(
            f"{name}: has no column {', '.join(missing)}. A manifest has the columns fileid, path, num_samples and, "
            "for audio in a tar, archive, byte_offset, byte_size (`examples/write_manifest.py` writes one)."
        )
    if "fileid" not in table.column_names:
        table = table.append_column("fileid", _fileids(table.column("path").cast(pa.large_string())))
    columns = [column for column in SCHEMA.names if column in table.column_names]
    table = table.select(columns).cast(pa.schema([SCHEMA.field(column) for column in columns])).combine_chunks()

    for column in ("fileid", "path", "num_samples"):
        values = table.column(column)
        bad = pc.is_null(values) if column == "num_samples" else pc.or_kleene(pc.is_null(values), pc.equal(values, ""))
        if (row := pc.index(bad, True).as_py()) >= 0:
            raise ManifestError(f"{name}: utterance {row + 1} has no {column}.")
    if (row := pc.index(pc.less(table.column("num_samples"), 0), True).as_py()) >= 0:
        raise ManifestError(f"{name}: utterance {row + 1} has a negative num_samples.")
    if present:
        in_archive = pc.not_equal(pc.fill_null(table.column("archive"), ""), "")
        for column in ("byte_offset", "byte_size"):
            bad = pc.and_(in_archive, pc.less(pc.fill_null(table.column(column), -1), 0))
            if (row := pc.index(bad, True).as_py()) >= 0:
                raise ManifestError(f"{name}: utterance {row + 1} lies in an archive and has no {column}.")
    if len(pc.unique(table.column("fileid"))) != table.num_rows:  # five times as fast as `count_distinct`
        counts = pc.value_counts(table.column("fileid"))
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        raise ManifestError(
            f"{name}: fileid {twice[0]['values'].as_py()!r} stands for {twice[0]['counts'].as_py()} utterances "
            f"({counted(len(twice), 'such fileid')}). Each needs its own; of a folder that holds the same audio in "
            "several formats, name a folder or a manifest with one of them."
        )
    _check_recordings(table, name, bool(present))
    return table


def _check_recordings(table: pa.Table, name: str, in_archives: bool) -> None:
    """Raises `ManifestError` where a recording comes twice, under whatever names."""
    columns = [pc.fill_null(table.column("path"), "")]
    if in_archives:
        archive = pc.fill_null(table.column("archive"), "")
        offset = pc.fill_null(table.column("byte_offset"), 0).cast(pa.large_string())
        # In an archive the place is what counts.
        inside = pc.binary_join_element_wise(archive, offset, pa.scalar(":", archive.type))
        columns = [pc.if_else(pc.equal(archive, ""), columns[0], inside)]
    places = columns[0]
    # Expressions take as long as all else here, for what few manifests have.
    if any(pc.any(pc.match_substring(places, part)).as_py() for part in ("//", "./")):
        places = pc.replace_substring_regex(places, r"/(\./)+|//+", "/")
        places = pc.replace_substring_regex(places, r"^(\./)+", "")
    if len(pc.unique(places)) == table.num_rows:
        return
    counts = pc.value_counts(places)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    rows = pc.indices_nonzero(pc.equal(places, twice[0]["values"])).to_pylist()[:2]
    first, second = (shown(table.column("fileid")[row].as_py()) for row in rows)
    raise ManifestError(
        f"{name}: the recording {shown(table.column('path')[rows[0]].as_py())} is there {twice[0]['counts'].as_py()} "
        f"times, as {first!r} and {second!r} ({counted(len(twice), 'such recording')}). Leave the others out; what "
        "should be heard more often gets a weight (data.weights)."
    )


def _fileids(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Paths below their root, without suffix. The root of absolute paths is the folder that holds them all."""
    extent = pc.min_max(paths)
    if len(paths) and (extent["min"].as_py() or "").startswith("/"):
        common = os.path.commonpath([os.path.dirname(extent[which].as_py()) for which in ("min", "max")])
        prefix = common.rstrip("/") + "/"
        paths = pc.if_else(pc.starts_with(paths, prefix), pc.utf8_slice_codeunits(paths, len(prefix)), paths)
    paths = pc.replace_substring_regex(paths, r"^(\.{0,2}/)+", "")
    return pc.replace_substring_regex(paths, r"([^/])\.[^./]*$", r"\1")


def _int64(table: pa.Table, column: str) -> np.ndarray:
    """A column as a numpy array that shares its memory; nulls, where there are any, become -1."""
    if column not in table.column_names:
        return np.empty(0, dtype=np.int64)
    values = table.column(column)
    if values.null_count:
        values = values.fill_null(-1)
    return (values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()).to_numpy(zero_copy_only=False)


__all__ = ["Manifest", "load_scan", "open_manifest", "read_manifest", "save_scan", "scan_folder", "scan_tar"]
