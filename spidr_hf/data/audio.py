"""Audio files to waveforms: float32, mono, 16 kHz.

Everything is decoded on the fly, in whichever process needs the samples, by soundfile (libsndfile: WAV, FLAC, OGG,
Opus, MP3, AIFF ...). What libsndfile does not know (M4A, MP4, WebM ...) is decoded by torchcodec where that is
installed. Audio of another rate or with several channels is refused unless the caller asks to resample, which soxr
does. A file is read to its end, whatever its header says, and is refused where that is before the header's; whatever
goes wrong with a file, a decoder's own errors included, is an `AudioError` that names it.
"""

import importlib.util
import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import soundfile

from ..configuration_spidr import SAMPLING_RATE
from ..system.errors import AudioError
from ..system.messages import counted, one_line, shown
from .containers import FileWindow, declared

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".w64", ".caf", ".au")
# What torchcodec reads beside these.
FURTHER_SUFFIXES = (".m4a", ".mp4", ".webm", ".mkv", ".mka", ".wma", ".aac", ".ac3", ".amr", ".3gp", ".mov")
# Audio that nothing here reads.
UNREAD_SUFFIXES = (".ape", ".dsf", ".m4b", ".ra", ".shn", ".sph", ".spx", ".tta", ".wv")
_UNKNOWN_FORMAT = 1  # libsndfile's SF_ERR_UNRECOGNISED_FORMAT; anything else is a damaged file of a format it knows
# Containers count what the encoder added before and after; a file this much shorter than its header says is cut off.
_SHORTER = 0.9
_RESAMPLE = "Convert it, or ask for resampling (--resample; --data.resample true where audio is set in a config)."
_RATES = (1_000, 1_000_000)  # Hz: beyond these a header lies, and resampling would ask for any amount of memory
_LONGEST_HOURS = 7 * 24
_BLOCK = 1 << 20  # samples (of all channels) decoded at a time where not all are wanted at once
_RESERVED = 1 << 26  # samples that a header may have reserved before they are decoded
# In these every sample has its place in the file, so that decoding from the middle gives what decoding the whole does.
_SEEKABLE = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_PLACED = ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "NIST")


@dataclass(frozen=True)
class AudioInfo:
    """What a header says: samples per channel at the file's own rate, in Hz."""

    num_samples: int
    sampling_rate: int
    channels: int

    @property
    def num_samples_16k(self) -> int:
        """Samples after resampling to 16 kHz: what is begun counts."""
        return -(-self.num_samples * SAMPLING_RATE // self.sampling_rate)


class Member(NamedTuple):
    """A file that lies in another one as it is: `size` bytes from `offset` on (a member of an uncompressed tar)."""

    archive: str
    offset: int
    size: int


Source = str | Path | bytes | BinaryIO | Member


class AudioFile:
    """An audio file of which a part can be had: S samples at 16 kHz, mono, like those of `read_audio`.

    Args:
        source: path, content, open binary file, or member of a tar.
        name: what error messages call it; the path by default.
        resample: take any rate and number of channels (see `read_audio`).
    """

    def __init__(self, source: Source, *, name: str | None = None, resample: bool = False):
        self.source, self.name, self.resample = source, _name(source, name), resample

    @property
    def num_samples(self) -> int:
        """Samples at 16 kHz by the header. Raises `AudioError` as `read_info` does."""
        return read_info(self.source, name=self.name, resample=self.resample).num_samples_16k

    def blocks(self) -> Iterator[np.ndarray]:
        """The samples from beginning to end, some at a time. Raises `AudioError` as `read_audio` does."""
        with _opened(self.source, self.name) as audio:
            _check(self.name, audio.info, self.resample)
            yield from _blocks(audio, self.name)

    def part(self, start: int, stop: int) -> np.ndarray:
        """The samples from `start` to before `stop`; nothing before them is decoded where the format allows that.

        Raises `AudioError` where they are not all there.
        """
        with _opened(self.source, self.name) as audio:
            _check(self.name, audio.info, self.resample)
            if audio.can_seek and _is_plain(audio.info):
                part = np.empty((stop - start, 1), dtype=np.float32)
                with _named_errors(self.name):
                    audio.seek(start)
                    length = audio.read(part)
                part = _finite(part[:length, 0], self.name)
            else:
                parts, place = [np.empty(0, dtype=np.float32)], 0
                for block in _blocks(audio, self.name):
                    parts.append(block[max(0, start - place) : max(0, stop - place)].copy())
                    place += len(block)
                    if place >= stop:
                        break
                part = np.concatenate(parts)
        if len(part) != stop - start:
            raise _cut_off(self.name, start + len(part), stop)
        return part


def read_info(source: Source, *, name: str | None = None, resample: bool = False) -> AudioInfo:
    """Header of an audio file (path, content or open file). Samples are decoded only where it does not say how many.

    Raises `AudioError` for what `read_audio` would refuse for its header alone, and for a file that ends before the
    header says.
    """
    name = _name(source, name)
    with _opened(source, name) as audio:
        _check(name, audio.info, resample)
        return audio.info


def read_audio(source: Source, *, name: str | None = None, resample: bool = False) -> np.ndarray:
    """Waveform of an audio file: S samples, float32, mono, 16 kHz, full scale 1.

    Args:
        source: path, content, or an open binary file.
        name: what error messages call it; the path by default.
        resample: take any rate and number of channels: channels are averaged, then resampled to 16 kHz (soxr, high
            quality). Without it such audio is refused.

    Raises `AudioError`, naming the file, for unreadable, cut off, empty or non-finite audio, and for a wrong rate or
    several channels without `resample`.
    """
    name = _name(source, name)
    with _opened(source, name) as audio:
        _check(name, audio.info, resample)
        if _is_plain(audio.info):
            return _finite(_whole(audio, name), name)
        return np.concatenate([block.copy() for block in _blocks(audio, name)])


def read_window(
    archive: str | Path, offset: int, size: int, *, name: str | None = None, resample: bool = False
) -> np.ndarray:
    """`read_audio` of `size` bytes from `offset` on: a member of an uncompressed tar, without unpacking."""
    name = name or f"{archive} at byte {offset}"
    try:
        with open(archive, "rb") as file:
            there = os.fstat(file.fileno()).st_size
            content = os.pread(file.fileno(), size, offset) if offset + size <= there else b""
    except (OSError, ValueError) as error:
        raise _unreadable(archive, name, error) from error
    if len(content) != size:
        raise _archive_ends(str(archive), name, offset + size)
    return read_audio(content, name=name, resample=resample)


def resample_audio(waveform: np.ndarray, sampling_rate: int) -> np.ndarray:
    """Mono waveform at `sampling_rate` Hz, resampled to 16 kHz: ceil(S * 16000 / sampling_rate) samples."""
    resampler = _Resampler(sampling_rate)
    return np.concatenate([resampler(np.asarray(waveform, dtype=np.float32)), resampler.rest()])


def resampler_name() -> str:
    """What `resample_audio` resamples with, for provenance: another one gives other features."""
    return "soxr, high quality"


class _Resampler:
    """Blocks of one recording to 16 kHz. Where they are cut makes no difference."""

    def __init__(self, sampling_rate: int):
        import soxr

        self._rate = sampling_rate
        self._stream = soxr.ResampleStream(sampling_rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ")
        self._taken = self._given = 0

    def __call__(self, block: np.ndarray) -> np.ndarray:
        self._taken += len(block)
        resampled = self._stream.resample_chunk(block)
        self._given += len(resampled)
        return resampled

    def rest(self) -> np.ndarray:
        """What is still inside. Silence follows the end, so that the last sample that was begun is there, too."""
        silence = np.zeros(-(-self._rate // SAMPLING_RATE) + 1, dtype=np.float32)
        rest = self._stream.resample_chunk(silence, last=True)
        return rest[: -(-self._taken * SAMPLING_RATE // self._rate) - self._given]


def audio_suffixes() -> tuple[str, ...]:
    """Suffixes of files that `read_audio` can read here."""
    return AUDIO_SUFFIXES + (FURTHER_SUFFIXES if importlib.util.find_spec("torchcodec") else ())


class _Decoder(Protocol):
    """An open audio file. `exact`: as many samples as `info` says are in it, or it is cut off."""

    info: AudioInfo
    exact: bool
    can_seek: bool

    def read(self, out: np.ndarray) -> int:
        """The next samples (into n x channels, float32): how many there were; fewer than n at the end only."""
        ...

    def seek(self, start: int) -> None: ...


class _Sequential(soundfile.SoundFile):
    """A file that is read on and on: the library seeks after every block, which some formats cannot do."""

    def seekable(self) -> bool:
        return False


class _ByLibsndfile:
    """What libsndfile decodes. `_Sequential` of a FLAC whose length nobody wrote down has the largest there is."""

    def __init__(self, file: _Sequential, window: FileWindow | None, name: str):
        self._file, self._window, self.exact = file, window, True
        self.can_seek = file.format in _PLACED and file.subtype in _SEEKABLE
        frames = int(file.frames)
        if frames >= 1 << 62:
            frames = self._count(name)
        self.info = AudioInfo(frames, int(file.samplerate), int(file.channels))

    def read(self, out: np.ndarray) -> int:
        length = len(self._file.read(len(out), out=out)) if len(out) else 0
        if self._window is not None and self._window.failure is not None:
            raise self._window.failure
        return length

    def seek(self, start: int) -> None:
        self._file.seek(start)

    def _count(self, name: str) -> int:
        """Samples per channel of a file that does not say, by decoding them."""
        block = np.empty((max(1, _BLOCK // self._file.channels), self._file.channels), dtype=np.float32)
        frames = 0
        while length := self.read(block):
            frames += length
        self._file.seek(0)
        return frames


class _ByTorchcodec:
    """What torchcodec decodes, whole. Containers round lengths, and some (a browser's recordings) do not know them."""

    exact = can_seek = False

    def __init__(self, decoder: Any):
        metadata, self._decoder = decoder.metadata, decoder
        self._samples: np.ndarray | None = None
        self._place = 0
        seconds = metadata.duration_seconds
        length = round(seconds * metadata.sample_rate) if seconds else len(self.samples)
        self.info = AudioInfo(length, metadata.sample_rate, metadata.num_channels)

    @property
    def samples(self) -> np.ndarray:
        """All samples: S x channels, float32."""
        if self._samples is None:
            self._samples = self._decoder.get_all_samples().data.numpy().T
        return self._samples

    def read(self, out: np.ndarray) -> int:
        block = self.samples[self._place : self._place + len(out)]
        out[: len(block)] = block
        self._place += len(block)
        return len(block)

    def seek(self, start: int) -> None:
        self._place = start


def _is_plain(info: AudioInfo) -> bool:
    return info.channels == 1 and info.sampling_rate == SAMPLING_RATE


def _whole(audio: _Decoder, name: str) -> np.ndarray:
    """All samples of mono audio at 16 kHz, decoded into the place where they stay."""
    expected = audio.info.num_samples
    # A decoder's lengths that are not exact may be too small.
    most = expected if audio.exact else 2 * expected + SAMPLING_RATE
    with _named_errors(name):
        waveform, length = np.empty(min(most, _RESERVED), dtype=np.float32), 0
        while length < most:
            if length == len(waveform):
                waveform.resize(min(most, 2 * length), refcheck=False)
            got = audio.read(waveform[length:, None])
            length += got
            if length < len(waveform):
                break
        if length < len(waveform):
            waveform.resize(length, refcheck=False)
    _check_length(audio, length, name)
    return waveform


def _blocks(audio: _Decoder, name: str) -> Iterator[np.ndarray]:
    """The samples at 16 kHz, mono, some at a time; a block is good until the next one is asked for."""
    info = audio.info
    frames = max(1, min(_BLOCK // info.channels, info.num_samples))
    with _named_errors(name):
        block = np.empty((frames, info.channels), dtype=np.float32)
        resampler = None if info.sampling_rate == SAMPLING_RATE else _Resampler(info.sampling_rate)
    length = 0
    while True:
        with _named_errors(name):
            got = audio.read(block)
            length += got
            mono = block[:got, 0] if info.channels == 1 else block[:got].mean(axis=1)
            mono = _finite(mono, name)
            resampled = mono if resampler is None else resampler(mono)
        if got:
            yield resampled
        if got < frames or (audio.exact and length >= info.num_samples):
            break
    _check_length(audio, length, name)
    if resampler is not None:
        with _named_errors(name):
            rest = resampler.rest()
        yield rest


def _finite(waveform: np.ndarray, name: str) -> np.ndarray:
    # A sum is finite only if every term is (or nearly: opposite infinities give NaN), and needs no temporary array.
    if not np.isfinite(waveform.sum(dtype=np.float64)):
        raise AudioError(
            f"{shown(name)}: has non-finite samples (NaN or infinity). Repair the recording or leave it out."
        )
    return waveform


def _check_length(audio: _Decoder, length: int, name: str) -> None:
    expected = audio.info.num_samples
    if length < (expected if audio.exact else _SHORTER * expected):
        raise _cut_off(name, length, expected)


@contextmanager
def _opened(source: Source, name: str) -> Iterator[_Decoder]:
    """The decoder of an audio file. Raises `AudioError` for what is none, or is cut off by what its header says."""
    with ExitStack() as stack:
        with _named_errors(name, source):
            file, window, size = _open_source(source, name, stack)
            read_at = window.read_at if window is not None else _read_at(file.fileno())
            end, repair = declared(read_at, size)
            if end is not None and end > size:
                raise AudioError(
                    f"{shown(name)}: cut off, by its header it has at least {end} bytes and {size} are there. Copy the "
                    "file again or leave it out."
                )
            if repair is not None:
                window = window or FileWindow(file, 0, size)
                window.repair = repair
            try:
                # By its number: libsndfile takes a name of its own choosing for another format.
                opened = _Sequential(file.fileno() if window is None else window, closefd=False)
            except soundfile.SoundFileError as error:
                if window is not None and window.failure is not None:
                    raise window.failure from error
                decoder = _further_decoder(source, error, lambda: read_at(0, size))
                if decoder is None:
                    raise
                audio: _Decoder = _ByTorchcodec(decoder)
            else:
                audio = _ByLibsndfile(stack.enter_context(opened), window, name)
        yield audio


def _open_source(source: Source, name: str, stack: ExitStack) -> tuple[Any, FileWindow | None, int]:
    """An open file, the window to read it through (None for a file on its own), and its size in bytes."""
    if isinstance(source, bytes):
        file: Any = io.BytesIO(source)
        return file, FileWindow(file, 0, len(source)), len(source)
    if isinstance(source, Member):
        file = stack.enter_context(open(source.archive, "rb"))  # noqa: SIM115 (the stack closes it)
        if os.fstat(file.fileno()).st_size < source.offset + source.size:
            raise _archive_ends(source.archive, name, source.offset + source.size)
        return file, FileWindow(file, source.offset, source.size), source.size
    if isinstance(source, (str, Path)):
        status = os.stat(source)  # before it is opened: a FIFO waits, a tape winds back
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{shown(name)}: is {_kind(status.st_mode)}, no audio file. Leave it out.")
        file = stack.enter_context(open(source, "rb", buffering=0))  # noqa: SIM115
        return file, None, os.fstat(file.fileno()).st_size
    try:
        mode = os.fstat(source.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no file of the system
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        raise AudioError(f"{shown(name)}: is {_kind(mode)}, no audio file. Leave it out.")
    if not source.seekable():
        return _open_source(source.read(), name, stack)
    size = source.seek(0, os.SEEK_END)
    return source, FileWindow(source, 0, size), size


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _read_at(descriptor: int) -> Any:
    return lambda offset, count: os.pread(descriptor, count, offset)


@contextmanager
def _named_errors(name: str, source: Any = None) -> Iterator[None]:
    """Whatever a decoder raises as an `AudioError` that names the file."""
    try:
        yield
    except (AudioError, ModuleNotFoundError):
        raise
    except MemoryError as error:
        raise AudioError(f"{shown(name)}: is too large for the memory. Cut it into parts, or leave it out.") from error
    except Exception as error:
        raise _unreadable(source, name, error) from error


def unreadable_suffixes() -> dict[str, str]:
    """Suffixes of audio that cannot be read here, and what to do about it."""
    advice = dict.fromkeys(UNREAD_SUFFIXES, "convert it to FLAC or WAV")
    if not importlib.util.find_spec("torchcodec"):
        advice |= dict.fromkeys(FURTHER_SUFFIXES, "install torchcodec and FFmpeg, which read it, or convert it")
    return advice


@cache
def audio_decoder() -> Any:
    """torchcodec's decoder; None where it is not installed, or finds no FFmpeg that it can use."""
    try:
        from torchcodec.decoders import AudioDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    return AudioDecoder


def _further_decoder(source: Source, error: Exception, content: Any) -> Any:
    """torchcodec's decoder of audio whose format libsndfile does not know; None where it cannot help.

    A damaged file of a format that libsndfile knows is not tried: what can be decoded of it would pass for the whole.
    """
    if getattr(error, "code", None) != _UNKNOWN_FORMAT or (decoder := audio_decoder()) is None:
        return None
    try:
        found = decoder(source if isinstance(source, (str, Path, bytes)) else content())
        return found if found.metadata.sample_rate and found.metadata.num_channels else None
    except (RuntimeError, ValueError):
        return None


def _name(source: Source, name: str | None) -> str:
    if name is not None:
        return str(name)
    if isinstance(source, Member):
        return f"{source.archive} at byte {source.offset}"
    return str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "audio"))


def _check(name: str, info: AudioInfo, resample: bool) -> None:
    name = shown(name)
    if info.num_samples <= 0:
        raise AudioError(f"{name}: holds no samples. Leave it out.")
    if not _RATES[0] <= info.sampling_rate <= _RATES[1]:
        raise AudioError(f"{name}: claims {info.sampling_rate} Hz, which no recording has. Repair its header.")
    if (hours := info.num_samples / info.sampling_rate / 3600) > _LONGEST_HOURS:
        raise AudioError(f"{name}: claims {hours:.0f} hours of audio, which no recording has. Repair its header.")
    if resample:
        return
    if info.sampling_rate != SAMPLING_RATE:
        raise AudioError(f"{name}: has {info.sampling_rate} Hz instead of {SAMPLING_RATE}. {_RESAMPLE}")
    if info.channels != 1:
        raise AudioError(f"{name}: has {counted(info.channels, 'channel')} instead of 1. {_RESAMPLE}")


def _cut_off(name: str, length: int, expected: int) -> AudioError:
    return AudioError(
        f"{shown(name)}: cut off, {length} of {expected} samples can be decoded. Copy the file again or leave it out."
    )


def _archive_ends(archive: str, name: str, end: int) -> AudioError:
    return AudioError(
        f"{shown(name)}: {shown(archive)} ends before byte {end}. Copy the archive again, or write its manifest anew."
    )


def _unreadable(source: Source | None, name: str, error: Exception) -> AudioError:
    path = source.archive if isinstance(source, Member) else source
    if isinstance(error, FileNotFoundError) and isinstance(path, (str, Path)):
        missing = "no such file" if str(path) == name else f"{shown(path)} does not exist"
        return AudioError(
            f"{shown(name)}: {missing}. Paths in manifests are looked for beside it, then in the working folder."
        )
    reason = one_line(getattr(error, "error_string", None) or error, 300).rstrip(".") or type(error).__name__
    advice = "Leave it out or convert it."
    if name.lower().endswith(FURTHER_SUFFIXES) and audio_decoder() is None:
        advice = "Convert it, or install torchcodec and FFmpeg, which read such files."
    return AudioError(f"{shown(name)}: cannot be read as audio ({reason}). {advice}")


__all__ = [
    "AUDIO_SUFFIXES",
    "FURTHER_SUFFIXES",
    "AudioFile",
    "AudioInfo",
    "Member",
    "audio_suffixes",
    "read_audio",
    "read_info",
    "read_window",
    "resample_audio",
    "resampler_name",
    "unreadable_suffixes",
]
