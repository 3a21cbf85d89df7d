"""Speech recognition and phone recognition by CTC: targets, tokenizers, decoding, error rates."""

import importlib.util
import json
import math
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizer, Wav2Vec2CTCTokenizer, Wav2Vec2PhonemeCTCTokenizer

from ..configuration_spidr import SpidrConfig, frame_lengths
from ..modeling_spidr_heads import SpidrForCTC
from .batches import LabelledBatch, Split
from .task import Task

UNITS = ("characters", "phones")
BLANK, UNKNOWN, WORD_END = "<pad>", "<unk>", "|"


def normalize_text(text: str) -> str:
    """Lower case, with letters, marks, digits and apostrophes only, and single spaces between words."""
    text = unicodedata.normalize("NFC", text).lower().replace("’", "'")
    kept = (c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in text)
    return " ".join("".join(kept).split())


def make_tokenizer(units: str, targets: Iterable[str]) -> PreTrainedTokenizer:
    """
    Tokenizer over what occurs in the targets: characters of texts, or phones between spaces. Its `<pad>`, number 0, is
    the blank of CTC; `<unk>` stands for what did not occur.

    `tokenizer.decode(frames)` collapses repeats and drops blanks.
    """
    if units not in UNITS:
        raise ValueError(f"`units` must be one of {', '.join(UNITS)}, got {units!r}.")
    found: set[str] = set()
    for target in targets:
        found.update(target.split() if units == "phones" else target)
    found -= {" ", BLANK, UNKNOWN, WORD_END}
    if not found:
        raise ValueError("There are no targets to make a vocabulary of.")
    special = [BLANK, UNKNOWN] if units == "phones" else [BLANK, UNKNOWN, WORD_END]
    vocabulary = {token: number for number, token in enumerate([*special, *sorted(found)])}
    options = {"bos_token": None, "eos_token": None, "pad_token": BLANK, "unk_token": UNKNOWN}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vocab.json")
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        if units == "phones":
            return Wav2Vec2PhonemeCTCTokenizer(
                str(path), **options, do_phonemize=False, phone_delimiter_token=" ", word_delimiter_token=None
            )
        return Wav2Vec2CTCTokenizer(str(path), **options, word_delimiter_token=WORD_END)


def encode(tokenizer: PreTrainedTokenizer, target: str) -> np.ndarray:
    """Token numbers of a text, or of phones between spaces (int64)."""
    # Phones are looked up one by one: the tokenizer would split them by its own rules.
    phones = isinstance(tokenizer, Wav2Vec2PhonemeCTCTokenizer)
    tokens = target.split() if phones else list(target.replace(" ", WORD_END))
    return np.array(tokenizer.convert_tokens_to_ids(tokens), dtype=np.int64)


def frames_needed(tokens: np.ndarray) -> int:
    """Fewest frames that CTC can spell the tokens in: one each, and a blank between equal neighbours."""
    return len(tokens) + int((tokens[1:] == tokens[:-1]).sum())


def expect_blanks(model: SpidrForCTC, share: float) -> None:
    """Have a new head predict the blank with this probability in every frame, and all other tokens alike.

    Without it a head begins by spelling a token in nearly every frame, and its first gradients mostly ask for blanks.
    """
    blank, others = model.config.pad_token_id, model.config.vocab_size - 1
    with torch.no_grad():
        model.lm_head.bias[blank] = math.log(share / (1 - share) * others)


def blank_share(split: Split, config: SpidrConfig) -> float:
    """Share of the frames of a split that CTC has no token for."""
    frames = int(frame_lengths(config, torch.from_numpy(split.source.num_samples[split.indices])).sum())
    tokens = sum(len(split.labels(int(index))) for index in split.indices)
    return min(max(1 - tokens / frames, 0.1), 0.99)


def error_rates(units: str, references: Sequence[str], hypotheses: Sequence[str]) -> dict[str, float]:
    """Error rates by jiwer, over all utterances together: `per` of phones; `wer` and `cer` of texts."""
    import jiwer

    references, hypotheses = list(references), list(hypotheses)
    if units == "phones":
        return {"per": jiwer.wer(references, hypotheses)}
    return {"wer": jiwer.wer(references, hypotheses), "cer": jiwer.cer(references, hypotheses)}


def check_ngram(path: str | Path) -> None:
    """Raises `ValueError` where there is no such language model, or what reads it is missing."""
    # Without kenlm, pyctcdecode would only warn and continue without the language model.
    if missing := [name for name in ("pyctcdecode", "kenlm") if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"n-gram decoding needs {' and '.join(missing)}: pip install pyctcdecode kenlm, in an environment that may "
            "have an older numpy."
        )
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such language model (an ARPA or KenLM file).")


class NgramDecoder:
    """Beam search with an n-gram language model, by pyctcdecode (and kenlm, which reads the model).

    Args:
        tokenizer: from `make_tokenizer`.
        path: ARPA or KenLM file, over words for characters, over phones for phones.
        alpha, beta: weight of the language model, and what each word (or phone) earns.
        beam_width: hypotheses kept.

    Raises `ValueError` as `check_ngram` does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        path: str | Path,
        *,
        alpha: float = 0.5,
        beta: float = 1.5,
        beam_width: int = 100,
    ):
        check_ngram(path)
        from pyctcdecode import build_ctcdecoder

        self.phones = isinstance(tokenizer, Wav2Vec2PhonemeCTCTokenizer)
        self.beam_width = beam_width
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        # A token that begins with this sign begins a word: every phone is one.
        special = {BLANK: "", WORD_END: " ", UNKNOWN: "▁⁇" if self.phones else "⁇"}
        labels = [special.get(token, f"▁{token}" if self.phones else token) for token in tokens]
        self._decoder = build_ctcdecoder(labels, str(path), alpha=alpha, beta=beta)

    def __call__(self, logits: Tensor) -> str:
        """Text (or phones between spaces) of the logits of one utterance, T x V."""
        return self._decoder.decode(logits.float().log_softmax(-1).cpu().numpy(), beam_width=self.beam_width)


class CTCTask(Task):
    """CTC on characters or phones.

    Args:
        processor: feature extractor and tokenizer.
        units: what the tokens are, one of `UNITS`.
        description: see `Task`.
    """

    def __init__(self, model: Any, processor: Any, units: str, description: Mapping):
        super().__init__(model, processor.feature_extractor, description)
        self.processor, self.units = processor, units
        self.metric = "per" if units == "phones" else "wer"
        self.decode: Callable[[Tensor], str] = self.greedy

    def labels(self, targets: Mapping[int, str]) -> Callable[[int], np.ndarray]:
        """Token numbers of an utterance, by its index. `targets`: texts, or phones between spaces, likewise."""
        return lambda index: encode(self.processor.tokenizer, targets[index])

    def greedy(self, logits: Tensor) -> str:
        """Text of the most probable token of every frame (T x V), as transformers' pipeline has it."""
        return self.processor.tokenizer.decode(logits.argmax(-1).tolist())

    def example_labels(self, frames: int) -> Tensor:
        return torch.ones(1, 1, dtype=torch.int64)

    def predict(self, output: Any, batch: LabelledBatch) -> list[str]:
        return [self.decode(logits[:frames]) for logits, frames in zip(output.logits, batch.frames, strict=True)]

    def score(self, predictions: Mapping[int, str], split: Split) -> dict[str, float]:
        references = [split.values[index] for index in predictions]
        return error_rates(self.units, references, list(predictions.values()))

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.processor.save_pretrained(folder)


def usable(
    source: Any, indices: Iterable[int], config: Any, encoded: Callable[[int], np.ndarray], max_samples: int
) -> tuple[np.ndarray, dict[str, int]]:
    """The utterances that CTC can be trained on, and how many are left out, by reason."""
    kept: list[int] = []
    left_out = {"too long": 0, "too short for their targets": 0, "with empty targets": 0}
    for index in indices:
        samples, tokens = int(source.num_samples[index]), encoded(index)
        if len(tokens) == 0:
            left_out["with empty targets"] += 1
        elif samples > max_samples:
            left_out["too long"] += 1
        elif int(frame_lengths(config, samples)) < frames_needed(tokens):
            left_out["too short for their targets"] += 1
        else:
            kept.append(index)
    return np.array(kept, dtype=np.int64), {reason: count for reason, count in left_out.items() if count}


__all__ = [
    "UNITS",
    "CTCTask",
    "NgramDecoder",
    "blank_share",
    "check_ngram",
    "encode",
    "error_rates",
    "expect_blanks",
    "frames_needed",
    "make_tokenizer",
    "normalize_text",
    "usable",
]
