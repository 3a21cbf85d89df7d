"""`pretrain.py --dry-run`: it finds what would fail, all of it, says what a run takes, and leaves nothing behind."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState, PartialState
from runs import SCRIPT, finish, launch, load_script, pretrain_here, rows, write_audio, write_config

from spidr_hf import SpidrConfig
from spidr_hf.data.batching import BucketSampler
from spidr_hf.data.sections import DataSection
from spidr_hf.pretraining.config import load_config
from spidr_hf.pretraining.dry_run import published_times
from spidr_hf.pretraining.loaders import heard_note
from spidr_hf.pretraining.memory import checkpoint_bytes
from spidr_hf.system.errors import ConfigError
from spidr_hf.system.processes import RunLock
from spidr_hf.training.planning import Plan


@pytest.fixture(scope="module")
def audio(tmp_path_factory) -> Path:
    return write_audio(tmp_path_factory.mktemp("planning") / "audio")


@pytest.fixture
def config(audio, tmp_path) -> Path:
    return write_config(tmp_path / "tiny.toml", audio)


@pytest.fixture(scope="module")
def script():
    return load_script()


@pytest.fixture
def plan(script, config, tmp_path, capsys):
    """`plan(*overrides)`: what a dry run finds and prints; it must write nothing."""

    def run(*overrides: str, folder: str = "run") -> tuple[Plan | None, str, str]:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        before = snapshot(tmp_path)
        found, error = None, ""
        try:
            found = script.dry_run(load_config(config, overrides), tmp_path / folder)
        except ConfigError as problem:
            error = str(problem)
        assert snapshot(tmp_path) == before
        return found, capsys.readouterr().out, error

    return run


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_the_plan(plan, config):
    found, printed, error = plan("--optimizer.gradient_accumulation_steps", "2")
    assert not error and not found.problems
    assert "20 utterances" in printed and "16 of 16 files tried can be read" in printed
    updates = int(re.search(r"(\d+) updates per epoch", printed)[1])
    assert f"12 updates = {12 / updates:.1f} epochs" in printed
    assert re.search(r"1 process x 2 batches of [\d.]+ s .* masked frames, [\d.]+ for each codeword", printed)
    assert "4 checkpoints of" in printed and "all kept" in printed
    assert re.search(r"measured here: [\d.]+ s for [\d.]+ s of audio", printed)
    assert re.search(r"memory +[\d.]+ MB on each CPU", printed) and "on a GPU" in printed
    assert printed.rstrip().endswith("Without --dry-run the same command begins (or continues) the run.")


def test_what_it_reckons_with_is_what_the_run_does(plan, script, config, tmp_path):
    """Masked frames per update, size of a checkpoint; and where the run resumes."""
    found, printed, _ = plan("--run.save_interval", "5")
    script.pretrain(load_config(config, ["--run.save_interval", "5"]), tmp_path / "done")
    folder = tmp_path / "done" / "checkpoints" / "step_5"
    size = sum(path.stat().st_size for path in folder.iterdir())
    reckoned = checkpoint_bytes(load_config(config).model)
    assert reckoned == pytest.approx(size, rel=0.25)  # headers and names weigh more in so small a model
    assert len(rows(tmp_path / "done")) == 12
    assert "3 checkpoints of" in printed
    shutil.rmtree(tmp_path / "done" / "final")
    found, printed, error = plan("--optimizer.max_steps", "20", folder="done")
    assert not error and "Continuing from" in printed and "8 updates on" in printed
    assert any("Changed since this run began: optimizer.max_steps 12 -> 20" in note for note in found.notes)
    _, _, error = plan("--model.codebook_size", "13", folder="done")
    assert re.search(r"1 problem \(see above\); the first: .* holds another run: model.codebook_size", error)


def test_checkpoint_of_spidr_base():
    assert checkpoint_bytes(SpidrConfig()) == pytest.approx(1.5e9, rel=0.02)


def test_it_tells_every_problem(plan, monkeypatch, tmp_path):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    _, printed, error = plan(
        *("--data.manifest", "/nowhere.csv", "--run.init_ckpt", "/nowhere.pt", "--run.tracker", "wandb"),
        *("--validation.dev.manifest", "/neither", "--run.keep_latest", "1"),
    )
    assert error.startswith("5 problems (see above); the first: /nowhere.pt does not exist")
    for text in (
        "PROBLEM     /nowhere.csv: no such file or folder",
        "PROBLEM     /neither: no such file or folder",
        "`run.tracker` is wandb, which is not installed: pip install wandb",
        "has 0.0 MB free, the run's checkpoints need",
    ):
        assert text in printed
    assert "measured here" not in printed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--data.min_sample_size", "90000", "--data.max_sample_size", "90000", "--data.max_batch_length", "90000"],
         "No utterance has the 90000 samples"),
        (["--run.validate_interval", "3"], r"`run\.validate_interval` is 3, and there is no section"),
    ],
)  # fmt: skip
def test_bad_input(plan, overrides, message):
    assert re.search(message, plan(*overrides)[2])


def test_files_that_cannot_be_read(plan, audio, tmp_path):
    shutil.copytree(audio, tmp_path / "mixed")
    manifest = tmp_path / "mixed.csv"
    lines = ["fileid,path,num_samples"]
    for index, path in enumerate(sorted((tmp_path / "mixed").iterdir())):
        lines.append(f"{path.stem},{path},{soundfile.info(path).frames}")
        if index % 4 == 0:
            path.write_bytes(b"fLaC")
    manifest.write_text("\n".join(lines) + "\n")
    found, printed, error = plan("--data.manifest", str(manifest))
    assert not error and any("files tried cannot be used. The first: " in note for note in found.notes)
    assert re.search(r"of 16 files tried can be read", printed)
    _, _, error = plan("--data.manifest", str(manifest), "--data.max_skipped_share", "0.1")
    assert "files tried cannot be used" in error


def test_what_an_epoch_hears_of_long_recordings(plan, script, config, tmp_path, capsys):
    """Said with advice, before and by the run itself; of utterances that are heard whole there is nothing to say."""
    assert not any("an epoch hears" in note for note in plan("--data.max_sample_size", "10000")[0].notes)
    (note,) = (note for note in plan("--data.max_sample_size", "6000")[0].notes if "an epoch hears" in note)
    share = float(re.search(r"an epoch hears ([\d.]+)% of the audio: 15 recordings are longer", note)[1])
    assert 60 < share < 90 and "(0.375 s)" in note and "raise `data.max_sample_size`" in note
    options = ["--data.max_sample_size", "6000", "--optimizer.max_steps", "1"]
    pretrain_here(config, tmp_path / "heard", *options)
    assert note in capsys.readouterr().err


def test_what_an_epoch_hears_beside_a_short_utterance():
    """Without padding a batch is as long as its shortest."""
    lengths = np.array([16_000] * 9 + [1600])
    for padding in (False, True):
        data = DataSection(max_batch_length=200_000, num_buckets=1, enable_padding=padding)
        sampler = BucketSampler(lengths, max_batch_length=200_000, num_buckets=1, padding=padding)
        note = heard_note(sampler, lengths, data)
        assert note is None if padding else "hears 11.0% of the audio" in note and "`data.enable_padding`" in note


def test_what_cannot_be_pushed(plan, monkeypatch):
    """Nothing is made on the Hub by looking."""

    class Stub:
        def whoami(self):
            raise OSError("Invalid user token.\nAnd more")

    monkeypatch.setattr("spidr_hf.pretraining.hub_push.HfApi", Stub)
    problem = "`run.push_to_hub` me/spidr: nothing can be pushed there (Invalid user token.)."
    _, printed, error = plan("--run.push_to_hub", "me/spidr")
    assert f"PROBLEM     {problem}" in printed and problem in error
    monkeypatch.setattr(Stub, "whoami", lambda self: {"name": "me"})
    assert "https://huggingface.co/me/spidr" in plan("--run.push_to_hub", "me/spidr")[1]


def test_validation_sets(plan, audio, config):
    config.write_text(config.read_text() + f'\n[validation.dev]\nmanifest = "{audio}"\n')
    assert "dev: 20 utterances, phones not known" in plan()[1] and "examples/validate.py" in plan()[1]
    assert "by the training processes, every 6 updates" in plan("--run.validate_interval", "6")[1]


def test_a_run_that_is_going_on(plan, tmp_path):
    """The lock of another process; here one that a child holds."""
    import subprocess
    import sys

    (tmp_path / "run").mkdir()
    code = (
        "import sys, time; from spidr_hf.system.processes import RunLock\n"
        "lock = RunLock(sys.argv[1]); print(1, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "run"], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert "is in use by another run at present" in plan()[2]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert not plan()[2]
    RunLock(tmp_path / "run").release()


def test_published_times(plan):
    """Of spidr-base alone; at the recipe's batch they are the paper's own."""
    assert "SpidR's own code" not in plan("--optimizer.dtype", "bfloat16")[1]
    config = load_config(SCRIPT.parent / "configs" / "spidr-base-librispeech.toml")
    config.optimizer.gradient_accumulation_steps, config.data.max_batch_length = 1, 3_800_000
    config.optimizer.max_steps = 400_000
    (line,) = published_times(config)
    assert line.text.endswith("on as many GPUs: 23 h on A100, 15 h on H100")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_under_the_launcher(config, tmp_path, processes):
    """One plan, however many processes; they share the steps that are timed."""
    before = snapshot(tmp_path)
    printed = finish(launch(config, tmp_path / "run", "--dry-run", processes=processes))
    assert printed.count("Nothing was written.") == 1 and "measured here" in printed
    assert f"{processes} process{'es' * (processes > 1)} x 1 batch" in printed
    assert not (tmp_path / "run").exists() and snapshot(tmp_path) == before
    failed = launch(config, tmp_path / "run", "--dry-run", "--data.manifest", "/nowhere.csv", processes=processes)
    output = failed.communicate(timeout=300)[0]
    assert failed.returncode != 0 and output.count("error: 1 problem (see above); the first: /nowhere.csv") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(plan):
    assert "allocated at the peak of these steps" in plan()[1]
