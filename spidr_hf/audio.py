"""Audio files to waveforms: float32, mono, 16 kHz.

Everything is decoded by soundfile (libsndfile: WAV, FLAC, OGG, Opus, MP3, AIFF ...), on the fly, in whichever process
needs the samples. Audio of another rate or with several channels is refused unless the caller asks to resample.
"""

import io
import os
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

SAMPLING_RATE = 16_000
AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".caf", ".au")


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file and says what to do."""


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

    def readinto(self, buffer: memoryview) -> int:
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
        info = soundfile.info(_file(source))
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(source, name, error) from error
    result = AudioInfo(int(info.frames), int(info.samplerate), int(info.channels))
    _check(name, result, resample)
    return result


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
        raise _unreadable(source, name, error) from error
    if len(audio) != header.num_samples:
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
        raise AudioError(
            f"{name}: has {info.sampling_rate} Hz instead of {SAMPLING_RATE}. Convert it, or ask for resampling."
        )
    if info.channels != 1:
        raise AudioError(f"{name}: has {info.channels} channels instead of 1. Convert it, or ask for resampling.")


def _unreadable(source: str | Path | bytes | BinaryIO, name: str, error: Exception) -> AudioError:
    if isinstance(source, (str, Path)) and not os.path.exists(source):
        missing = "no such file" if str(source) == name else f"{source} does not exist"
        return AudioError(
            f"{name}: {missing}. Paths in manifests are looked for beside it, then in the working folder."
        )
    reason = getattr(error, "error_string", str(error)).rstrip(".")
    return AudioError(f"{name}: cannot be read as audio ({reason}). Leave it out or convert it.")


__all__ = [
    "AUDIO_SUFFIXES",
    "SAMPLING_RATE",
    "AudioError",
    "AudioInfo",
    "FileWindow",
    "read_audio",
    "read_info",
    "read_window",
    "resample_audio",
]
