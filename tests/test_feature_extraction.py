"""The feature extractor: standardisation, padding, integer audio, refusals."""

import json
import logging

import numpy as np
import pytest
import torch
from tiny import tiny_config
from transformers import AutoFeatureExtractor, AutoProcessor, Wav2Vec2CTCTokenizer, Wav2Vec2Processor
from transformers.utils.logging import get_logger

from spidr_hf import SpidrConfig, SpidrFeatureExtractor, SpidrModel

RATE = 16_000
extractor = SpidrFeatureExtractor()


def standardized(waveform: np.ndarray) -> np.ndarray:
    """The definition, in extended precision."""
    waveform = waveform.astype(np.longdouble)
    mean = waveform.mean()
    return (waveform - mean) / np.sqrt(np.square(waveform - mean).mean() + 1e-5)


def noise(samples: int, level: float = 0.1, offset: float = 0.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=samples) * level + offset).astype(np.float32)


@pytest.mark.parametrize(
    "waveform",
    [
        noise(16_000),
        noise(16_000, level=0.9),
        noise(16_000, level=1e-3),
        noise(16_000, level=1e-3, offset=0.5),
        noise(2_000_000, level=0.05, offset=-0.2),
        np.zeros(8_000, dtype=np.float32),
        np.full(8_000, 0.3, dtype=np.float32),
        noise(16_000).astype(np.float64),
        noise(16_000).astype(np.float16),
    ],
    ids=["usual", "loud", "quiet", "quiet-with-offset", "long", "silence", "constant", "float64", "float16"],
)
def test_standardizes_over_the_utterances_own_samples(waveform):
    values = extractor(waveform, sampling_rate=RATE)["input_values"][0]
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, standardized(waveform).astype(np.float64), rtol=1e-6, atol=1e-6)


def test_the_epsilon_matters_on_quiet_audio_and_is_a_field():
    quiet = noise(16_000, level=1e-3)
    assert 0.2 < extractor(quiet, sampling_rate=RATE)["input_values"][0].std() < 0.4
    other = SpidrFeatureExtractor(norm_eps=1e-12)
    assert other(quiet, sampling_rate=RATE)["input_values"][0].std() == pytest.approx(1, abs=1e-3)
    unchanged = SpidrFeatureExtractor(do_normalize=False)
    np.testing.assert_array_equal(unchanged(quiet, sampling_rate=RATE)["input_values"][0], quiet)


def test_rows_of_a_padded_batch_equal_the_utterances_alone():
    waveforms = [noise(n, level=level) for n, level in ((4000, 0.5), (7001, 1e-3), (400, 0.1))]
    batch = extractor(waveforms, sampling_rate=RATE, padding=True, return_tensors="np")
    assert batch["input_values"].shape == batch["attention_mask"].shape == (3, 7001)
    assert batch["attention_mask"].dtype == np.int32
    for row, mask, waveform in zip(batch["input_values"], batch["attention_mask"], waveforms, strict=True):
        alone = extractor(waveform, sampling_rate=RATE)["input_values"][0]
        np.testing.assert_array_equal(row[: len(waveform)], alone)
        assert not row[len(waveform) :].any()
        np.testing.assert_array_equal(mask, np.arange(7001) < len(waveform))


@pytest.mark.parametrize("padding", [False, True])
def test_the_attention_mask_comes_unless_it_is_not_wanted(padding):
    waveform = noise(1000)
    inputs = extractor(waveform, sampling_rate=RATE, padding=padding)
    assert inputs["attention_mask"][0].tolist() == [1] * 1000
    assert "attention_mask" not in extractor(waveform, sampling_rate=RATE, padding=padding, return_attention_mask=False)
    without = SpidrFeatureExtractor(return_attention_mask=False)
    assert "attention_mask" not in without(waveform, sampling_rate=RATE, padding=padding)


def test_padding_and_truncation_lengths():
    waveforms = [noise(1000), noise(3000)]

    def shape(**options):
        rows = extractor(waveforms, sampling_rate=RATE, **options)["input_values"]
        return [len(row) for row in rows]

    assert shape() == [1000, 3000]
    assert shape(padding="longest") == [3000, 3000]
    assert shape(padding="longest", pad_to_multiple_of=320) == [3200, 3200]
    assert shape(padding="max_length", max_length=4000) == [4000, 4000]
    assert shape(padding="max_length", max_length=2000) == [2000, 3000]
    assert shape(padding="max_length", max_length=2000, truncation=True) == [2000, 2000]
    assert shape(max_length=2000, truncation=True) == [1000, 2000]
    assert shape(padding=True, max_length=500, truncation=True) == [500, 500]
    with pytest.raises(ValueError, match="max_length"):
        shape(truncation=True)
    with pytest.raises(ValueError, match="padding=True"):
        extractor(waveforms, sampling_rate=RATE, return_tensors="pt")


def test_statistics_are_those_of_the_samples_left_after_truncation():
    waveform = np.concatenate([noise(1000, level=0.01), noise(1000, level=0.9)])
    cut = extractor(waveform, sampling_rate=RATE, max_length=1000, truncation=True)["input_values"][0]
    np.testing.assert_array_equal(cut, extractor(waveform[:1000], sampling_rate=RATE)["input_values"][0])


def test_every_kind_of_input_gives_the_same_batch():
    rows = np.stack([noise(1000), noise(1000, seed=1)])
    expected = extractor(list(rows), sampling_rate=RATE, return_tensors="np")["input_values"]
    for batch in (
        rows,
        rows.tolist(),
        tuple(rows),
        [row.tolist() for row in rows],
        torch.from_numpy(rows),
        list(torch.from_numpy(rows)),
        torch.from_numpy(rows).requires_grad_(),
        rows.astype(np.float64),
    ):
        values = extractor(batch, sampling_rate=RATE, return_tensors="pt")["input_values"]
        assert isinstance(values, torch.Tensor)
        np.testing.assert_array_equal(values.numpy(), expected)
    for single in (
        rows[0],
        rows[0].tolist(),
        torch.from_numpy(rows[0]),
        list(rows[0]),
        list(torch.from_numpy(rows[0])),
    ):
        values = extractor(single, sampling_rate=RATE, return_tensors="np")["input_values"]
        np.testing.assert_array_equal(values, expected[:1])
    ragged = np.empty(2, dtype=object)
    ragged[:] = [rows[0], rows[1, :900]]
    assert [len(row) for row in extractor(ragged, sampling_rate=RATE)["input_values"]] == [1000, 900]
    half = extractor(torch.from_numpy(rows).bfloat16(), sampling_rate=RATE, return_tensors="np")["input_values"]
    np.testing.assert_allclose(half, expected, atol=0.02)


@pytest.mark.parametrize(
    "dtype, scale, silence",
    [(np.int16, 2**15, 0), (np.int32, 2**31, 0), (np.uint8, 2**7, 128), (np.int8, 2**7, 0)],
)
def test_integer_pcm_is_scaled(dtype, scale, silence):
    limits = np.iinfo(dtype)
    pcm = np.random.default_rng(0).integers(limits.min, limits.max, size=1000, dtype=dtype, endpoint=True)
    scaled = (pcm.astype(np.float64) - silence) / scale
    assert scaled.min() >= -1 and scaled.max() < 1
    unchanged = SpidrFeatureExtractor(do_normalize=False)
    for audio in (pcm, torch.from_numpy(pcm), [pcm]):
        np.testing.assert_allclose(unchanged(audio, sampling_rate=RATE)["input_values"][0], scaled, atol=1e-7)
    quiet = (pcm // 64 + (silence - silence // 64)).astype(dtype)
    np.testing.assert_allclose(
        extractor(quiet, sampling_rate=RATE)["input_values"][0],
        standardized((quiet.astype(np.float64) - silence) / scale).astype(np.float64),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "audio, message",
    [
        (np.zeros((2, 2, 1000)), r"got \(2, 2, 1000\): keep one channel or average"),
        (torch.zeros(1, 2, 1000), r"got \(1, 2, 1000\): keep one channel or average"),
        ([np.zeros((2, 1000))], r"Utterance 0 must be mono audio .* got \(2, 1000\): keep one channel"),
        ([noise(1000), torch.zeros(2, 1000)], "Utterance 1 must be mono audio"),
        ([[[0.0, 0.1], [0.2, 0.3]]], "Utterance 0 must be mono audio"),
        ([[[0.0, 0.1], [0.2]]], "Utterance 0 must be mono audio"),
        (np.zeros((1000, 2)), r"\(1000, 2\) looks like samples x channels"),
        ([], "The input is empty"),
        (np.zeros((0, 1000)), "The input is empty"),
        (np.zeros(0), "Utterance 0 is empty"),
        ([noise(10), []], "Utterance 1 is empty"),
        (np.array([0.0, 0.1, np.nan]), "Utterance 0 has non-finite samples .* first at sample 2: repair"),
        ([noise(10), np.array([0.0, np.inf])], "Utterance 1 has non-finite samples .* first at sample 1"),
        ([1, 2, 3], r"type int64, whose scale is unknown: pass floats .*np.int16"),
        (np.zeros(10, dtype=np.uint16), "uint16, whose scale is unknown"),
        (np.zeros(10, dtype=bool), "bool, whose scale is unknown"),
        (np.zeros(10, dtype=complex), "complex128, whose scale is unknown"),
        ({"array": noise(10), "sampling_rate": RATE}, r"The input is a dict, .* pass its samples, `audio\['array'\]`"),
        ([{"array": noise(10)}], "Utterance 0 is a dict"),
        ("speech.wav", "The input is a str, .* pass samples, not a file"),
        (None, "The input is a NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_say_what_to_do(audio, message):
    with pytest.raises(ValueError, match=message):
        extractor(audio, sampling_rate=RATE)


def test_refuses_another_sampling_rate():
    with pytest.raises(
        ValueError, match=r"16000 Hz and got audio of 8000 Hz: resample it .*resample\(audio, 8000, 16000"
    ):
        extractor(noise(1000), sampling_rate=8000)


def test_warns_without_a_sampling_rate():
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = get_logger("spidr_hf.feature_extraction_spidr")
    logger.addHandler(handler)
    try:
        extractor(noise(1000))
        extractor(noise(1000), sampling_rate=RATE)
    finally:
        logger.removeHandler(handler)
    assert len(messages) == 1 and "strongly recommended to pass the `sampling_rate`" in messages[0]


@pytest.mark.parametrize("fields, message", [({"norm_eps": 0}, "norm_eps"), ({"padding_side": "left"}, "padding_side")])
def test_refuses_impossible_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SpidrFeatureExtractor(**fields)


def test_audio_too_short_for_a_frame_is_refused_by_the_model():
    config = SpidrConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, conv_dim=[4] * 7,
        num_conv_pos_embedding_groups=1, num_codebooks=1, codebook_size=4,
    )  # fmt: skip
    model = SpidrModel(config).eval()
    batch = extractor(noise(399), sampling_rate=RATE, return_tensors="pt")
    with pytest.raises(ValueError, match="399 samples is too short: one frame needs 400"):
        model(**batch)
    batch = extractor([noise(399), noise(1000)], sampling_rate=RATE, padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match="399 samples: one frame needs 400"):
        model(**batch)


def test_saves_and_loads(tmp_path):
    saved = SpidrFeatureExtractor(norm_eps=1e-4, do_normalize=False, padding_value=0.5)
    saved.save_pretrained(tmp_path)
    loaded = SpidrFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    assert (loaded.norm_eps, loaded.do_normalize, loaded.padding_value) == (1e-4, False, 0.5)
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is SpidrFeatureExtractor
    fields = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert fields["feature_extractor_type"] == "SpidrFeatureExtractor"
    assert fields["auto_map"] == {"AutoFeatureExtractor": "feature_extraction_spidr.SpidrFeatureExtractor"}
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        saved.save_pretrained(tmp_path / "file")


def test_goes_into_the_processor_of_transformers(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5}))
    processor = Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json")))
    processor.save_pretrained(tmp_path / "processor")
    processor = Wav2Vec2Processor.from_pretrained(tmp_path / "processor")
    assert type(processor.feature_extractor) is SpidrFeatureExtractor
    waveforms = [noise(1000), noise(900)]
    batch = processor(waveforms, text=["a a", "a"], sampling_rate=RATE, padding=True, return_tensors="pt")
    assert batch["labels"].shape == (2, 3)
    assert batch["attention_mask"].sum(-1).tolist() == [1000, 900]
    features = [{"input_values": extractor(w, sampling_rate=RATE)["input_values"][0]} for w in waveforms]
    collated = processor.pad(features, padding=True, return_tensors="pt")
    torch.testing.assert_close(collated["input_values"], batch["input_values"], rtol=0, atol=0)
    assert collated["attention_mask"].sum(-1).tolist() == [1000, 900]


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.float32])
def test_either_byte_order_is_read(kind):
    rng = np.random.default_rng(0)
    audio = rng.normal(0, 0.1, 1000)
    audio = (audio if kind is np.float32 else audio * np.iinfo(kind).max).astype(kind)
    extract = SpidrFeatureExtractor()
    expected = extract(audio, sampling_rate=16_000)["input_values"]
    swapped = audio.astype(audio.dtype.newbyteorder())
    assert np.array_equal(extract(swapped, sampling_rate=16_000)["input_values"], expected)


def test_one_channel_is_mono_however_it_lies():
    audio = np.random.default_rng(0).normal(0, 0.1, 1000).astype(np.float32)
    extract = SpidrFeatureExtractor()
    expected = extract(audio, sampling_rate=16_000)["input_values"][0]
    for given in (audio[None], audio[:, None], [audio[None]], [audio[:, None]]):
        (got,) = extract(given, sampling_rate=16_000)["input_values"]
        assert np.array_equal(got, expected)


def test_auto_processor_asks_nothing(tmp_path, monkeypatch):
    """The folder holds remote code, which nobody needs where the package is imported."""

    def ask(*_):
        raise AssertionError("asked whether to run custom code")

    monkeypatch.setattr("builtins.input", ask)
    SpidrModel(tiny_config()).save_pretrained(tmp_path)
    SpidrFeatureExtractor(norm_eps=1e-3).save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is SpidrFeatureExtractor and processor.norm_eps == 1e-3
