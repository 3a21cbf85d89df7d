"""The door of all DATA: whatever the commands are given becomes an audio source."""

from collections.abc import Sequence
from pathlib import Path

from .datasets_source import is_dataset, open_dataset
from .manifests import open_manifest
from .mixture import MixedSource
from .sources import AudioSource


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
        if is_dataset(data):
            return open_dataset(data, resample=resample, cache=cache, progress=progress)
        return open_manifest(data, resample=resample, cache=cache, progress=progress)
    path = None if cache is None else Path(cache)
    caches = [path and path.with_stem(f"{path.stem}-{index}") for index in range(len(data))]
    sources = [
        open_data(part, resample=resample, cache=kept, progress=progress)
        for part, kept in zip(data, caches, strict=True)
    ]
    return MixedSource(sources, [str(part) for part in data], weights)


__all__ = ["open_data"]
