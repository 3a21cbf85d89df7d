"""What happens beside the updates of a run, now and then: the report, pictures, profiles, validation, uploads.

An observer is a class with the four hooks below, in a file of its own.
"""

from collections.abc import Iterable
from pathlib import Path


class Observer:
    """The hooks; one that is not overridden does nothing.

    Every process of a run has the same observers and calls them alike, in the same order.
    """

    def before_step(self, step: int) -> None:
        """Update `step`, counted from 1, begins."""

    def after_step(self, step: int) -> None:
        """Update `step` is made. Called before the first update too, with the step that the run stands at."""

    def saved(self, folder: Path) -> None:
        """A complete checkpoint lies in the folder. Called on the first process, by the thread that wrote it."""

    def finish(self, final: Path | None) -> None:
        """No update follows. `final` is the finished model's folder, None where the run was told to stop before its
        end. Processes wait for each other no more."""


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, observers: Iterable[Observer]):
        self._observers = list(observers)

    def before_step(self, step: int) -> None:
        """An update begins."""
        for observer in self._observers:
            observer.before_step(step)

    def after_step(self, step: int) -> None:
        """An update is made."""
        for observer in self._observers:
            observer.after_step(step)

    def saved(self, folder: Path) -> None:
        """A complete checkpoint lies in the folder."""
        for observer in self._observers:
            observer.saved(folder)

    def finish(self, final: Path | None) -> None:
        """No update follows."""
        for observer in self._observers:
            observer.finish(final)


__all__ = ["Observer", "Observers"]
