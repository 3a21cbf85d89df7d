"""The door of all DATA: whatever the commands are given becomes an audio source.

A new kind of source is a class (`sources` has the protocols) and a line in one of the two tables here.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .datasets_source import is_dataset, open_dataset
from .manifests import open_manifest
from .mixture import MixedSource
from .sections import DataSection
from .sources import AudioSource, StreamedSource
from .streaming import can_stream, open_stream


class Kind(NamedTuple):
    """A kind of DATA: whether it takes what the user gave, and how that is opened."""

    takes: Callable[[str | Path], bool]
    open: Callable[..., Any]


# The first kind that takes DATA opens it. Stored: `open(data, resample=, cache=, progress=)` gives an `AudioSource`.
STORED = [Kind(is_dataset, open_dataset), Kind(lambda data: True, open_manifest)]
# Streamed: `open(data, resample=)` gives a `StreamedSource`.
STREAMED = [Kind(can_stream, open_stream)]


def open_data(
    data: str | Path | Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    resample: bool = False,
    cache: str | Path | None = None,
    progress: bool = True,
) -> AudioSource:
    """Utterances of DATA: a manifest, a folder of audio files, a tar, or a data set of `datasets`; or several of these.

    Args:
        data: what the commands call DATA; a list of them makes a `MixedSource`.
        weights: with a list: how many times an epoch has each utterance of each of them (1 by default).
        resample: take audio of any rate and number of channels.
        cache: where the scan of it is kept (see `open_manifest` and `DatasetSource`); with a list, the first is kept
            under this name with `-0` before its suffix, and so on.
        progress: show a bar while headers are read.

    Raises `ManifestError` with what to do where `data` cannot be used.
    """
    if isinstance(data, (str, Path)):
        data = os.path.expanduser(data)
        kind = next(kind for kind in STORED if kind.takes(data))
        return kind.open(data, resample=resample, cache=cache, progress=progress)
    path = None if cache is None else Path(cache)
    caches = [path and path.with_stem(f"{path.stem}-{index}") for index in range(len(data))]
    sources = [
        open_data(part, resample=resample, cache=kept, progress=progress)
        for part, kept in zip(data, caches, strict=True)
    ]
    return MixedSource(sources, [str(part) for part in data], weights)


def is_streamable(data: str | Path | Sequence[str | Path]) -> bool:
    """Whether a kind of streamed source takes DATA."""
    return isinstance(data, (str, Path)) and any(kind.takes(data) for kind in STREAMED)


def open_source(
    data: DataSection, *, cache: str | Path | None = None, progress: bool = True
) -> AudioSource | StreamedSource:
    """What a `[data]` section names, streamed where it says so. Raises `ManifestError` where it cannot be used."""
    manifest: Any = data.manifest  # the config has seen to it that there is one, and that it can be streamed
    if data.streaming:
        kind = next(kind for kind in STREAMED if kind.takes(manifest))
        return kind.open(manifest, resample=data.resample)
    return open_data(manifest, weights=data.weights, resample=data.resample, cache=cache, progress=progress)


__all__ = ["STORED", "STREAMED", "Kind", "is_streamable", "open_data", "open_source"]
