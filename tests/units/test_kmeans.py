"""K-means: seeded, stored with its provenance, applied by `extract_units.py --kmeans`."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from commands import fails, run_command
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor
from spidr_hf.system.errors import NonFiniteError
from spidr_hf.units.kmeans import KMeans, feature_files, load_features, load_kmeans, train_kmeans

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """Features around four far points, in five files."""
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(4, 6))
    for i in range(5):
        points = centres[rng.integers(0, 4, 200)] + 0.1 * rng.normal(size=(200, 6))
        torch.save(torch.from_numpy(points).float(), folder / f"{i}.pt")
    return folder, centres


def test_it_finds_what_is_there_and_the_same_each_time(blobs):
    folder, centres = blobs
    files = sorted(folder.glob("*.pt"))
    first, again = (train_kmeans(files, 4, seed=3) for _ in range(2))
    assert torch.equal(first.centroids, again.centroids)
    distances = torch.cdist(first.centroids, torch.from_numpy(centres).float())
    assert distances.min(0).values.max() < 0.1
    features = load_features(files[0])
    assert torch.equal(first.predict(features), torch.cdist(features, first.centroids).argmin(-1))
    assert first.provenance.items() >= {"clusters": 4, "seed": 3, "frames": 1000, "files": 5}.items()
    assert train_kmeans(files, 4, max_frames=450).provenance["frames"] == 450


def test_round_trip(tmp_path):
    kmeans = KMeans(torch.randn(3, 5), {"layer": 6, "before_residual": True})
    kmeans.save(tmp_path / "a" / "k.safetensors")
    back = load_kmeans(tmp_path / "a" / "k.safetensors")
    assert torch.equal(back.centroids, kmeans.centroids) and back.provenance == kmeans.provenance
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["k.safetensors"]
    assert back.check_layer(None) == back.check_layer([6]) == 6
    for layers, after, message in (([5], False, "layer 6, not 5"), ([5, 6], False, "one layer"), ([6], True, "leave")):
        with pytest.raises(ValueError, match=message):
            back.check_layer(layers, after_residual=after)
    with pytest.raises(ValueError, match=r"features have 4 dimensions, the centroids 5"):
        back.predict(torch.randn(2, 4))


def test_from_audio_to_units(tmp_path, not_installed):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    SpidrFeatureExtractor().save_pretrained(tmp_path / "model")
    (tmp_path / "audio").mkdir()
    for i in range(3):
        soundfile.write(tmp_path / "audio" / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, 30_000), 16_000)
    features, kmeans, out = tmp_path / "features", tmp_path / "k.safetensors", tmp_path / "units"
    run_command("extract_features", tmp_path / "model", tmp_path / "audio", features, "--layers", 2)
    done = run_command("train_kmeans", features / "2", kmeans, "--clusters", 8)
    assert done.status == 0, done.err
    assert "8 clusters" in done.out
    provenance = load_kmeans(kmeans).provenance
    assert provenance["layer"] == 2 and len(provenance["sha256"]) == 64
    done = run_command("extract_units", tmp_path / "model", tmp_path / "audio", out, "--kmeans", kmeans)
    assert done.status == 0, done.err
    for row in map(json.loads, (out / "2" / "units.jsonl").read_text().splitlines()):
        expected = load_kmeans(kmeans).predict(load_features(features / "2" / f"{row['file']}.pt"))
        assert np.mean(np.array(row["units"]) == expected.numpy()) > 0.99
    assert "was trained on features of" not in done.err
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    SpidrFeatureExtractor().save_pretrained(tmp_path / "other")
    other = run_command("extract_units", tmp_path / "other", tmp_path / "audio", tmp_path / "o", "--kmeans", kmeans)
    assert other.status == 0 and f"was trained on features of {tmp_path / 'model'}" in other.err
    sidecar = json.loads((out / "2" / "units.provenance.json").read_text())
    assert sidecar["kind"] == "k-means units" and sidecar["num_units"] == 8 and len(sidecar["kmeans_sha256"]) == 64
    fails(
        run_command("extract_units", tmp_path / "model", tmp_path / "audio", out, "--kmeans", kmeans, "--layers", 3),
        "layer 2, not 3",
    )


def test_bad_input(blobs, tmp_path):
    folder, _ = blobs
    out = tmp_path / "k.safetensors"
    (tmp_path / "empty").mkdir()
    fails(run_command("train_kmeans", tmp_path / "empty", out, "--clusters", 4), "no feature files")
    fails(run_command("train_kmeans", tmp_path / "nowhere", out, "--clusters", 4), "no such folder")
    fails(run_command("train_kmeans", folder, out, "--clusters", 5000), "5000 clusters", "1000")
    fails(run_command("train_kmeans", folder, out, "--clusters", 1), "at least 2")
    fails(run_command("train_kmeans", folder, tmp_path / "k.bin", "--clusters", 4), ".safetensors")
    (tmp_path / "file").write_text("")
    fails(run_command("train_kmeans", folder, tmp_path / "file" / "k.safetensors", "--clusters", 4), "file")
    (tmp_path / "bad").mkdir()
    for content, message in (
        (torch.randn(3), "frames x dimensions"),
        (torch.full((3, 4), float("nan")), "non-finite"),
        ({"x": 1}, "does not hold features"),
    ):
        torch.save(content, tmp_path / "bad" / "a.pt")
        fails(run_command("train_kmeans", tmp_path / "bad", out, "--clusters", 2), "a.pt", message)
    (tmp_path / "bad" / "a.pt").write_bytes(b"nothing")
    fails(run_command("train_kmeans", tmp_path / "bad", out, "--clusters", 2), "a.pt", "cannot be read")
    torch.save(torch.randn(300, 4), tmp_path / "bad" / "a.pt")
    torch.save(torch.randn(300, 5), tmp_path / "bad" / "b.pt")
    fails(run_command("train_kmeans", tmp_path / "bad", out, "--clusters", 2), "dimensions", "one layer's folder")
    assert not out.exists()
    with pytest.raises(ValueError, match="no such k-means file"):
        load_kmeans(out)
    out.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as a safetensors"):
        load_kmeans(out)


@pytest.mark.parametrize("below", ["", "deu/test"])
def test_the_folder_of_several_layers_is_refused(tmp_path, below):
    """Else their features would be mixed; folders of numbers alone may be anything."""
    for layer in ("3", "11"):
        folder = tmp_path / layer / below
        folder.mkdir(parents=True)
        np.save(folder / "a.npy", np.zeros((2, 4), dtype=np.float32))
    assert len(feature_files(tmp_path)) == 2
    for layer in ("3", "11"):
        (tmp_path / layer / below / "features.provenance.json").write_text("{}")
    with pytest.raises(ValueError, match=r"layers 3, 11: give one of them, .*/11 for example"):
        feature_files(tmp_path)
    assert len(feature_files(tmp_path / "3")) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_centroids_and_features_that_are_not_finite(tmp_path, value):
    centroids = torch.zeros(3, 4)
    centroids[1, 2] = value
    KMeans(centroids, {"layer": 1}).save(tmp_path / "k.safetensors")
    with pytest.raises(NonFiniteError, match="train the k-means again"):
        load_kmeans(tmp_path / "k.safetensors")
    np.save(tmp_path / "a.npy", centroids.numpy())
    with pytest.raises(NonFiniteError, match="bfloat16"):
        load_features(tmp_path / "a.npy")
    with pytest.raises(NonFiniteError):
        KMeans(torch.zeros(3, 4)).predict(centroids)


def test_finished_is_finished_and_others_are_refused_by_name(blobs, tmp_path):
    folder, _ = blobs
    out = tmp_path / "k.safetensors"
    command = ("train_kmeans", folder, out, "--clusters", 4)
    assert run_command(*command).status == 0
    before = (out.read_bytes(), out.stat().st_mtime_ns)
    again = run_command(*command)
    assert again.status == 0 and "is there already" in again.out
    for option in ("--clusters", "--seed", "--max-frames", "--max-iterations"):
        name = option.removeprefix("--").replace("-", "_")
        fails(run_command(*command, option, 5), "holds another run", f"{name} is", "and 5 here", "--overwrite")
    shutil.copytree(folder, tmp_path / "more")
    torch.save(torch.randn(30, 4), tmp_path / "more" / "new.pt")
    fails(run_command("train_kmeans", tmp_path / "more", *command[2:]), "features_sha256 is")
    assert before == (out.read_bytes(), out.stat().st_mtime_ns) and sorted(os.listdir(tmp_path)) == [
        "k.safetensors",
        "more",
    ]
    assert run_command(*command, "--seed", 5, "--overwrite").status == 0
    assert load_kmeans(out).provenance["seed"] == 5
    out.write_bytes(b"nothing")
    fails(run_command(*command), "cannot be read as a safetensors")
    assert run_command(*command, "--overwrite").status == 0


def test_features_made_otherwise_are_others(blobs, tmp_path):
    """Of the same names and sizes; and what is not complete yet is said."""
    folder = shutil.copytree(blobs[0], tmp_path / "features")
    sidecar = {"model": "m", "layer": 6, "before_residual": True, "dtype": "float32", "resample": None}
    command = ("train_kmeans", folder, tmp_path / "k.safetensors", "--clusters", 4)

    def train(**changes):
        content = {**sidecar, "complete": True, **changes}
        (folder / "features.provenance.json").write_text(json.dumps(content))
        return run_command(*command)

    assert train(complete=False).err.startswith(f"The extraction into {folder} has not ended")
    again = train()
    assert "is there already" in again.out and not again.err
    fails(train(dtype="bfloat16"), "dtype is float32 there and bfloat16 here")
    fails(train(resample=True), "resample is None there and True here")


def test_two_starts_at_once_are_kept_apart(blobs, tmp_path):
    """Of one file; those of other files, other layers' say, go side by side."""
    folder, _ = blobs
    code = "import sys; from spidr_hf.examples.train_kmeans import one_at_a_time; from pathlib import Path\n"
    code += "with one_at_a_time(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "k.safetensors")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        fails(run_command("train_kmeans", folder, tmp_path / "k.safetensors", "--clusters", 4), "in use by another run")
        assert run_command("train_kmeans", folder, tmp_path / "l.safetensors", "--clusters", 4).status == 0
        other.communicate()
    assert run_command("train_kmeans", folder, tmp_path / "k.safetensors", "--clusters", 4).status == 0
