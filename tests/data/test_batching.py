"""Batches: sizes, buckets, equal counts per process, and an order that can be resumed anywhere."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spidr_hf.data.batching import BucketSampler, Position, batches_by_length, read_ahead
from spidr_hf.system.errors import BatchingError

LENGTHS = np.random.default_rng(0).integers(1_000, 60_000, 400)
BASE = {"max_batch_length": 200_000, "min_sample_size": 2_000, "max_sample_size": 50_000, "num_buckets": 20}


def sampler(lengths=LENGTHS, **options) -> BucketSampler:
    return BucketSampler(np.asarray(lengths), **{**BASE, **options})


def size(batch, lengths=LENGTHS, padding=False, cap=50_000) -> int:
    """Samples that a batch counts; what is left of it after cropping to its shortest is less."""
    capped = np.minimum(lengths[batch], cap)
    assert len(batch) * capped.min() <= capped.sum()
    return len(batch) * int(capped.max()) if padding else int(capped.sum())


def epoch_of(keys):
    return [key.utterances.tolist() for key in keys]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("bucket_method", ["uniform", "percentile"])
def test_an_epoch_is_every_utterance_once_in_batches_that_fit(padding, bucket_method):
    batches = sampler(padding=padding, bucket_method=bucket_method).epoch_batches(0)
    taken = np.concatenate(batches)
    assert sorted(taken) == np.flatnonzero(LENGTHS >= 2_000).tolist()
    assert all(size(batch, padding=padding) <= 200_000 for batch in batches)
    # Packed as full as the next utterance lets them: most are nearly full.
    assert np.median([size(batch, padding=padding) for batch in batches]) > 150_000


def test_batches_hold_similar_lengths():
    width = (50_000 - 2_000) / 20
    spreads = [np.ptp(np.minimum(LENGTHS[batch], 50_000)) for batch in sampler().epoch_batches(0)]
    assert np.median(spreads) < 2 * width  # a batch of short utterances runs through many sparse buckets


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(**options):
        return [batch.tolist() for batch in sampler(**options).epoch_batches(options.pop("epoch", 3))]

    other = sampler()
    other.epoch_batches(0)
    list(islice(other, 7))
    assert [b.tolist() for b in other.epoch_batches(3)] == order()
    assert order() != order(seed=1)
    assert [b.tolist() for b in sampler().epoch_batches(2)] != order()


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_same_update_for_any_number_of_processes(world_size, accumulation):
    """1 process x 4 accumulated = 2 x 2 = 4 x 1, across the end of the epoch too."""
    ranks = [sampler(rank=rank, world_size=world_size, accumulation=accumulation) for rank in range(world_size)]
    updates = ranks[0].updates_per_epoch() + 3
    keys = [list(islice(rank, updates * accumulation)) for rank in ranks]
    ours = [
        keys[rank][update * accumulation + micro_batch]
        for update in range(updates)
        for micro_batch in range(accumulation)
        for rank in range(world_size)
    ]
    alone = list(islice(sampler(accumulation=4), updates * 4))
    assert epoch_of(ours) == epoch_of(alone)
    assert [(key.epoch, key.index) for key in ours] == [(key.epoch, key.index) for key in alone]
    assert len({key.following for key in ours}) == updates
    first_epoch = [key for key in ours if key.epoch == 0]
    assert sorted(np.concatenate([key.utterances for key in first_epoch])) == np.flatnonzero(LENGTHS >= 2_000).tolist()


def test_no_batch_is_cut_when_they_divide_evenly():
    base = sampler().epoch_batches(0)
    for count in (n for n in range(2, len(base) + 1) if len(base) % n == 0):
        assert epoch_of_batches(sampler(world_size=count).epoch_batches(0)) == epoch_of_batches(base)


def epoch_of_batches(batches):
    return [batch.tolist() for batch in batches]


def test_the_end_of_an_epoch_is_spread_over_all_processes():
    """Cut in two, largest first; repeated only where single utterances are left; or left out with `drop_last`."""
    lengths = np.full(10, 10_000)
    options = {"lengths": lengths, "max_batch_length": 40_000}  # batches of 4, 4 and 2
    assert sorted(map(len, sampler(**options).epoch_batches(0))) == [2, 4, 4]
    assert sorted(map(len, sampler(**options, world_size=2).epoch_batches(0))) in ([1, 1, 4, 4], [2, 2, 2, 4])
    for world_size in (4, 8, 10):
        batches = sampler(**options, world_size=world_size).epoch_batches(0)
        assert len(batches) == world_size
        assert sorted(np.concatenate(batches)) == list(range(10))
    # One batch of one utterance is left for two processes: the update before gives some.
    lengths = np.array([1_000] * 8 + [40_000])
    batches = sampler(lengths, max_batch_length=40_000, min_sample_size=0, num_buckets=2, accumulation=2).epoch_batches(
        0
    )
    assert len(batches) == 2 and sorted(np.concatenate(batches)) == list(range(9))
    batches = sampler(**options, world_size=16).epoch_batches(0)
    assert len(batches) == 16 and {len(batch) for batch in batches} == {1}
    assert set(np.concatenate(batches)) == set(range(10))
    dropping = sampler(**options, world_size=2, drop_last=True)
    assert len(dropping.epoch_batches(0)) == 2 and dropping.updates_per_epoch() == 1


@pytest.mark.parametrize("updates", [0, 1, 5, 11, 12, 30])
def test_resuming_goes_on_at_the_very_next_batch(updates):
    layout = {"rank": 1, "world_size": 3, "accumulation": 2}
    whole = list(islice(sampler(**layout), 80))
    position = whole[2 * updates - 1].following if updates else Position()
    resumed = sampler(**layout)
    resumed.position = position
    rest = list(islice(resumed, 80 - 2 * updates))
    assert epoch_of(rest) == epoch_of(whole[2 * updates :])
    assert [(key.epoch, key.index, key.following) for key in rest] == [
        (key.epoch, key.index, key.following) for key in whole[2 * updates :]
    ]


def test_resuming_on_another_number_of_processes_keeps_the_order():
    position = list(islice(sampler(world_size=4), 3))[-1].following
    assert position == Position(0, 12)
    ranks = [sampler(rank=rank, world_size=3) for rank in range(3)]
    for rank in ranks:
        rank.position = position
    keys = [key for group in zip(*(islice(rank, 2) for rank in ranks), strict=True) for key in group]
    assert epoch_of(keys) == epoch_of_batches(sampler().epoch_batches(0)[12:18])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 3_000), min_size=1, max_size=60),
    padding=st.booleans(),
    method=st.sampled_from(["uniform", "percentile"]),
    buckets=st.integers(1, 30),
    world_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_every_data_set_makes_whole_updates(lengths, padding, method, buckets, world_size, accumulation, epoch):
    lengths = np.array([*lengths, 500])
    options = {"max_batch_length": 4_000, "min_sample_size": 100, "max_sample_size": 2_000, "padding": padding}
    layout = {"world_size": world_size, "accumulation": accumulation, "num_buckets": buckets, "bucket_method": method}
    batches = sampler(lengths, **options, **layout).epoch_batches(epoch)
    assert len(batches) % (world_size * accumulation) == 0
    assert all(0 < size(batch, lengths, padding, 2_000) <= 4_000 for batch in batches)
    taken, kept = np.concatenate(batches), np.flatnonzero(lengths >= 100)
    assert set(taken) == set(kept)
    alone = sampler(lengths, **options, num_buckets=buckets, bucket_method=method).epoch_batches(epoch)
    needed = -(-len(alone) // (world_size * accumulation)) * world_size * accumulation
    assert len(taken) == max(len(kept), needed)


def test_a_single_utterance_may_exceed_a_batch():
    assert len(sampler([100_000], max_sample_size=None, max_batch_length=50_000).epoch_batches(0)) == 1


def test_impossible_data_is_named():
    with pytest.raises(BatchingError, match="No utterance has the 2000 samples of `min_sample_size`; the longest of 2"):
        sampler([100, 1_999])
    with pytest.raises(BatchingError, match=r"an update takes 64 \(8 processes x 8 accumulated\).*`max_batch_length`"):
        sampler([10_000] * 10, drop_last=True, world_size=8, accumulation=8)
    with pytest.raises(ValueError, match="`bucket_method` must be one of uniform, percentile"):
        sampler(bucket_method="quantile")


def test_batches_are_those_of_the_recorded_run():
    """Lengths like those of the reference corpus: 3.06 utterances and 16.2 s after cropping, with 20 s at most."""
    rng = np.random.default_rng(0)
    lengths = (16_000 * np.clip(rng.normal(5.56, 1.9, 1948), 1.38, 11.1)).astype(int)
    reference = {"max_batch_length": 320_000, "max_sample_size": 320_000, "num_buckets": 20}
    batches = sampler(lengths, **reference).epoch_batches(0)
    assert np.mean([len(batch) for batch in batches]) == pytest.approx(3.06, abs=0.1)
    assert np.mean([len(batch) * lengths[batch].min() for batch in batches]) / 16_000 == pytest.approx(16.2, abs=0.3)


def test_it_says_what_it_has():
    assert str(sampler([16_000] * 225 + [100])) == "225 utterances, 1 too short, 3.8 min; 19 updates per epoch"


def test_the_share_of_the_audio_that_an_epoch_hears():
    second = 16_000
    hour = {"min_sample_size": 2_000, "max_sample_size": 20 * second, "max_batch_length": 60 * second}
    # An hour of which 20 s are heard; and 20 s that are heard whole.
    assert sampler([3_600 * second], **hour).heard_share == pytest.approx(20 / 3_600)
    assert sampler([20 * second] * 5, **hour).heard_share == 1
    # What is too short counts as not heard, and so does what a batch is cropped by.
    assert sampler([1_000, 9_000], **BASE).heard_share == pytest.approx(0.9)
    assert sampler([9_000, 10_000], **BASE, bucket_method="uniform").heard_share == pytest.approx(18 / 19)
    assert sampler([9_000, 10_000], **BASE, padding=True).heard_share == 1
    # A source that comes in every other epoch is whole when that is all of it.
    shares = np.full(len(LENGTHS), 0.5)
    assert sampler(shares=shares, padding=True).heard_share == pytest.approx(sampler(padding=True).heard_share, abs=0.1)


def test_batches_fit_and_are_sorted():
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    batches = batches_by_length(lengths, 300)
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    for batch in batches:
        assert len(batch) * max(lengths[batch]) <= 300
    assert batches_by_length([500, 10], 300) == [[0], [1]]


def test_what_is_read_ahead_comes_in_order_and_no_further_than_is_asked():
    begun = []

    def read(item):
        begun.append(item)
        return -item

    batches = read_ahead(([2 * i, 2 * i + 1] for i in range(100)), read, threads=2)
    assert [next(batches), next(batches)] == [[0, -1], [-2, -3]]
    batches.close()
    assert set(begun) <= set(range(10))
    assert list(read_ahead([[1], [], [2, 3]], read, threads=2)) == [[-1], [], [-2, -3]]
