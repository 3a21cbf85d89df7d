"""What a page does with a recording: each bad one gets a message, good ones the units of the pipeline."""

import numpy as np
import pytest
import soundfile
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor
from spidr_hf.examples.demo_page.recordings import (
    Recording,
    analyse_recording,
    cut_unit,
    default_layer,
    read_recording,
    unit_stretches,
    units_report,
)
from spidr_hf.system.errors import AudioError
from spidr_hf.units.unit_files import predict_units

RATE = 16_000


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_units_are_those_of_the_package(model, tmp_path):
    waveform = noise(20_000)
    soundfile.write(tmp_path / "a.wav", waveform, RATE, subtype="FLOAT")
    recording = analyse_recording(tmp_path / "a.wav", model, SpidrFeatureExtractor())
    assert recording.name == "a.wav" and recording.seconds == 1.25
    expected = predict_units(model, SpidrFeatureExtractor(), [waveform])
    assert set(recording.units) == set(expected) == {2, 3, 4}
    assert all(np.array_equal(recording.units[layer], expected[layer][0]) for layer in expected)


def test_any_rate_and_channels(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.stack([noise(44_100), noise(44_100, 1)], axis=1), 44_100)
    assert len(read_recording(tmp_path / "a.flac")) == RATE


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("Dear page, this is no sound.\n" * 9), "is no audio file.* Use WAV, FLAC"),
        (lambda path: path.write_bytes(b""), "is empty: the file has no content"),
        (lambda path: soundfile.write(path, noise(0), RATE), "holds no sound"),
        (lambda path: soundfile.write(path, noise(399), RATE), "too short: 24.9 ms. One unit needs 25 ms"),
        (lambda path: soundfile.write(path, noise(100), RATE), "too short: 6.25 ms"),
        (lambda path: soundfile.write(path, noise(60 * 100 * 80), 100), "100 samples per second; 4000 to"),
        (lambda path: soundfile.write(path, noise(10), 2_000_000_011), "2000000011 samples per second"),
        (lambda path: soundfile.write(path, noise(61 * RATE), RATE), "61 s long; at most 60 seconds"),
        (lambda path: soundfile.write(path, noise(500 * 4_000), 4_000), "8.3 min long"),
        (lambda path: path.unlink(missing_ok=True), "is not here any more"),
        (lambda path: soundfile.write(path, np.full(RATE, np.nan), RATE, subtype="FLOAT"), "is damaged"),
    ],
)
def test_bad_uploads_get_a_message(write, message, tmp_path):
    path = tmp_path / "speech.wav"
    write(path)
    with pytest.raises(AudioError, match=message) as error:
        read_recording(path, min_samples=400)
    assert str(error.value).startswith("speech.wav ") and str(tmp_path) not in str(error.value)


def test_an_hour_is_refused_without_being_decoded(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "hour.flac", np.zeros(3_600 * RATE, np.int16), RATE)
    monkeypatch.setattr("spidr_hf.examples.demo_page.recordings.read_audio", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(AudioError, match=r"hour\.flac is 60 min long; at most 60 seconds can be shown"):
        read_recording(tmp_path / "hour.flac")


def test_channels_are_refused_without_being_decoded(tmp_path, monkeypatch):
    path = tmp_path / "wide.wav"  # as Ogg, a minute of such silence is 100 KB
    soundfile.write(path, np.zeros((200_000, 255), np.int16), 48_000, subtype="PCM_U8")
    monkeypatch.setattr("spidr_hf.examples.demo_page.recordings.read_audio", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(AudioError, match=r"wide\.wav has 255 channels at 48000 Hz"):
        read_recording(path)


def test_a_cut_off_file_is_damaged(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, noise(RATE), RATE)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match=r"a\.flac is damaged"):
        read_recording(path)


def test_first_layer_shown(model):
    assert default_layer(model.config) == 4  # none has a codebook on layer 6
    assert default_layer(tiny_model(num_hidden_layers=8, num_codebooks=3).config) == 6
    assert default_layer(tiny_model(num_hidden_layers=8, num_codebooks=1).config) == 8


def test_a_unit_is_cut_where_it_lies():
    waveform = np.repeat(np.arange(1, 6, dtype=np.float32), 320)  # frame n holds n + 1
    a = Recording("a", np.append(waveform, np.float32(9)), {3: np.array([4, 7, 7, 4, 7])})
    b = Recording("b", waveform, {3: np.array([4, 4, 4, 4, 7])})
    assert unit_stretches(a.units[3]) == [(4, 0, 1), (7, 1, 2), (4, 3, 1), (7, 4, 1)]
    cut = cut_unit([a, b], 3, 7)
    pause = round(0.15 * RATE)
    assert len(cut) == 640 + pause + 320 + pause + 320
    assert cut[300] == 2 and cut[340] == 3  # away from the faded ends
    assert not cut[640 : 640 + pause].any()
    assert cut[640 + pause + 160] == 5 and cut[-160] == 5
    with pytest.raises(ValueError, match="Unit 1 of layer 3"):
        cut_unit([a], 3, 1)


def test_report():
    a = Recording("a.wav", noise(1_600), {3: np.array([4, 7, 7, 4])})
    b = Recording("b.wav", noise(1_600), {3: np.array([4, 7, 7, 7])})
    report = units_report([a, b], 3, {"model": "me/model"})
    assert report["recordings"][0] == {"file": "a.wav", "seconds": 0.1, "units": [4, 7, 4], "durations": [1, 2, 1]}
    assert report["comparison"]["edit_distance"] == 1 and report["comparison"]["shared_units"] == 2
    assert (report["model"], report["layer"], report["frame_seconds"]) == ("me/model", 3, 0.02)
    assert "comparison" not in units_report([a], 3, {})
