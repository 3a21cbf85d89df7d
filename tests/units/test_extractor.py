"""Windows over long recordings, ragged batches, and extraction of whole data sets from Python."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_parity import PARITY, load
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor, SpidrForAudioTokenization, SpidrModel
from spidr_hf.data.manifests import scan_folder
from spidr_hf.units.extractor import (
    Extractor,
    check_layers,
    cluster_outputs,
    extract,
    feature_outputs,
    plan_windows,
    teacher_outputs,
    unit_outputs,
)

EXTRACTOR = SpidrFeatureExtractor()


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * 16_000)).astype(np.float32)


@given(st.integers(1, 2000), st.integers(3, 300), st.integers(0, 100))
@settings(max_examples=200)
def test_windows_keep_every_frame_once_with_its_context(frames, window, context):
    context = min(context, (window - 1) // 2)
    windows = plan_windows(frames, window, context)
    kept = np.concatenate([np.arange(w.first, w.last)[w.keep] for w in windows])
    np.testing.assert_array_equal(kept, np.arange(frames))
    assert len({w.last - w.first for w in windows}) == 1
    length = windows[0].last
    assert length == frames if len(windows) == 1 else window <= length <= window + window // 20
    for w in windows:
        first, last = np.arange(w.first, w.last)[w.keep][[0, -1]]
        assert w.first == 0 or first - w.first >= context
        assert w.last == frames or w.last - 1 - last >= context


def test_longer_windows_where_that_saves_one():
    def lengths(seconds):
        return [w.last - w.first for w in plan_windows(50 * seconds, 3000, 100)]

    assert lengths(60) == [3000]
    assert lengths(63) == [3150]
    assert lengths(64) == [3000] * 2
    assert lengths(3600) == [3010] * 64


def test_a_window_without_room_is_refused():
    with pytest.raises(ValueError, match=r"window of 2 s with 1 s of context.*longer than twice"):
        Extractor(tiny_model(), EXTRACTOR, unit_outputs(tiny_model()), window=2, context=1)


@pytest.mark.parametrize("objective", ["spidr", "dinosr"])
def test_units_are_the_argmax_of_the_predictions_and_ignore_what_shares_the_batch(objective):
    model = tiny_model(objective=objective)
    waveforms = [EXTRACTOR.standardize(noise(s, i)) for i, s in enumerate((1.1, 0.025, 2.3, 0.7))]
    for layers in ([2, 3, 4], [3]):
        together = Extractor(model, EXTRACTOR, unit_outputs(model, layers))(waveforms)
        small = Extractor(model, EXTRACTOR, unit_outputs(model, layers), max_batch_seconds=1.2)(waveforms)
        for waveform, a, b in zip(waveforms, together, small, strict=True):
            with torch.no_grad():
                expected = model.get_codebooks(torch.from_numpy(waveform)[None])
            assert sorted(a) == layers
            for layer in layers:
                torch.testing.assert_close(a[layer], expected[layer - 1][0].argmax(-1))
                torch.testing.assert_close(a[layer], b[layer])


@pytest.mark.parametrize("folder", ["spidr-tiny", "dinosr-tiny", "spidr-tiny-variant"])
def test_units_are_those_of_the_reference_implementation(folder):
    model = load(PARITY / folder / "checkpoint.pt", folder.split("-")[0])
    expected = load_file(PARITY / folder / "expected.safetensors")
    units = Extractor(model, EXTRACTOR, unit_outputs(model))(list(expected["waveform"].numpy()))
    for row, result in enumerate(units):
        for layer, sequence in result.items():
            assert torch.equal(sequence, expected[f"codebook.{layer}.proba"][row].argmax(-1))


@pytest.mark.parametrize("before_residual", [True, False])
def test_features_are_those_of_each_alone(before_residual):
    model = tiny_model().spidr
    waveforms = [EXTRACTOR.standardize(noise(s, i)) for i, s in enumerate((1.1, 0.4, 0.7))]
    results = Extractor(model, EXTRACTOR, feature_outputs(model, [3, 1], before_residual=before_residual))(waveforms)
    for waveform, result in zip(waveforms, results, strict=True):
        with torch.no_grad():
            expected = model.get_intermediate_outputs(torch.from_numpy(waveform)[None], before_residual=before_residual)
        for layer in (1, 3):
            torch.testing.assert_close(result[layer], expected[layer - 1][0], atol=1e-4, rtol=1e-4)


def test_layers_above_the_highest_are_not_computed():
    model = tiny_model()
    model.spidr.encoder.layers[3].forward = None
    for outputs in (unit_outputs(model, [2, 3]), feature_outputs(model, [3])):
        assert sorted(Extractor(model, EXTRACTOR, outputs)([noise(0.5)])[0])[-1] == 3


def test_a_long_recording_is_its_windows():
    model = tiny_model()
    waveform = EXTRACTOR.standardize(noise(9.03))
    extractor = Extractor(model, EXTRACTOR, feature_outputs(model, [4]), window=3, context=0.5)
    result = extractor([waveform])[0][4]
    assert len(result) == extractor.frames(len(waveform)) == (len(waveform) - 400) // 320 + 1
    for window in plan_windows(len(result), 150, 25):
        piece = torch.from_numpy(waveform[window.first * 320 : (window.last - 1) * 320 + 400])
        with torch.no_grad():
            expected = model.spidr.get_intermediate_outputs(piece[None])[3][0][window.keep]
        first = window.first + window.keep.start
        torch.testing.assert_close(result[first : first + len(expected)], expected, atol=1e-4, rtol=1e-4)
    units = Extractor(model, EXTRACTOR, unit_outputs(model, [4]), window=3, context=0.5)([waveform])[0][4]
    expected = (result @ model.heads.weight[2].t() + model.heads.bias[2]).argmax(-1)
    assert (units == expected).float().mean() > 0.99


def test_without_attention_there_are_no_seams():
    """Convolutions reach less than the context, so windows give what the whole recording gives."""
    model = tiny_model()
    for layer in model.spidr.encoder.layers:
        torch.nn.init.zeros_(layer.attention.proj.weight)
    waveform = EXTRACTOR.standardize(noise(13.37))
    windows = Extractor(model, EXTRACTOR, feature_outputs(model, [4]), window=5, context=1.5)([waveform])[0][4]
    whole = Extractor(model, EXTRACTOR, feature_outputs(model, [4]))([waveform])[0][4]
    torch.testing.assert_close(windows, whole, atol=1e-4, rtol=1e-4)


def test_recordings_are_standardised_whole_also_in_blocks(monkeypatch):
    extractor = Extractor(tiny_model(), EXTRACTOR, unit_outputs(tiny_model()))
    waveform = 0.01 * noise(2) + 0.3
    expected, original = EXTRACTOR.standardize(waveform), waveform.copy()
    monkeypatch.setattr("spidr_hf.units.extractor.BLOCK", 10_000)
    np.testing.assert_allclose(extractor.standardize(waveform), expected, atol=1e-5)
    np.testing.assert_array_equal(waveform, original)
    waveform[7] = np.nan
    with pytest.raises(ValueError, match="non-finite"):
        extractor.standardize(waveform)


def test_teacher_labels_and_clusters():
    model = tiny_model()
    waveform = EXTRACTOR.standardize(noise(1))
    labels = Extractor(model, EXTRACTOR, teacher_outputs(model, [2, 4]))([waveform])[0]
    expected = model.get_teacher_labels(torch.from_numpy(waveform)[None])[0]
    assert torch.equal(labels[2], expected[0]) and torch.equal(labels[4], expected[2])
    centroids = torch.randn(7, 48)
    units = Extractor(model, EXTRACTOR, cluster_outputs(model, 2, centroids))([waveform])[0][2]
    features = Extractor(model, EXTRACTOR, feature_outputs(model, [2]))([waveform])[0][2]
    assert torch.equal(units, torch.cdist(features, centroids).argmin(-1))
    with pytest.raises(ValueError, match="48"):
        cluster_outputs(model, 2, torch.randn(7, 5))
    tokenizer = SpidrForAudioTokenization(model.config)
    with pytest.raises(ValueError, match="whole pretraining checkpoint"):
        teacher_outputs(tokenizer)


@pytest.mark.parametrize("layer", [0, 5, -1])
def test_unknown_layers_are_refused(layer):
    with pytest.raises(ValueError, match=f"Layer {layer} has no representation.*layers 1 to 4"):
        feature_outputs(SpidrModel(tiny_model().config), [1, layer])
    assert check_layers([3, 1, 3], 1, 4, "x") == [1, 3]


def test_a_folder_with_a_bad_file_among_good_ones(tmp_path):
    for i, seconds in enumerate((0.5, 1.0, 0.01, 0.7)):
        soundfile.write(tmp_path / f"{i}.wav", noise(seconds, i), 16_000)
    soundfile.write(tmp_path / "cut.flac", noise(1.5), 16_000)
    content = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    source = scan_folder(tmp_path, progress=False)
    model = tiny_model()
    extractor = Extractor(model, EXTRACTOR, unit_outputs(model, [4]), max_batch_seconds=1)
    results, skipped = {}, []
    for batch in extract(source, extractor):
        results |= {source.fileid(i): units[4] for i, units in batch.results}
        skipped += batch.skipped
    assert sorted(results) == ["0", "1", "3"]
    reasons = dict(skipped)
    assert sorted(reasons) == ["2", "cut"] and "too short" in reasons["2"]
    alone = extractor([EXTRACTOR.standardize(source.read(1))])[0][4]
    assert torch.equal(results["1"], alone)


def test_of_what_is_not_wanted_nothing_is_told_and_nothing_computed_alone(tmp_path, monkeypatch):
    for i, seconds in enumerate((0.5, 0.9, 0.01, 0.01)):
        soundfile.write(tmp_path / f"{i}.wav", noise(seconds, i), 16_000)
    source = scan_folder(tmp_path, progress=False)
    model = tiny_model()
    extractor = Extractor(model, EXTRACTOR, feature_outputs(model, [4]), max_batch_seconds=10)
    (whole,) = extract(source, extractor)
    (part,) = extract(source, extractor, wanted={1, 3})
    assert [index for index, _ in part.results] == [1] and [entry.fileid for entry in part.skipped] == ["3"]
    assert torch.equal(part.results[0][1][4], dict(whole.results)[1][4]) and part.seconds == 0.9
    monkeypatch.setattr(extractor, "results", None)  # computing would fail
    (nothing,) = extract(source, extractor, wanted={2})
    assert not nothing.results and [entry.fileid for entry in nothing.skipped] == ["2"]


HOUR = """if True:
    import resource, sys, torch
    from spidr_hf import SpidrConfig, SpidrFeatureExtractor, SpidrForAudioTokenization
    from spidr_hf.units.extractor import Extractor, extract, unit_outputs
    from spidr_hf.data.manifests import scan_folder
    torch.set_num_threads(1)
    config = SpidrConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7,
        num_conv_pos_embedding_groups=2, codebook_size=8, num_codebooks=1,
    )
    model = SpidrForAudioTokenization(config).eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    extractor = Extractor(model, SpidrFeatureExtractor(), unit_outputs(model))
    (batch,) = extract(scan_folder(sys.argv[1], progress=False), extractor)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(len(batch.results[0][1][2]), (after - before) // 1024)
"""


@pytest.mark.slow
def test_an_hour_in_bounded_memory(tmp_path):
    """The recording itself takes 230 MB, twice that while it is standardised; nothing grows with its square."""
    with soundfile.SoundFile(tmp_path / "hour.wav", "w", 16_000, 1) as file:
        for minute in range(60):
            file.write(noise(60, minute))
    done = subprocess.run([sys.executable, "-c", HOUR, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames, megabytes = map(int, done.stdout.split())
    assert frames == (3600 * 16_000 - 400) // 320 + 1
    assert megabytes < 800
