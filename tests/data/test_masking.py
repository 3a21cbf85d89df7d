"""Span masks: the fast form against the obvious one, and what holds for every mask."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_masking import reference_span_mask, reference_thin

from spidr_hf.data.masking import SpanMask, frame_mask, masked_frames, span_mask

OPTIONS = {
    "static": {},
    "static, short": {"length": 5},
    "half": {"prob": 0.4},
    "uniform": {"selection": "uniform", "other": 3},
    "uniform from 0": {"selection": "uniform", "length": 2},
    "normal": {"selection": "normal", "other": 4.0},
    "poisson": {"selection": "poisson"},
    "poisson, often 0": {"selection": "poisson", "length": 1},
    "no overlap": {"no_overlap": True},
    "no overlap, space 3": {"no_overlap": True, "min_space": 3, "length": 5},
    "no overlap, normal": {"no_overlap": True, "selection": "normal", "other": 3.0},
    "no overlap, touching": {"no_overlap": True, "min_space": 0},
}
LENGTHS = np.array([60, 37, 12, 9, 3])


def run_lengths(row: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return edges[1::2] - edges[::2]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fast_masks_have_the_distribution_of_the_obvious_ones(options):
    """How often each frame is masked, how many frames are, and how many runs they form, row by row."""
    rounds = 500
    fast, slow = np.random.default_rng(1), np.random.default_rng(2)
    spans = SpanMask(**options)
    ours = np.stack([span_mask(LENGTHS, spans, fast) for _ in range(rounds)]).astype(float)
    reference = np.stack([reference_span_mask(LENGTHS, slow, **options) for _ in range(rounds)]).astype(float)

    def close(a, b):
        """Means over the rounds within 5 standard errors of each other."""
        error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / rounds)
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 5 * error + 1e-9).all()

    close(ours, reference)
    close(ours.sum(axis=2), reference.sum(axis=2))
    close(ours.sum(axis=2) ** 2, reference.sum(axis=2) ** 2)
    starts = [(np.diff(masks, axis=2, prepend=0) == 1).sum(axis=2).astype(float) for masks in (ours, reference)]
    close(*starts)


def test_thinning_keeps_each_masked_frame_equally_often():
    spans, rounds = SpanMask(length=5), 800
    fast, slow = np.random.default_rng(3), np.random.default_rng(4)
    ours = np.zeros((len(LENGTHS), LENGTHS.max()))
    reference = np.zeros_like(ours)
    for _ in range(rounds):
        ours += frame_mask(masked_frames(LENGTHS, spans, fast), LENGTHS.max())
        reference += reference_thin(reference_span_mask(LENGTHS, slow, length=5), slow)
    assert np.abs(ours - reference).max() / rounds < 5 * np.sqrt(2 * 0.25 / rounds)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    prob=st.floats(0.05, 1.0),
    length=st.integers(1, 15),
    selection=st.sampled_from(["static", "uniform", "normal", "poisson"]),
    other=st.floats(0.0, 1.0),
    no_overlap=st.booleans(),
    min_space=st.integers(0, 4),
    seed=st.integers(0, 2**32),
)
def test_every_mask_is_usable(lengths, prob, length, selection, other, no_overlap, min_space, seed):
    """Equal counts of at least one, ascending, distinct, valid frames; the same seed gives the same mask."""
    spans = SpanMask(prob, length, selection, other, no_overlap, min_space)
    spans.check()
    lengths = np.array(lengths)
    indices = masked_frames(lengths, spans, np.random.default_rng(seed))
    assert indices.dtype == np.int64
    assert indices.shape[0] == len(lengths) and indices.shape[1] >= 1
    assert (np.diff(indices, axis=1) > 0).all()
    assert (indices >= 0).all() and (indices < lengths[:, None]).all()
    np.testing.assert_array_equal(indices, masked_frames(lengths, spans, np.random.default_rng(seed)))
    mask = frame_mask(indices, lengths.max())
    np.testing.assert_array_equal(np.nonzero(mask)[1].reshape(indices.shape), indices)
    if no_overlap and selection == "static":
        for row in span_mask(lengths, spans, np.random.default_rng(seed)):
            gaps = run_lengths(~row)[1:-1] if row.any() else []
            assert all(gap >= min_space for gap in gaps)
            if min_space > 0:
                assert all(run == length for run in run_lengths(row)) or row.sum() == 1 or row.sum() < length


def test_base_recipe_masks_a_bit_more_than_half():
    """0.8 in spans of 10 that may overlap: 1 - exp(-0.8) = 55 % of the frames of a long utterance."""
    rng = np.random.default_rng(0)
    counts = [masked_frames(np.full(8, 1000), SpanMask(), rng).shape[1] for _ in range(50)]
    assert 0.53 < np.mean(counts) / 1000 < 0.56


def test_at_least_two_spans():
    rng = np.random.default_rng(0)
    spans = SpanMask(prob=0.01, length=2)
    starts = [span_mask(np.array([50]), spans, rng).sum() for _ in range(200)]
    assert min(starts) == 3 and max(starts) == 4  # two spans of 2, which may overlap by one frame


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prob": 1.5}, "`mask_prob` must be in"),
        ({"length": 0}, "`mask_length` must be at least 1"),
        ({"selection": "gauss"}, "`mask_selection` must be one of static"),
        ({"selection": "uniform", "other": 30}, "`mask_other` must be in"),
        ({"selection": "normal", "other": -1}, "standard deviation"),
        ({"min_space": -1}, "`mask_min_space`"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SpanMask(**options).check()


def test_rows_without_frames_are_refused():
    with pytest.raises(ValueError, match="at least one frame"):
        masked_frames(np.array([5, 0]), SpanMask(), np.random.default_rng(0))


def test_masks_are_never_the_bottleneck():
    """A batch of the base recipe (20 x 600 frames) takes well under a step's 60 ms."""
    rng = np.random.default_rng(0)
    masked_frames(np.full(20, 600), SpanMask(), rng)
    start = time.perf_counter()
    for _ in range(10):
        masked_frames(np.full(20, 600), SpanMask(), rng)
    assert (time.perf_counter() - start) / 10 < 0.02
