"""Which frames the student does not see: span masks over time.

The spans are fairseq's, as SpidR and DinoSR use them (arXiv 2512.20308, arXiv 2305.10005): starts drawn without
replacement, spans that may overlap, and every row thinned to the same number of masked frames. All rows of a batch are
drawn at once; the obvious form, one row and one span at a time, is `tests/reference_masking.py`.
"""

from typing import NamedTuple

import numpy as np

SELECTIONS = ("static", "uniform", "normal", "poisson")
MIN_SPANS = 2


class SpanMask(NamedTuple):
    """How spans are drawn.

    Attributes:
        prob: share of the frames that spans would cover if they did not overlap.
        length: length of a span in frames; its mean for `"normal"` and `"poisson"`.
        selection: `"static"`: every span has `length`; `"uniform"`: an integer in [other, 2 * length]; `"normal"`:
            max(1, round(N(length, other))); `"poisson"`: Poisson(length).
        other: second parameter of `"uniform"` and `"normal"`.
        no_overlap: spans neither overlap nor come nearer than `min_space`.
        min_space: least number of unmasked frames between spans, with `no_overlap`.
    """

    prob: float = 0.8
    length: int = 10
    selection: str = "static"
    other: float = 0.0
    no_overlap: bool = False
    min_space: int = 1

    def check(self, name: str = "mask") -> None:
        """Raises `ValueError`, naming the field, on impossible values."""
        if not 0 <= self.prob <= 1:
            raise ValueError(f"`{name}_prob` must be in [0, 1], got {self.prob}.")
        if self.length < 1:
            raise ValueError(f"`{name}_length` must be at least 1, got {self.length}.")
        if self.selection not in SELECTIONS:
            raise ValueError(f"`{name}_selection` must be one of {', '.join(SELECTIONS)}, got {self.selection!r}.")
        if self.selection == "uniform" and not 0 <= self.other <= 2 * self.length:
            raise ValueError(f"`{name}_other` must be in [0, 2 * {name}_length] for uniform spans, got {self.other}.")
        if self.selection == "normal" and self.other < 0:
            raise ValueError(f"`{name}_other`, a standard deviation, must not be negative, got {self.other}.")
        if self.min_space < 0:
            raise ValueError(f"`{name}_min_space` must not be negative, got {self.min_space}.")


def masked_frames(lengths: np.ndarray, spans: SpanMask, rng: np.random.Generator) -> np.ndarray:
    """Masked frames of a batch: B x M frame numbers (int64), ascending in every row.

    Every row has the same number M >= 1 of masked frames, all of them valid ones.

    Args:
        lengths: valid frames of each row (B).
        spans: how spans are drawn.
        rng: source of all randomness; one for each batch.
    """
    mask = span_mask(lengths, spans, rng)
    count = int(mask.sum(axis=1).min())
    keys = rng.random(mask.shape)
    keys[~mask] = 2.0
    kept = np.argpartition(keys, count - 1, axis=1)[:, :count]
    kept.sort(axis=1)
    return kept


def frame_mask(indices: np.ndarray, num_frames: int) -> np.ndarray:
    """Masked frames B x M as a bool mask B x T."""
    mask = np.zeros((len(indices), num_frames), dtype=bool)
    np.put_along_axis(mask, indices, True, axis=1)
    return mask


def span_mask(lengths: np.ndarray, spans: SpanMask, rng: np.random.Generator) -> np.ndarray:
    """Spans of every row before thinning: bool B x T, T the longest row. No row is without a masked frame."""
    lengths = np.asarray(lengths, dtype=np.int64)
    if lengths.ndim != 1 or len(lengths) == 0 or lengths.min() < 1:
        raise ValueError(f"Every row needs at least one frame to mask, got lengths {lengths.tolist()}.")
    counts = (spans.prob * lengths / spans.length + rng.random(len(lengths))).astype(np.int64)
    counts = np.maximum(counts, MIN_SPANS)
    is_span = np.arange(counts.max()) < counts[:, None]
    sizes = _span_lengths(is_span.shape, lengths, is_span, spans, rng)
    if spans.no_overlap:
        starts, sizes = _separate_starts(lengths, sizes, spans.min_space, rng)
    else:
        starts = _distinct_starts(lengths, counts, sizes, is_span, rng)
    mask = _cover(lengths, starts, sizes)
    # Rows of one or two frames: every span may have begun behind the end.
    mask[~mask.any(axis=1), 0] = True
    return mask


def _span_lengths(
    shape: tuple[int, int], lengths: np.ndarray, is_span: np.ndarray, spans: SpanMask, rng: np.random.Generator
) -> np.ndarray:
    """Lengths of the spans (B x N), 0 where a row has no further span."""
    match spans.selection:
        case "static":
            sizes = np.full(shape, spans.length)
        case "uniform":
            sizes = rng.integers(int(spans.other), 2 * spans.length, shape, endpoint=True)
        case "normal":
            sizes = np.maximum(1, np.rint(rng.normal(spans.length, spans.other, shape))).astype(np.int64)
        case _:
            sizes = rng.poisson(spans.length, shape)
    sizes = np.where(is_span, sizes, 0)
    # Uniform and Poisson lengths can all be 0, and a row needs something to predict.
    empty = sizes.sum(axis=1) == 0
    sizes[empty, 0] = np.clip(lengths[empty] - 1, 1, spans.length)
    return sizes


def _distinct_starts(
    lengths: np.ndarray, counts: np.ndarray, sizes: np.ndarray, is_span: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Starts of spans that may overlap (B x N), distinct in each row, from [0, T - shortest span)."""
    shortest = np.where(is_span, sizes, np.iinfo(np.int64).max).min(axis=1)
    choices = lengths - shortest
    choices = np.where(choices <= counts, counts + 1, choices)
    # The positions of the n smallest of as many random numbers are n distinct positions. Lengths are drawn
    # independently of starts, so it does not matter which span of a row gets which start.
    keys = rng.random((len(lengths), choices.max()))
    keys[np.arange(keys.shape[1]) >= choices[:, None]] = 2.0
    return np.argsort(keys, axis=1)[:, : sizes.shape[1]]


def _separate_starts(
    lengths: np.ndarray, sizes: np.ndarray, min_space: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of spans that keep `min_space` frames apart (B x N); a span that fits nowhere has length 0.

    The longest come first. Each goes to one of the row's free stretches that can hold it, chosen with a probability
    proportional to the stretch's length, and anywhere in it. One step places the next span of every row.
    """
    rows = np.arange(len(lengths))
    sizes = -np.sort(-sizes, axis=1)
    starts = np.zeros_like(sizes)
    # Free stretches [begin, end) of each row; placing a span splits one in two.
    begins = np.zeros((len(lengths), sizes.shape[1] + 1), dtype=np.int64)
    ends = np.zeros_like(begins)
    ends[:, 0] = lengths
    for index in range(sizes.shape[1]):
        size = sizes[:, index]
        free = ends[:, : index + 1] - begins[:, : index + 1]
        weights = np.where(free >= size[:, None], free, 0).cumsum(axis=1)
        fits = (weights[:, -1] > 0) & (size > 0)
        picks = rng.random(len(lengths)) * weights[:, -1]
        stretch = np.minimum((weights <= picks[:, None]).sum(axis=1), index)
        begin, end = begins[rows, stretch], ends[rows, stretch]
        start = begin + (rng.random(len(lengths)) * (end - begin - size + 1)).astype(np.int64)
        starts[:, index] = np.where(fits, start, 0)
        sizes[:, index] = np.where(fits, size, 0)
        ends[rows, stretch] = np.where(fits, start - min_space, end)
        begins[:, index + 1] = np.where(fits, start + size + min_space, 0)
        ends[:, index + 1] = np.where(fits, end, 0)
    return starts, sizes


def _cover(lengths: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Frames that at least one span covers: bool B x T."""
    batch, longest = len(lengths), int(lengths.max())
    begins = np.minimum(starts, lengths[:, None])
    ends = np.minimum(starts + sizes, lengths[:, None])
    offsets = np.arange(batch)[:, None] * (longest + 1)
    size = batch * (longest + 1)
    steps = np.bincount((begins + offsets).ravel(), minlength=size)
    steps -= np.bincount((ends + offsets).ravel(), minlength=size)
    return steps.reshape(batch, longest + 1).cumsum(axis=1)[:, :longest] > 0


__all__ = ["MIN_SPANS", "SELECTIONS", "SpanMask", "frame_mask", "masked_frames", "span_mask"]
