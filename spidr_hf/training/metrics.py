"""`metrics.jsonl`: one row per logged step, however often the run was interrupted."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..system.errors import RunFolderError
from ..system.files import naming, sync_open, write_bytes
from ..system.tables import parse_json

logger = logging.getLogger(__name__)


class MetricsFile:
    """The file. Opening it after `step` keeps the rows up to that step byte for byte and removes later ones.

    Lines that are no rows (what a power cut leaves) are removed, and told of; the rows behind them stay.

    Attributes:
        reached: the last step that there was a row of, when the file was opened.
    """

    def __init__(self, path: str | Path, step: int = 0):
        self.path = Path(path)
        content = self.path.read_bytes() if self.path.exists() else b""
        rows = list(_rows(content))
        self.reached = max((row["step"] for row, _ in rows), default=0)
        kept = b"".join(line for row, line in rows if row["step"] <= step)
        if not content.startswith(kept):
            write_bytes(self.path, kept)
            logger.warning("%s had damaged lines; they are left out, and the rows behind them stay.", self.path)
        # Without a buffer: what could not be written is not tried again when the file is closed.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        self._file.truncate(len(kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. It is on disk on return: a checkpoint of the same step must never outlive it.

        Raises `RunFolderError` where the file is there no more, and `OSError` where it cannot be written; nothing of
        the row is in it then.
        """
        if not self.path.exists():
            raise RunFolderError(
                f"{self.path} was removed, or moved, during the run. It ends here, and writes no more."
            )
        line, before = memoryview((json.dumps(row, allow_nan=False) + "\n").encode()), self._file.tell()
        with naming(self.path):
            try:
                while line:
                    line = line[self._file.write(line) :]
                sync_open(self._file.fileno(), self.path)
            except OSError:
                self._file.truncate(before)
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Averages:
    """Means over the steps since the last row. Its state goes into checkpoints, so that resuming changes no row."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        state = state or {}
        self.count: int = state.get("count", 0)
        self._sums = {name: np.array(value, dtype=np.float64) for name, value in state.get("sums", {}).items()}

    def add(self, values: Mapping[str, float | list[float]]) -> None:
        """Values of one step; the names are the same in every step."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + np.array(value, dtype=np.float64)
        self.count += 1

    def means(self) -> dict[str, Any]:
        """The means so far (None where there was no step)."""
        return {name: (total / self.count).tolist() for name, total in self._sums.items()} if self.count else {}

    def reset(self) -> None:
        """Begin the next row."""
        self.count = 0
        self._sums = {}

    def state(self) -> dict[str, Any]:
        """What `Averages` can be made from again, in JSON's types and without rounding."""
        return {"count": self.count, "sums": {name: total.tolist() for name, total in self._sums.items()}}


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """A row as single numbers, for trackers; lists become one curve per codebook."""
    curves: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            curves |= {f"{name}/{index}": item for index, item in enumerate(value)}
        elif name != "step" and value is not None:
            curves[name] = value
    return curves


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without damaged lines."""
    return [row for row, _ in _rows(path.read_bytes())]


def _rows(content: bytes) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows, and the line of each. A row may have damage before it in its line; one that is cut off is none."""
    for line in content.splitlines(keepends=True):
        whole = line[max(0, line.rfind(b'{"step"')) :]
        try:
            row = parse_json(whole)
            if whole.endswith(b"\n") and isinstance(row["step"], int):
                yield row, whole
        except (ValueError, KeyError, TypeError):
            continue


__all__ = ["Averages", "MetricsFile", "curves", "read_rows"]
