"""Audio files to waveforms: float32, mono, 16 kHz.

Everything is decoded on the fly, in whichever process needs the samples, by soundfile (libsndfile: WAV, FLAC, OGG,
Opus, MP3, AIFF ...). What libsndfile does not know (M4A, MP4, WebM ...) is decoded by torchcodec where that is
installed. Audio of another rate or with several channels is refused unless the caller asks to resample.
"""

import importlib.util
import io
import os
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from ..configuration_spidr import SAMPLING_RATE
from ..system.errors import AudioError

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".caf", ".au")
# What torchcodec reads beside these.
FURTHER_SUFFIXES = (".m4a", ".mp4", ".webm", ".mkv", ".mka", ".wma")
_UNKNOWN_FORMAT = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT; anything else is a damaged file of a format it knows
# Containers count what the encoder added before and after; a file this much shorter than its header says is cut off.
_SHORTER = 0.9
_RESAMPLE = "Convert it, or ask for resampling (--resample; --data.resample true where audio is set in a config)."


@dataclass(frozen=True)
class AudioInfo:
    """What a header says: samples per channel at the file's own rate, in Hz."""

    num_samples: int
    sampling_rate: int
    channels: int

    @property
    def num_samples_16k(self) -> int:
        """Samples after resampling to 16 kHz, as `scipy.signal.resample_poly` counts them."""
        return -(-self.num_samples * SAMPLING_RATE // self.sampling_rate)


class FileWindow(io.RawIOBase):
    """`size` bytes of an open file from `offset` on, as a file of their own (a member of an uncompressed tar)."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        super().__init__()
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader gives no other buffer
        count = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_info(source: str | Path | bytes | BinaryIO, *, name: str | None = None, resample: bool = False) -> AudioInfo:
    """Header of an audio file (path, content or open file); no samples are decoded.

    Raises `AudioError` for what `read_audio` would refuse for its header alone.
    """
    name = _name(source, name)
    try:
        found = soundfile.info(_file(source))
        info = AudioInfo(int(found.frames), int(found.samplerate), int(found.channels))
    except (soundfile.SoundFileError, OSError) as error:
        if (decoder := _further_decoder(source, error)) is None:
            raise _unreadable(source, name, error) from error
        info = _further_info(decoder)
    _check(name, info, resample)
    return info


def read_audio(source: str | Path | bytes | BinaryIO, *, name: str | None = None, resample: bool = False) -> np.ndarray:
    """Waveform of an audio file: S samples, float32, mono, 16 kHz, full scale 1.

    Args:
        source: path, content, or an open binary file.
        name: what error messages call it; the path by default.
        resample: take any rate and number of channels: channels are averaged, then resampled to 16 kHz
            (polyphase filter). Without it such audio is refused.

    Raises `AudioError`, naming the file, for unreadable, cut off, empty or non-finite audio, and for a wrong rate or
    several channels without `resample`.
    """
    name = _name(source, name)
    try:
        with soundfile.SoundFile(_file(source)) as file:
            header = AudioInfo(file.frames, file.samplerate, file.channels)
            _check(name, header, resample)
            audio = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        if (decoder := _further_decoder(source, error)) is None:
            raise _unreadable(source, name, error) from error
        header = _further_info(decoder)
        _check(name, header, resample)
        audio = _further_samples(decoder, name)
        whole = len(audio) >= _SHORTER * header.num_samples
    else:
        whole = len(audio) == header.num_samples
    if not whole:
        raise AudioError(
            f"{name}: cut off, {len(audio)} of {header.num_samples} samples can be decoded. Copy the file again or "
            "leave it out."
        )
    waveform = audio[:, 0] if header.channels == 1 else audio.mean(axis=1)
    # A sum is finite only if every term is (or nearly: opposite infinities give NaN), and needs no temporary array.
    if not np.isfinite(waveform.sum(dtype=np.float64)):
        raise AudioError(f"{name}: has non-finite samples (NaN or infinity). Repair the recording or leave it out.")
    if header.sampling_rate != SAMPLING_RATE:
        waveform = resample_audio(waveform, header.sampling_rate)
    return np.ascontiguousarray(waveform)


def read_window(
    archive: str | Path, offset: int, size: int, *, name: str | None = None, resample: bool = False
) -> np.ndarray:
    """`read_audio` of `size` bytes from `offset` on: a member of an uncompressed tar, without unpacking."""
    name = name or f"{archive} at byte {offset}"
    try:
        with open(archive, "rb") as file:
            content = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise _unreadable(archive, name, error) from error
    if len(content) != size:
        raise AudioError(
            f"{name}: {archive} ends before byte {offset + size}. Copy the archive again, or write its manifest anew."
        )
    return read_audio(content, name=name, resample=resample)


def resample_audio(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Mono waveform at `sampling_rate` Hz, resampled to 16 kHz: ceil(S * 16000 / sampling_rate) samples."""
    from scipy.signal import resample_poly  # scipy comes with the `train` extra and takes half a second to import

    common = gcd(SAMPLING_RATE, sampling_rate)
    resampled = resample_poly(waveform, SAMPLING_RATE // common, sampling_rate // common)
    return resampled.astype(np.float32, copy=False)


def audio_suffixes() -> tuple[str, ...]:
    """Suffixes of files that `read_audio` can read here."""
    return AUDIO_SUFFIXES + (FURTHER_SUFFIXES if importlib.util.find_spec("torchcodec") else ())


@cache
def _audio_decoder() -> Any:
    """torchcodec's decoder; None where it is not installed, or finds no FFmpeg that it can use."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    return AudioDecoder


def _further_decoder(source: str | Path | bytes | BinaryIO, error: Exception) -> Any:
    """torchcodec's decoder of audio whose format libsndfile does not know; None where it cannot help.

    A damaged file of a format that libsndfile knows is not tried: what can be decoded of it would pass for the whole.
    """
    if getattr(error, "code", None) != _UNKNOWN_FORMAT or (decoder := _audio_decoder()) is None:
        return None
    if not isinstance(source, (str, Path, bytes)):
        source.seek(0)
        source = source.read()
    try:
        found = decoder(source)
        return found if found.metadata.sample_rate and found.metadata.num_channels else None
    except (RuntimeError, ValueError):
        return None


def _further_info(decoder: Any) -> AudioInfo:
    """What the container says. Some (a browser's recordings) do not know their length: those are decoded for it."""
    metadata = decoder.metadata
    seconds = metadata.duration_seconds
    samples = round(seconds * metadata.sample_rate) if seconds else len(_further_samples(decoder, "audio"))
    return AudioInfo(samples, metadata.sample_rate, metadata.num_channels)


def _further_samples(decoder: Any, name: str) -> np.ndarray:
    """All samples: S x channels, float32."""
    try:
        return decoder.get_all_samples().data.numpy().T
    except (RuntimeError, ValueError) as error:
        raise AudioError(f"{name}: cannot be decoded, it is damaged. Copy the file again or leave it out.") from error


def _file(source: str | Path | bytes | BinaryIO) -> str | BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    return os.fspath(source) if isinstance(source, (str, Path)) else source


def _name(source: str | Path | bytes | BinaryIO, name: str | None) -> str:
    if name is None:
        name = str(source) if isinstance(source, (str, Path)) else getattr(source, "name", "audio")
    return str(name)


def _check(name: str, info: AudioInfo, resample: bool) -> None:
    if info.num_samples <= 0:
        raise AudioError(f"{name}: holds no samples. Leave it out.")
    if resample:
        return
    if info.sampling_rate != SAMPLING_RATE:
        raise AudioError(f"{name}: has {info.sampling_rate} Hz instead of {SAMPLING_RATE}. {_RESAMPLE}")
    if info.channels != 1:
        raise AudioError(f"{name}: has {info.channels} channels instead of 1. {_RESAMPLE}")


def _unreadable(source: str | Path | bytes | BinaryIO, name: str, error: Exception) -> AudioError:
    if isinstance(source, (str, Path)) and not os.path.exists(source):
        missing = "no such file" if str(source) == name else f"{source} does not exist"
        return AudioError(
            f"{name}: {missing}. Paths in manifests are looked for beside it, then in the working folder."
        )
    reason = getattr(error, "error_string", str(error)).rstrip(".")
    advice = "Leave it out or convert it."
    if name.lower().endswith(FURTHER_SUFFIXES) and _audio_decoder() is None:
        advice = "Convert it, or install torchcodec and FFmpeg, which read such files."
    return AudioError(f"{name}: cannot be read as audio ({reason}). {advice}")


__all__ = [
    "AUDIO_SUFFIXES",
    "FURTHER_SUFFIXES",
    "AudioInfo",
    "FileWindow",
    "audio_suffixes",
    "read_audio",
    "read_info",
    "read_window",
    "resample_audio",
]
