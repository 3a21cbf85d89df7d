"""`metrics.jsonl`: one row per logged step, however often the run was interrupted."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class MetricsFile:
    """The file. Opening it after `step` keeps the rows up to that step byte for byte and removes later ones."""

    def __init__(self, path: str | Path, step: int = 0):
        self.path = Path(path)
        self._file = open(self.path, "a+b")  # noqa: SIM115 (open as long as the run)
        self._file.seek(0)
        kept = 0
        for line in self._file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept += len(line)
        self._file.truncate(kept)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. It is on disk on return: a checkpoint of the same step must never outlive it."""
        self._file.write((json.dumps(row, allow_nan=False) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

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
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


__all__ = ["Averages", "MetricsFile", "curves", "read_rows"]
