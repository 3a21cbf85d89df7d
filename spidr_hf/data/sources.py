"""What every kind of audio source offers: of utterances that are known beforehand, or of streamed ones."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from .audio import AudioFile


class Skipped(NamedTuple):
    """An utterance that was left out, and why."""

    fileid: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without what differs between utterances: names of files, and numbers."""
        return re.sub(r"\d+", "N", self.reason.removeprefix(self.fileid).rpartition(": ")[2])


def commonest(skipped: Sequence[Skipped]) -> tuple[str, Skipped]:
    """The first utterance that was left out for the reason that most were, and words that say how many those are.

    Where it is everyone's, or each has its own, the words are empty.
    """
    kinds = [entry.kind for entry in skipped]
    kind, count = Counter(kinds).most_common(1)[0]
    return f"{count} for one reason, " if 1 < count < len(kinds) else "", skipped[kinds.index(kind)]


class AudioSource(Protocol):
    """Utterances by index: what pretraining, feature extraction and evaluation read from.

    `num_samples` (int64, one entry per utterance) is known without decoding anything. `fingerprint` tells one set of
    utterances from another. `skipped` lists what was left out on opening.
    """

    num_samples: np.ndarray

    @property
    def skipped(self) -> Sequence[Skipped]: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def fileid(self, index: int) -> str:
        """Unique name of the utterance."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Waveform: S samples, float32, mono, 16 kHz. Raises `AudioError` where it cannot be had."""
        ...

    def recording(self, index: int) -> AudioFile:
        """The same, to be decoded in parts: what pretraining asks for where it hears seconds of hours."""
        ...


@runtime_checkable
class StreamedSource(Protocol):
    """Utterances in shards (files, mostly), read in the order they come: how many there are and how long they are
    shows while they are read. Pretraining alone takes it (`streaming`).

    `name` is what messages call it; `resample`: audio of any rate and number of channels is taken. `fingerprint` tells
    one data set from another, so that a run does not resume in the wrong one.
    """

    name: str
    resample: bool
    num_shards: int

    @property
    def fingerprint(self) -> str: ...

    def rows(
        self, shard: int, state: dict[str, Any] | None = None
    ) -> Iterator[tuple[Any, Callable[[], dict[str, Any]]]]:
        """Rows of a shard, each with what tells the state after it; from such a state on (JSON's types), where given.

        Whatever it raises ends the stream, with a line that says so.
        """
        ...

    def row_name(self, row: Any) -> str:
        """What the row says that its utterance is called; empty where it does not."""
        ...

    def stored(self, row: Any, name: str) -> bytes | str:
        """Audio as it is stored: the content of a file, or its path. Raises `AudioError`, naming it, without any."""
        ...


__all__ = ["AudioSource", "Skipped", "StreamedSource", "commonest"]
