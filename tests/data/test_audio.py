"""Decoding: what is read comes out as it went in, what cannot be used is named."""

import io
import shutil
import subprocess
import tarfile

import numpy as np
import pytest
import soundfile

from spidr_hf.data import audio
from spidr_hf.data.audio import FileWindow, read_audio, read_info, read_window, resample_audio
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
    decoder = audio._audio_decoder()
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
    monkeypatch.setattr(audio, "_audio_decoder", lambda: None)
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
