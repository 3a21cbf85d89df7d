"""`pipeline("speech-to-units")` on everything that audio comes as."""

import io

import numpy as np
import pytest
import soundfile
import torch
from tiny import tiny_config, tiny_model
from transformers import pipeline

from spidr_hf import SpeechToUnitsPipeline, SpidrFeatureExtractor, SpidrForAudioTokenization, SpidrForCTC, SpidrModel
from spidr_hf.units.unit_files import predict_units


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("speech-to-units", model=str(folder), layer=3, device="cpu")


@pytest.fixture(scope="module")
def waveforms():
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in (9_000, 24_321, 719, 16_000)]


@pytest.fixture(scope="module")
def expected(folder, waveforms):
    model = SpidrForAudioTokenization.from_pretrained(folder)
    return [predict_units(model, SpidrFeatureExtractor(), [waveform], [3])[3][0].tolist() for waveform in waveforms]


def test_one_recording(pipe, waveforms, expected, tmp_path):
    assert isinstance(pipe, SpeechToUnitsPipeline)
    soundfile.write(tmp_path / "a.wav", waveforms[0], 16_000, subtype="FLOAT")
    for item in (
        waveforms[0],
        torch.from_numpy(waveforms[0]),
        {"array": waveforms[0], "sampling_rate": 16_000},
        {"raw": waveforms[0], "sampling_rate": 16_000},
        str(tmp_path / "a.wav"),
        tmp_path / "a.wav",
        (tmp_path / "a.wav").read_bytes(),
        bytearray((tmp_path / "a.wav").read_bytes()),
        memoryview((tmp_path / "a.wav").read_bytes()),
        io.BytesIO((tmp_path / "a.wav").read_bytes()),
        waveforms[0][None],
        waveforms[0][:, None],
        {"array": waveforms[0][None], "sampling_rate": 16_000},
        waveforms[0].astype(">f4"),
        {"path": str(tmp_path / "a.wav"), "bytes": None},
    ):
        result = pipe(item)
        assert result == {"units": expected[0], "durations": [1] * len(expected[0])}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_several(pipe, waveforms, expected, batch_size):
    for several in (waveforms, tuple(waveforms)):
        results = pipe(several, batch_size=batch_size)
        assert isinstance(results, list) and [result["units"] for result in results] == expected
    stream = pipe((waveform for waveform in waveforms), batch_size=batch_size)
    assert not isinstance(stream, list) and [result["units"] for result in stream] == expected


def test_deduplication_keeps_durations(pipe, folder, waveforms, expected):
    for run in (pipe, pipeline("speech-to-units", model=str(folder), layer=3, deduplicate=True, device="cpu")):
        result = run(waveforms[1], deduplicate=True)
        assert np.repeat(result["units"], result["durations"]).tolist() == expected[1]
        assert all(a != b for a, b in zip(result["units"], result["units"][1:], strict=False))


def test_the_layer_may_change_per_call(pipe, folder, waveforms):
    model = SpidrForAudioTokenization.from_pretrained(folder)
    units = predict_units(model, SpidrFeatureExtractor(), waveforms[:1], [2, 4])
    assert pipe(waveforms[0], layer=2)["units"] == units[2][0].tolist()
    # The default is 6, here the last: there is no layer 6.
    default = pipeline("speech-to-units", model=model, feature_extractor=SpidrFeatureExtractor(), device="cpu")
    assert default(waveforms[0])["units"] == units[4][0].tolist()


def test_long_recordings_have_no_seams(folder):
    model = tiny_model()
    for layer in model.spidr.encoder.layers:
        torch.nn.init.zeros_(layer.attention.proj.weight)
    pipe = pipeline("speech-to-units", model=model, feature_extractor=SpidrFeatureExtractor(), device="cpu")
    waveform = np.random.default_rng(1).normal(0, 0.1, 200_000).astype(np.float32)
    whole = np.array(pipe(waveform)["units"])
    windows = np.array(pipe(waveform, window_seconds=5, context_seconds=1.5)["units"])
    assert len(whole) == len(windows) == (200_000 - 400) // 320 + 1
    assert (whole == windows).mean() > 0.995


def test_other_rates_are_resampled(pipe, tmp_path):
    time = np.arange(3 * 48_000) / 48_000
    tone = (0.1 * np.sin(2 * np.pi * 300 * time * (1 + 0.2 * time))).astype(np.float32)
    low = pipe(np.ascontiguousarray(tone[::3]))["units"]
    soundfile.write(tmp_path / "s.wav", np.stack([tone, tone], 1), 48_000, subtype="FLOAT")
    for item in ({"array": tone, "sampling_rate": 48_000}, str(tmp_path / "s.wav")):
        units = pipe(item)["units"]
        assert len(units) == len(low)
        assert (np.array(units) == low).mean() > 0.8


def test_a_column_of_a_data_set(pipe, waveforms, expected, tmp_path):
    datasets = pytest.importorskip("datasets")
    paths = []
    for i, waveform in enumerate(waveforms):
        paths.append(str(tmp_path / f"{i}.wav"))
        soundfile.write(paths[-1], waveform, 16_000, subtype="FLOAT")
    data = datasets.Dataset.from_dict({"audio": paths}).cast_column("audio", datasets.Audio(decode=False))
    results = pipe(data["audio"], batch_size=2)
    assert [result["units"] for result in results] == expected
    streamed = data.to_iterable_dataset()
    results = pipe((row["audio"] for row in streamed), batch_size=2)
    assert [result["units"] for result in results] == expected


def test_bad_input(pipe, folder, tmp_path):
    for item, message in (
        (np.zeros((2, 16_000), dtype=np.float32), r"mono.*\(2, 16000\)"),
        ({"array": np.zeros(800)}, "sampling_rate"),
        ({"text": "x"}, "`array` and `sampling_rate`"),
        (str(tmp_path / "nothing.wav"), "nothing.wav"),
        (np.zeros(100, dtype=np.float32), "too short"),
        (np.full(1000, np.nan, dtype=np.float32), "non-finite"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(item)
    for kind in (np.int64, np.uint16, bool):
        for rate in (16_000, 8_000):
            with pytest.raises(ValueError, match="scale is unknown"):
                pipe({"array": np.ones(16_000, dtype=kind), "sampling_rate": rate})
    with open(__file__) as file, pytest.raises(ValueError, match="binary mode"):
        pipe(file)
    good = np.zeros(1000, dtype=np.float32)
    with pytest.raises(ValueError, match=r"^Input 2: .*too short"):
        pipe([good, good, good[:100], good], batch_size=2)
    with pytest.raises(ValueError, match="empty list"):
        pipe(good, layer=[])
    with pytest.raises(ValueError, match="Layer 1 has no codebook"):
        pipe(np.zeros(800, dtype=np.float32), layer=1)
    with pytest.raises(ValueError, match="Layer 9 has no codebook"):
        pipeline("speech-to-units", model=str(folder), layer=9, device="cpu")
    with pytest.raises(TypeError, match="'beams'"):
        pipe(np.zeros(800, dtype=np.float32), beams=3)


@pytest.mark.parametrize("rate", [16_000, 8_000])
def test_integer_pcm_is_scaled_alike_at_every_rate(pipe, waveforms, rate):
    pcm = (waveforms[1] * 20_000).clip(-32768, 32767).astype(np.int16)
    expected = pipe({"array": pcm / np.float32(32768), "sampling_rate": rate})
    for array in (pcm, pcm.astype(">i2"), pcm.astype(np.int32) << 16, torch.from_numpy(pcm)):
        assert pipe({"array": array, "sampling_rate": rate}) == expected


def test_several_layers_in_one_pass(folder, waveforms, monkeypatch):
    pipe = pipeline("speech-to-units", model=str(folder), layer=[4, 3], device="cpu")
    expected = {layer: pipe(waveforms[0], layer=layer) for layer in (3, 4)}
    passes, forward = [], pipe.model.base_model.feature_extractor.forward
    monkeypatch.setattr(
        pipe.model.base_model.feature_extractor, "forward", lambda *args: passes.append(1) or forward(*args)
    )
    assert pipe(waveforms[0]) == expected and len(passes) == 1
    assert pipe([waveforms[0]], deduplicate=True)[0][3]["durations"] != expected[3]["durations"]
    assert pipe(waveforms[0], layer=[3]) == {3: expected[3]}


@pytest.mark.parametrize("model_class", [SpidrModel, SpidrForCTC])
def test_weights_that_predict_no_units_are_refused(model_class, tmp_path):
    torch.manual_seed(0)
    model_class(tiny_config(vocab_size=9)).save_pretrained(tmp_path)
    SpidrFeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights.*heads\.") as caught:
        pipeline("speech-to-units", model=str(tmp_path), device="cpu")
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
