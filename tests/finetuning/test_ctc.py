"""Targets, tokenizers, decoding and error rates of CTC."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import fails, run_command
from tiny import tiny_config

from spidr_hf import SpidrForCTC
from spidr_hf.finetuning.batches import Split
from spidr_hf.finetuning.ctc import (
    NgramDecoder,
    blank_share,
    encode,
    error_rates,
    expect_blanks,
    frames_needed,
    make_tokenizer,
    normalize_text,
    usable,
)


def test_normalized_text():
    assert normalize_text("Hello,  World! It’s 5 o'clock…") == "hello world it's 5 o'clock"
    assert normalize_text("Ça, déjà-vu?") == "ça déjà vu"
    assert normalize_text("हिन्दी।") == "हिन्दी"  # vowel signs are marks, and stay


@pytest.mark.parametrize("units, target", [("characters", "ab ba"), ("phones", "AH A AHA A")])
def test_tokens_and_back(units, target, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = make_tokenizer(units, [target])
    tokens = encode(tokenizer, target)
    assert tokenizer.pad_token_id == 0 and 0 not in tokens and tokenizer.unk_token_id not in tokens
    # As CTC spells it: repeats are one token, unless a blank lies between.
    frames = [token for token in tokens.tolist() for token in (token, token, 0)]
    assert tokenizer.decode(frames) == target
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.decode(frames) == target and len(loaded) == len(tokenizer) == max(tokens) + 1
    assert encode(tokenizer, "z")[0] == tokenizer.unk_token_id
    with pytest.raises(ValueError, match="no targets"):
        make_tokenizer(units, ["", " "])
    with pytest.raises(ValueError, match="characters, phones"):
        make_tokenizer("words", [target])


def test_error_rates():
    jiwer = pytest.importorskip("jiwer", reason="error rates are jiwer's (pip extra finetune)")
    references, hypotheses = ["AH B K", "T"], ["AH K", "T D"]
    assert error_rates("phones", references, hypotheses) == {"per": 2 / 4}
    texts, heard = ["the cat", "a dog"], ["the bat", "a dog"]
    assert error_rates("characters", texts, heard) == {"wer": 1 / 4, "cer": jiwer.cer(texts, heard)}


def test_what_ctc_can_spell():
    assert [frames_needed(np.array(tokens)) for tokens in ([], [4], [4, 5, 4], [4, 4, 4])] == [0, 1, 3, 5]
    source = SimpleNamespace(num_samples=np.array([400, 720, 1360, 1360, 99_999]))
    tokens = [[4], [4, 4], [4, 4], [], [4]]  # in 1, 2, 4, 4 and 312 frames
    kept, left_out = usable(source, range(5), tiny_config(), lambda index: np.array(tokens[index]), 50_000)
    assert kept.tolist() == [0, 2]
    assert left_out == {"too long": 1, "too short for their targets": 1, "with empty targets": 1}


def test_a_new_head_expects_blanks():
    source = SimpleNamespace(num_samples=np.array([1360, 1360, 720]))
    split = Split("training", source, np.array([0, 1]), lambda index: np.array([1, 2]))
    assert blank_share(split, tiny_config()) == 0.5
    model = SpidrForCTC(tiny_config(vocab_size=9)).eval()
    expect_blanks(model, 0.8)
    model.lm_head.weight.data.zero_()
    with torch.no_grad():
        probabilities = model(torch.randn(1, 2000)).logits.softmax(-1)[0, 0]
    torch.testing.assert_close(probabilities, torch.tensor([0.8] + 8 * [0.2 / 8]))


def arpa(words: dict[str, float]) -> str:
    """A language model of unigrams, and of the one bigram that kenlm insists on."""
    lines = [f"{math.log10(p):.4f}\t{word}\t0" for word, p in words.items()]
    counts = ["\\data\\", f"ngram 1={len(lines)}", "ngram 2=1", ""]
    return "\n".join([*counts, "\\1-grams:", *lines, "", "\\2-grams:", "-1\t<s> </s>", "", "\\end\\", ""])


@pytest.mark.parametrize("units", ["phones", "characters"])
def test_ngram_decoding(units, tmp_path):
    pytest.importorskip("pyctcdecode", reason="pyctcdecode is not installed")
    pytest.importorskip("kenlm", reason="kenlm is not installed")
    target = "AH B" if units == "phones" else "cab"
    tokenizer = make_tokenizer(units, ["AH B K" if units == "phones" else "ab c b"])
    tokens, wrong = (encode(tokenizer, text).tolist() for text in (target, target.replace("AH", "K").replace("c", "b")))
    # Nearly undecided between two first tokens, the wrong one ahead; all that follows is clear, with blanks between.
    logits = torch.full((2 * len(tokens), len(tokenizer)), -12.0)
    logits[0, tokens[0]], logits[0, wrong[0]] = 0.0, 0.3
    logits[1::2, 0] = 0.0
    for place, token in enumerate(tokens[1:], start=1):
        logits[2 * place, token] = 0.0
    right, other = ("AH", "K") if units == "phones" else ("cab", "bab")
    common = {"<unk>": 1e-4, "<s>": 0.1, "</s>": 0.1, right: 0.7, other: 0.01}
    (tmp_path / "lm.arpa").write_text(arpa(common | ({"B": 0.1} if units == "phones" else {})))
    greedy = tokenizer.decode(logits.argmax(-1).tolist())
    decode = NgramDecoder(tokenizer, tmp_path / "lm.arpa", alpha=1.0)
    assert greedy != target and decode(logits) == target
    with pytest.raises(ValueError, match="no such language model"):
        NgramDecoder(tokenizer, tmp_path / "nothing.arpa")


def test_ngram_decoding_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "kenlm", None)
    (tmp_path / "lm.arpa").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="pip install pyctcdecode kenlm"):
        NgramDecoder(make_tokenizer("phones", ["A"]), tmp_path / "lm.arpa")
    # The command says so before it opens anything.
    said = run_command("finetune_ctc", "model", "data", "out", "--valid", "dev", "--ngram", tmp_path / "lm.arpa")
    fails(said, "pip install pyctcdecode kenlm")
