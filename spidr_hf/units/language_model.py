"""Spoken language models on units with stock parts of transformers: tokenizer, data, scores.

Units are text to everything from here on, numbers between spaces, and a tokenizer of transformers takes them apart.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..data.batches import padded
from ..system.messages import shown
from ..system.names import find_names
from ..system.tables import csv_columns, csv_rows, known_table
from .unit_files import deduplicate

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"
ARCHITECTURES = ("llama", "opt")
_BATCH_TOKENS = 16_384


def unit_tokenizer(num_units: int, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """A tokenizer whose words are the units 0 ... `num_units` - 1; it saves and loads as any other of transformers.

    `tokenizer("17 17 203")` gives the ids of `<s> 17 17 203 </s>`; `decode` gives the text back.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNK, *map(str, range(num_units))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=max_length,
        padding_side="right",
    )


def units_to_text(units: Sequence[int] | np.ndarray, *, collapse: bool = False) -> str:
    """Units as the text that `unit_tokenizer` reads: numbers between spaces; without repeats if `collapse`."""
    values = deduplicate(units)[0] if collapse else np.asarray(units).tolist()
    return " ".join(map(str, values))


def text_to_units(text: str) -> list[int]:
    """The inverse of `units_to_text`."""
    return [int(unit) for unit in text.split()]


def lm_config(
    architecture: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_layers: int = 4,
    hidden_size: int = 256,
    num_heads: int = 4,
    max_length: int = 1024,
) -> LlamaConfig | OPTConfig:
    """Config of a small causal language model over the tokenizer's vocabulary."""
    if hidden_size % num_heads:
        raise ValueError(f"The hidden size {hidden_size} must be a multiple of the {num_heads} heads.")
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "max_position_embeddings": max_length,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if architecture == "llama":
        return LlamaConfig(**common, intermediate_size=4 * hidden_size, tie_word_embeddings=True)
    if architecture == "opt":
        return OPTConfig(**common, ffn_dim=4 * hidden_size, word_embed_proj_dim=hidden_size)
    raise ValueError(f"Unknown architecture {architecture!r}: choose one of {', '.join(ARCHITECTURES)}.")


class UnitSequences(Dataset):
    """Token ids of unit sequences, `<s> ... </s>` each, in pieces of at most `max_length`, held in one array."""

    def __init__(
        self,
        units: Iterable[Sequence[int] | np.ndarray],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        collapse: bool = False,
    ):
        pieces: list[np.ndarray] = []
        for sequence in units:
            ids = np.array(tokenizer(units_to_text(sequence, collapse=collapse))["input_ids"], dtype=np.int32)
            if (ids == tokenizer.unk_token_id).any():
                known = len(tokenizer) - 4
                raise ValueError(f"The unit {max(sequence)} is unknown to the tokenizer, which has {known} units.")
            pieces += [ids[i : i + max_length] for i in range(0, len(ids), max_length)]
        # A piece of one token has nothing to predict.
        pieces = [piece for piece in pieces if len(piece) > 1]
        if not pieces:
            raise ValueError("There are no units to train on.")
        self._ids = np.concatenate(pieces)
        self._ends = np.cumsum([len(piece) for piece in pieces])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start = self._ends[index - 1] if index else 0
        return {"input_ids": self._ids[start : self._ends[index]].tolist()}

    @property
    def num_tokens(self) -> int:
        """Tokens in all."""
        return len(self._ids)


@torch.inference_mode()
def log_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, with_end: bool = False
) -> list[Tensor]:
    """
    Log-probability of every unit of each text, given those before it (float32, on CPU).

    Texts longer than the model's context are taken in windows that overlap by half, so that every unit is seen with at
    least half a context before it.

    Args:
        with_end: Also that of the end of the sequence.
    """
    context = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    pieces: list[tuple[int, list[int], int]] = []  # text, ids, ids at the start that are only context
    for i, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        if tokenizer.unk_token_id in ids:
            raise ValueError(f"There are units that the tokenizer does not know in {text[:60]!r}.")
        ids = ids if with_end else ids[:-1]
        if len(ids) < 2:
            raise ValueError("An empty sequence of units has no probability.")
        start, seen = 0, 1
        while seen < len(ids):
            end = min(len(ids), start + context)
            pieces.append((i, ids[start:end], seen - start))
            start, seen = end - context // 2, end
    scores: list[list[Tensor]] = [[] for _ in texts]
    found: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    order = sorted(range(len(pieces)), key=lambda p: -len(pieces[p][1]))
    try:
        while order:
            longest = len(pieces[order[0]][1])
            batch, order = order[: max(1, _BATCH_TOKENS // longest)], order[max(1, _BATCH_TOKENS // longest) :]
            ids, _ = padded([np.array(pieces[p][1]) for p in batch], value=tokenizer.pad_token_id)
            ids = ids.to(model.device)
            # Padding lies to the right, where causal attention never looks; OPT counts positions by the mask.
            mask = (ids != tokenizer.pad_token_id).long()
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            values = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).cpu()
            for row, p in zip(values, batch, strict=True):
                _, piece, known = pieces[p]
                found[p] = row[known - 1 : len(piece) - 1].clone()
    finally:
        model.train(was_training)
    for p, (i, _, _) in enumerate(pieces):
        scores[i].append(found[p])
    return [torch.cat(score) for score in scores]


@dataclass
class NGrams:
    """Unigrams and bigrams of units with the end of a sequence, as the floor of a language model.

    Bigrams are smoothed by unigrams (Witten-Bell), unigrams by one count each.
    """

    unigrams: np.ndarray
    bigrams: dict[int, dict[int, int]]

    @classmethod
    def count(cls, sequences: Iterable[Sequence[int]], num_units: int) -> "NGrams":
        """Count sequences; `num_units` stands for their end, `num_units` + 1 for what is before their start."""
        unigrams = np.ones(num_units + 1)
        bigrams: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for sequence in sequences:
            previous = num_units + 1
            for unit in (*sequence, num_units):
                unigrams[unit] += 1
                bigrams[previous][unit] += 1
                previous = unit
        return cls(unigrams / unigrams.sum(), {key: dict(counts) for key, counts in bigrams.items()})

    def score(self, sequences: Iterable[Sequence[int]]) -> tuple[float, float]:
        """Nats per unit (the end included) by unigrams and by bigrams."""
        num_units = len(self.unigrams) - 1
        unigram = bigram = count = 0.0
        for sequence in sequences:
            previous = num_units + 1
            for unit in (*sequence, num_units):
                p = self.unigrams[unit]
                unigram -= np.log(p)
                if followers := self.bigrams.get(previous):
                    total = sum(followers.values())
                    p = (followers.get(unit, 0) + len(followers) * p) / (total + len(followers))
                bigram -= np.log(p)
                previous, count = unit, count + 1
        return unigram / count, bigram / count


@dataclass(frozen=True)
class Pair:
    """Two sequences of units of which the first should be the more probable one.

    Attributes:
        name: pairs of one name (a word in several voices) are averaged first.
        group: for accuracy by group; may be empty.
    """

    positive: str
    negative: str
    name: str = ""
    group: str = ""


def read_pairs(
    path: str | os.PathLike, units: Mapping[str, Sequence[int] | np.ndarray] | None = None, group: str | None = None
) -> list[Pair]:
    """
    Pairs of a CSV file, as texts of units.

    Args:
        path: With the columns `positive` and `negative`; or those of ZeroSpeech (sWUGGY, sBLIMP), `id`, `filename`,
            `correct` (1 and 0) and maybe `voice`: rows of one id and voice are paired.
        units: Units by file id, where the columns hold file ids instead of units.
        group: Column by which accuracy is also wanted.
    """
    columns, rows = csv_columns(path), list(csv_rows(path))
    if group is not None and group not in columns:
        raise ValueError(f"{path} has no column {group}, only {', '.join(columns)}.")

    def without_suffix(value: str) -> str:
        return value if units is None or value in units else os.path.splitext(value)[0]

    values = (row.get(column) for _, row in rows for column in ("positive", "negative", "filename"))
    known = find_names({without_suffix(value) for value in values if value}, units or ())

    def sequence(value: str, number: int) -> str:
        if units is None:
            try:
                return units_to_text(text_to_units(value))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {shown(value, 40)!r} are no units (numbers between spaces). If they are "
                    "files, give their units, too."
                ) from error
        if len(found := known.get(without_suffix(value), [])) == 1:
            return units_to_text(units[found[0]])
        raise ValueError(f"{path}, line {number}: there are no units of {shown(value)!r}.")

    pairs: list[Pair] = []
    if {"positive", "negative"} <= set(columns):
        for number, row in rows:
            positive, negative = (sequence(row[side], number) for side in ("positive", "negative"))
            pairs.append(Pair(positive, negative, name=str(number), group=row[group] if group else ""))
    elif {"id", "filename", "correct"} <= set(columns):
        members: dict[tuple[str, str], dict[bool, list[tuple[int, dict]]]] = defaultdict(lambda: defaultdict(list))
        for number, row in rows:
            members[row["id"], row.get("voice") or ""][row["correct"].strip() == "1"].append((number, row))
        for (name, _), sides in members.items():
            if not (sides[True] and sides[False]):
                number, _ = next(iter(sides.values()))[0]
                raise ValueError(
                    f"{path}, line {number}: {shown(name)!r} has no pair of a correct and an incorrect sequence."
                )
            for right_number, right in sides[True]:
                for wrong_number, wrong in sides[False]:
                    positive = sequence(right["filename"], right_number)
                    negative = sequence(wrong["filename"], wrong_number)
                    pairs.append(Pair(positive, negative, name=name, group=right[group] if group else ""))
    else:
        raise ValueError(
            f"{path} has the columns {shown(', '.join(columns)) or '(none)'}; expected positive and negative, or id, "
            "filename and correct."
        )
    if not pairs:
        raise ValueError(f"{path} holds no pairs.")
    return pairs


def pair_accuracy(pairs: Sequence[Pair], positive: Sequence[float], negative: Sequence[float]) -> dict[str, float]:
    """Accuracy in all (`accuracy`) and by group: pairs of one name are averaged first; ties count half."""
    by_group: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for pair, right, wrong in zip(pairs, positive, negative, strict=True):
        outcome = 0.5 if right == wrong else float(right > wrong)
        for group in {"accuracy", pair.group or "accuracy"}:
            by_group[group][pair.name].append(outcome)
    return {
        group: float(np.mean([np.mean(outcomes) for outcomes in names.values()])) for group, names in by_group.items()
    }


def score_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], *, normalize: bool = True
) -> tuple[dict[str, float], list[tuple[float, float]]]:
    """
    Accuracy on pairs, and both log-probabilities of each.

    Args:
        normalize: Divide log-probabilities by the number of units.
    """
    texts = sorted({text for pair in pairs for text in (pair.positive, pair.negative)})
    values = log_probabilities(model, tokenizer, texts)
    scores = {t: float(v.mean() if normalize else v.sum()) for t, v in zip(texts, values, strict=True)}
    both = [(scores[pair.positive], scores[pair.negative]) for pair in pairs]
    return pair_accuracy(pairs, [right for right, _ in both], [wrong for _, wrong in both]), both


def collapses(folder: str | os.PathLike) -> bool:
    """Whether the language model of a folder was trained on units without repeats."""
    return known_table(Path(folder, "unit_lm.json")).get("deduplicated") is True


def trained_on(folder: str | os.PathLike) -> dict[str, Any]:
    """What made the units that the language model of a folder was trained on (`unit_files.made_by`)."""
    known = known_table(Path(folder, "unit_lm.json")).get("made_by")
    return known if isinstance(known, dict) else {}


__all__ = [
    "ARCHITECTURES",
    "NGrams",
    "Pair",
    "UnitSequences",
    "collapses",
    "lm_config",
    "log_probabilities",
    "pair_accuracy",
    "read_pairs",
    "score_pairs",
    "text_to_units",
    "trained_on",
    "unit_tokenizer",
    "units_to_text",
]
