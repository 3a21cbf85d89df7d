"""Span masks the obvious way: one row and one span after the other, as the specification says it."""

import numpy as np


def reference_span_mask(
    lengths, rng, *, prob=0.8, length=10, selection="static", other=0.0, no_overlap=False, min_space=1
):
    """Spans of every row, before thinning: bool B x T."""
    mask = np.zeros((len(lengths), max(lengths)), dtype=bool)
    for row, frames in zip(mask, lengths, strict=True):
        count = max(2, int(prob * frames / length + rng.random()))
        spans = [_span_length(rng, length, selection, other) for _ in range(count)]
        if sum(spans) == 0:
            spans[0] = max(1, min(length, frames - 1))
        if no_overlap:
            _place_apart(row, frames, spans, min_space, rng)
        else:
            choices = frames - min(spans)
            if choices <= count:
                choices = count + 1
            for start, span in zip(rng.choice(choices, count, replace=False), spans, strict=True):
                row[start : min(start + span, frames)] = True
        if not row.any():
            row[0] = True
    return mask


def reference_thin(mask, rng):
    """Every row cut at random to the smallest number of masked frames: bool B x T."""
    smallest = mask.sum(axis=1).min()
    thinned = np.zeros_like(mask)
    for row, kept in zip(mask, thinned, strict=True):
        kept[rng.choice(np.flatnonzero(row), smallest, replace=False)] = True
    return thinned


def _span_length(rng, length, selection, other):
    if selection == "static":
        return length
    if selection == "uniform":
        return rng.integers(int(other), 2 * length + 1)
    if selection == "normal":
        return max(1, round(rng.normal(length, other)))
    return rng.poisson(length)


def _place_apart(row, frames, spans, min_space, rng):
    free = [(0, frames)]
    for span in sorted(spans, reverse=True):
        if span == 0:
            continue
        weights = np.array([end - begin if end - begin >= span else 0 for begin, end in free], dtype=float)
        if weights.sum() == 0:
            continue
        begin, end = free.pop(rng.choice(len(free), p=weights / weights.sum()))
        start = rng.integers(begin, end - span + 1)
        row[start : start + span] = True
        free += [(begin, start - min_space), (start + span + min_space, end)]
