"""Extraction to files: resumable, atomic, by one process or several.

While units are computed they go to a journal, `OUT_DIR/.partial/...`, one line per utterance; when all are there the
unit files are written in the order of the data and the journal goes. Feature files appear one by one, each complete.
Started again, the same command computes only what is missing. Several processes (started by `accelerate launch`) take
every n-th batch; the first of them puts everything together. Shards (jobs that know nothing of each other) do so, too,
and the last of them puts everything together.
"""

import json
import shutil
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from ..data.sources import AudioSource, Skipped, commonest
from ..system.errors import RunFolderError
from ..system.files import naming, write_text
from ..system.messages import counted, warn_once
from ..system.processes import RunLock
from ..system.tables import json_lines
from .extractor import Extractor, Throughput, extract, plan_batches
from .stores import LENGTHS_FILE, OtherLength, Store

SKIPPED_FILE = "skipped.jsonl"
_STARTED = "started"  # among the journals: the store is prepared


@dataclass
class Summary:
    """What an extraction did: utterances computed and found done, what was skipped, and where results lie.

    `not_finite`: those of the skipped whose results are NaN or infinite. `lengths`: what is not as long as DATA says.
    `waiting`: utterances that other shards have yet to compute; None while some of these are at work.
    """

    computed: int
    found: int
    skipped: list[Skipped]
    not_finite: list[Skipped]
    lengths: list[OtherLength]
    seconds: float
    files: list[Path]
    throughput: str
    waiting: int | None = 0

    def __str__(self) -> str:
        text = f"{counted(self.computed, 'utterance')} computed{f' ({self.throughput})' if self.computed else ''}"
        if self.found:
            text += f", {self.found} there before"
        if self.waiting is None:
            text += "; other shards are at work, the last of which writes the files"
        elif self.waiting:
            text += f"; {self.waiting} left to other shards, the last of which writes the files"
        return text


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of an extraction that are computed apart, in whatever order; `index` counts from 0."""

    index: int
    count: int


def run_extraction(
    source: AudioSource,
    extractor: Extractor,
    store: Store,
    *,
    threads: int = 2,
    progress: bool = True,
    shard: Shard | None = None,
) -> Summary | None:
    """
    Extract what is missing in a store, on every process that was launched.

    With a `shard` only that part of it; the shard that finds that nothing is missing any more puts all together, to the
    same files as without shards.

    Returns the summary on the main process and None on the others. Raises `ValueError` when not one utterance could be
    used, or other results are in the way.
    """
    state = PartialState()
    folder = store.journal_folder
    with ExitStack() as held:
        looking = held.enter_context(ExitStack())
        if state.is_main_process:
            looking.enter_context(_lock(store.root, shard))
        own = _keep_apart(folder, shard, held) if state.is_main_process else None
        todo = store.missing(extractor, source)
        earlier = list(folder.glob("*.jsonl"))
        begun = bool(shard and (earlier or (folder / _STARTED).exists()))
        missing = set(todo)
        # Whole batches are dealt and computed, the same as one process makes that is never stopped: so the results are
        # the same to the last bit.
        part = plan_batches(source, extractor) if todo else []
        part = part[shard.index :: shard.count] if shard else part
        part = [batch for batch in part if not missing.isdisjoint(batch)]
        # All have looked before anyone writes: every process sees the same list.
        state.wait_for_everyone()
        throughput = Throughput()
        name = f"{time.time_ns()}-{f'{shard.index}of{shard.count}-' if shard else ''}{state.process_index}.jsonl"
        if part:  # of more shards than batches some have nothing to do
            folder.mkdir(parents=True, exist_ok=True)
            if state.is_main_process and not begun:
                store.start()
                (folder / _STARTED).touch()
            state.wait_for_everyone()
            if shard:
                looking.close()  # others may begin
            batches = part[state.process_index :: state.num_processes]
            progress = progress and state.is_main_process
            _extract_part(source, extractor, store, batches, missing, folder / name, threads, progress)
        state.wait_for_everyone()
        if not state.is_main_process:
            return None
        if shard and own is not None:
            mine = [path for path in folder.glob(f"*-{shard.index}of{shard.count}-*.jsonl") if path not in earlier]
            done = _read_journals(mine)
            looking.close()
            held.enter_context(_lock(store.root, shard))
            found = len(store.names) - len(todo)
            throughput.seconds = done.seconds
            if todo and not folder.exists():  # another one was the last, and has put all together
                return Summary(done.computed, found, [], [], [], done.seconds, [], str(throughput))
            others = _others_at_work(folder, own)
            own.release()  # before the other lock is: of two that end at once one finds itself the last
            if others:
                skipped, bad = list(done.skipped.values()), list(done.not_finite.values())
                return Summary(done.computed, found, skipped, bad, [], done.seconds, [], str(throughput), None)
            # What is still missing, and was not found to be of no use, other shards have to compute.
            missing = set(store.missing(extractor, source))
            entries = _read_journals(sorted(folder.glob("*.jsonl")))
            unusable = {fileid for fileid in entries.skipped if fileid in {store.fileids[index] for index in missing}}
            waiting = len(missing) - len(unusable)
            if waiting:
                skipped = [entry for fileid, entry in done.skipped.items() if fileid in unusable]
                bad = [entry for fileid, entry in done.not_finite.items() if fileid in unusable]
                return Summary(done.computed, found, skipped, bad, [], done.seconds, [], str(throughput), waiting)
            return _finish(source, store, todo, [], throughput, only=unusable, own=mine)
        return _finish(source, store, todo, earlier, throughput)


@contextmanager
def _lock(folder: Path, shard: Shard | None) -> Iterator[RunLock]:
    """Keeps other extractions out of the folder; shards wait, since each holds it only while it looks what is there."""
    lock, patience = None, 30.0 if shard else 2.0
    while lock is None:
        try:
            lock = RunLock(folder, patience)
        except RunFolderError as error:
            if shard is None:
                raise ValueError(
                    f"Another extraction is writing into {folder}: wait for it, or give another OUT_DIR."
                ) from error
            warn_once("shards", f"Waiting for another extraction that writes into {folder}.")
    try:
        yield lock
    finally:
        # Not while others wait for it: they would lock a file that is no longer there.
        if shard is None or not (folder / ".partial").exists():
            lock.path.unlink(missing_ok=True)
        lock.release()


def _keep_apart(folder: Path, shard: Shard | None, held: ExitStack) -> RunLock | None:
    """Lets no shard run twice at a time, and none beside a run without shards. Returns the shard's lock."""
    own = folder / f"shard-{shard.index}-of-{shard.count}" if shard else None
    for path in folder.glob("shard-*") if own is None else [own]:
        try:
            lock = RunLock(path, patience=0.0 if own is None else 2.0)
        except RunFolderError as error:
            index, count = path.name.split("-")[1::2]
            raise ValueError(
                f"Shard {index}/{count} is being extracted into {folder.parent.parent}: wait for it."
            ) from error
        if own is not None:
            held.callback(lock.release)
            return lock
        lock.release()
    return None


def _others_at_work(folder: Path, own: RunLock) -> bool:
    """Whether other shards are: it spares this one the reading of all that there is, for nothing."""
    for path in folder.glob("shard-*"):
        if path != own.path.parent:
            try:
                RunLock(path, patience=0.0).release()
            except RunFolderError:
                return True
    return False


class _Journals(NamedTuple):
    """What journals say: utterances and seconds of audio computed, and what was skipped, by fileid."""

    computed: int
    seconds: float
    skipped: dict[str, Skipped]
    not_finite: dict[str, Skipped]


def _read_journals(paths: Sequence[Path]) -> _Journals:
    computed, seconds = 0, 0.0
    skipped: dict[str, Skipped] = {}
    not_finite: dict[str, Skipped] = {}
    for path in paths:
        with path.open("rb") as file:
            lines = (line for line in file if b'"skipped"' in line or b'"seconds"' in line)
            for _, row in json_lines(path, dict, lines=lines):  # one may have been cut off when a run was killed
                if "skipped" in row:
                    skipped[row["file"]] = Skipped(row["file"], row["skipped"])
                    not_finite.pop(row["file"], None)
                    if row.get("not_finite"):
                        not_finite[row["file"]] = skipped[row["file"]]
                elif "seconds" in row:
                    computed, seconds = computed + row["utterances"], seconds + row["seconds"]
    return _Journals(computed, seconds, skipped, not_finite)


def _extract_part(
    source: AudioSource,
    extractor: Extractor,
    store: Store,
    batches: Sequence[Sequence[int]],
    missing: Container[int],
    journal_path: Path,
    threads: int,
    progress: bool,
) -> None:
    lengths = np.asarray(source.num_samples)
    total = sum(float(lengths[list(batch)].sum()) for batch in batches) / 16_000 + 1e-6  # sums of floats may exceed it
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}, {rate_fmt}]"
    bar = tqdm(
        total=total, desc="Extracting", unit=" s of audio", bar_format=layout, disable=not progress, smoothing=0.05
    )
    with naming(journal_path), journal_path.open("w", encoding="utf-8") as journal, bar:
        for batch in extract(source, extractor, batches, wanted=missing, threads=threads):
            for index, result in batch.results:
                store.add(store.names[index], result, journal)
            rows: list[dict[str, Any]] = [{"file": fileid, "skipped": reason} for fileid, reason in batch.skipped]
            rows += [{"file": fileid, "skipped": reason, "not_finite": True} for fileid, reason in batch.not_finite]
            rows += [
                {"file": fileid, "said": said, "there": there}
                for fileid, said, there in batch.lengths
                if extractor.frames(said) != extractor.frames(there) or abs(said - there) > extractor.stride
            ]
            rows.append({"utterances": len(batch.results), "seconds": batch.seconds})
            journal.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            journal.flush()
            bar.update(batch.planned_seconds)


def _finish(
    source: AudioSource,
    store: Store,
    todo: Sequence[int],
    earlier: Sequence[Path],
    throughput: Throughput,
    only: Container[str] | None = None,
    own: Sequence[Path] | None = None,
) -> Summary:
    """`only`: what of the skipped was not computed later. `own`: journals of this run, among those of other shards."""
    folder = store.journal_folder
    # Journals of interrupted runs are older; what they skipped was tried again.
    entries = _read_journals([path for path in sorted(folder.glob("*.jsonl")) if path not in earlier])
    skipped, not_finite = entries.skipped, entries.not_finite
    if only is not None:
        skipped = {fileid: entry for fileid, entry in skipped.items() if fileid in only}
        not_finite = {fileid: entry for fileid, entry in not_finite.items() if fileid in only}
    if own is not None:
        entries = _read_journals(own)
    throughput.seconds = entries.seconds
    lengths = store.known_lengths(source)
    if len(skipped) == len(store.names):
        _clear(folder)
        how_many, (fileid, reason) = commonest(list(skipped.values()))
        nothing = counted(0, "utterance", of=len(skipped))
        raise ValueError(f"{nothing} can be used; {how_many}the first, {fileid}: {reason}")
    files = store.finish()
    # In the order of the data, however many processes found them.
    all_skipped = [*source.skipped, *(skipped[fileid] for fileid in store.fileids if fileid in skipped)]
    _write_list(store.root / SKIPPED_FILE, [{"file": fileid, "reason": reason} for fileid, reason in all_skipped])
    _write_list(store.root / LENGTHS_FILE, [entry._asdict() for entry in lengths])
    _clear(folder)
    found = len(store.names) - len(todo)
    return Summary(
        entries.computed,
        found,
        all_skipped,
        [not_finite[fileid] for fileid in store.fileids if fileid in not_finite],
        lengths,
        throughput.seconds,
        files,
        str(throughput),
    )


def _write_list(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines; no file where there is nothing to list."""
    if rows:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        path.unlink(missing_ok=True)


def _clear(journal_folder: Path) -> None:
    shutil.rmtree(journal_folder, ignore_errors=True)
    if journal_folder.parent.exists() and not any(journal_folder.parent.iterdir()):
        journal_folder.parent.rmdir()


__all__ = ["SKIPPED_FILE", "Shard", "Summary", "run_extraction"]
