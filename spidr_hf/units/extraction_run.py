"""Extraction to files: resumable, atomic, by one process or several.

While units are computed they go to a journal, `OUT_DIR/.partial/...`, one line per utterance; when all are there the
unit files are written in the order of the data and the journal goes. Feature files appear one by one, each complete.
Started again, the same command computes only what is missing. Several processes (started by `accelerate launch`) take
every n-th utterance by length; the first of them puts everything together.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from ..data.sources import AudioSource, Skipped
from ..system.errors import RunFolderError
from ..system.files import write_text
from ..system.processes import RunLock
from .extractor import Extractor, Throughput, extract
from .stores import LENGTHS_FILE, OtherLength, Store

SKIPPED_FILE = "skipped.jsonl"


@dataclass
class Summary:
    """What an extraction did: utterances computed and found done, what was skipped, and where results lie.

    `not_finite`: those of the skipped whose results are NaN or infinite. `lengths`: what is not as long as DATA says.
    """

    computed: int
    found: int
    skipped: list[Skipped]
    not_finite: list[Skipped]
    lengths: list[OtherLength]
    seconds: float
    files: list[Path]
    throughput: str

    def __str__(self) -> str:
        text = f"{self.computed} utterances computed ({self.throughput})"
        if self.found:
            text += f", {self.found} were there before"
        return text


def run_extraction(
    source: AudioSource,
    extractor: Extractor,
    store: Store,
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
            if state.is_main_process:
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
    store: Store,
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
) -> Summary:
    folder, computed = store.journal_folder, 0
    skipped: dict[str, Skipped] = {}
    not_finite: dict[str, Skipped] = {}
    journals = sorted(folder.glob("*.jsonl"))
    # Journals of interrupted runs are older; what they skipped was tried again.
    for path in journals:
        if path in earlier:
            continue
        for line in path.open(encoding="utf-8"):
            row = json.loads(line)
            if "skipped" in row:
                skipped[row["file"]] = Skipped(row["file"], row["skipped"])
                if row.get("not_finite"):
                    not_finite[row["file"]] = skipped[row["file"]]
            elif "seconds" in row:
                computed, throughput.seconds = computed + row["utterances"], throughput.seconds + row["seconds"]
    lengths = store.known_lengths(source)
    if len(skipped) == len(store.names):
        _clear(folder)
        fileid, reason = next(iter(skipped.values()))
        raise ValueError(f"None of the {len(skipped)} utterances can be used; the first, {fileid}: {reason}")
    files = store.finish()
    # In the order of the data, however many processes found them.
    all_skipped = [*source.skipped, *(skipped[fileid] for fileid in store.fileids if fileid in skipped)]
    _write_list(store.root / SKIPPED_FILE, [{"file": fileid, "reason": reason} for fileid, reason in all_skipped])
    _write_list(store.root / LENGTHS_FILE, [entry._asdict() for entry in lengths])
    _clear(folder)
    found = len(store.names) - len(todo)
    return Summary(
        computed,
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


__all__ = ["SKIPPED_FILE", "Summary", "run_extraction"]
