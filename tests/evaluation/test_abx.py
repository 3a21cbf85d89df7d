"""ABX against its obvious form, by hand, and against fastabx where there is one."""

import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import reference_abx
import torch
from commands import fails, run_command
from huggingface_hub import ModelCard

from spidr_hf.evaluation.abx import Token, abx, cell_error, cut_tokens, dtw, read_items


def made_items(seed, *, speakers=3, contexts=2, phones=3, most=4):
    """Tokens of random lengths and features with some structure, in one file per speaker."""
    rng = np.random.default_rng(seed)
    tokens, features = [], {}
    centres = rng.normal(size=(phones, 5))
    for s in range(speakers):
        frames = []
        for c in range(contexts):
            for p in range(phones):
                for _ in range(rng.integers(0, most)):
                    length = int(rng.integers(1, 5))
                    tokens.append(Token(f"d/{s}", len(frames), len(frames) + length, f"p{p}", (f"c{c}", "x"), f"s{s}"))
                    frames += list(centres[p] + rng.normal(size=(length, 5)))
        features[f"d/{s}"] = torch.tensor(np.array(frames), dtype=torch.float32).reshape(-1, 5)
    return tokens, features


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("speaker", ["within", "across"])
@pytest.mark.parametrize("context", ["within", "any"])
def test_the_obvious_form(seed, speaker, context, monkeypatch):
    tokens, features = made_items(seed)
    frames = [features[t.fileid][t.start : t.end].double().numpy() for t in tokens]
    expected = reference_abx.abx(tokens, frames, speaker, context)
    options = {"speaker": speaker, "context": context, "max_size_group": None, "max_x_across": None}
    assert abx(tokens, features, **options) == pytest.approx(expected, abs=1e-6)
    # Whatever is computed at a time.
    monkeypatch.setattr("spidr_hf.evaluation.abx.PAIRS_AT_ONCE", 5)
    monkeypatch.setattr("spidr_hf.evaluation.abx.VALUES_AT_ONCE", 100)
    assert abx(tokens, features, **options) == pytest.approx(expected, abs=1e-6)


def test_recorded_by_fastabx():
    """What fastabx 0.9.0 printed for these units, with every token (its sums are float32)."""
    folder = Path(__file__).parents[1] / "fixtures" / "fastabx"
    tokens = read_items(folder / "triphones.item", 50)
    rows = map(json.loads, (folder / "units.jsonl").read_text().splitlines())
    units = {row["file"]: torch.tensor(row["units"])[:, None] for row in rows}
    options = {"distance": "identical", "max_size_group": None, "max_x_across": None}
    for name, recorded in json.loads((folder / "scores.json").read_text()).items():
        speaker, context = name.split(" speaker, ")
        error = abx(tokens, units, speaker=speaker, context=context.removesuffix(" context"), **options)
        assert error == pytest.approx(recorded, abs=1e-6), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("speaker", ["within", "across"])
def test_units_are_identical_or_not(seed, speaker):
    tokens, features = made_items(seed)
    units = {name: (x[:, :1] > 0).long() + 2 * (x[:, 1:2] > 0) for name, x in features.items()}
    frames = [units[t.fileid][t.start : t.end, 0].tolist() for t in tokens]
    expected = reference_abx.abx(tokens, frames, speaker, distance=reference_abx.identical)
    options = {"speaker": speaker, "max_size_group": None, "max_x_across": None}
    assert abx(tokens, units, distance="identical", **options) == pytest.approx(expected, abs=1e-6)


def test_dtw_of_ragged_pairs():
    rng = np.random.default_rng(0)
    tokens = [rng.normal(size=(int(n), 4)) for n in rng.integers(1, 8, 12)]
    rows, columns = np.array([0, 1, 2, 3, 4, 5]), np.array([6, 7, 8, 9, 10, 11])
    lengths = np.array([len(t) for t in tokens])
    distances = torch.full((7, 7, 6), 9.0, dtype=torch.float64)
    for p, (i, j) in enumerate(zip(rows, columns, strict=True)):
        for a, b in np.ndindex(lengths[i], lengths[j]):
            distances[a, b, p] = reference_abx.angle(tokens[i][a], tokens[j][b])
    result = dtw(distances, torch.from_numpy(lengths[rows]), torch.from_numpy(lengths[columns]))
    expected = [reference_abx.dtw(tokens[i], tokens[j]) for i, j in zip(rows, columns, strict=True)]
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-9)


def test_by_hand():
    nan = float("nan")
    assert cell_error(np.array([[nan, 1.0], [1.0, nan]]), np.array([[2.0, 2.0], [0.5, 1.0]])) == pytest.approx(1.5 / 4)
    # Phones on different axes are never confused; the same frames everywhere are always a tie.
    axes = torch.eye(2).repeat_interleave(4, 0)
    tokens = [Token("f", i, i + 1, "ab"[i // 4], ("x", "y"), "st"[i % 2]) for i in range(8)]
    for speaker in ("within", "across"):
        assert abx(tokens, {"f": axes}, speaker=speaker) == 0
        assert abx(tokens, {"f": torch.ones(8, 2)}, speaker=speaker) == 0.5
        assert abx(tokens, {"f": torch.zeros(8, 2)}, speaker=speaker) == 0.5


def test_random_features_are_at_chance_and_draws_are_seeded():
    tokens, _ = made_items(0, speakers=3, contexts=3, phones=4, most=15)
    ends = {fileid: max(t.end for t in tokens if t.fileid == fileid) for fileid in ("d/0", "d/1", "d/2")}
    features = {fileid: torch.randn(end, 5, generator=torch.Generator().manual_seed(1)) for fileid, end in ends.items()}
    first = abx(tokens, features, speaker="across", max_size_group=5, max_x_across=1)
    assert first == abx(tokens, features, speaker="across", max_size_group=5, max_x_across=1)
    assert first == pytest.approx(0.5, abs=0.05)


def test_items(tmp_path):
    path = tmp_path / "a.item"
    header = "#file onset offset #phone prev-phone next-phone speaker\n"
    path.write_text(header + "a/b 0.25 0.49 AH K T s1\n")
    # Middles of frames lie at 0.01 + 0.02 n: the first from 0.25 on is the 12th's.
    assert read_items(path) == [Token("a/b", 12, 25, "AH", ("K", "T"), "s1")]
    for text, message in (
        ("", "no column #file"),
        (header, "holds no items"),
        (header + "a 0.1 x AH K T s\n", "line 2 is not of the form"),
        (header + "a 0.1 0.2 AH\n", "line 2 is not of the form"),
        (header + "a 0.111 0.112 AH K T s\n", "line 2: from 0.111 to 0.112 s there is no frame"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_items(path)
    with pytest.raises(ValueError, match="'f' have 3 frames, but an item reaches to frame 4"):
        cut_tokens([Token("f", 1, 4, "a", ("x", "y"), "s")], {"f": torch.ones(3, 2)})
    with pytest.raises(ValueError, match="no triplets within"):
        abx([Token("f", 0, 1, "a", ("x", "y"), "s")], {"f": torch.ones(3, 2)})


@pytest.fixture(scope="module")
def files(tmp_path_factory, speech):
    """Items of the shipped speech, and features that hold the log energy of a few bands."""
    from spidr_hf.data.manifests import read_manifest

    folder = tmp_path_factory.mktemp("abx")
    done = run_command("write_items", speech / "alignments.jsonl", folder / "triphones.item")
    assert done.status == 0 and "5 speakers" in done.out, done.err + done.out
    manifest = read_manifest(speech / "manifest.csv")
    for i in range(len(manifest)):
        wave = torch.from_numpy(manifest.read(i)).unfold(0, 400, 320)
        bands = torch.fft.rfft(wave * torch.hann_window(400)).abs().square()[:, :200].reshape(len(wave), 20, 10).sum(-1)
        for layer, features in ((1, (bands + 1e-5).log() + 8), (2, torch.randn(len(wave), 4))):
            path = folder / "features" / str(layer) / f"{manifest.fileid(i)}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(features, path)
            units = features[:, ::5].argmax(-1).tolist()
            with (folder / f"{layer}.jsonl").open("a") as file:
                file.write(json.dumps({"file": manifest.fileid(i), "units": units}) + "\n")
    for layer in (1, 2):
        (folder / "units" / str(layer)).mkdir(parents=True)
        (folder / f"{layer}.jsonl").rename(folder / "units" / str(layer) / "units.jsonl")
    return folder


def test_the_command(files, tmp_path):
    done = run_command(
        "evaluate_abx", files / "triphones.item", files / "features", "--json", tmp_path / "a.json",
        "--plot", tmp_path / "a.png", "--max-size-group", 4, "--backend", "own",
    )  # fmt: skip
    assert done.status == 0, done.err
    scores = json.loads((tmp_path / "a.json").read_text())["layers"]
    assert list(scores) == ["1", "2"] and list(scores["1"]) == ["within", "across"]
    assert scores["1"]["within"] < scores["1"]["across"] < 40 < scores["2"]["across"] < 60
    assert (tmp_path / "a.png").exists() and "layer 1: ABX error" in done.out


def test_units(files, tmp_path):
    """Of a folder with layers, and of one file."""
    (tmp_path / "README.md").write_text("---\ntags:\n- speech\n---\n\n# A model\n")
    done = run_command(
        "evaluate_abx", files / "triphones.item", files / "units", "--units", "--json", tmp_path / "a",
        "--card", tmp_path, "dev",
    )  # fmt: skip
    assert done.status == 0, done.err
    scores = json.loads((tmp_path / "a").read_text())["layers"]
    told = {
        result.metric_name: result.metric_value for result in ModelCard.load(tmp_path / "README.md").data.eval_results
    }
    assert told["ABX error of units across speakers (%), layer 2"] == round(scores["2"]["across"], 2)
    assert scores["1"]["within"] < 45 < scores["2"]["across"] < 60
    one = files / "units" / "1" / "units.jsonl"
    done = run_command("evaluate_abx", files / "triphones.item", one, "--units", "--json", tmp_path / "b")
    assert json.loads((tmp_path / "b").read_text()) == scores["1"]


def test_names_that_end_alike(files, tmp_path):
    """Items that name a file by its stem find it in a folder, where there is one only."""
    (tmp_path / "paths").mkdir()
    for path in (files / "features" / "1").rglob("*.pt"):
        place = tmp_path / "paths" / "of" / path.name
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(path)
    scores = []
    for features in (tmp_path / "paths", files / "features" / "1"):
        items = files / "triphones.item"
        done = run_command("evaluate_abx", items, features, "--json", tmp_path / "a.json")
        assert done.status == 0, done.err
        scores.append(json.loads((tmp_path / "a.json").read_text()))
    assert scores[0] == scores[1]


def test_one_speaker_has_a_score_within(files, tmp_path):
    lines = (files / "triphones.item").read_text().splitlines(keepends=True)
    speaker = lines[1].split()[-1]
    (tmp_path / "one.item").write_text(lines[0] + "".join(line for line in lines[1:] if line.split()[-1] == speaker))
    done = run_command("evaluate_abx", tmp_path / "one.item", files / "features" / "1", "--json", tmp_path / "a.json")
    assert done.status == 0 and "no score across speakers" in done.err
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["within"]
    fails(run_command("evaluate_abx", tmp_path / "one.item", files / "features" / "1", "--speaker", "across"), "across")


def test_speakers_that_share_no_context_have_scores_within(files, tmp_path):
    header, *lines = (files / "triphones.item").read_text().splitlines()
    rows = [line.split() for line in lines]
    apart = [" ".join([*row[:4], row[6] + row[4], *row[5:]]) for row in rows]
    (tmp_path / "apart.item").write_text("\n".join([header, *apart]) + "\n")
    command = ("evaluate_abx", tmp_path / "apart.item", files / "features", "--json", tmp_path / "a.json")
    done = run_command(*command, "--max-size-group", 2)
    assert done.status == 0 and done.err.count("no triplets across speakers") == 1, done.err
    layers = json.loads((tmp_path / "a.json").read_text())["layers"]
    assert [list(scores) for scores in layers.values()] == [["within"], ["within"]]
    fails(run_command(*command, "--speaker", "across"), "no triplets across speakers")


def test_bad_input(files, tmp_path):
    items, features = files / "triphones.item", files / "features" / "1"
    fails(run_command("evaluate_abx", tmp_path / "no.item", features), "no.item", "no such item file")
    fails(run_command("evaluate_abx", items, tmp_path / "no"), "no such folder")
    (tmp_path / "empty").mkdir()
    fails(run_command("evaluate_abx", items, tmp_path / "empty"), "no feature files")
    torch.save(torch.ones(3, 2), tmp_path / "empty" / "x.pt")
    fails(run_command("evaluate_abx", items, tmp_path / "empty"), "no entry for '", "'x' for one")
    fails(run_command("evaluate_abx", items, features, "--units"), "no units in this folder")
    fails(run_command("evaluate_abx", items, files / "units", "--units", "--backend", "fastabx"), "--backend own")
    fails(run_command("write_items", tmp_path / "no.jsonl", tmp_path / "x.item"), "no such file")
    (tmp_path / "a.jsonl").write_text('{"id": "x", "phones": [["A", 0, 0.1], ["B", 0.1, 0.2], ["C", 0.2, 0.3]]}\n')
    fails(run_command("write_items", tmp_path / "a.jsonl", tmp_path / "x.item"), "no speaker for 'x'")
    assert not (tmp_path / "x.item").exists()


def test_what_fastabx_is_asked_and_cannot_answer(files, tmp_path, monkeypatch):
    """It gets the device; where it finds no triplets across speakers those within have their score."""

    class EmptyTaskError(ValueError):
        pass

    def zerospeech_abx(*_, speaker: str, device: str, **options) -> float:
        assert device == "cpu" and set(options) >= {"max_size_group", "max_x_across", "context", "seed"}
        if speaker == "across":
            raise EmptyTaskError("The task has no cell.")
        return 0.25

    stand_in = ModuleType("fastabx")
    stand_in.__spec__ = ModuleSpec("fastabx", None)
    stand_in.__dict__.update(EmptyTaskError=EmptyTaskError, zerospeech_abx=zerospeech_abx)
    monkeypatch.setitem(sys.modules, "fastabx", stand_in)
    command = ("evaluate_abx", files / "triphones.item", files / "features" / "1", "--device", "cpu")
    done = run_command(*command, "--json", tmp_path / "s.json")
    assert done.status == 0 and json.loads((tmp_path / "s.json").read_text()) == {"within": 25}
    assert "no triplets across speakers" in done.err
    fails(run_command(*command, "--speaker", "across"), "no triplets across speakers", "no cell")


def test_items_of_alignments_whose_speakers_are_in_another_file(tmp_path):
    rows = "".join(
        f"{name} 1 {0.1 * i:.1f} 0.1 {phone}\n" for name in ("d/a", "d/b", "c") for i, phone in enumerate("KAST")
    )
    (tmp_path / "a.ctm").write_text(rows)
    command = ("write_items", tmp_path / "a.ctm", tmp_path / "a.item")
    fails(run_command(*command), "no speaker for 'd/a'", "give --speakers FILE")
    (tmp_path / "speakers.txt").write_text("a\tJane Austen\nb\tJane Eyre\nz\tNobody\n")
    done = run_command(*command, "--speakers", tmp_path / "speakers.txt")
    assert done.status == 0 and "1 of 3 utterances has no speaker: left out, 'c' for one" in done.err
    # Of the last triphone the model has no frame.
    assert "2 triphones of 2 speakers" in done.out
    lines = (tmp_path / "a.item").read_text().splitlines()[1:]
    assert lines == ["d/a 0.0000 0.3000 A K S Jane_Austen", "d/b 0.0000 0.3000 A K S Jane_Eyre"]
    for line in ("a Jane Austen", "a,Jane", "a\t"):
        (tmp_path / "speakers.txt").write_text(f"{line}\n")
        fails(run_command(*command, "--speakers", tmp_path / "speakers.txt"), "line 1", "a tab between them")


@pytest.mark.slow
def test_fastabx_agrees(files, tmp_path):
    """In this Python, or in the one that FASTABX_PYTHON names (fastabx needs 3.12)."""
    python = os.environ.get("FASTABX_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import fastabx"], capture_output=True).returncode:
        pytest.skip("fastabx is not installed; FASTABX_PYTHON may name a Python >= 3.12 that has it")
    script = (
        "import json, sys; from fastabx import zerospeech_abx\n"
        "item, root = sys.argv[1:]\n"
        "options = {'max_size_group': None, 'max_x_across': None}\n"
        "print(json.dumps({s: 100 * zerospeech_abx(item, root, speaker=s, **options) for s in ('within', 'across')}))"
    )
    items, features = files / "triphones.item", files / "features" / "1"
    done = subprocess.run([python, "-c", script, items, features], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout.splitlines()[-1])
    options = ("--max-size-group", 0, "--max-x-across", 0, "--backend", "own", "--json", tmp_path / "a.json")
    assert run_command("evaluate_abx", items, features, *options).status == 0
    assert json.loads((tmp_path / "a.json").read_text()) == pytest.approx(expected, abs=0.01)
