"""The obvious form of ABX: every triplet, every pair of frames, one by one."""

import math
from collections import defaultdict

import numpy as np


def angle(x, y):
    return math.acos(max(-1.0, min(1.0, float(x @ y) / float(np.linalg.norm(x) * np.linalg.norm(y))))) / math.pi


def dtw(x, y, distance=angle):
    """Least mean-path distance of two tokens, N x D and M x D: sum along the best path over its length."""
    n, m = len(x), len(y)
    cost = {}
    for i in range(n):
        for j in range(m):
            before = [cost[p] for p in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if p in cost]
            cost[i, j] = distance(x[i], y[j]) + (min(before) if before else 0.0)
    i, j, steps = n - 1, m - 1, 1
    while i or j:
        candidates = [p for p in ((i - 1, j - 1), (i, j - 1), (i - 1, j)) if p in cost]
        i, j = min(candidates, key=lambda p: cost[p])  # the first of equal ones
        steps += 1
    return cost[n - 1, m - 1] / steps


def identical(x, y):
    return float(x != y)


def abx(tokens, frames, speaker, context="within", distance=angle):
    """ABX error of tokens (with phone, context, speaker) and their frames, without drawing any at random."""
    cells = defaultdict(list)
    items = list(zip(tokens, frames, strict=True))
    for i, (a, a_frames) in enumerate(items):
        for b, b_frames in items:
            if b.phone == a.phone or b.speaker != a.speaker or (context == "within" and b.context != a.context):
                continue
            for k, (x, x_frames) in enumerate(items):
                if k == i or x.phone != a.phone or (context == "within" and x.context != a.context):
                    continue
                if (x.speaker == a.speaker) != (speaker == "within"):
                    continue
                to_a, to_b = dtw(x_frames, a_frames, distance), dtw(x_frames, b_frames, distance)
                error = 0.5 if to_a == to_b else float(to_a > to_b)
                place = a.context if context == "within" else None
                cells[a.phone, b.phone, a.speaker, place, x.speaker].append(error)
    # A cell's triplets, then contexts (and speakers of X), then speakers, then pairs of phones.
    pairs = defaultdict(lambda: defaultdict(list))
    for (a, b, voice, _, _), errors in cells.items():
        pairs[a, b][voice if context == "within" else None].append(np.mean(errors))
    return float(np.mean([np.mean([np.mean(errors) for errors in by.values()]) for by in pairs.values()]))
