"""Streamed data sets: every utterance once, batches that fit, and resuming at the very next batch, bit for bit."""

import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from tiny import tiny_config

from spidr_hf.data.batches import BatchBuilder
from spidr_hf.data.open import open_source
from spidr_hf.data.sections import DataSection
from spidr_hf.data.streaming import Stream, StreamedBatches, StreamingSource, open_stream
from spidr_hf.pretraining.config import PretrainingConfig, make_config
from spidr_hf.pretraining.loaders import make_data_loader
from spidr_hf.system.errors import BatchingError, ConfigError, ManifestError
from spidr_hf.training.checkpoints import TrainerState

MODEL = tiny_config()
ROWS, SHARDS = 50, 5


def wav(seed: int, samples: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.default_rng(seed).standard_normal(samples), 16_000, format="WAV")
    return file.getvalue()


def length(index: int) -> int:
    return 3_000 + 37 * index  # of its own, so that an utterance is known by it


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five Parquet files of ten rows."""
    folder = tmp_path_factory.mktemp("parquet")
    for shard in range(SHARDS):
        indices = range(shard * 10, shard * 10 + 10)
        rows = {
            "id": [f"u{index:02d}" for index in indices],
            "audio": [{"bytes": wav(index, length(index)), "path": None} for index in indices],
        }
        table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
        table.to_parquet(folder / f"train-{shard}.parquet")
    return folder


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory) -> Path:
    """The same as an Arrow data set on disk."""
    path = tmp_path_factory.mktemp("saved") / "data"
    datasets.load_dataset(str(folder), split="train").save_to_disk(path)
    return path


def config(folder, **options) -> PretrainingConfig:
    defaults = {
        "manifest": str(folder), "streaming": True, "shuffle_buffer": 7, "num_buckets": 4, "num_workers": 0,
        "max_sample_size": 12_000, "max_batch_length": 16_000, "rand_crop": True,
    }  # fmt: skip
    return PretrainingConfig(data=DataSection(**{**defaults, **options}))


def loader(settings, state=None, **layout):
    return make_data_loader(
        open_source(settings.data, progress=False), settings, MODEL, state or TrainerState(), **layout
    )


def streams(settings, count: int) -> list[Stream]:
    source = open_source(settings.data)
    builder = BatchBuilder(settings.data, settings.masking, MODEL)
    return [Stream(source, builder, index, count) for index in range(count)]


def heard(stream: Stream, epochs: int) -> list[Counter]:
    """How often each utterance, known by its length, is decoded in every epoch of a stream."""
    counts = [Counter() for _ in range(epochs)]
    decode = stream.decode

    def watch(block, members):
        counts[min(block.begin.epoch, epochs - 1)].update(block.lengths[i] for i in members)
        return decode(block, members)

    stream.decode = watch
    for batch in stream:
        if batch.key.epoch >= epochs - 1:
            return counts[:-1]
    raise AssertionError


def assert_same(ours, expected) -> None:
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected, strict=True):
        assert (a.key.epoch, a.key.index) == (b.key.epoch, b.key.index)
        assert a.inputs.keys() == b.inputs.keys()
        assert all(torch.equal(a.inputs[name], b.inputs[name]) for name in b.inputs)


@pytest.mark.parametrize(
    ("kind", "count"), [("parquet", 1), ("parquet", 2), ("parquet", 5), ("parquet", 7), ("parquet", 13), ("arrow", 7)]
)
def test_each_utterance_comes_once_per_epoch_in_one_stream(folder, saved, kind, count):
    every = Counter()
    for stream in streams(config(folder if kind == "parquet" else saved), count):
        first, second = heard(stream, 3)
        assert first == second
        every += first
    assert every == Counter(length(index) for index in range(ROWS))


def test_batches_fit_and_hold_similar_lengths(folder):
    for padding in (False, True):
        (stream,) = streams(config(folder, shuffle_buffer=50, enable_padding=padding), 1)
        batches = list(islice(stream, 12))
        assert all(batch.input_values.numel() <= 16_000 for batch in batches)
        assert sum(len(batch.input_values) for batch in batches) > 30
        if padding:
            assert any(batch.attention_mask is not None for batch in batches)


def test_epochs_differ_and_seeds_do(folder):
    def order(**options):
        (stream,) = streams(config(folder, **options), 1)
        epochs = {}
        for batch in islice(stream, 40):
            epochs.setdefault(batch.key.epoch, []).append(batch.audio_samples)
        return epochs[0], epochs[1]

    first, second = order()
    assert first != second and order() == (first, second)
    assert order(random_seed=1)[0] != first


@pytest.mark.parametrize(
    ("kind", "world_size", "workers"),
    [("parquet", 1, 0), ("parquet", 1, 3), ("parquet", 2, 2), ("parquet", 3, 0), ("arrow", 1, 0)],
)
def test_resuming_continues_at_the_very_next_batch(folder, saved, kind, world_size, workers):
    """Within a block, at its ends, within and between shards, across epochs."""
    settings = config(folder if kind == "parquet" else saved, num_workers=workers)
    for rank in range(world_size):
        whole, states = [], []
        running = loader(settings, rank=rank, world_size=world_size)
        for batch in islice(running, 30):
            whole.append(batch)
            state = running.state()
            states.append(json.dumps({**state, "ranks": state["ranks"] * world_size}))
        assert max(batch.key.epoch for batch in whole) >= 1
        for taken in (1, 2, 3, 5, 7, 12, 17, 25) if workers == 0 else (4, 11):
            state = TrainerState(stream=json.loads(states[taken - 1]))
            rest = list(islice(loader(settings, state, rank=rank, world_size=world_size), 5))
            assert_same(rest, whole[taken : taken + 5])


def test_places_of_older_checkpoints_are_found(folder):
    """They have `shards` under the name `turn`."""
    (stream,) = streams(config(folder), 1)
    whole = list(islice(stream, 20))
    for taken in (7, 14):
        place = dict(whole[taken - 1].place)
        place["turn"] = place.pop("shards")
        source, builder = stream.source, stream.builder
        assert_same(list(islice(StreamedBatches(source, builder, taken=taken, places=[place]), 4)), whole[taken:][:4])


def test_one_worker_is_no_worker(folder):
    assert_same(
        list(islice(loader(config(folder, num_workers=1)), 12)), list(islice(loader(config(folder, num_workers=0)), 12))
    )


def test_another_layout_is_refused(folder):
    state = loader(config(folder)).state()
    trained = TrainerState(stream=json.loads(json.dumps(state)))
    for settings, layout in ((config(folder), {"world_size": 2}), (config(folder, num_workers=3), {})):
        with pytest.raises(BatchingError, match="streams its audio with 1 process of 1 worker and cannot resume"):
            loader(settings, trained, **layout)
    # Other audio begins at its beginning.
    trained.stream["data"] = "other"
    assert loader(config(folder, num_workers=3), trained).state()["ranks"][0]["taken"] == 0


def test_what_cannot_be_used_is_skipped_and_named(tmp_path):
    contents = [wav(0, 9_000), b"no audio", None, wav(1, 100), wav(2, 9_000)]
    cut = io.BytesIO()
    soundfile.write(cut, 0.1 * np.random.default_rng(0).standard_normal(20_000), 16_000, format="FLAC")
    contents += [cut.getvalue()[:15_000], wav(3, 8_000)]
    rows = {"audio": [{"bytes": content, "path": None} for content in contents]}
    datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio()).to_parquet(tmp_path / "a.parquet")
    (stream,) = streams(config(tmp_path, shuffle_buffer=3), 1)
    skipped, tried, rows = [], 0, 0
    for batch in stream:
        if batch.key.epoch:
            break
        skipped += batch.skipped
        tried += len(batch.key.utterances)
        rows += len(batch.input_values)
    assert rows == 3 and tried >= rows + 2
    reasons = {entry.fileid.rpartition(", ")[2]: entry.reason for entry in skipped}
    assert "cannot be read as audio" in reasons["row 1"] and "no audio in this row" in reasons["row 2"]
    assert "has 100 samples at 16 kHz, at least 2000 are needed" in reasons["row 3"]


def test_audio_of_which_nothing_can_be_used_is_a_failure(tmp_path):
    rows = {"audio": [{"bytes": b"no audio", "path": None}] * 3}
    datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio()).to_parquet(tmp_path / "a.parquet")
    (stream,) = streams(config(tmp_path), 1)
    (batch,) = stream
    assert "found no audio that can be used. The last:" in batch.failure and len(batch.key.utterances) == 6


def test_a_stream_that_breaks_off_is_a_failure_not_a_traceback():
    pytest.importorskip(
        "torchcodec", reason="datasets encodes audio of a generator by torchcodec", exc_type=ImportError
    )

    def rows(shards):
        for shard in shards:
            for index in range(9):
                if shard == 1:
                    raise ConnectionError("the line is dead")
                yield {"audio": {"bytes": wav(index, 9_000), "path": None}}

    features = datasets.Features({"audio": datasets.Audio()})
    data = datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs={"shards": [0, 1]})
    settings = config("x", num_workers=0)
    builder = BatchBuilder(settings.data, settings.masking, MODEL)
    *good, last = StreamedBatches(StreamingSource(data, name="talk"), builder)
    assert "talk: the stream broke off (the line is dead)" in last.failure
    assert all(batch.failure is None for batch in good)


@pytest.mark.parametrize("column", ["audio", "sound"])
def test_a_source_of_ones_own(folder, column):
    """Any `IterableDataset` with an Audio column: filtered, renamed."""
    loaded = datasets.load_dataset(str(folder), split="train", streaming=True)
    # Without `decode=False`, datasets would decode what its own filter sees.
    loaded = loaded.cast_column("audio", datasets.Audio(decode=False))
    chosen = loaded.filter(lambda row: row["id"] < "u20")
    if column != "audio":
        pytest.importorskip(
            "torchcodec", reason="datasets encodes a renamed column by torchcodec", exc_type=ImportError
        )
        chosen = chosen.rename_column("audio", column)
    settings = config("x")
    builder = BatchBuilder(settings.data, settings.masking, MODEL)
    source = StreamingSource(chosen)
    (first, _) = heard(Stream(source, builder, 0, 1), 3)
    assert first == Counter(length(index) for index in range(20))
    whole = list(islice(Stream(source, builder, 0, 1), 15))
    for taken in (1, 3, 8):
        batches = StreamedBatches(source, builder, taken=taken, places=[whole[taken - 1].place])
        assert_same(list(islice(batches, 4)), whole[taken : taken + 4])


def test_bad_data_is_named(folder, tmp_path):
    loaded = datasets.load_dataset(str(folder), split="train", streaming=True)
    with pytest.raises(ManifestError, match="has a shuffle buffer, whose content would be lost"):
        StreamingSource(loaded.shuffle(seed=0, buffer_size=10).map(lambda row: row))
    shuffled = loaded.shuffle(seed=0, buffer_size=10)
    for mixed in (
        datasets.interleave_datasets([loaded, shuffled]),
        datasets.interleave_datasets([shuffled, loaded], probabilities=[0.5, 0.5]).take(5),
        datasets.concatenate_datasets([loaded, datasets.concatenate_datasets([loaded, shuffled])]),
    ):
        with pytest.raises(ManifestError, match=r"has a shuffle buffer.* interleaved or concatenated"):
            StreamingSource(mixed)
    with pytest.raises(ManifestError, match="no column of the type Audio, only id"):
        StreamingSource(loaded.remove_columns("audio"))
    with pytest.raises(ManifestError, match="its columns have no types"):
        StreamingSource(datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}])))
    with pytest.raises(ManifestError, match="cannot be loaded as a data set"):
        open_stream(tmp_path / "nothing")
    for manifest in ("a.csv", ["a/b", "c/d"]):
        with pytest.raises(ConfigError, match=r"`data\.streaming` takes one data set"):
            make_config({"data": {"manifest": manifest, "streaming": True}})
    with pytest.raises(ConfigError, match=r"`validation\.dev.streaming`"):
        make_config({"data": {"manifest": "x"}, "validation": {"dev": {"manifest": "x", "streaming": True}}})


def test_other_rates_need_resampling(tmp_path):
    file = io.BytesIO()
    soundfile.write(file, np.zeros((4_000, 2)), 8_000, format="WAV")
    rows = {"audio": [{"bytes": file.getvalue(), "path": "slow.wav"}]}
    datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio()).to_parquet(tmp_path / "a.parquet")
    (batch,) = streams(config(tmp_path), 1)[0]
    assert "8000 Hz" in batch.failure and "slow" in batch.failure
    batch = next(iter(streams(config(tmp_path, resample=True), 1)[0]))
    assert batch.input_values.shape == (1, 8_000)
