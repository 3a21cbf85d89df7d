"""Decoding: what is read comes out as it went in, what cannot be used is named."""

import io
import os
import shutil
import struct
import subprocess
import tarfile

import numpy as np
import pytest
import soundfile

from spidr_hf.data import audio
from spidr_hf.data.audio import AudioFile, Member, read_audio, read_info, read_window, resample_audio
from spidr_hf.data.containers import FileWindow
from spidr_hf.data.manifests import scan_folder
from spidr_hf.system.errors import AudioError


@pytest.fixture
def waveform() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".flac", ".wav", ".ogg"])
def test_formats(tmp_path, waveform, suffix):
    path = tmp_path / f"a{suffix}"
    soundfile.write(path, waveform, 16_000)
    assert read_info(path).num_samples == len(waveform)
    for source in (path, str(path), path.read_bytes(), path.open("rb")):
        decoded = read_audio(source)
        assert decoded.dtype == np.float32 and decoded.shape == waveform.shape
        if suffix != ".ogg":
            np.testing.assert_allclose(decoded, waveform, atol=2**-15)


def test_members_of_a_tar_are_read_in_place(tmp_path, waveform):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.flac", waveform if name == "b" else waveform[:5000], 16_000)
    with tarfile.open(tmp_path / "both.tar", "w") as archive:
        for name in ("a", "b"):
            archive.add(tmp_path / f"{name}.flac", f"{name}.flac")
    with tarfile.open(tmp_path / "both.tar") as archive, open(tmp_path / "both.tar", "rb") as file:
        member = archive.getmember("b.flac")
        decoded = read_window(tmp_path / "both.tar", member.offset_data, member.size)
        assert read_info(FileWindow(file, member.offset_data, member.size)).num_samples == len(waveform)
    np.testing.assert_array_equal(decoded, read_audio(tmp_path / "b.flac"))


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling(tmp_path, rate):
    """A tone stays the tone, from any rate and with any number of channels; headers tell the resulting length."""
    time = np.arange(rate // 2) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone, tone], axis=1), rate, subtype="FLOAT")
    decoded = read_audio(tmp_path / "tone.wav", resample=True)
    assert decoded.dtype == np.float32
    assert len(decoded) == read_info(tmp_path / "tone.wav", resample=True).num_samples_16k
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(decoded)) / 16_000)
    np.testing.assert_allclose(decoded[800:-800], expected[800:-800], atol=5e-3)
    assert len(resample_audio(tone, rate)) == len(decoded)


@pytest.fixture
def torchcodec():
    """torchcodec's decoder, which must come with an FFmpeg that it can load."""
    decoder = audio.audio_decoder()
    if decoder is None:
        pytest.skip("torchcodec, or an FFmpeg that it can use, is not installed")
    return decoder


@pytest.fixture
def convert(tmp_path, torchcodec):
    """`convert(waveform, suffix, rate)` writes a file as FFmpeg encodes it."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        pytest.skip("the command ffmpeg is not installed")

    def run(waveform, suffix, rate=16_000):
        soundfile.write(tmp_path / "in.wav", waveform, rate, "FLOAT")
        path = tmp_path / f"out{suffix}"
        subprocess.run([ffmpeg, "-y", "-loglevel", "error", "-i", tmp_path / "in.wav", "-vn", path], check=True)
        return path

    return run


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["a.wav", "a.flac", "float.wav"])
def test_torchcodec_decodes_what_soundfile_does(tmp_path, torchcodec, kind, channels):
    data = 0.1 * np.random.default_rng(0).standard_normal((16_000, channels))
    soundfile.write(tmp_path / kind, data, 16_000, "FLOAT" if "float" in kind else None)
    theirs = audio._further_samples(torchcodec(tmp_path / kind), "audio")
    assert audio._further_info(torchcodec(tmp_path / kind)) == read_info(tmp_path / kind, resample=True)
    np.testing.assert_allclose(theirs.mean(axis=1), read_audio(tmp_path / kind, resample=True), atol=1e-7)


@pytest.mark.parametrize("suffix", [".m4a", ".mp4", ".webm", ".mkv"])
def test_formats_that_libsndfile_does_not_know(convert, tmp_path, suffix):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32_000) / 16_000).astype(np.float32)
    path = convert(tone, suffix)
    for source in (path, path.read_bytes(), path.open("rb")):
        decoded = read_audio(source, name="a", resample=suffix == ".webm")  # Opus has 48 kHz
        assert decoded.dtype == np.float32 and abs(len(decoded) - 32_000) < 1_200
        spectrum = np.abs(np.fft.rfft(decoded[8_000:24_000]))
        assert np.argmax(spectrum) == 440 and 0.4 < np.abs(decoded[8_000:24_000]).max() < 0.6
    expected = read_info(path, resample=True).num_samples_16k
    assert abs(expected - len(decoded)) < 1_200
    if suffix == ".webm":
        with pytest.raises(AudioError, match=r"out\.webm: has 48000 Hz instead of 16000"):
            read_audio(path)


def test_a_folder_of_such_files_is_found(convert, tmp_path):
    convert(np.zeros(16_000), ".m4a")
    (tmp_path / "in.wav").unlink()
    (manifest,) = [scan_folder(tmp_path, progress=False)]
    assert manifest.fileid(0) == "out" and len(manifest.read(0)) >= 16_000


def test_damaged_files_of_such_formats_are_named(convert, tmp_path, waveform):
    for suffix in (".m4a", ".mkv"):
        path = convert(waveform, suffix)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(AudioError, match=f"out\\{suffix}: (cannot be|cut off)"):
            read_audio(path)


def test_without_torchcodec_the_message_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "audio_decoder", lambda: None)
    (tmp_path / "a.m4a").write_bytes(b"nothing" * 100)
    with pytest.raises(AudioError, match=r"a\.m4a: cannot be read as audio .* install torchcodec and FFmpeg"):
        read_audio(tmp_path / "a.m4a")


def bad_files(folder, waveform):
    soundfile.write(folder / "8k.wav", waveform, 8_000)
    soundfile.write(folder / "stereo.wav", np.stack([waveform, waveform], axis=1), 16_000)
    soundfile.write(folder / "nothing.wav", waveform[:0], 16_000)
    soundfile.write(folder / "nan.wav", np.where(np.arange(len(waveform)) == 7, np.nan, waveform), 16_000, "FLOAT")
    soundfile.write(folder / "whole.flac", waveform, 16_000)
    content = (folder / "whole.flac").read_bytes()
    (folder / "cut.flac").write_bytes(content[: len(content) // 2])
    (folder / "empty.flac").write_bytes(b"")
    (folder / "text.wav").write_text("this is not audio\n" * 100)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("8k.wav", "8k.wav: has 8000 Hz instead of 16000. Convert it, or ask for resampling"),
        ("stereo.wav", "stereo.wav: has 2 channels instead of 1. Convert it, or ask for resampling"),
        ("nothing.wav", "nothing.wav: holds no samples"),
        ("nan.wav", "nan.wav: has non-finite samples"),
        ("cut.flac", "cut.flac: c"),  # libsndfile's versions differ in what they say
        ("empty.flac", "empty.flac: cannot be read as audio"),
        ("text.wav", "text.wav: cannot be read as audio"),
        ("missing.wav", "missing.wav: no such file"),
    ],
)
def test_unusable_audio_is_named(tmp_path, waveform, name, message):
    bad_files(tmp_path, waveform)
    with pytest.raises(AudioError, match=message):
        read_audio(tmp_path / name)


def test_messages_name_what_bytes_belong_to():
    with pytest.raises(AudioError, match=r"the\.tar:a\.wav: cannot be read"):
        read_audio(b"nonsense", name="the.tar:a.wav")
    with pytest.raises(AudioError, match=r"^audio: cannot be read"):
        read_audio(io.BytesIO(b"nonsense"))


def test_cut_off_archives_are_named(tmp_path, waveform):
    (tmp_path / "a.tar").write_bytes(b"0" * 100)
    with pytest.raises(AudioError, match="ends before byte 150"):
        read_window(tmp_path / "a.tar", 50, 100)
    with pytest.raises(AudioError, match="does not exist"):
        read_window(tmp_path / "b.tar", 50, 100, name="b.tar:x.wav")


# Every format and coding that libsndfile writes and knows again by its content.
CODINGS = [
    (kind, coding)
    for kind in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST")
    for coding in soundfile.available_subtypes(kind)
    if coding not in ("DWVW_12", "MPEG_LAYER_I", "MPEG_LAYER_II") and (kind, coding) != ("WAV", "MPEG_LAYER_III")
]


def encoded(waveform, kind="WAV", coding=None, endian=None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, 16_000, format=kind, subtype=coding, endian=endian)
    return file.getvalue()


def ways(content, folder) -> list:
    """The same audio as everything that the reader takes."""
    (folder / "audio").write_bytes(content)
    (folder / "archive").write_bytes(b"before" + content + b"behind")
    member = Member(str(folder / "archive"), 6, len(content))
    return [folder / "audio", content, io.BytesIO(content), open(folder / "audio", "rb"), member]


@pytest.mark.parametrize(("kind", "coding"), CODINGS)
def test_every_coding_is_read_whole_and_known_when_it_is_cut_off(tmp_path, waveform, kind, coding):
    content = encoded(waveform, kind, coding)
    for source in ways(content, tmp_path):
        decoded = read_audio(source, name="a")
        assert len(waveform) <= len(decoded) < len(waveform) + 2_000
        assert read_info(source, name="a").num_samples == len(decoded)
        # The parts of it are the whole.
        file = AudioFile(source, name="a")
        np.testing.assert_array_equal(np.concatenate([block.copy() for block in file.blocks()]), decoded)
        np.testing.assert_array_equal(file.part(5_000, 9_001), decoded[5_000:9_001])
    for share in (0.5, 0.9, 0.99):
        for source in ways(content[: int(share * len(content))], tmp_path):
            with pytest.raises(AudioError, match=r"^a: c"):
                read_audio(source, name="a")


def placed(content: bytes, name: bytes, value: int, order: str, width: int = 4, behind: int = 0) -> bytes:
    """The content with another number behind the first occurrence of a chunk's name."""
    place = content.index(name) + len(name) + behind
    return content[:place] + struct.pack(order + {4: "I", 8: "Q"}[width], value) + content[place + width :]


def streamed(waveform) -> dict[str, bytes]:
    """What programs write into a pipe: sizes are not known when the header is."""
    riff, rifx, aiff = (encoded(waveform, kind, "PCM_16", order) for kind, order in KINDS.values())
    files = {}
    for value in (0, 0xFFFFFFFF, 0x7FFFFFFF - 36, 0x7FFFF000, 0x80000000, 0xFFFFFFFF - 44):
        files[f"wav {value:x}"] = placed(placed(riff, b"RIFF", value or 36, "<"), b"data", value, "<")
        files[f"rifx {value:x}"] = placed(placed(rifx, b"RIFX", value or 36, ">"), b"data", value, ">")
    for value in (0x7F000008, 0xFFFFFFFF):
        files[f"aiff {value:x}"] = placed(aiff, b"SSND", value, ">")
    files["au"] = placed(encoded(waveform, "AU", "PCM_16"), b".snd", 0xFFFFFFFF, ">", behind=4)
    files["caf"] = placed(encoded(waveform, "CAF", "PCM_16"), b"data", (1 << 64) - 1, ">", 8)
    w64 = encoded(waveform, "W64", "PCM_16")
    files["w64"] = placed(w64, bytes.fromhex("64617461f3acd3118cd100c04f8edb8a"), (1 << 63) - 1, "<", 8)
    rf64 = encoded(waveform, "RF64", "PCM_16")
    files["rf64"] = placed(rf64, b"ds64", (1 << 64) - 1, "<", 8, behind=12)
    files["au 0"] = placed(encoded(waveform, "AU", "PCM_16"), b".snd", 0, ">", behind=4)
    files["flac"] = flac_of_length(waveform, 0)
    return files


KINDS = {"riff": ("WAV", "LITTLE"), "rifx": ("WAV", "BIG"), "aiff": ("AIFF", None)}


def flac_of_length(waveform, length: int) -> bytes:
    """A FLAC whose header says that it has so many samples (36 bits; 0: not known)."""
    content = encoded(waveform, "FLAC")
    header = int.from_bytes(content[18:26], "big") >> 36 << 36 | length
    return content[:18] + header.to_bytes(8, "big") + content[26:]


def test_lengths_that_nobody_knew_are_found_out(tmp_path, waveform):
    for kind, content in streamed(waveform).items():
        for source in ways(content, tmp_path):
            assert len(read_audio(source, name=kind)) == len(waveform), kind
            assert read_info(source, name=kind).num_samples == len(waveform), kind
            assert len(AudioFile(source, name=kind).part(100, 300)) == 200


def test_an_empty_recording_with_more_behind_it_holds_no_samples(waveform):
    content = encoded(waveform[:0], "WAV", "PCM_16") + b"LIST" + struct.pack("<I", 100) + bytes(100)
    with pytest.raises(AudioError, match="holds no samples"):
        read_audio(placed(content, b"RIFF", len(content) - 8, "<"))


@pytest.mark.parametrize("length", [15_999, 16_001, 40_000, 1 << 35, (1 << 36) - 1])
def test_flac_headers_that_lie(waveform, length):
    content = flac_of_length(waveform, length)
    if length < len(waveform):
        assert len(read_audio(content)) == length
    else:
        with pytest.raises(AudioError, match=r"^audio: (cut off, 16000 of|claims .* hours|cannot be read)"):
            read_audio(content)


def test_a_flac_of_unknown_length_that_is_cut_off(waveform):
    content = flac_of_length(waveform, 0)
    with pytest.raises(AudioError, match="cannot be read as audio"):
        read_audio(content[: len(content) // 2])


@pytest.mark.parametrize("rate", [0, 1, 999, 1_000_001, (1 << 31) - 1, (1 << 32) - 1])
def test_rates_that_lie(waveform, rate):
    content = placed(encoded(waveform, "WAV", "PCM_16"), b"fmt ", rate, "<", behind=8)
    for read in (read_audio, read_info):
        with pytest.raises(AudioError, match=r"claims -?\d+ Hz, which no recording has|cannot be read as audio"):
            read(content, resample=True)


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    (tmp_path / "b.wav").mkdir()
    for source, kind in ((tmp_path / "a.wav", "a FIFO"), (tmp_path / "b.wav", "a folder"), ("/dev/zero", "a device")):
        for read in (read_audio, read_info):
            with pytest.raises(AudioError, match=f"is {kind}, no audio file"):
                read(source)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as pipe, pytest.raises(AudioError, match="is a FIFO, no audio file"):
        read_audio(pipe)
    os.close(writing)
    with pytest.raises(AudioError, match="cannot be read as audio"):
        read_audio(tmp_path / "nul\0.wav")


class Broken(io.BytesIO):
    """A file on a disk that gives up."""

    def read(self, *_):
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("what is this?"), OSError(5, "Input/output error")])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, waveform, monkeypatch, error):
    (tmp_path / "a.wav").write_bytes(encoded(waveform))

    def read(*_, **__):
        raise error

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    for call in (read_audio, lambda path: list(AudioFile(path).blocks()), lambda path: AudioFile(path).part(0, 9)):
        with pytest.raises(AudioError, match=r"a\.wav: (is too large for the memory|cannot be read as audio)"):
            call(tmp_path / "a.wav")


def test_a_file_object_that_fails_is_named(waveform):
    with pytest.raises(AudioError, match=r"^a: cannot be read as audio \(.*Input/output error"):
        read_audio(Broken(encoded(waveform)), name="a")


def test_names_that_are_no_text(tmp_path, waveform):
    """Names of bytes that are no UTF-8, with line ends, and as long as a disk allows."""
    for name in (b"caf\xe9.wav", b"a\nb.wav", b"$HOME.wav", b"-", b"x" * 251 + b".wav"):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
        with open(path, "wb") as file:
            file.write(encoded(waveform))
        assert len(read_audio(path)) == read_info(path).num_samples == len(waveform)
        with open(path, "wb") as file:
            file.write(b"nothing")
        with pytest.raises(AudioError) as caught:
            read_audio(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "OGG", "MP3", "NIST"])
def test_damage_anywhere_ends_in_audio_or_in_one_line(waveform, kind):
    """Headers with bytes changed, taken out, or repeated: never anything but samples or an `AudioError`."""
    rng = np.random.default_rng(sorted(map(ord, kind)))
    whole = encoded(waveform[:4_000], kind)
    for _ in range(40):
        content = bytearray(whole)
        for place in rng.integers(min(200, len(content)), size=rng.integers(1, 4)):
            match rng.integers(3):
                case 0:
                    content[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
                case 1:
                    del content[place : place + int(rng.integers(1, 9))]
                case 2:
                    content[place : place + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        for resample in (False, True):
            try:
                decoded = read_audio(bytes(content), name="a", resample=resample)
                assert np.isfinite(decoded).all() and decoded.ndim == 1
                assert abs(read_info(bytes(content), resample=resample).num_samples_16k - len(decoded)) <= 1
            except AudioError as error:
                assert str(error).startswith("a: ") and str(error).isprintable() and len(str(error)) < 1_000


def test_resampling_in_blocks_is_resampling_at_once(tmp_path):
    """And aliases are as good as gone: a tone above 8 kHz leaves nothing."""
    for rate in (8_000, 11_025, 44_100, 96_000):
        noise = (0.1 * np.random.default_rng(0).standard_normal((3 * rate + 7, 2))).astype(np.float32)
        soundfile.write(tmp_path / "a.wav", noise, rate, "FLOAT")
        at_once = resample_audio(noise.mean(axis=1), rate)
        np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", resample=True), at_once)
        np.testing.assert_array_equal(AudioFile(tmp_path / "a.wav", resample=True).part(700, 900), at_once[700:900])
    tone = np.sin(2 * np.pi * 8_500 * np.arange(44_100) / 44_100).astype(np.float32)
    assert 20 * np.log10(np.abs(resample_audio(tone, 44_100)[500:-500]).max()) < -120
