"""Several sources with weights: what an epoch has of each, and that order, resume and processes stay as they were."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny import tiny_config

from spidr_hf.data.batches import BatchBuilder, PretrainingBatches, make_loader, make_sampler
from spidr_hf.data.batching import BucketSampler, Position
from spidr_hf.data.manifests import scan_folder
from spidr_hf.data.mixture import MixedSource
from spidr_hf.data.open import open_data
from spidr_hf.data.sections import DataSection, MaskingSection
from spidr_hf.pretraining.config import load_config, make_config
from spidr_hf.system.errors import ConfigError, ManifestError
from spidr_hf.system.messages import duration

MODEL = tiny_config()
START = Position()
DATA = DataSection(num_buckets=4, max_batch_length=30_000, max_sample_size=12_000, num_workers=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """Twelve and eight utterances, whose names are the same."""
    rng = np.random.default_rng(0)
    made = []
    for name, count in (("a", 12), ("b", 8)):
        folder = tmp_path_factory.mktemp(name)
        for index in range(count):
            soundfile.write(folder / f"u{index:02d}.wav", 0.1 * rng.standard_normal(4_000 + 500 * index), 16_000)
        made.append(folder)
    return tuple(made)


@pytest.fixture(scope="module")
def sources(folders):
    return [scan_folder(folder, progress=False) for folder in folders]


def mixed(sources, *weights) -> MixedSource:
    return MixedSource(sources, ["a", "b"], weights or None)


def epoch_names(source, epoch, **layout) -> list[str]:
    batches = make_sampler(source, DATA, MODEL, **layout).epoch_batches(epoch)
    return sorted(source.fileid(index) for batch in batches for index in batch)


def test_weights_of_one_are_the_sources_side_by_side(sources):
    source = mixed(sources)
    assert len(source) == 20 and source.shares is None
    assert source.num_samples.tolist() == [*sources[0].num_samples, *sources[1].num_samples]
    assert source.fileid(0) == "a:u00" and source.fileid(12) == "b:u00"  # the same name in both, told apart
    np.testing.assert_array_equal(source.read(13), sources[1].read(1))
    assert len(set(epoch_names(source, 0))) == 20
    with pytest.raises(IndexError):
        source.read(20)


def test_whole_weights_are_times_per_epoch_each_with_its_own_crop(sources):
    source = mixed(sources, 1, 3)
    for epoch in range(2):
        names = epoch_names(source, epoch)
        assert all(names.count(f"a:u{index:02d}") == 1 for index in range(12))
        assert all(names.count(f"b:u{index:02d}") == 3 for index in range(8))
    builder = BatchBuilder(DATA, MaskingSection(), MODEL)
    once, again = (builder.crop(source.read(19), 5_000, 0, (index,)) for index in (19, 27))
    assert source.fileid(19) == source.fileid(27) == "b:u07" and not np.array_equal(once, again)


@pytest.mark.parametrize("weight", [0.4, 2.5, 1 / 3])
def test_broken_weights_come_evenly_over_the_epochs(sources, weight):
    """After any number of epochs every utterance came weight x epochs times, give or take one."""
    source = mixed(sources, 1, weight)
    counts = dict.fromkeys([f"b:u{index:02d}" for index in range(8)], 0)
    for epoch in range(15):
        names = [name for name in epoch_names(source, epoch) if name.startswith("b")]
        assert abs(len(names) - 8 * weight) < 2
        for name in names:
            counts[name] += 1
        assert all(abs(count - weight * (epoch + 1)) < 1 for count in counts.values())


def test_the_share_of_the_audio_is_weight_times_length(sources):
    source = mixed(sources, 1, 2.5)
    seconds = [entry.num_samples.sum() / 16_000 for entry in sources]
    assert make_sampler(source, DATA, MODEL).seconds == pytest.approx(seconds[0] + 2.5 * seconds[1])
    share = 2.5 * seconds[1] / (seconds[0] + 2.5 * seconds[1])
    assert source.describe()[1] == f"b: 8 utterances, {duration(seconds[1])}, weight 2.5, so {share:.1%} of all"


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_any_number_of_processes_makes_the_same_updates(sources, world_size, accumulation):
    source = mixed(sources, 0.7, 2.5)

    def updates(world_size, accumulation, position=START):
        ranks = [
            make_sampler(source, DATA, MODEL, rank=rank, world_size=world_size, accumulation=accumulation)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.position = position
        keys = [list(islice(rank, 12 * accumulation)) for rank in ranks]
        order = [
            keys[r][i * accumulation + t] for i in range(12) for t in range(accumulation) for r in range(world_size)
        ]
        return [(key.epoch, key.index, key.utterances.tolist(), key.following) for key in order]

    ours, alone = updates(world_size, accumulation), updates(1, 4)
    assert ours == alone and ours[-1][0] >= 2
    # Resumed after the fifth update.
    assert updates(world_size, accumulation, ours[19][-1])[: 4 * 7] == alone[20:]


def test_workers_change_nothing(sources):
    source = mixed(sources, 0.7, 2.5)

    def run(workers):
        data = DataSection(num_buckets=4, max_batch_length=30_000, max_sample_size=12_000, num_workers=workers)
        loader = make_loader(
            PretrainingBatches(source, data, MaskingSection(), MODEL), make_sampler(source, data, MODEL), data
        )
        return list(islice(loader, 10))

    for ours, alone in zip(run(2), run(0), strict=True):
        assert torch.equal(ours.input_values, alone.input_values)


def test_an_epoch_may_have_no_utterance_at_all():
    sampler = BucketSampler(np.array([5_000]), max_batch_length=9_000, shares=np.array([0.25]))
    epochs = [key.epoch for key in islice(sampler, 3)]
    assert np.diff(epochs).tolist() == [4, 4]


def test_the_fingerprint_knows_weights_and_order(sources):
    prints = {mixed(sources, *weights).fingerprint for weights in ((), (1, 2), (2, 1), (0.5, 1))}
    assert len({*prints, mixed(sources[::-1]).fingerprint}) == 5


def test_open_data_takes_a_list_and_keeps_each_scan(folders, tmp_path):
    names = [str(folder) for folder in folders]
    source = open_data(names, weights=[2, 1], cache=tmp_path / "data.arrow", progress=False)
    assert isinstance(source, MixedSource) and len(source) == 32 and source.fileid(0) == f"{names[0]}:u00"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data-0.arrow", "data-1.arrow"]
    (folders[0] / "more.wav").write_text("no audio")
    try:
        again = open_data(names, weights=[2, 1], cache=tmp_path / "data.arrow", progress=False)
    finally:
        (folders[0] / "more.wav").unlink()
    assert again.fingerprint == source.fingerprint and again.skipped == []


def test_bad_mixtures_are_named(sources):
    with pytest.raises(ManifestError, match=r"a is named twice.*weight of 2"):
        MixedSource(sources, ["a", "a"])
    with pytest.raises(ManifestError, match="2 sources have 1 weight:"):
        MixedSource(sources, ["a", "b"], [1])
    with pytest.raises(ManifestError, match="positive number, got 0"):
        MixedSource(sources, ["a", "b"], [0, 1])


def test_in_a_config(tmp_path):
    path = tmp_path / "c.toml"
    (tmp_path / "a.csv").touch()
    path.write_text('[data]\nmanifest = ["a.csv", "b.csv"]\nweights = [2, 0.5]\n')
    data = load_config(path).data
    assert data.manifest == [str(tmp_path / "a.csv"), "b.csv"] and data.weights == [2, 0.5]
    again = tmp_path / "again.toml"
    again.write_text(load_config(path).to_toml())
    assert load_config(again).data == data
    over = load_config(path, ["--data.manifest", '["x:y", "z"]', "--data.weights=[1, 3]"]).data
    assert over.manifest == ["x:y", "z"] and over.weights == [1, 3]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"manifest": "a", "weights": [1]}}, "`data.weights` goes with a list"),
        ({"data": {"manifest": ["a", "b"], "weights": [1]}}, "`data.weights` has 1 numbers for 2 sources"),
        ({"data": {"manifest": ["a", "b"], "weights": [1, 0]}}, "positive numbers"),
        ({"data": {"manifest": []}}, "`data.manifest` must be a source, or a list"),
        ({"data": {"manifest": ["a", 3]}}, "`data.manifest` must be a string"),
        ({"data": {"manifest": "a"}, "validation": {"dev": {"manifest": ["a", "b"]}}}, "`validation.dev.manifest`"),
    ],
)
def test_bad_configs_are_named(sections, message):
    with pytest.raises(ConfigError, match=message):
        make_config(sections)
