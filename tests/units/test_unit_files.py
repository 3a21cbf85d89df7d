"""Units of ragged batches, collapsed repeats, and the files that hold units."""

import json
import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor, SpidrForAudioTokenization, SpidrForPretraining
from spidr_hf.units.unit_files import (
    deduplicate,
    describe_model,
    predict_units,
    provenance_path,
    read_units,
    write_units,
)


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_codebooks=2, hidden_dropout=0.1)  # codebooks for layers 3 and 4


@pytest.fixture(scope="module")
def waveforms():
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, n).astype(np.float32) for n in (9_000, 400, 24_321, 719, 16_000)]


def test_units_of_ragged_audio_are_those_of_each_alone(model, waveforms):
    extractor = SpidrFeatureExtractor()
    model.train()
    together = predict_units(model, extractor, waveforms)
    assert model.training  # as it was found
    assert list(together) == [3, 4]
    alone = [predict_units(model, extractor, [waveform]) for waveform in waveforms]
    in_small_batches = predict_units(model, extractor, waveforms, max_batch_seconds=1.1)
    model.eval()
    for i, waveform in enumerate(waveforms):
        inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            probabilities = model.get_codebooks(inputs["input_values"])
        assert probabilities[:2] == [None, None]
        for layer in (3, 4):
            expected = probabilities[layer - 1][0].argmax(-1).numpy()
            assert len(expected) == (len(waveform) - 400) // 320 + 1
            for units in (together[layer][i], alone[i][layer][0], in_small_batches[layer][i]):
                assert units.dtype == np.int64
                np.testing.assert_array_equal(units, expected)


def test_both_classes_give_the_same_units(model, waveforms, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer = SpidrForAudioTokenization.from_pretrained(tmp_path)
    from_codebooks = predict_units(model, SpidrFeatureExtractor(), waveforms, layers=[4])
    from_codes = predict_units(tokenizer, SpidrFeatureExtractor(), waveforms, layers=[4])
    assert list(from_codes) == [4]
    for a, b in zip(from_codebooks[4], from_codes[4], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("layer", [0, 2, 5])
def test_a_layer_without_codebook_is_refused(model, waveforms, layer):
    with pytest.raises(ValueError, match=f"Layer {layer} has no codebook.*layers 3 to 4"):
        predict_units(model, SpidrFeatureExtractor(), waveforms, layers=[3, layer])


def test_another_sampling_rate_is_refused(model, waveforms):
    with pytest.raises(ValueError, match="44100"):
        predict_units(model, SpidrFeatureExtractor(), waveforms, sampling_rate=44_100)


@given(st.lists(st.integers(0, 3)))
def test_deduplicate_and_back(units):
    kept, durations = deduplicate(units)
    assert np.repeat(np.array(kept, dtype=int), durations).tolist() == units
    assert all(a != b for a, b in pairwise(kept))


def test_deduplicate_takes_what_units_come_in():
    expected = ([5, 2, 5], [2, 1, 1])
    for units in ([5, 5, 2, 5], np.array([5, 5, 2, 5]), torch.tensor([5, 5, 2, 5])):
        assert deduplicate(units) == expected
    with pytest.raises(ValueError, match=r"one utterance.*\(1, 3\)"):
        deduplicate([[1, 2, 2]])
    with pytest.raises(ValueError, match="integers"):
        deduplicate([0.5, 1.0])


@pytest.mark.parametrize("collapse", [False, True])
def test_files_hold_units_and_where_they_are_from(tmp_path, collapse):
    units = {"b/ü": np.array([3, 3, 1]), "a": [0]}
    path = tmp_path / "6" / "units.jsonl"
    write_units(path, units, {"model": "m", "layer": 6}, collapse=collapse)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if collapse:
        assert rows[0] == {"file": "b/ü", "units": [3, 1], "durations": [2, 1]}
    else:
        assert rows == [{"file": "b/ü", "units": [3, 3, 1]}, {"file": "a", "units": [0]}]
    back = read_units(path)
    assert {key: value.tolist() for key, value in back.items()} == {"b/ü": [3, 3, 1], "a": [0]}
    sidecar = json.loads(provenance_path(path).read_text())
    assert sidecar.items() >= {"model": "m", "layer": 6, "deduplicated": collapse, "utterances": 2, "frames": 4}.items()
    assert sorted(os.listdir(path.parent)) == ["units.jsonl", "units.provenance.json"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "units.jsonl"
    write_units(path, {"a": [1]}, {})
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_units(path, {"b": [2]}, {})
    monkeypatch.undo()
    assert list(read_units(path)) == ["a"]
    assert json.loads(provenance_path(path).read_text())["utterances"] == 1


@pytest.mark.parametrize("units", [[-1, 2], [], [0.5], [[1]]])
def test_what_is_no_unit_is_not_written(tmp_path, units):
    with pytest.raises(ValueError, match="The units of 'x'"):
        write_units(tmp_path / "units.jsonl", {"x": units}, {})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file": "a", "units": [1]}\n{"file": "a", "units": [2]}\n', "line 2: the file id 'a' was there before"),
        ('{"file": "a", "units": [1]}\n{"file": "b", "un', "line 2 is not of the form"),
        ('{"id": "a", "units": [1]}\n', "line 1 is not of the form.*'file'"),
        ('{"file": "a", "units": [1], "durations": [1, 2]}\n', "line 1 is not of the form"),
    ],
)
def test_broken_unit_files_are_named(tmp_path, text, message):
    path = tmp_path / "units.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"units.jsonl, {message}"):
        read_units(path)


def test_names_of_audio_are_read_without_its_suffix(tmp_path):
    """As they are written for fastabx where they have a point in them."""
    lines = ('{"audio": "a.b.flac", "units": [1]}', '{"audio": "c.d", "units": [2]}', '{"file": "e.wav", "units": [3]}')
    (tmp_path / "units.jsonl").write_text("\n".join(lines))
    assert list(read_units(tmp_path / "units.jsonl")) == ["a.b", "c.d", "e.wav"]


def test_a_model_is_described_by_its_weights(model, tmp_path):
    assert describe_model(model) == {"model": None, "revision": None}
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    a, b = (describe_model(SpidrForPretraining.from_pretrained(tmp_path / name)) for name in "ab")
    assert a["model"] == str(tmp_path / "a")
    assert a["sha256"] == b["sha256"] and len(a["sha256"]) == 64
