"""What `--dry-run` prints: lines that the parts of a run say of themselves, each by a `plan` beside its code."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..system.commands import DEVICE_IS_FULL
from ..system.errors import RunFolderError

# Topics of their own: what the user should know, and what would make the run fail.
NOTE, PROBLEM = "Note", "PROBLEM"


class Line(NamedTuple):
    """A line of a plan under its topic; several lines of one topic stand together."""

    topic: str
    text: str


@dataclass
class Plan:
    """What was found: lines by topic, what the user should know, and what is wrong."""

    lines: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, lines: Iterable[Line]) -> None:
        """What a part says of itself. An error on the way is a problem; what was said before stays."""
        with self.trying():
            for line in lines:
                if line.topic == NOTE:
                    self.notes.append(line.text)
                elif line.topic == PROBLEM:
                    self.problems.append(line.text)
                else:
                    self.lines.append(line)

    @contextmanager
    def trying(self) -> Iterator[None]:
        """What goes wrong inside is a problem, and the rest is looked at all the same."""
        try:
            yield
        except (ValueError, OSError, RunFolderError) as error:
            self.problems.append(" ".join(str(error).split()))
        except torch.OutOfMemoryError:
            self.problems.append(DEVICE_IS_FULL)

    def __str__(self) -> str:
        shown, text = "", []
        for topic, line in self.lines:
            text.append(f"{'' if topic == shown else topic:12}{line}")
            shown = topic
        text += [f"{NOTE:12}{note}" for note in self.notes]
        return "\n".join([*text, *(f"{PROBLEM:12}{problem}" for problem in self.problems)])


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


__all__ = ["NOTE", "PROBLEM", "Line", "Plan", "size"]
