"""`extract_features.py` and `extract_units.py`: files and layouts, interrupted runs, bad input."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from commands import fails, run_command
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from walk import ROOT

import spidr_hf.units.extraction_run
from spidr_hf import SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.configuration_spidr import frame_lengths
from spidr_hf.data.manifests import Manifest, read_manifest
from spidr_hf.system.messages import counted
from spidr_hf.system.processes import RunLock
from spidr_hf.units.arguments import parse_shard
from spidr_hf.units.extraction_run import Shard
from spidr_hf.units.extractor import Extractor
from spidr_hf.units.kmeans import feature_files
from spidr_hf.units.stores import Layout, UnitStore
from spidr_hf.units.unit_files import predict_units, read_units, unit_files


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory, speech):
    """A manifest of nine utterances in three folders."""
    manifest = read_manifest(speech / "manifest.csv")
    path = tmp_path_factory.mktemp("data") / "few.csv"
    Manifest(manifest.table.take(np.arange(0, 66, 8)), manifest.root).write(path)
    return path


@pytest.fixture(scope="module")
def expected(model_folder, data):
    """Units of each utterance alone, by file id and layer."""
    manifest, model = read_manifest(data), SpidrForPretraining.from_pretrained(model_folder)
    units = {}
    for i in range(len(manifest)):
        alone = predict_units(model, SpidrFeatureExtractor(), [manifest.read(i)])
        units[manifest.fileid(i)] = {layer: sequences[0].tolist() for layer, sequences in alone.items()}
    return units


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_units_with_their_provenance(model_folder, data, expected, tmp_path):
    done = run_command("extract_units", model_folder, data, tmp_path, "--batch-seconds", 20)
    assert done.status == 0, done.err
    assert "9 utterances computed" in done.out and "s per second" in done.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3", "4"]  # nothing else stays behind
    for layer in (2, 3, 4):
        assert sorted(os.listdir(tmp_path / str(layer))) == ["units.jsonl", "units.provenance.json"]
        lines = rows(tmp_path / str(layer) / "units.jsonl")
        assert [row["file"] for row in lines] == list(expected)  # in the order of the data
        assert lines == [{"file": name, "units": units[layer]} for name, units in expected.items()]
        sidecar = json.loads((tmp_path / str(layer) / "units.provenance.json").read_text())
        assert sidecar["model"] == str(model_folder) and len(sidecar["sha256"]) == 64
        assert sidecar["layer"] == layer and sidecar["kind"] == "codebook predictions"
        assert sidecar["window_seconds"] == 60 and sidecar["deduplicated"] is False and sidecar["utterances"] == 9


def test_deduplicated_units_keep_their_durations(model_folder, data, expected, tmp_path):
    assert run_command("extract_units", model_folder, data, tmp_path, "--layers", 3, "--deduplicate").status == 0
    for row in rows(tmp_path / "3" / "units.jsonl"):
        assert np.repeat(row["units"], row["durations"]).tolist() == expected[row["file"]][3]
        assert all(a != b for a, b in zip(row["units"], row["units"][1:], strict=False))
    # The same units with another layout of the lines need no second computation, but a word that it may replace them.
    before = (tmp_path / "3" / "units.jsonl").read_bytes()
    for options in (("--key", "name"), (), ("--deduplicate", "--key", "audio")):
        refused = run_command("extract_units", model_folder, data, tmp_path, "--layers", 3, *options)
        fails(refused, "holds units", "--overwrite to replace it")
        assert (tmp_path / "3" / "units.jsonl").read_bytes() == before
    again = run_command("extract_units", model_folder, data, tmp_path, "--layers", 3, "--key", "name", "--overwrite")
    assert "0 utterances computed" in again.out and "9 there before" in again.out
    assert [row["name"] for row in rows(tmp_path / "3" / "units.jsonl")] == list(expected)
    assert {name: units.tolist() for name, units in read_units(tmp_path / "3" / "units.jsonl").items()} == {
        name: units[3] for name, units in expected.items()
    }


def test_discophon_and_fastabx(model_folder, data, expected, tmp_path):
    discophon = ("--layout", "discophon", "--language", "eng", "--split", "test")
    assert run_command("extract_units", model_folder, data, tmp_path / "d", "--layers", 4, *discophon).status == 0
    lines = rows(tmp_path / "d" / "4" / "units-eng-test.jsonl")
    assert [set(row) for row in lines] == [{"file", "units"}] * 9
    assert [row["file"] for row in lines] == [name.split("/")[-1] for name in expected]
    assert run_command("extract_features", model_folder, data, tmp_path / "d", "--layers", 4, *discophon).status == 0
    features = sorted((tmp_path / "d" / "4" / "eng" / "test").glob("*.pt"))
    assert [path.stem for path in features] == sorted(name.split("/")[-1] for name in expected)

    assert (
        run_command("extract_units", model_folder, data, tmp_path / "f", "--layers", 4, "--layout", "fastabx").status
        == 0
    )
    assert [set(row) for row in rows(tmp_path / "f" / "4" / "units.jsonl")] == [{"audio", "units"}] * 9
    again = run_command("extract_units", model_folder, data, tmp_path / "f", "--layers", 4, "--layout", "fastabx")
    assert "9 there before" in again.out


@pytest.mark.parametrize("after", [False, True])
def test_features(model_folder, data, expected, tmp_path, after):
    options = ["--after-residual"] if after else []
    done = run_command("extract_features", model_folder, data, tmp_path, "--layers", 4, 2, *options)
    assert done.status == 0, done.err
    model = SpidrForPretraining.from_pretrained(model_folder).spidr
    manifest = read_manifest(data)
    for layer in (2, 4):
        sidecar = json.loads((tmp_path / str(layer) / "features.provenance.json").read_text())
        assert sidecar["before_residual"] is not after and sidecar["complete"] and sidecar["utterances"] == 9
        for i in range(len(manifest)):
            features = torch.load(tmp_path / str(layer) / f"{manifest.fileid(i)}.pt", weights_only=True)
            inputs = SpidrFeatureExtractor()(manifest.read(i), sampling_rate=16_000, return_tensors="pt")
            with torch.no_grad():
                alone = model.get_intermediate_outputs(inputs["input_values"], before_residual=not after)
            assert features.dtype == torch.float32 and features.untyped_storage().nbytes() == features.nbytes
            torch.testing.assert_close(features, alone[layer - 1][0], atol=1e-4, rtol=1e-4)


def test_predictions_as_features(model_folder, data, expected, tmp_path):
    done = run_command("extract_features", model_folder, data, tmp_path, "--layers", 3, "--predictions")
    assert done.status == 0, done.err
    for name, units in expected.items():
        probabilities = torch.load(tmp_path / "3" / f"{name}.pt", weights_only=True)
        assert probabilities.shape == (len(units[3]), 24)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(units[3])))
        assert probabilities.argmax(-1).tolist() == units[3]


def test_numpy_features_of_a_folder(model_folder, tmp_path):
    for name in ("a/x.wav", "b.flac"):
        (tmp_path / "audio" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "audio" / name, np.random.default_rng(0).normal(0, 0.1, 8000), 16_000)
    done = run_command(
        "extract_features", model_folder, tmp_path / "audio", tmp_path / "out", "--layers", 1, "--format", "npy"
    )
    assert done.status == 0, done.err
    assert np.load(tmp_path / "out" / "1" / "a" / "x.npy").shape == (24, 48)


def test_an_interrupted_run_goes_on(model_folder, data, expected, tmp_path, monkeypatch):
    """Killed after two batches, with half a line written: the rest is computed, and nothing twice."""
    original, batches = spidr_hf.units.extraction_run.extract, []

    def dies(*args, **kwargs):
        for batch in original(*args, **kwargs):
            if len(batches) == 2:
                raise KeyboardInterrupt
            batches.append(batch)
            yield batch

    monkeypatch.setattr(spidr_hf.units.extraction_run, "extract", dies)
    arguments = (model_folder, data, tmp_path, "--layers", 4, 3, "--batch-seconds", 10)
    stopped = run_command("extract_units", *arguments)
    assert stopped.status != 0 and "resumes from here" in stopped.err
    assert not (tmp_path / "4").exists()  # no half-written units
    (journal,) = (tmp_path / ".partial").glob("*/*.jsonl")
    with journal.open("a") as file:
        file.write('{"file": "half", "lay')
    monkeypatch.undo()
    done = run_command("extract_units", *arguments)
    assert done.status == 0, done.err
    found = sum(len(batch.results) for batch in batches)
    assert found and f"{counted(9 - found, 'utterance')} computed" in done.out and f"{found} there before" in done.out
    for layer in (3, 4):
        assert rows(tmp_path / str(layer) / "units.jsonl") == [
            {"file": name, "units": units[layer]} for name, units in expected.items()
        ]
    assert not (tmp_path / ".partial").exists()


def test_features_that_are_there_are_not_computed_again(model_folder, data, tmp_path):
    arguments = (model_folder, data, tmp_path, "--layers", 2)
    assert run_command("extract_features", *arguments).status == 0
    files = sorted((tmp_path / "2").rglob("*.pt"))
    times = [path.stat().st_mtime_ns for path in files]
    files[3].rename(files[3].with_name(f".{files[3].stem}.123.partial.pt"))  # a process killed while it wrote
    assert len(feature_files(tmp_path / "2")) == 8
    again = run_command("extract_features", *arguments)
    assert "1 utterance computed" in again.out and "8 there before" in again.out
    assert sorted((tmp_path / "2").rglob("*.pt")) == files
    assert [path.stat().st_mtime_ns for i, path in enumerate(files) if i != 3] == times[:3] + times[4:]
    fails(run_command("extract_features", *arguments, "--after-residual"), "another before residual", "--overwrite")
    replaced = run_command("extract_features", *arguments, "--after-residual", "--overwrite")
    assert "9 utterances computed" in replaced.out
    assert json.loads((tmp_path / "2" / "features.provenance.json").read_text())["before_residual"] is False


def test_other_options_or_data_are_not_overwritten_unasked(model_folder, data, tmp_path):
    arguments = (model_folder, data, tmp_path, "--layers", 4)
    assert run_command("extract_units", *arguments).status == 0
    before = (tmp_path / "4" / "units.jsonl").read_bytes()
    fails(run_command("extract_units", *arguments, "--window-seconds", 50), "window seconds", "60", "50", "--overwrite")
    manifest = read_manifest(data)
    Manifest(manifest.table.slice(2), manifest.root).write(tmp_path / "less.csv")
    fails(run_command("extract_units", model_folder, tmp_path / "less.csv", *arguments[2:]), "not among the data")
    assert (tmp_path / "4" / "units.jsonl").read_bytes() == before
    less = run_command("extract_units", model_folder, tmp_path / "less.csv", *arguments[2:], "--overwrite")
    assert less.status == 0 and len(rows(tmp_path / "4" / "units.jsonl")) == 7


@pytest.mark.parametrize("command", ["extract_units", "extract_features"])
def test_other_recordings_of_the_same_names_are_not_taken_for_the_same(model_folder, tmp_path, command):
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 20_000))
    for folder, lengths in (("one", (9000, 12_000, 8000)), ("other", (9000, 15_000, 8000)), ("alike", (9000, 12_000))):
        (tmp_path / folder).mkdir()
        for i, length in enumerate(lengths):
            soundfile.write(tmp_path / folder / f"{i}.flac", noise[i + (folder == "other"), :length], 16_000)
    out = tmp_path / "out"

    def extract(data, *options, to=out):
        return run_command(command, model_folder, tmp_path / data, to, "--layers", 4, *options)

    def results(folder):
        files = sorted((folder / "4").glob("*.pt" if command == "extract_features" else "units.jsonl"))
        return {path.name: path.read_bytes() for path in files}

    assert extract("one").status == 0
    before = results(out)
    fails(extract("other"), "another recording of the name '1'", "37 frames there, 46 here", "--overwrite")
    assert results(out) == before
    # Those of the same names and lengths may be the same, elsewhere: which ones they are is said.
    if command == "extract_features":
        alike = extract("alike")
        assert alike.status == 0 and f"made from {tmp_path / 'one'}" in alike.err and "2 there before" in alike.out
    done = extract("other", "--overwrite")
    assert done.status == 0 and "3 utterances computed" in done.out and "made from" not in done.err
    extract("other", to=tmp_path / "apart")
    assert results(out) == results(tmp_path / "apart") != before


def test_features_of_other_options_go_together(model_folder, tmp_path):
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.flac", np.random.default_rng(i).normal(0, 0.1, 9000), 16_000)
    (tmp_path / "one.tsv").write_text(f"{tmp_path}\n0.flac\t9000\n")
    command = ("extract_features", model_folder)
    assert run_command(*command, tmp_path, tmp_path / "out", "--layers", 2).status == 0
    done = run_command(
        *command, tmp_path / "one.tsv", tmp_path / "out", "--layers", 2, "--after-residual", "--overwrite"
    )
    assert done.status == 0 and [path.name for path in (tmp_path / "out" / "2").glob("*.pt")] == ["0.pt"]


def test_corrupt_files_are_skipped_and_named(model_folder, tmp_path):
    audio = tmp_path / "audio"
    audio.mkdir()
    for i in range(3):
        soundfile.write(audio / f"{i}.flac", np.random.default_rng(i).normal(0, 0.1, 20_000), 16_000)
    content = (audio / "1.flac").read_bytes()
    (audio / "1.flac").write_bytes(content[: len(content) // 2])
    (audio / "text.wav").write_text("no audio")
    done = run_command("extract_units", model_folder, audio, tmp_path / "out", "--layers", 4)
    assert done.status == 0
    assert "2 files skipped (see skipped.jsonl)" in done.err
    skipped = rows(tmp_path / "out" / "skipped.jsonl")
    assert sorted(row["file"] for row in skipped) == ["1", "text"] and all(row["reason"] for row in skipped)
    assert [row["file"] for row in rows(tmp_path / "out" / "4" / "units.jsonl")] == ["0", "2"]
    # Mended, they are computed; the rest is not.
    (audio / "1.flac").write_bytes(content)
    (audio / "text.wav").unlink()
    again = run_command("extract_units", model_folder, audio, tmp_path / "out", "--layers", 4)
    assert "1 utterance computed" in again.out and not (tmp_path / "out" / "skipped.jsonl").exists()


def test_nothing_but_corrupt_files(model_folder, tmp_path):
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 16_000)
    fails(run_command("extract_units", model_folder, tmp_path, tmp_path / "out"), "0 of 1 utterance can", "too short")
    assert not list((tmp_path / "out").rglob("*.jsonl"))


@pytest.mark.parametrize("command", ["extract_units", "extract_features"])
def test_bad_input(command, model_folder, data, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    fails(run_command(command, model_folder, empty, out), str(empty), "no audio files")
    fails(run_command(command, model_folder, tmp_path / "nowhere", out), "nowhere", "no such file")
    fails(run_command(command, tmp_path / "nomodel", data, out), "nomodel", "no model folder")
    fails(run_command(command, "some/name", data, out), "some/name", "cannot be loaded")
    fails(run_command(command, model_folder, data, out, "--layers", 9), "Layer 9", "to 4")
    fails(run_command(command, model_folder, data, out, "--layers", 0), "Layer 0")
    fails(run_command(command, model_folder, data, out, "--language", "eng"), "--layout discophon")
    fails(
        run_command(command, model_folder, data, out, "--layout", "discophon", "--language", "en", "--split", "x"),
        "ISO 639-3",
    )
    fails(run_command(command, model_folder, data, out, "--window-seconds", 3), "longer than twice the context")
    fails(run_command(command, model_folder, data, out, "--device", "gpu"), "gpu")
    (tmp_path / "file").write_text("")
    fails(run_command(command, model_folder, data, tmp_path / "file" / "out"), "file is no folder")
    assert not out.exists()


def test_models_without_what_it_takes(model_folder, data, tmp_path):
    SpidrForPretraining.from_pretrained(model_folder).spidr.save_pretrained(tmp_path / "encoder")
    SpidrFeatureExtractor().save_pretrained(tmp_path / "encoder")
    fails(run_command("extract_units", tmp_path / "encoder", data, tmp_path / "out"), "lacks weights", "heads")
    fails(run_command("extract_units", model_folder, data, tmp_path / "out", "--layers", 1), "Layer 1 has no codebook")
    (tmp_path / "spidr.pt").write_bytes(b"x")
    fails(run_command("extract_units", tmp_path / "spidr.pt", data, tmp_path / "out"), "convert_checkpoint.py")


def test_names_that_would_meet_or_escape(tmp_path):
    for layout in (Layout("discophon", "eng", "dev"), Layout("fastabx")):
        with pytest.raises(ValueError, match="'a/x' and 'b/x' share 'x'"):
            UnitStore(tmp_path, [1], ["a/x", "b/x"], {}, layout=layout)
    UnitStore(tmp_path, [1], ["a/x", "b/x"], {})
    for fileid in ("../x", "/etc/x"):
        with pytest.raises(ValueError, match="leads out of the output folder"):
            UnitStore(tmp_path, [1], [fileid], {})


def test_teacher_labels(model_folder, data, tmp_path):
    assert run_command("extract_units", model_folder, data, tmp_path, "--layers", 4, "--teacher").status == 0
    model, manifest = SpidrForPretraining.from_pretrained(model_folder), read_manifest(data)
    inputs = SpidrFeatureExtractor()(manifest.read(0), sampling_rate=16_000, return_tensors="pt")
    labels = model.get_teacher_labels(inputs["input_values"])[0, -1]
    assert rows(tmp_path / "4" / "units.jsonl")[0]["units"] == labels.tolist()


@pytest.mark.slow
def test_two_processes_make_the_same_files(model_folder, data, expected, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0", str(ROOT / "examples" / "extract_units.py")]
    command += [str(model_folder), str(data), str(tmp_path), "--layers", "3", "4"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "9 utterances computed" in done.stdout and done.stdout.count("utterances computed") == 1
    for layer in (3, 4):
        assert rows(tmp_path / str(layer) / "units.jsonl") == [
            {"file": name, "units": units[layer]} for name, units in expected.items()
        ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "4"]


@pytest.mark.slow
def test_a_killed_run_leaves_no_half_written_file(model_folder, speech, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "examples" / "extract_units.py"),
        str(model_folder),
        str(speech / "small.tar"),
    ]
    command += [str(tmp_path), "--layers", "4", "--batch-seconds", "5"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(p.stat().st_size for p in tmp_path.glob(".partial/*/*.jsonl")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "4").exists()
    done = run_command("extract_units", *command[2:])
    assert done.status == 0 and "there before" in done.out
    assert len(rows(tmp_path / "4" / "units.jsonl")) == 66


def damage(folder, name: str) -> None:
    """NaN in one of a model's tensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors[next(key for key in tensors if name in key)].view(-1)[3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("command", "name", "options"),
    [
        ("extract_units", "heads.weight", ()),
        ("extract_units", "teacher", ("--teacher",)),
        ("extract_units", "codebooks", ("--teacher",)),
        ("extract_features", "feed_forward", ()),
        ("extract_features", "heads.weight", ("--predictions",)),
    ],
)
def test_damaged_weights_give_no_results(data, tmp_path, command, name, options):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    damage(folder, name)
    done = run_command(command, folder, data, tmp_path / "out", *options)
    fails(done, "NaN or infinity", "damaged")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".pt", ".npy")]
    assert not list((tmp_path / "out").rglob("units*.jsonl"))


@pytest.mark.parametrize("command", ["extract_units", "extract_features"])
def test_what_overflows_is_skipped_and_the_rest_is_done(model_folder, data, tmp_path, monkeypatch, command):
    """As float16 does it: one recording of nine, in a batch with others."""
    manifest = read_manifest(data)
    bad = manifest.fileid(3)
    frames = tiny_model().config
    length = int(frame_lengths(frames, int(manifest.num_samples[3])))
    run = Extractor.results

    def results(self, waveforms):
        found = run(self, waveforms)
        for result in found:
            for x in result.values():
                if len(x) == length:
                    x[-1] = float("inf") if x.is_floating_point() else -1
        return found

    monkeypatch.setattr(Extractor, "results", results)
    others = [manifest.fileid(i) for i in range(9) if frame_lengths(frames, int(manifest.num_samples[i])) != length]
    done = run_command(command, model_folder, data, tmp_path, "--layers", 4)
    fails(done, f"the first, {bad}: Layer 4 is not finite (NaN or infinity) in 1 of {length} frames")
    assert bad in [row["file"] for row in rows(tmp_path / "skipped.jsonl")]
    if command == "extract_units":
        assert [row["file"] for row in rows(tmp_path / "4" / "units.jsonl")] == others
    else:
        for name in manifest.table["fileid"].to_pylist():
            assert (tmp_path / "4" / f"{name}.pt").exists() == (name in others)
    monkeypatch.undo()
    again = run_command(command, model_folder, data, tmp_path, "--layers", 4)
    assert again.status == 0 and "1 utterance computed" in again.out
    assert not (tmp_path / "skipped.jsonl").exists()


def test_lengths_that_the_manifest_has_wrong_are_named(model_folder, data, tmp_path):
    manifest = read_manifest(data)
    lengths = manifest.num_samples.copy()
    lengths[2] *= 2
    lengths[5] -= 4_000
    table = manifest.table.set_column(manifest.table.column_names.index("num_samples"), "num_samples", [lengths])
    Manifest(table, manifest.root).write(tmp_path / "wrong.csv")
    out = tmp_path / "out"
    done = run_command("extract_units", model_folder, tmp_path / "wrong.csv", out, "--layers", 4)
    assert done.status == 0 and "2 files are not as long as DATA says (see lengths.jsonl)" in done.err
    there = manifest.num_samples
    listed = [{"file": manifest.fileid(i), "said": int(lengths[i]), "there": int(there[i])} for i in (2, 5)]
    assert rows(out / "lengths.jsonl") == listed
    before = (out / "4" / "units.jsonl").read_bytes()
    again = run_command("extract_units", model_folder, tmp_path / "wrong.csv", out, "--layers", 4)
    assert "0 utterances computed" in again.out and "9 there before" in again.out
    assert (out / "4" / "units.jsonl").read_bytes() == before and rows(out / "lengths.jsonl") == listed
    # With the lengths mended the same results are found, and nothing is left to say.
    mended = run_command("extract_units", model_folder, data, out, "--layers", 4)
    assert "0 utterances computed" in mended.out and not (out / "lengths.jsonl").exists()


@pytest.mark.parametrize(
    ("fileids", "message"),
    [
        (["a", "a.pt/b"], "which is the folder of another utterance"),
        (["a", "x" * 253], "file's name of 256 bytes"),
        (["ü" * 127, "b"], "file's name of 257 bytes"),
        (["a\0b", "c"], "has a NUL in it"),
        (["/etc/a", "c"], "leads out of the output folder"),
    ],
)
def test_names_that_cannot_be_files_are_told_first(model_folder, tmp_path, monkeypatch, fileids, message):
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(4_000), 16_000)
    rows = [{"fileid": name, "path": f"{i}.wav", "num_samples": 4_000} for i, name in enumerate(fileids)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(Extractor, "results", lambda *_: pytest.fail("the model ran"))
    fails(run_command("extract_features", model_folder, tmp_path / "m.jsonl", tmp_path / "out"), message)


def test_the_longest_names_are_written(model_folder, tmp_path):
    name = "x" * 251
    soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(0).normal(0, 0.1, 4_000), 16_000)
    done = run_command("extract_features", model_folder, tmp_path, tmp_path / "out", "--layers", 2)
    assert done.status == 0 and (tmp_path / "out" / "2" / f"{name}.pt").exists()


def tree(folder):
    """Every file in a folder, its times left out."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name.endswith(".provenance.json"):
            content = {key: value for key, value in json.loads(content).items() if key != "created"}
        found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture
def some_bad(tmp_path):
    """Eleven recordings, one of which is cut off."""
    folder = tmp_path / "audio"
    folder.mkdir()
    for i in range(11):
        rng = np.random.default_rng(i)
        soundfile.write(folder / f"{i:02d}.flac", rng.normal(0, 0.1, 9_000 + 700 * (i * 5 % 11)), 16_000)
    content = (folder / "04.flac").read_bytes()
    (folder / "04.flac").write_bytes(content[: len(content) // 2])
    return folder


@pytest.mark.parametrize("command", ["extract_units", "extract_features"])
@pytest.mark.parametrize("parts", [["2/3", "0/3", "1/3"], ["3/3", "1/3", "2/3"], ["1/1"], ["1/9", *"2345678"]])
def test_shards_merge_into_the_files_of_one_process(model_folder, some_bad, tmp_path, command, parts):
    arguments = ("--layers", 2, 4, "--batch-seconds", 2)
    one = run_command(command, model_folder, some_bad, tmp_path / "one", *arguments)
    assert one.status == 0, one.err
    for part in parts:
        part = part if "/" in part else f"{part}/9"  # more than there are batches
        done = run_command(command, model_folder, some_bad, tmp_path / "many", *arguments, "--shard", part)
        assert done.status == 0, done.err
        if len(parts) > 3:
            continue
        assert ("left to other shards" in done.out) == (part != parts[-1]), part
        assert (tmp_path / "many" / "skipped.jsonl").exists() == (part == parts[-1])
    if len(parts) > 3:
        for part in ("0/9", "8/9"):  # the second has nothing to do, and comes when all is done
            run_command(command, model_folder, some_bad, tmp_path / "many", *arguments, "--shard", part)
    assert tree(tmp_path / "many") == tree(tmp_path / "one")


def test_a_run_without_shards_does_what_is_left_of_them(model_folder, some_bad, tmp_path):
    arguments = ("--layers", 4, "--batch-seconds", 2)
    assert run_command("extract_units", model_folder, some_bad, tmp_path / "one", *arguments).status == 0
    many = tmp_path / "many"
    run_command("extract_units", model_folder, some_bad, many, *arguments, "--shard", "1/3")
    # Parts of another number are parts of what is left.
    run_command("extract_units", model_folder, some_bad, many, *arguments, "--shard", "1/2")
    rest = run_command("extract_units", model_folder, some_bad, many, *arguments)
    assert rest.status == 0 and "there before" in rest.out
    assert tree(many) == tree(tmp_path / "one")


@pytest.mark.parametrize("held", ["shard-1-of-3", ""])
def test_shards_and_others_are_kept_apart(model_folder, some_bad, tmp_path, monkeypatch, held):
    out = tmp_path / "out"
    arguments = ("extract_units", model_folder, some_bad, out, "--batch-seconds", 2)
    run_command(*arguments, "--shard", "0/3")
    (journals,) = (out / ".partial").iterdir()
    holder = [sys.executable, "-c", HOLDER, journals / held if held else out]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline().strip() == b"held"
        if held:
            fails(run_command(*arguments), "Shard 1/3 is being extracted")
            fails(run_command(*arguments, "--shard", "1/3"), "is being extracted")
            done = run_command(*arguments, "--shard", "2/3")
            assert done.status == 0 and "other shards are at work" in done.out
        else:
            fails(run_command(*arguments), "Another extraction")
        process.communicate(b"\n")


def test_a_shard_without_anything_to_do_leaves_the_others_their_journals(model_folder, some_bad, tmp_path):
    """Also where one has computed nothing yet, and on disks that do not tell whether it is at work."""
    arguments = ("extract_features", model_folder, some_bad, tmp_path / "out", "--layers", 4, "--batch-seconds", 2)
    run_command(*arguments, "--shard", "0/20")
    (folder,) = (tmp_path / "out" / ".partial").iterdir()
    for journal in folder.glob("*.jsonl"):
        journal.write_text("")
    before = sorted(folder.iterdir())
    assert "left to other shards" in run_command(*arguments, "--shard", "19/20").out
    assert sorted(folder.iterdir()) == before


def test_a_shard_waits_for_its_turn(model_folder, some_bad, tmp_path, monkeypatch):
    """However long others take to see what is there: with many recordings, and many shards, minutes."""
    module = spidr_hf.units.extraction_run
    monkeypatch.setattr(module, "RunLock", lambda folder, patience: RunLock(folder, min(patience, 0.2)))
    holder = [sys.executable, "-c", HOLDER, tmp_path / "out"]
    with subprocess.Popen(holder, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline().strip() == b"held"
        threading.Timer(1, process.communicate, [b"\n"]).start()
        done = run_command("extract_units", model_folder, some_bad, tmp_path / "out", "--shard", "1/1")
    assert done.status == 0 and (tmp_path / "out" / "4" / "units.jsonl").exists()


HOLDER = """
import fcntl, os, sys
os.makedirs(sys.argv[1], exist_ok=True)
file = open(os.path.join(sys.argv[1], ".lock"), "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("1/8", {}, (1, 8)),
        ("8/8", {}, (0, 8)),
        ("0/8", {}, (0, 8)),
        ("slurm", {"ID": "5", "MIN": "1", "COUNT": "8", "STEP": "1"}, (4, 8)),
        ("slurm", {"ID": "6", "MIN": "0", "COUNT": "4", "STEP": "2"}, (3, 4)),
        ("slurm", {"ID": "6", "MIN": "0", "MAX": "7", "COUNT": "4", "STEP": "2"}, (3, 4)),
        ("slurm", {"ID": "15", "MIN": "0", "MAX": "15", "COUNT": "16", "STEP": "1"}, (15, 16)),
        ("slurm", {"ID": "7", "MIN": "3", "MAX": "7", "COUNT": "2", "STEP": "4"}, (1, 2)),
        ("slurm", {"ID": "0", "COUNT": "1", "MIN": "0"}, (0, 1)),
    ],
)
def test_parts(monkeypatch, text, environment, expected):
    task_of_array(monkeypatch, environment)
    assert parse_shard(text) == Shard(*expected)


def task_of_array(monkeypatch, environment: dict[str, str]) -> None:
    for name in ("ID", "MIN", "MAX", "STEP", "COUNT"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
        if name in environment:
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", environment[name])


@pytest.mark.parametrize("task", [3, 7, 9])
@pytest.mark.parametrize("step", [1, 4])
def test_an_array_with_gaps_is_refused(monkeypatch, task, step):
    """Two of its tasks would take the same part, and nobody another."""
    variables = {"ID": task, "MIN": 3, "MAX": 9, "COUNT": 3, "STEP": step}
    task_of_array(monkeypatch, {name: str(value) for name, value in variables.items()})
    with pytest.raises(argparse.ArgumentTypeError, match="sbatch --array=1-3"):
        parse_shard("slurm")


@pytest.mark.parametrize("text", ["9/8", "-1/8", "1/0", "a/b", "3", "slurm", "1/2/3"])
def test_what_is_no_part(monkeypatch, model_folder, data, tmp_path, text):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no part|needs a job array"):
        parse_shard(text)


@pytest.mark.parametrize("options", [(), ("--deduplicate",), ("--key", "audio")])
def test_units_as_parquet(model_folder, data, expected, tmp_path, options):
    arguments = ("extract_units", model_folder, data, tmp_path / "out", "--layers", 4, "--format", "parquet", *options)
    assert run_command(*arguments).status == 0
    path = tmp_path / "out" / "4" / "units.parquet"
    assert list(unit_files(tmp_path / "out").values()) == [path]
    assert {name: units.tolist() for name, units in read_units(path).items()} == {
        name: layers[4] for name, layers in expected.items()
    }
    # It holds what the JSON lines hold, and is found again, also when some of it is missing.
    assert run_command(*arguments[:3], tmp_path / "lines", "--layers", 4, *options).status == 0
    assert pq.read_table(path).to_pylist() == rows(tmp_path / "lines" / "4" / "units.jsonl")
    again = run_command(*arguments)
    assert "0 utterances computed" in again.out and "9 there before" in again.out
    part = pq.read_table(path).slice(0, 5)
    pq.write_table(part, path, row_group_size=2)
    assert "4 utterances computed" in run_command(*arguments).out
    assert pq.read_table(path).to_pylist() == rows(tmp_path / "lines" / "4" / "units.jsonl")
    fails(run_command(*arguments[:6], *options), "units.parquet is there: give another OUT_DIR")
    path.write_bytes(path.read_bytes()[:100])
    fails(run_command(*arguments), "cannot be read as units")
