"""Language models of units with stock parts: tokenizer, training, scores of pairs."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import fails, run_command
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from spidr_hf.units.language_model import (
    NGrams,
    Pair,
    UnitSequences,
    lm_config,
    log_probabilities,
    pair_accuracy,
    read_pairs,
    text_to_units,
    unit_tokenizer,
    units_to_text,
)
from spidr_hf.units.unit_files import write_units


def test_the_tokenizer_saves_and_loads(tmp_path):
    unit_tokenizer(100, max_length=64).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    units = [17, 17, 99, 0]
    assert units_to_text(units) == "17 17 99 0" and units_to_text(np.array(units), collapse=True) == "17 99 0"
    ids = tokenizer(units_to_text(units))["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and len(ids) == 6
    assert text_to_units(tokenizer.decode(ids, skip_special_tokens=True)) == units
    assert len(tokenizer) == 104 and tokenizer.model_max_length == 64
    assert tokenizer("100")["input_ids"][1] == tokenizer.unk_token_id
    batch = tokenizer(["1 2", "3"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_sequences_are_cut_to_the_context():
    tokenizer = unit_tokenizer(10)
    data = UnitSequences([[1, 2, 3], np.array([4, 4, 5, 6])], tokenizer, 4)
    rows = [data[i]["input_ids"] for i in range(len(data))]
    assert rows == [[1, 5, 6, 7], [1, 8, 8, 9], [10, 2]]  # the lone end of the first has nothing to predict
    assert UnitSequences([[4, 4, 5]], tokenizer, 9, collapse=True)[0]["input_ids"] == [1, 8, 9, 2]
    with pytest.raises(ValueError, match=r"unit 12 is unknown.*10 units"):
        UnitSequences([[12]], tokenizer, 4)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_log_probabilities_of_ragged_texts(architecture, monkeypatch):
    tokenizer = unit_tokenizer(10)
    set_seed(0)
    config = lm_config(architecture, tokenizer, num_layers=1, hidden_size=16, num_heads=2, max_length=8)
    model = AutoModelForCausalLM.from_config(config).eval()
    texts = ["1 2 3", "4", "5 6 7 8 9 0"]
    together = log_probabilities(model, tokenizer, texts)
    for text, values in zip(texts, together, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :-1]
        with torch.no_grad():
            expected = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
    # Longer than the context: every unit once, those of the first window as they are alone.
    long = " ".join(str(i % 10) for i in range(29))
    values = log_probabilities(model, tokenizer, [long], with_end=True)[0]
    first = log_probabilities(model, tokenizer, [" ".join(long.split()[:7])])[0]
    assert len(values) == 30
    torch.testing.assert_close(values[:7], first, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="does not know"):
        log_probabilities(model, tokenizer, ["11"])


def test_ngrams_by_hand():
    ngrams = NGrams.count([[0, 1, 0, 1], [0, 1]], 2)
    # Unigrams with one count each: 0 three times, 1 three times, end twice.
    np.testing.assert_allclose(ngrams.unigrams, np.array([4, 4, 3]) / 11)
    unigram, bigram = ngrams.score([[0]])
    assert unigram == pytest.approx(-(math.log(4 / 11) + math.log(3 / 11)) / 2)
    # After the start always 0 (2 counts, 1 kind); after 0 always 1 (3 counts, 1 kind).
    after_start, after_0 = (2 + 4 / 11) / 3, (0 + 3 / 11) / 4
    assert bigram == pytest.approx(-(math.log(after_start) + math.log(after_0)) / 2)


def test_accuracy_by_hand():
    pairs = [Pair("1", "2", "a", "x"), Pair("1", "2", "a", "x"), Pair("1", "2", "b", "y")]
    result = pair_accuracy(pairs, [1.0, 0.0, 3.0], [0.0, 1.0, 3.0])
    assert result == {"accuracy": 0.5, "x": 0.5, "y": 0.5}
    assert pair_accuracy(pairs, [1.0, 1.0, 0.0], [0.0, 0.0, 3.0])["accuracy"] == 0.5  # a: 1, b: 0


def test_pairs_of_every_form(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("positive,negative,kind\n1 2,2 1,x\n")
    assert read_pairs(path, group="kind") == [Pair("1 2", "2 1", "2", "x")]
    path.write_text("positive,negative\na.wav,d/b\n")
    units = {"a": [1, 2], "d/b": np.array([3])}
    assert read_pairs(path, units) == [Pair("1 2", "3", "2")]
    path.write_text("positive,negative\nx/a.wav,y/a.wav\n")
    assert read_pairs(path, {"x/a": [1], "y/a": [2], "a": [3]}) == [Pair("1", "2", "2")]
    with pytest.raises(ValueError, match=r"no units of 'x/a.wav'"):
        read_pairs(path, {"a": [3]})  # whose?
    path.write_text("id,filename,voice,correct\n7,a,v,1\n7,b,v,0\n7,c,w,0\n7,a,w,1\n")
    units = {"a": [1], "b": [2], "c": [3]}
    assert read_pairs(path, units) == [Pair("1", "2", "7"), Pair("1", "3", "7")]
    for text, message in (
        ("positive\n1\n", "columns positive; expected"),
        ("positive,negative\n", "no pairs"),
        ("positive,negative\na,b\n", "line 2: 'a' are no units"),
        ("id,filename,correct\n7,1,1\n", "'7' has no pair"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    path.write_text("positive,negative\na,z\n")
    with pytest.raises(ValueError, match="line 2: there are no units of 'z'"):
        read_pairs(path, units)


def walks(count, seed):
    """Sequences over 12 units in which two units together tell the next: bigrams cannot know."""
    rng = np.random.default_rng(seed)
    sequences = {}
    for i in range(count):
        units = rng.integers(0, 12, 2).tolist()
        while len(units) < 40:
            sure = (units[-1] + units[-2]) % 12
            units.append(sure if rng.random() < 0.95 else int(rng.integers(0, 12)))
        sequences[f"{seed}-{i}"] = units
    return sequences


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    write_units(folder / "train.jsonl", walks(600, 0), {"num_units": 12})
    write_units(folder / "valid.jsonl", walks(30, 1), {"num_units": 12})
    arguments = (
        folder / "train.jsonl", folder / "out", "--valid", folder / "valid.jsonl", "--num-layers", 2,
        "--hidden-size", 64, "--num-heads", 2, "--max-length", 48, "--lr", 0.005, "--warmup-steps", 20,
        "--steps", 300, "--save-steps", 150,
    )  # fmt: skip
    done = run_command("train_unit_lm", *arguments)
    assert done.status == 0, done.err
    return folder, arguments, done


def test_a_model_knows_more_than_bigrams(trained):
    folder, _, done = trained
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["model"] < metrics["bigram"] - 0.2 < metrics["unigram"]
    assert metrics["real_over_shuffled"] > 0.9
    assert "Held-out units" in done.out
    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "final")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "final")
    assert model.config.vocab_size == len(tokenizer) == 16
    generated = model.generate(**tokenizer("1 2 3", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert generated.shape[1] > 5


def test_pairs_are_told_apart(trained, tmp_path):
    folder, _, _ = trained
    real, rng = walks(20, 2), np.random.default_rng(0)
    units = real | {f"{name}-mixed": rng.permutation(sequence).tolist() for name, sequence in real.items()}
    write_units(tmp_path / "u.jsonl", units, {})
    lines = "".join(f"{name},{name}-mixed\n" for name in real)
    (tmp_path / "p.csv").write_text("positive,negative\n" + lines)
    done = run_command(
        "score_pairs", folder / "out" / "final", tmp_path / "p.csv", "--units", tmp_path / "u.jsonl",
        "--json", tmp_path / "s.json", "--scores", tmp_path / "s.csv",
    )  # fmt: skip
    assert done.status == 0, done.err
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["accuracy"] > 0.9 and scores["pairs"] == 20
    assert len((tmp_path / "s.csv").read_text().splitlines()) == 21


def test_other_units_of_the_same_numbers_are_refused(trained, tmp_path):
    _, arguments, _ = trained
    made = {"num_units": 12, "layer": 6, "sha256": "a" * 64, "kind": "codebook predictions"}
    for name, change in (("six", {}), ("five", {"layer": 5}), ("other", {"sha256": "b" * 64})):
        write_units(tmp_path / f"{name}.jsonl", walks(4, 0), made | change)
    command = ("train_unit_lm", tmp_path / "six.jsonl", tmp_path / "out", "--valid")
    fails(run_command(*command, tmp_path / "five.jsonl"), "five.jsonl", "another layer (5)", "six.jsonl (6)")
    fails(run_command(*command, tmp_path / "other.jsonl"), "other.jsonl", "another model than")
    done = run_command(*command, tmp_path / "six.jsonl", *arguments[4:-4], "--steps", 1)
    assert done.status == 0, done.err
    (tmp_path / "p.csv").write_text("positive,negative\n0-0,0-1\n")
    score = ("score_pairs", tmp_path / "out" / "final", tmp_path / "p.csv", "--units")
    fails(run_command(*score, tmp_path / "five.jsonl"), "another layer (5) than those that the language model", "(6)")
    assert run_command(*score, tmp_path / "six.jsonl").status == 0


def test_started_again_it_ends_as_if_never_interrupted(trained, not_installed):
    """Killed while it wrote its last checkpoint, or between that and `final`."""
    folder, arguments, _ = trained
    out = folder / "out"
    before = (out / "metrics.json").read_bytes()
    weights = load_file(out / "final" / "model.safetensors")
    for damage in ("trainer_state.json", None):
        shutil.rmtree(out / "final")
        if damage:
            (out / "checkpoints" / "checkpoint-300" / damage).unlink()
        done = run_command("train_unit_lm", *arguments)
        assert done.status == 0, done.err
        again = load_file(out / "final" / "model.safetensors")
        assert all(torch.equal(again[name], weights[name]) for name in weights)
        assert (out / "metrics.json").read_bytes() == before
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-150", "checkpoint-300"]


def test_finished_is_finished(trained):
    folder, arguments, _ = trained
    files = {path: path.stat().st_mtime_ns for path in (folder / "out" / "final").iterdir()}
    done = run_command("train_unit_lm", *arguments)
    assert done.status == 0 and "is there already" in done.out
    assert files == {path: path.stat().st_mtime_ns for path in (folder / "out" / "final").iterdir()}


@pytest.mark.parametrize(("option", "value"), [("--steps", 400), ("--lr", 0.1), ("--seed", 3), ("--hidden-size", 32)])
def test_another_run_is_refused_by_name(trained, option, value):
    _, arguments, _ = trained
    name = option.removeprefix("--").replace("-", "_")
    fails(run_command("train_unit_lm", *arguments, option, value), "holds another run", name, "--fresh")


def test_other_units_are_refused(trained, tmp_path):
    folder, arguments, _ = trained
    (tmp_path / "other.jsonl").write_bytes((folder / "valid.jsonl").read_bytes())
    fails(run_command("train_unit_lm", tmp_path / "other.jsonl", *arguments[1:]), "holds another run", "units_sha256")


def test_two_starts_at_once_are_kept_apart(trained):
    folder, arguments, _ = trained
    code = "import sys; from spidr_hf.system.processes import RunLock\nlock = RunLock(sys.argv[1])\n"
    code += "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(folder / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        fails(run_command("train_unit_lm", *arguments), "in use by another run")
        other.communicate()


@pytest.mark.slow
def test_two_processes_begin_anew_together(trained, tmp_path):
    """With --fresh none of them finds what the first is about to remove; a refusal of the first ends both at once."""
    folder, _, _ = trained
    out = tmp_path / "out"
    options = (
        folder / "train.jsonl", out, "--valid", folder / "valid.jsonl", "--num-layers", 1, "--hidden-size", 32,
        "--num-heads", 2, "--max-length", 48, "--steps", 6, "--save-steps", 3,
    )  # fmt: skip

    def launch(*more):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
        command = [sys.executable, "-m", "spidr_hf.examples.train_unit_lm", *map(str, options), *map(str, more)]
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        ended = [process.communicate(timeout=300) for process in processes]
        return [process.returncode for process in processes], *("".join(texts) for texts in zip(*ended, strict=True))

    codes, said, errors = launch()
    assert codes == [0, 0] and said.count("Held-out units") == 1, errors
    weights = load_file(out / "final" / "model.safetensors")
    codes, said, errors = launch()
    assert codes == [0, 0] and "is there already" in said, errors
    codes, _, errors = launch("--seed", 3)
    # Both say it, since no launcher ends the second when the first has ended.
    told = {line.removesuffix(" (process 1)") for line in errors.splitlines() if "error: " in line}
    assert codes == [1, 1] and len(told) == 1 and "holds another run" in told.pop(), errors
    codes, said, errors = launch("--seed", 3, "--fresh")
    assert codes == [0, 0] and said.count("Held-out units") == 1, errors
    again = load_file(out / "final" / "model.safetensors")
    assert any(not torch.equal(again[name], weights[name]) for name in weights)


def test_bad_input(trained, tmp_path):
    folder, _, _ = trained
    train, valid, final = folder / "train.jsonl", folder / "valid.jsonl", folder / "out" / "final"
    fails(run_command("train_unit_lm", tmp_path / "no", tmp_path / "o", "--valid", valid), "no such file of units")
    (tmp_path / "empty.jsonl").write_text("")
    fails(run_command("train_unit_lm", tmp_path / "empty.jsonl", tmp_path / "o", "--valid", valid), "holds no units")
    fails(run_command("train_unit_lm", train, tmp_path / "o", "--valid", valid, "--num-units", 5), "unit 11", "5 units")
    fails(run_command("train_unit_lm", train, tmp_path / "o", "--valid", valid, "--num-heads", 3), "multiple of the 3")
    (tmp_path / "file").write_text("")
    fails(run_command("train_unit_lm", train, tmp_path / "file" / "o", "--valid", valid), "file")
    (tmp_path / "p.csv").write_text("positive,negative\n1 2,2 50\n")
    fails(run_command("score_pairs", final, tmp_path / "no.csv"), "no such file of pairs")
    fails(run_command("score_pairs", final, tmp_path / "p.csv"), "does not know")
    fails(run_command("score_pairs", tmp_path, tmp_path / "p.csv"), "no config.json")
    fails(run_command("score_pairs", "no/model", tmp_path / "p.csv"), "no/model", "cannot be loaded")
