"""`examples/finetune_ctc.py` and `finetune_classification.py` from end to end: they learn, resume where they stopped,
and what they save gives in transformers' pipelines what they said it gives."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate import PartialState
from commands import fails, run_command
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model
from transformers import AutoProcessor, pipeline

from spidr_hf import SpidrFeatureExtractor, SpidrForAudioFrameClassification, SpidrForXVector
from spidr_hf.data.batching import BatchKey, Position
from spidr_hf.data.labels import Labels, read_phones
from spidr_hf.data.open import open_data
from spidr_hf.finetuning.arguments import open_splits, own_labels
from spidr_hf.finetuning.batches import Split
from spidr_hf.finetuning.classification import FrameTask
from spidr_hf.finetuning.settings import Settings
from spidr_hf.finetuning.task import evaluate
from spidr_hf.system.errors import AudioError
from spidr_hf.training.checkpoints import Checkpoints

pytest.importorskip("jiwer", reason="error rates are jiwer's (pip extra finetune)")
pytest.importorskip("matplotlib", reason="curves are drawn by matplotlib (pip extra finetune)")

ROOT = Path(__file__).resolve().parents[2]
TONES = {"A": 300, "BE": 700, "C": 1500, "D": 3000}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_codebooks": 2,
    "conv_dim": [24] * 7,
    "tdnn_dim": [16, 16, 20],
    "tdnn_kernel": [3, 3, 1],
    "tdnn_dilation": [1, 2, 1],
    "xvector_output_dim": 12,
    "classifier_proj_size": 16,
}
FAST = ("--num-workers", 0, "--dtype", "float32", "--batch-seconds", 3, "--mask-time-prob", 0)
FAST += ("--head-lr", 5e-3, "--freeze-encoder-steps", 0)


@pytest.fixture(scope="module")
def speech_of_tones(tmp_path_factory) -> Path:
    """A folder with `train/`, `dev/` and `labels.jsonl`: phones are tones, one speaker has a shrill tone over all."""
    folder, rng, rows = tmp_path_factory.mktemp("tones"), np.random.default_rng(0), []
    for split, count in (("train", 24), ("dev", 8)):
        (folder / split).mkdir()
        for number in range(count):
            speaker = ("quiet", "shrill")[number % 2]
            phones, pieces, start = [], [], 0.0
            for name in ["SIL", *rng.choice(list(TONES), size=3 + number % 4), "SIL"]:
                samples = int(rng.integers(1200, 2000))
                time = np.arange(samples) / 16_000
                pieces.append(0.3 * np.sin(2 * np.pi * TONES[name] * time) if name in TONES else np.zeros(samples))
                phones.append([str(name), round(start, 4), round(start + samples / 16_000, 4)])
                start += samples / 16_000
            wave = np.concatenate(pieces)
            wave += 0.001 * rng.standard_normal(len(wave))
            if speaker == "shrill":
                wave += 0.3 * np.sin(2 * np.pi * 5000 * np.arange(len(wave)) / 16_000)
            soundfile.write(folder / split / f"{split}-{number:02d}.wav", wave, 16_000)
            text = " ".join("Be, a" if name == "BE" else str(name).lower() for name, _, _ in phones if name != "SIL")
            rows.append({"id": f"{split}-{number:02d}", "speaker": speaker, "text": text, "phones": phones})
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    tiny_model(**SMALL).save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def finetune(speech_of_tones, pretrained, tmp_path):
    """`finetune(command, name, *options)` runs `examples/finetune_COMMAND.py` into a folder of that name."""

    def run(command: str, name: str, *options: object):
        PartialState._reset_state()
        labels = () if "--labels" in options else ("--labels", speech_of_tones / "labels.jsonl")
        data = (pretrained, speech_of_tones / "train", tmp_path / name, "--valid", speech_of_tones / "dev")
        return run_command(f"finetune_{command}", *data, *labels, *FAST, *options)

    return run


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "audio_seconds_per_second"} for row in rows(folder)]


def scores(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["scores"]


def audio(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


PHONES = ("--units", "phones", "--steps", 10, "--lr", 2e-3, "--eval-interval", 5, "--log-interval", 5)


def test_phones(finetune, speech_of_tones, tmp_path):
    import jiwer

    options = ("--train-extractor", "--lr", 3e-3, "--head-lr", 1e-2, "--warmup", 0.05, "--hold", 0.75)
    done = finetune("ctc", "run", *PHONES, *options, "--steps", 200, "--eval-interval", 100)
    assert done.status == 0, done.err
    folder = tmp_path / "run"
    per = scores(folder)["validation"]["per"]
    # 1 without training, 0.31 to 0.33 with other seeds.
    assert 0 < per < 0.6 and f"per {100 * per:.2f} %" in done.out
    assert rows(folder)[-1]["loss"] < 0.5 * rows(folder)[0]["loss"]
    assert (folder / "curves.png").stat().st_size > 10_000

    # The pipeline, one file at a time, says what the evaluation in batches said.
    recognize = pipeline("automatic-speech-recognition", model=str(folder / "final"), device="cpu")
    labels = [json.loads(line) for line in (speech_of_tones / "labels.jsonl").read_text().splitlines()]
    dev = [row for row in labels if row["id"].startswith("dev")]
    heard = [recognize(audio(speech_of_tones / "dev" / f"{row['id']}.wav"))["text"] for row in dev]
    said = [" ".join(name for name, _, _ in row["phones"] if name != "SIL") for row in dev]
    assert jiwer.wer(said, heard) == per
    tokenizer = AutoProcessor.from_pretrained(folder / "final").tokenizer
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == ["<pad>", "<unk>", "A", "BE", "C", "D"]


def test_characters(finetune, tmp_path, speech_of_tones):
    done = finetune("ctc", "run", "--steps", 4, "--eval-interval", 2)
    assert done.status == 0, done.err
    found = scores(tmp_path / "run")["validation"]
    assert set(found) == {"utterances", "wer", "cer", "loss"}
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "run" / "final").tokenizer
    assert set(tokenizer.get_vocab()) == {"<pad>", "<unk>", "|", *"abcde"}
    recognize = pipeline("automatic-speech-recognition", model=str(tmp_path / "run" / "final"), device="cpu")
    assert isinstance(recognize(audio(speech_of_tones / "dev" / "dev-00.wav"))["text"], str)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(finetune, tmp_path, monkeypatch):
    masks = ("--mask-time-prob", 0.3, "--mask-time-length", 3, "--dropout", 0.1, "--freeze-encoder-steps", 6)
    options = (*PHONES, *masks, "--steps", 12, "--eval-interval", 3, "--log-interval", 2)
    assert finetune("ctc", "whole", *options).status == 0
    save = Checkpoints.save

    class Killed(BaseException):
        pass

    def save_and_die(self, state, *args, **kwargs):
        save(self, state, *args, wait=True, **kwargs)
        if state.step == stop:
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    for step in (3, 9):  # before the encoder begins to train, and after
        stop = step
        with pytest.raises(Killed):
            finetune("ctc", "stopped", *options)
    stop = None
    assert finetune("ctc", "stopped", *options).status == 0
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")
    ours, expected = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert scores(tmp_path / "stopped") == scores(tmp_path / "whole")

    # Once done, the same command only says again how good it is; another task has no place in the folder.
    again = finetune("ctc", "stopped", *options)
    assert again.status == 0 and results(tmp_path / "stopped") == results(tmp_path / "whole")
    fails(finetune("ctc", "stopped", *options, "--random-encoder"), "another run", "random_encoder is False there")
    fails(finetune("ctc", "stopped", *options, "--mask-time-prob", 0.2), "config.mask_time_prob is 0.3 there and 0.2")

    # With its only checkpoint damaged, it does not begin again by itself.
    before = (tmp_path / "stopped" / "metrics.jsonl").read_bytes()
    (tmp_path / "stopped" / "checkpoints" / "step_12" / "model.safetensors").write_bytes(b"x")
    fails(finetune("ctc", "stopped", *options), "None of the checkpoints", "--fresh")
    assert (tmp_path / "stopped" / "metrics.jsonl").read_bytes() == before
    assert finetune("ctc", "stopped", *options, "--random-encoder", "--fresh").status == 0
    assert (tmp_path / "stopped" / "earlier-1" / "metrics.jsonl").read_bytes() == before


def test_what_trains_when(finetune, pretrained, tmp_path):
    before = load_file(pretrained / "model.safetensors")

    def changed(name: str) -> set[str]:
        after = load_file(tmp_path / name / "final" / "model.safetensors")
        moved = {key for key in after if key in before and not torch.equal(after[key], before[key])}
        return {key.split(".")[1] for key in moved}

    steps = (*PHONES, "--steps", 3, "--eval-interval", 3)
    assert finetune("ctc", "usual", *steps).status == 0
    assert finetune("ctc", "frozen", *steps, "--freeze-encoder").status == 0
    assert finetune("ctc", "late", *steps, "--freeze-encoder-steps", 3).status == 0
    assert finetune("ctc", "all", *steps, "--train-extractor").status == 0
    assert changed("usual") == {"feature_projection", "encoder"}
    assert changed("frozen") == changed("late") == set()
    assert changed("all") == {"feature_extractor", "feature_projection", "encoder"}


def test_a_complete_run_is_left_as_it_is(finetune, tmp_path):
    """Its settings and card tell how it was made, not what somebody asked for later."""
    options = (*PHONES, "--freeze-encoder", "--eval-interval", 1)
    first = finetune("ctc", "run", *options, "--steps", 2)
    assert first.status == 0, first.err

    def content():
        files = (path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".png")
        return {path: path.read_bytes() for path in files if path.name != ".lock"}

    before = content()
    again = finetune("ctc", "run", *options, "--steps", 1, "--lr", 0.7)
    assert again.status == 0, again.err
    assert "is complete, and left as it is" in again.err and "lr 0.002 -> 0.7" in again.err and content() == before
    assert again.out == first.out
    more = finetune("ctc", "run", *options, "--steps", 3)
    assert more.status == 0 and json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 3


def test_the_best_step_is_kept(finetune, tmp_path):
    # A rate at which scores go up and down.
    options = ("--freeze-encoder", "--head-lr", 0.5, "--steps", 12, "--eval-interval", 2)
    assert finetune("ctc", "run", *PHONES, *options).status == 0
    folder = tmp_path / "run"
    validated = {row["step"]: row["valid_per"] for row in rows(folder) if "valid_per" in row}
    found = json.loads((folder / "results.json").read_text())
    assert len(validated) == 6 and len(set(validated.values())) > 1
    assert validated[found["best_step"]] == min(validated.values()) == found["scores"]["validation"]["per"]
    by_loss = {row["step"]: row["valid_loss"] for row in rows(folder) if "valid_loss" in row}
    assert found["scores"]["validation"]["loss"] == pytest.approx(by_loss[found["best_step"]], rel=1e-5)


def test_a_speaker_held_out(finetune, tmp_path):
    options = (*PHONES, "--steps", 3, "--eval-interval", 3, "--hold-out", "speaker=shrill")
    done = finetune("ctc", "run", *options)
    assert done.status == 0, done.err
    found = scores(tmp_path / "run")
    assert {name: entry["utterances"] for name, entry in found.items()} == {
        "validation": 4,
        "held out, speaker=shrill": 4,
    }
    assert "held out, speaker=shrill (4 utterances): per" in done.out and "12 utterances, " in done.err


def test_labels_of_utterances(finetune, speech_of_tones, tmp_path):
    options = ("--task", "utterance", "--column", "speaker", "--steps", 60, "--train-extractor")
    done = finetune("classification", "run", *options, "--lr", 1e-3, "--eval-interval", 20)
    assert done.status == 0, done.err
    accuracy = scores(tmp_path / "run")["validation"]["accuracy"]
    assert accuracy > 0.9 and f"accuracy {100 * accuracy:.2f} %" in done.out  # 0.5 to 0.75 without training, else 1
    # The pipeline, one file at a time, says what the evaluation in batches said.
    classify = pipeline("audio-classification", model=str(tmp_path / "run" / "final"), device="cpu")
    answers = [classify(audio(speech_of_tones / "dev" / f"dev-{number:02d}.wav"))[0]["label"] for number in range(8)]
    assert np.mean([label == ("quiet", "shrill")[number % 2] for number, label in enumerate(answers)]) == accuracy


def test_probing_with_a_learned_sum_of_layers(finetune, pretrained, tmp_path):
    options = ("--task", "frame", "--freeze-encoder", "--weighted-layer-sum", "--steps", 90)
    done = finetune("classification", "run", *options, "--head-lr", 5e-2, "--eval-interval", 90)
    assert done.status == 0, done.err
    # 0.12 to 0.32 without training (silence, the commonest, has 0.3), 0.46 to 0.53 with other seeds.
    assert scores(tmp_path / "run")["validation"]["accuracy"] > 0.4
    assert "Weights of the layers: input 0." in done.out
    assert (tmp_path / "run" / "layer_weights.png").stat().st_size > 5000
    model = SpidrForAudioFrameClassification.from_pretrained(tmp_path / "run" / "final")
    assert model.layer_weights.abs().sum() > 0 and model.config.id2label[4] == "SIL"
    before, after = load_file(pretrained / "model.safetensors"), model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in after if key.startswith("spidr."))


def test_labels_of_frames_lie_on_their_frames(speech_of_tones):
    """Frames labelled as silence are silent, and no others, in whole utterances and in crops."""
    source = open_data(speech_of_tones / "dev", progress=False)
    phones = own_labels(source, read_phones([speech_of_tones / "labels.jsonl"]))
    model = SpidrForAudioFrameClassification(tiny_config(**SMALL, num_labels=5))
    names = ["SIL", *TONES]
    for max_samples in (None, 3000):
        task = FrameTask(model, SpidrFeatureExtractor(), names, {}, max_samples)
        split = Split("dev", source, np.arange(0, 8, 2), task.labels(source, phones))  # without the shrill speaker
        for epoch in range(3):
            batch = task.batches(split, training=True)[BatchKey(epoch, 0, split.indices, Position())]
            for wave, labels, frames in zip(batch.input_values, batch.labels, batch.frames, strict=True):
                # The middle 5 ms of each window of 25 ms.
                loud = torch.stack([wave[320 * t + 160 : 320 * t + 240].std() for t in range(frames)]) > 0.1
                known = labels[:frames] != -100
                edges = torch.cat([labels[1:frames] != labels[: frames - 1], torch.tensor([True])])
                inside = known & ~edges & ~torch.roll(edges, 1)
                assert inside.any() and torch.equal(loud[inside], (labels[:frames] != 0)[inside])
                assert (labels[frames:] == -100).all()


def test_batches_have_few_numbers_of_frames(speech_of_tones):
    """And what is beyond a row's audio is masked."""
    source = open_data(speech_of_tones / "dev", progress=False)
    phones = own_labels(source, read_phones([speech_of_tones / "labels.jsonl"]))
    model = SpidrForAudioFrameClassification(tiny_config(**SMALL, num_labels=5))
    task = FrameTask(model, SpidrFeatureExtractor(), ["SIL", *TONES], {}, None)
    split = Split("dev", source, np.arange(len(source.num_samples)), task.labels(source, phones))
    for first in range(len(split)):
        chosen = split.indices[first : first + 2]
        batch = task.batches(split)[BatchKey(0, 0, chosen, Position())]
        frames = int(model._get_feat_extract_output_lengths(batch.input_values.shape[1]))
        assert frames % 16 == 0 and frames - max(batch.frames) < 16 and batch.labels.shape[1] == frames
        assert batch.attention_mask.sum(1).tolist() == source.num_samples[chosen].tolist()
        assert not batch.input_values[~batch.attention_mask].any()


def test_an_unreadable_file_alone_in_its_batch(speech_of_tones, tmp_path, capsys):
    """Training takes another utterance in its place and lists it; a validation leaves it out and says so."""
    shutil.copytree(speech_of_tones / "dev", tmp_path / "dev")
    source = open_data(tmp_path / "dev", progress=False)
    phones = own_labels(source, read_phones([speech_of_tones / "labels.jsonl"]))
    model = SpidrForAudioFrameClassification(tiny_config(**SMALL, num_labels=5))
    task = FrameTask(model, SpidrFeatureExtractor(), ["SIL", *TONES], {}, None)
    split = Split("dev", source, np.arange(0, 8, 2), task.labels(source, phones))
    broken = next((tmp_path / "dev").rglob(f"{source.fileid(2)}.*"))
    broken.write_bytes(broken.read_bytes()[:200])
    key = BatchKey(0, 3, np.array([2]), Position())
    batch = task.batches(split, training=True)[key]
    assert len(batch.utterances) == 1 and batch.utterances[0] in (0, 4, 6)
    assert {entry.fileid for entry in batch.skipped} == {source.fileid(2)}
    assert torch.equal(batch.input_values, task.batches(split, training=True)[key].input_values)
    with pytest.raises(AudioError, match="0 of 1 utterance"):
        task.batches(split)[key]
    scores = evaluate(task, split, Settings(batch_seconds=0.01), torch.device("cpu"))  # every utterance alone
    assert np.isfinite(scores["loss"]) and source.fileid(2) in capsys.readouterr().err
    task.left_out.clear()
    evaluate(task, split, Settings(), torch.device("cpu"))  # beside good ones
    assert source.fileid(2) in capsys.readouterr().err
    evaluate(task, split, Settings(), torch.device("cpu"))
    assert source.fileid(2) not in capsys.readouterr().err  # said once
    alone = Split("dev", source, np.array([2]), task.labels(source, phones))
    with pytest.raises(AudioError, match="0 of 2 utterances"):
        task.batches(alone, training=True)[key]


def test_speaker_embeddings(finetune, tmp_path):
    options = ("--task", "speaker", "--train-extractor", "--steps", 60, "--eval-interval", 20, "--max-seconds", 0.3)
    done = finetune("classification", "run", *options, "--lr", 3e-3, "--head-lr", 1e-2)
    assert done.status == 0, done.err
    # 0.19 to 0.5 without training, 0 with other seeds.
    assert scores(tmp_path / "run")["validation"]["eer"] < 0.1 and "eer " in done.out
    assert SpidrForXVector.from_pretrained(tmp_path / "run" / "final").config.label2id == {"quiet": 0, "shrill": 1}


def test_labels_from_the_data_itself(speech_of_tones, pretrained, tmp_path):
    from datasets import Audio, Dataset

    labels = [json.loads(line) for line in (speech_of_tones / "labels.jsonl").read_text().splitlines()]
    for split in ("train", "dev"):
        chosen = [row for row in labels if row["id"].startswith(split)]
        columns = {
            "id": [row["id"] for row in chosen],
            "audio": [str(speech_of_tones / split / f"{row['id']}.wav") for row in chosen],
            "mood": [row["speaker"] for row in chosen],
        }
        dataset = Dataset.from_dict(columns).cast_column("audio", Audio(decode=False))
        dataset.class_encode_column("mood").save_to_disk(tmp_path / split)
    PartialState._reset_state()
    data = (pretrained, tmp_path / "train", tmp_path / "run", "--valid", tmp_path / "dev")
    options = ("--task", "utterance", "--column", "mood", "--steps", 2, "--eval-interval", 2)
    done = run_command("finetune_classification", *data, *FAST, *options)
    assert done.status == 0, done.err
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["names"] == ["quiet", "shrill"]


def test_recordings_of_one_name_keep_their_own_labels(speech_of_tones, tmp_path):
    """Of two data sets each numbers its recordings from 0, as those without an id do."""
    from datasets import Audio, Dataset

    def read(data, source):
        return Labels([], data, source).column("mood")

    files = sorted(map(str, (speech_of_tones / "dev").glob("*.wav")))[:3]
    moods = {"train": ["sad", "glad", "sad"], "dev": ["glad", "sad", "odd"]}
    for split, values in moods.items():
        content = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
        dataset = Dataset.from_dict({"audio": content, "mood": values}).cast_column("audio", Audio(decode=False))
        dataset.save_to_disk(tmp_path / split)
    names = {"data": str(tmp_path / "train"), "valid": str(tmp_path / "dev")}
    args = argparse.Namespace(**names, resample=False, labels=[], hold_out=None)
    train, valid = open_splits(args, read)
    assert train.source.fileid(0) == valid.source.fileid(0)
    assert list(train.values.values()) == moods["train"] and list(valid.values.values()) == moods["dev"]


@pytest.mark.parametrize(
    "command, options, words",
    [
        ("ctc", ("--labels", "nowhere.jsonl"), ("nowhere.jsonl", "no such file")),
        ("ctc", ("--column", "words"), ("no column 'words'", "speaker")),
        ("ctc", ("--hold-out", "speaker"), ("COLUMN=VALUE",)),
        ("ctc", ("--hold-out", "speaker=me"), ("'me'", "quiet, shrill")),
        ("ctc", ("--steps", 0), ("`steps`", "positive")),
        ("ctc", ("--warmup", 0.7, "--hold", 0.7), ("`warmup`", "above 1")),
        ("ctc", ("--mask-time-prob", 2), ("mask_time_prob",)),
        ("ctc", ("--ngram", "lm.arpa"), ("lm.arpa", "no such language model")),
        ("classification", ("--task", "utterance"), ("--column",)),
        ("classification", ("--task", "utterance", "--column", "id"), ("does not occur in training",)),
    ],
)
def test_bad_input(finetune, tmp_path, command, options, words):
    if "--ngram" in options:
        pytest.importorskip("pyctcdecode", reason="needs pyctcdecode")
        pytest.importorskip("kenlm", reason="needs kenlm")
    fails(finetune(command, "run", *options), *words)
    assert not (tmp_path / "run" / "final").exists()


def test_no_model(speech_of_tones, tmp_path):
    data = (speech_of_tones, speech_of_tones / "train", tmp_path / "run", "--valid", speech_of_tones / "dev")
    PartialState._reset_state()
    fails(run_command("finetune_ctc", *data, "--labels", speech_of_tones / "labels.jsonl"), "no model folder")


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(finetune, speech_of_tones, pretrained, tmp_path):
    options = [*PHONES, "--steps", 8, "--eval-interval", 4, "--log-interval", 2, "--freeze-encoder-steps", 4]
    assert finetune("ctc", "one", *options, "--accumulation", 2).status == 0
    data = [pretrained, speech_of_tones / "train", tmp_path / "two", "--valid", speech_of_tones / "dev"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", str(ROOT / "examples" / "finetune_ctc.py")]
    command = [*launch, *data, "--labels", speech_of_tones / "labels.jsonl", *FAST, *options]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, expected = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert {row["world_size"] for row in ours} == {2}
    for row, other in zip(ours, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-4)
        if "valid_loss" in other:
            assert row["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-3)
    assert done.stdout.count("Best step") == 1
    assert (tmp_path / "two" / "final" / "config.json").exists()


def test_a_signal_saves_and_the_same_command_goes_on(finetune, tmp_path, monkeypatch):
    options = (*PHONES, "--steps", 6, "--eval-interval", 3, "--log-interval", 1)
    assert finetune("ctc", "whole", *options).status == 0
    import spidr_hf.finetuning.loop as module

    agreed = module.StopSignal.agreed
    calls = []

    def after_two(self):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed(self)

    monkeypatch.setattr(module.StopSignal, "agreed", after_two)
    stopped = finetune("ctc", "stopped", *options)
    assert stopped.status == 0 and "SIGTERM: saved step 2" in stopped.err
    assert not (tmp_path / "stopped" / "final").exists()
    signal.alarm(0)
    assert finetune("ctc", "stopped", *options).status == 0
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")
    shutil.rmtree(tmp_path / "stopped")
