"""ABX discriminability: how often a token of a phone is nearer to a token of another phone than to one of its own.

The definition of ZeroSpeech 2021, as fastabx computes it: tokens are the stretches of an `.item` file; their distance
is dynamic time warping over the angle between frames, divided by the length of the path; a triplet (A, B, X) has A and
X of one phone, B of another, all in the same context (neighbouring phones) and, `within` speakers, of one speaker;
`across` speakers X is of another speaker than A and B. Discrete units are compared by "identical": 0 where they are
equal, else 1. Ties count half. Errors are averaged over a cell's triplets, then contexts, speakers, and pairs of
phones. The obvious form stands in `tests/reference_abx.py`.
"""

import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..system.messages import counted
from ..system.tables import column_lines, interval

FREQUENCY = 50  # frames per second
_COLUMNS = ("#file", "onset", "offset", "#phone", "prev-phone", "next-phone", "speaker")
Distance = Literal["angular", "identical"]
PAIRS_AT_ONCE = 20_000
VALUES_AT_ONCE = 1 << 25  # of the frames of one side of the pairs


class NoTripletsError(ValueError):
    """Items among which nothing can be compared; the message says why."""


@dataclass(frozen=True)
class Token:
    """A stretch of speech: frames `start` ... `end` (exclusive) of a file."""

    fileid: str
    start: int
    end: int
    phone: str
    context: tuple[str, str]
    speaker: str


def read_items(path: str | os.PathLike, frequency: int = FREQUENCY) -> list[Token]:
    """
    Tokens of an `.item` file: `#file onset offset #phone prev-phone next-phone speaker`, times in seconds.

    A token is made of the frames whose middle lies between onset and offset, both ends included.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such item file (`examples/write_items.py` makes one from alignments).")

    def token(
        fileid: str, onset: str, offset: str, phone: str, before: str, after: str, speaker: str
    ) -> tuple[Token, str]:
        interval(onset, offset)
        # Exact: 0.25 s times 50 less a half is 12, in binary it may be a little more.
        start = math.ceil(Decimal(onset) * frequency - Decimal("0.5"))
        end = math.floor(Decimal(offset) * frequency - Decimal("0.5")) + 1
        return Token(fileid, start, end, phone, (before, after), speaker), f"from {onset} to {offset} s"

    tokens = []
    for number, (item, stretch) in column_lines(path, _COLUMNS, token):
        if item.end <= item.start:
            raise ValueError(f"{path}, line {number}: {stretch} there is no frame. Leave it out.")
        tokens.append(item)
    if not tokens:
        raise ValueError(f"{path} holds no items.")
    return tokens


def cut_tokens(
    tokens: Sequence[Token], features: Mapping[str, Tensor] | Iterator, distance: Distance = "angular"
) -> tuple[Tensor, Tensor, Tensor]:
    """
    Frames of all tokens, one after the other.

    Args:
        tokens: From `read_items`.
        features: Features (T x D), or units (T x 1), by file id; it is asked for every file once.
        distance: What frames are compared by.

    Returns:
        Frames (N x D, float32 of length 1; units as they are), where each token starts, and its number of frames.
    """
    by_file: dict[str, list[int]] = defaultdict(list)
    for i, token in enumerate(tokens):
        by_file[token.fileid].append(i)
    pieces: list[Tensor] = [torch.empty(0)] * len(tokens)
    for fileid, indices in by_file.items():
        x = features[fileid]  # type: ignore[index]  # a mapping here
        for i in indices:
            if tokens[i].end > len(x):
                raise ValueError(
                    f"The features of {fileid!r} have {counted(len(x), 'frame')}, but an item reaches to frame "
                    f"{tokens[i].end}. Leave items at the very end out (the convolutions drop up to 25 ms there)."
                )
            pieces[i] = x[tokens[i].start : tokens[i].end]
    lengths = torch.tensor([len(piece) for piece in pieces])
    frames = torch.cat(pieces)
    if distance == "identical":
        return frames, lengths.cumsum(0) - lengths, lengths
    frames = frames.float()
    norms = frames.norm(dim=1, keepdim=True)
    # A frame of zeros has no direction; as in fastabx it gets the diagonal's.
    frames = torch.where(norms > 0, frames / norms.clamp_min(1e-30), frames.shape[1] ** -0.5)
    return frames, lengths.cumsum(0) - lengths, lengths


def dtw(distances: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """
    Dynamic time warping of P pairs at once.

    Args:
        distances: N x M x P, distances between frames; beyond a pair's lengths anything.
        rows, columns: Lengths of each pair (P).

    Returns:
        P: the least sum along a path, divided by the frames on it. Of equal predecessors the diagonal one is taken,
        then the one of the same row.
    """
    height, width, pairs = distances.shape
    cost, steps = distances.clone(), torch.empty_like(distances)
    first_row = torch.arange(1, width + 1, dtype=distances.dtype, device=distances.device)
    first_column = torch.arange(1, height + 1, dtype=distances.dtype, device=distances.device)
    cost[0] = cost[0].cumsum(0)
    cost[:, 0] = distances[:, 0].cumsum(0)
    steps[0], steps[:, 0] = first_row[:, None], first_column[:, None]
    for i in range(1, height):
        for j in range(1, width):
            up, left, diagonal = cost[i - 1, j], cost[i, j - 1], cost[i - 1, j - 1]
            aside = torch.minimum(up, left)
            cost[i, j] += torch.minimum(aside, diagonal)
            aside_steps = torch.where(left <= up, steps[i, j - 1], steps[i - 1, j])
            steps[i, j] = torch.where(diagonal <= aside, steps[i - 1, j - 1], aside_steps) + 1
    p = torch.arange(pairs, device=distances.device)
    return cost[rows - 1, columns - 1, p] / steps[rows - 1, columns - 1, p]


def token_distances(
    frames: Tensor,
    starts: Tensor,
    lengths: Tensor,
    rows: np.ndarray,
    columns: np.ndarray,
    distance: Distance = "angular",
) -> np.ndarray:
    """
    Distances between pairs of tokens.

    Args:
        frames: N x D, from `cut_tokens`.
        starts, lengths: Of each token in `frames`.
        rows, columns: The pairs' tokens (P each).
        distance: Between frames.

    Returns:
        P distances, float32.
    """
    result = np.empty(len(rows), dtype=np.float32)
    sizes = lengths.cpu().numpy()
    longest = np.maximum(sizes[rows], sizes[columns])
    order = np.argsort(longest, kind="stable")  # pairs of similar length, so that little is padded
    first = 0
    while first < len(order):
        chunk = order[first : first + PAIRS_AT_ONCE]
        chunk = chunk[: max(1, VALUES_AT_ONCE // (int(longest[chunk[-1]]) * frames.shape[1]))]
        width = int(longest[chunk[-1]])
        r, c = (torch.from_numpy(pairs[chunk]).to(frames.device) for pairs in (rows, columns))
        offsets = torch.arange(width, device=frames.device)
        # Tokens are padded by their last frame; what lies beyond a length is never looked at.
        x, y = (frames[starts[t][:, None] + torch.minimum(offsets, lengths[t][:, None] - 1)] for t in (r, c))
        if distance == "identical":
            between = (x != y.transpose(1, 2)).float()
        else:
            between = torch.bmm(x, y.transpose(1, 2)).clamp(-1, 1).acos() / math.pi
        values = dtw(between.permute(1, 2, 0).contiguous(), lengths[r], lengths[c])
        result[chunk] = values.cpu().numpy()
        first += len(chunk)
    return result


def cell_error(to_a: np.ndarray, to_b: np.ndarray) -> float:
    """
    Share of a cell's triplets in which X is nearer to B than to A; ties count half.

    Args:
        to_a: Distances between each X and each A (NaN where they are the same token).
        to_b: Distances between each X and each B.
    """
    ordered = np.sort(to_b, axis=1)
    errors = count = 0.0
    for x, distances in enumerate(to_a):
        distances = distances[~np.isnan(distances)]
        below = np.searchsorted(ordered[x], distances, side="left")
        up_to = np.searchsorted(ordered[x], distances, side="right")
        errors += (below + up_to).sum() / 2
        count += len(distances) * to_b.shape[1]
    return errors / count


def abx(
    tokens: Sequence[Token],
    features: Mapping[str, Tensor],
    *,
    distance: Distance = "angular",
    speaker: Literal["within", "across"] = "within",
    context: Literal["within", "any"] = "within",
    max_size_group: int | None = 10,
    max_x_across: int | None = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> float:
    """
    ABX error of features, from 0 to 1; chance is 0.5.

    Args:
        tokens: From `read_items`.
        features: Features (T x D), or units (T x 1), by file id.
        distance: Between frames: "angular", or "identical" for units.
        speaker: Whether X is of the same speaker as A and B, or of another.
        context: Whether A, B and X share their neighbouring phones.
        max_size_group: Tokens of one phone, context and speaker used at most, drawn at random (ZeroSpeech: 10).
        max_x_across: Other speakers that X is taken from at most, for given A and B (ZeroSpeech: 5).
        seed: Of what is drawn.
        device: Where distances are computed.
        progress: Show a bar.

    Raises `NoTripletsError` where there is no triplet at all.
    """
    frames, starts, lengths = (x.to(device) for x in cut_tokens(tokens, features, distance))
    # context -> (phone, speaker) -> tokens
    groups: dict[tuple, dict[tuple[str, str], list[int]]] = defaultdict(lambda: defaultdict(list))
    for i, token in enumerate(tokens):
        groups[token.context if context == "within" else ()][token.phone, token.speaker].append(i)
    rng = np.random.default_rng(seed)
    cells: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    waiting: list[_Group] = []

    def score_waiting() -> None:
        rows, columns = (np.concatenate([getattr(group, side) for group in waiting]) for side in ("rows", "columns"))
        distances = token_distances(frames, starts, lengths, rows, columns, distance)
        for group, part in zip(
            waiting, np.split(distances, np.cumsum([len(g.rows) for g in waiting])[:-1]), strict=True
        ):
            for (a, b, _), error in group.errors(part):
                cells[a[0], b[0], a[1] if context == "within" else ""].append(error)
        waiting.clear()

    for _, members in tqdm(sorted(groups.items()), desc=f"ABX {speaker}", disable=not progress):
        if max_size_group is not None:
            for key in sorted(members):
                if len(members[key]) > max_size_group:
                    members[key] = sorted(rng.permutation(members[key])[:max_size_group].tolist())
        if plan := list(_plan_cells(members, speaker, max_x_across, rng)):
            waiting.append(_Group(members, plan))
        # Many contexts hold few tokens: their pairs are computed together.
        if sum(len(group.rows) for group in waiting) >= PAIRS_AT_ONCE:
            score_waiting()
    if waiting:
        score_waiting()
    if not cells:
        raise NoTripletsError(
            f"There are no triplets {speaker} speakers: no context has two phones of one speaker"
            + (" and another speaker." if speaker == "across" else ", one of them twice.")
        )
    by_pair: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (a, b, _), errors in cells.items():
        by_pair[a, b].append(float(np.mean(errors)))
    return float(np.mean([np.mean(errors) for errors in by_pair.values()]))


class _Group:
    """The tokens of one context, and the pairs of them (`rows`, `columns`) whose distances its cells need."""

    def __init__(self, members: Mapping[tuple[str, str], Sequence[int]], plan: Sequence[tuple]):
        self.plan = plan
        order = [i for key in sorted(members) for i in members[key]]
        place = {i: n for n, i in enumerate(order)}
        self._at = {key: np.array([place[i] for i in indices]) for key, indices in members.items()}
        self._wanted = np.zeros((len(order), len(order)), dtype=bool)
        for a, b, x in plan:
            self._wanted[np.ix_(self._at[x], self._at[a])] = self._wanted[np.ix_(self._at[x], self._at[b])] = True
        np.fill_diagonal(self._wanted, False)
        self.rows, self.columns = (np.array(order)[side] for side in np.nonzero(self._wanted))

    def errors(self, distances: np.ndarray) -> Iterator[tuple[tuple, float]]:
        """Error of each cell, from the pairs' distances."""
        matrix = np.full(self._wanted.shape, np.nan, dtype=np.float32)
        matrix[self._wanted] = distances
        for a, b, x in self.plan:
            to_a, to_b = (matrix[np.ix_(self._at[x], self._at[side])] for side in (a, b))
            yield (a, b, x), cell_error(to_a, to_b)


def _plan_cells(
    members: Mapping[tuple[str, str], Sequence[int]], speaker: str, max_x_across: int | None, rng: np.random.Generator
) -> Iterator[tuple[tuple[str, str], tuple[str, str], tuple[str, str]]]:
    """The cells of one context, as (phone, speaker) of A, B and X."""
    for a, b in itertools.permutations(sorted(members), 2):
        if a[0] == b[0] or a[1] != b[1]:
            continue
        if speaker == "within":
            if len(members[a]) > 1:
                yield a, b, a
            continue
        others = [key for key in sorted(members) if key[0] == a[0] and key[1] != a[1]]
        if max_x_across is not None and len(others) > max_x_across:
            others = [others[i] for i in sorted(rng.permutation(len(others))[:max_x_across])]
        for x in others:
            yield a, b, x


__all__ = [
    "FREQUENCY",
    "Distance",
    "NoTripletsError",
    "Token",
    "abx",
    "cell_error",
    "cut_tokens",
    "dtw",
    "read_items",
    "token_distances",
]
