"""The picture of a run's curves, `curves.png`, drawn every few minutes as the run goes, and once more at its end.

Another process draws it, at the lowest priority until the run is over: a thread would take Python's lock from the
training loop for as long as it draws.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..configuration_spidr import SpidrConfig
from ..training.observers import Observer
from ..training.planning import NOTE, Line

# What it runs; as a file, since importing the package would take longer than drawing.
DRAWING = Path(__file__).resolve().parent.parent / "plots" / "curves.py"
_LOWEST = 19


class CurvesPicture(Observer):
    """Draws `curves.png` beside `metrics.jsonl`, where matplotlib is installed.

    Args:
        run_dir: the run's folder.
        model: of the run.
        minutes: at least so many between two pictures; 0: none at all.
        say: takes a line for the user, where the last picture cannot be drawn.
    """

    def __init__(
        self, run_dir: str | Path, model: SpidrConfig, minutes: float, say: Callable[[str | None], None] = print
    ):
        self._say = say
        self.run_dir = Path(run_dir)
        self._seconds = 60 * minutes
        self._enabled = minutes > 0 and importlib.util.find_spec("matplotlib") is not None
        options = [str(self.run_dir), str(model.first_codebook_layer), str(model.codebook_size)]
        self._command = [sys.executable, "-P", str(DRAWING), *options]
        self._process: Any = None  # a Popen, once there is one
        self._last = time.monotonic()
        for left in self.run_dir.glob(".curves.*.partial.png"):  # of a run that was killed
            left.unlink(missing_ok=True)

    def after_step(self, step: int) -> None:
        """Begin a new picture if it is time and none is being drawn; it is not waited for."""
        if self._enabled and time.monotonic() - self._last >= self._seconds and not self._drawing():
            self._start()

    def finish(self, final: Path | None = None) -> None:
        """Draw the last picture and wait for it."""
        if self._enabled:
            self._say(self._draw_last())

    def _draw_last(self, patience: float = 60.0) -> str | None:
        """Why it could not be drawn, if it could not."""
        try:
            if self._drawing():
                self._process.kill()
                self._process.communicate()
            self._start(hurry=True)
            _, errors = self._process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return f"curves.png is not drawn: it takes longer than {patience:.0f} s."
        if self._process.returncode:
            return (
                f"curves.png is not drawn: {errors.strip().splitlines()[-1] if errors.strip() else 'no reason given'}"
            )
        return None

    def _drawing(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self, hurry: bool = False) -> None:
        self._last = time.monotonic()
        command = [*self._command, "0" if hurry else str(_LOWEST)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )


def plan() -> Iterator[Line]:
    """Whether there will be pictures."""
    if importlib.util.find_spec("matplotlib") is None:
        yield Line(NOTE, "no pictures of the curves: pip install 'spidr_hf[train]' brings matplotlib.")


__all__ = ["CurvesPicture", "plan"]
