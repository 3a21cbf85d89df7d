"""`examples/pretrain.py` on every kind of audio: damaged folders, mixtures, streams, other rates."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
from accelerate.state import AcceleratorState, PartialState
from runs import assert_same_run, finish, launch, load_script, results, rows, write_audio, write_config

from spidr_hf.pretraining.config import load_config
from spidr_hf.training.stopping import STOPPING


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    return write_audio(tmp_path_factory.mktemp("data") / "audio")


@pytest.fixture(scope="module")
def stored(audio, tmp_path_factory) -> Path:
    """The same audio as Parquet files, for streaming."""
    folder = tmp_path_factory.mktemp("stream") / "parquet"
    folder.mkdir()
    paths = sorted(audio.iterdir())
    for shard in range(4):
        part = [{"bytes": path.read_bytes(), "path": path.name} for path in paths[shard::4]]
        table = datasets.Dataset.from_dict({"audio": part}).cast_column("audio", datasets.Audio())
        table.to_parquet(folder / f"train-{shard}.parquet")
    return folder


@pytest.fixture
def pretrain(audio, tmp_path) -> Iterator:
    """`pretrain(name, *overrides)` runs the command's `pretrain` in this process and returns the run's folder."""
    module = load_script()
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    config = write_config(tmp_path / "tiny.toml", audio)

    def run(name: str, *overrides: str) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        module.pretrain(load_config(config, overrides), tmp_path / name)
        return tmp_path / name

    yield run
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def streamed(stored: Path, *options: str) -> list[str]:
    return ["--data.manifest", str(stored), "--data.streaming=true", "--data.shuffle_buffer=3", *options]


@pytest.mark.parametrize(
    "options",
    [[], ["--data.num_workers=2", "--optimizer.gradient_accumulation_steps=2"]],
    ids=["alone", "workers and accumulation"],
)
def test_a_streamed_run_resumes_where_it_stopped(pretrain, stored, options):
    whole = pretrain("whole", *streamed(stored, *options))
    for steps in ("5", "8", "12"):
        cut = pretrain("cut", *streamed(stored, *options, "--optimizer.max_steps", steps))
    assert_same_run(cut, whole)
    assert rows(whole)[-1]["epoch"] > (1 if options else 0)


@pytest.mark.slow
def test_a_streamed_run_of_two_processes_resumes_where_it_stopped(audio, stored, tmp_path):
    config = write_config(tmp_path / "tiny.toml", audio)
    options = streamed(stored, "--data.num_workers=1")
    finish(launch(config, tmp_path / "whole", *options, processes=2))
    finish(launch(config, tmp_path / "cut", *options, "--optimizer.max_steps=5", processes=2))
    finish(launch(config, tmp_path / "cut", *options, processes=2))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    refused = finish(launch(config, tmp_path / "cut", *options, "--optimizer.max_steps=15"), code=1)
    assert "streams its audio with 2 processes of 1 workers and cannot resume with 1 of 1" in refused


def test_from_a_stream_to_its_download_and_back(pretrain, stored, capsys):
    """A run may change how it reads its audio; it says so."""
    pretrain("run", *streamed(stored, "--optimizer.max_steps=4"))
    pretrain("run", "--optimizer.max_steps=6")
    assert "The audio is not what it was" in capsys.readouterr().err
    folder = pretrain("run", *streamed(stored, "--optimizer.max_steps=8"))
    assert [row["step"] for row in rows(folder)] == list(range(1, 9))


def test_a_mixed_run_resumes_where_it_stopped(pretrain, audio, tmp_path, capsys):
    second = tmp_path / "second"
    second.mkdir()
    for path in sorted(audio.iterdir())[:6]:
        (second / path.name).write_bytes(path.read_bytes())
    mixture = ["--data.manifest", json.dumps([str(audio), str(second)]), "--data.weights", "[0.5, 2]"]
    whole = pretrain("whole", *mixture)
    assert f"{second}: 6 utterances, 2.1 s, weight 2, so " in capsys.readouterr().err
    pretrain("cut", *mixture, "--optimizer.max_steps=7")
    assert_same_run(pretrain("cut", *mixture), whole)
    other = pretrain("other", *mixture[:-1], "[1, 2]")
    assert results(other) != results(whole)


def bad_folder(folder: Path, audio: Path) -> None:
    """Eight good files, and one of each kind that is not."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for path in sorted(audio.iterdir())[:8]:
        (folder / path.name).write_bytes(path.read_bytes())
    content = (folder / "00.flac").read_bytes()
    (folder / "cut.flac").write_bytes(content[: len(content) // 2])
    (folder / "header.flac").write_bytes(content[:30])
    (folder / "empty.flac").write_bytes(b"")
    (folder / "text.wav").write_text("this is not audio\n" * 200)
    soundfile.write(folder / "nothing.wav", np.zeros(0), 16_000)
    soundfile.write(folder / "short.wav", 0.1 * rng.standard_normal(1_900), 16_000)
    soundfile.write(folder / "stereo.wav", 0.1 * rng.standard_normal((6_000, 2)), 16_000)
    soundfile.write(folder / "slow.wav", 0.1 * rng.standard_normal(4_000), 8_000)
    nan = 0.1 * rng.standard_normal(6_000).astype(np.float32)
    nan[100] = np.nan
    soundfile.write(folder / "nan.wav", nan, 16_000, subtype="FLOAT")


REASONS = {
    "cut": ("cut off", "cannot be read as audio"),
    "header": ("cannot be read as audio",),
    "empty": ("cannot be read as audio",),
    "text": ("cannot be read as audio",),
    "nothing": ("holds no samples",),
    "short": ("has 1900 samples at 16 kHz, at least 2000 are needed",),
    "stereo": ("has 2 channels instead of 1. Convert it, or ask for resampling (--resample; --data.resample true",),
    "slow": ("has 8000 Hz instead of 16000. Convert it, or ask for resampling (--resample; --data.resample true",),
    "nan": ("non-finite samples",),
}


@pytest.mark.parametrize("resample", [False, True])
def test_a_folder_of_damaged_files_trains_on_the_good_ones(pretrain, audio, tmp_path, resample):
    bad_folder(tmp_path / "bad", audio)
    options = ["--data.manifest", str(tmp_path / "bad"), "--data.max_skipped_share=0.6"]
    folder = pretrain("run", *options, f"--data.resample={str(resample).lower()}")
    assert [row["step"] for row in rows(folder)] == list(range(1, 13))
    assert all(np.isfinite(row["loss"]) for row in rows(folder))
    listed = {
        row["file"]: row["reason"] for row in map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    }
    expected = {name: parts for name, parts in REASONS.items() if not (resample and name in ("stereo", "slow"))}
    assert listed.keys() == expected.keys()
    for name, parts in expected.items():
        assert name in listed[name] and any(part in listed[name] for part in parts), listed[name]
