"""`examples/configs/`: every file is valid, and its header says what it does."""

import re
import tomllib
from pathlib import Path

import pytest
from tiny import tiny_model

from spidr_hf.conversion.sources import published
from spidr_hf.data.batches import min_samples
from spidr_hf.pretraining.config import PretrainingConfig, load_config
from spidr_hf.pretraining.memory import MASKED_SHARE, parameter_counts, training_memory
from spidr_hf.pretraining.setup import recipe_notes
from spidr_hf.training.schedules import learning_rate

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))
# What runs on a CPU: its memory is counted for one.
ON_CPU = {"demo", "made-speech"}
BASE = "spidr-base-librispeech"


def number(text: str) -> int:
    return int(text.replace(" ", ""))


def header(path: Path) -> str:
    """The comment that a file begins with, in one line."""
    lines = path.read_text(encoding="utf-8").partition("\n[run]")[0].splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines)


def load(name: str) -> PretrainingConfig:
    return load_config(FOLDER / f"{name}.toml")


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_these_are_there():
    there = {path.stem for path in CONFIGS}
    assert there >= {BASE, f"{BASE}-16xa100", f"{BASE}-8gpus", f"{BASE}-1gpu", "dinosr-base-librispeech"}
    assert there >= {"small-consumer-gpu", "adapt-to-language", "adapt-spidr-adapt", "made-speech", "demo"}


def test_nothing_in_it_is_without_effect(path):
    assert load(path.stem).notes == []


def test_the_command_in_the_header_names_the_file(path):
    assert f"examples/configs/{path.name}" in header(path) or path.stem == "demo"


def test_update(path):
    """Processes x batches, samples, seconds, minutes."""
    found = re.search(
        r"Update: +(\d+) process(?:es)? x (\d+) batch(?:es)? of ([\d ]+) samples \(([\d.]+) s\) = ([\d.]+) min",
        header(path),
    )
    config = load(path.stem)
    processes, batches, samples = int(found[1]), int(found[2]), number(found[3])
    assert batches == config.optimizer.gradient_accumulation_steps and samples == config.data.max_batch_length
    assert float(found[4]) == round(samples / 16_000, 1)
    assert processes * batches * samples / 16_000 / 60 == pytest.approx(float(found[5]), rel=0.02)
    assert not list(recipe_notes(config, processes))


def test_schedule(path):
    config = load(path.stem).optimizer
    text = header(path)
    if config.scheduler == "constant":
        found = re.search(r"Schedule: +warm-up ([\d ]+), then constant = ([\d ]+) updates", text)
        assert [number(count) for count in found.groups()] == [config.warmup_steps, config.max_steps]
        return
    found = re.search(r"Schedule: +warm-up ([\d ]+) \+ hold ([\d ]+) \+ decay ([\d ]+) = ([\d ]+) updates", text)
    warmup, hold, decay, total = map(number, found.groups())
    assert (warmup, hold, decay) == (config.warmup_steps, config.hold_steps, config.decay_steps)
    assert warmup + hold + decay == total
    made = re.search(r"updates, of which ([\d ]+) are made", text)
    assert config.max_steps == (number(made[1]) if made else total)


def test_memory(path):
    config = load(path.stem)
    text = header(path)
    options = {"batch_samples": config.data.max_batch_length, "dtype": config.optimizer.dtype}
    options["frozen"] = config.model.freeze_step == 0
    found = [float(value) for value in re.findall(r"([\d.]+) GiB", text)]
    if path.stem in ON_CPU:
        options |= {"device": "cpu", "utterance_samples": 48_000}
        assert found == [round(training_memory(config.model, **options).total / 2**30, 1)]
        return
    plain, kernels = (
        training_memory(config.model, kernels=kernels, **options).total / 2**30 for kernels in (False, True)
    )
    assert found == pytest.approx([plain, kernels], rel=0.05)


@pytest.mark.parametrize("name", [f"{BASE}-16xa100", f"{BASE}-8gpus", f"{BASE}-1gpu"])
def test_the_published_run_on_other_machines_makes_the_same_updates(name):
    """They differ in nothing but how many batches of a process make an update."""
    ours, published = ({**tomllib.loads((FOLDER / f"{n}.toml").read_text())} for n in (name, BASE))
    ours["optimizer"].pop("gradient_accumulation_steps", None)
    assert ours == published
    audio = {n: float(re.search(r"= ([\d.]+) min of audio", header(FOLDER / f"{n}.toml"))[1]) for n in (name, BASE)}
    assert audio[name] == audio[BASE] == 63


def test_arithmetic_of_the_headers():
    """Times that are the published ones times a number of GPUs, and what else is counted there."""
    text = {path.stem: header(path) for path in CONFIGS}
    h100, a100 = 15, 23  # hours on 16 GPUs, published
    assert f"is {2 * h100} h on H100 and {2 * a100} h on A100" in text[f"{BASE}-8gpus"]
    assert f"is {16 * h100} h (10 days) on an H100 and {16 * a100} h (15 days) on an A100" in text[f"{BASE}-1gpu"]
    adapt, small = load("adapt-to-language"), load("small-consumer-gpu")
    for hours, milliseconds, minutes in ((h100, 135, 45), (a100, 207, 69)):
        assert hours * 3600 / 400_000 * 1000 == pytest.approx(milliseconds, abs=0.5)
        assert adapt.optimizer.max_steps * milliseconds / 60_000 == pytest.approx(minutes, abs=0.5)
    assert "135 ms on an H100, 207 ms on an A100" in text["adapt-to-language"]
    assert "it is 45 min and 69 min" in text["adapt-to-language"]
    assert parameter_counts(small.model)["trained"] == pytest.approx(25.5e6, rel=2e-3)
    assert parameter_counts(load(BASE).model)["trained"] == pytest.approx(94.7e6, rel=2e-3)
    audio = 4 * small.data.max_batch_length / 16_000
    assert small.optimizer.max_steps * audio / 3600 == pytest.approx(13_200, rel=2e-3)
    assert small.optimizer.max_steps * audio / 1000 / 3600 == pytest.approx(13, abs=0.5)
    for config, name, frames, each in (
        (small, "small-consumer-gpu", "13 000", 51),
        (adapt, "adapt-to-language", "6 500", 26),
        (load("adapt-spidr-adapt"), "adapt-spidr-adapt", "6 500", 26),
    ):
        batches = config.optimizer.gradient_accumulation_steps
        masked = batches * config.data.max_batch_length / 320 * MASKED_SHARE
        assert masked == pytest.approx(number(frames), rel=0.02) and masked / 256 == pytest.approx(each, abs=0.6)
        assert f"{frames} masked frames, {each} for each" in text[name]


def test_the_recipe_of_discophon():
    config = load("adapt-to-language")
    assert config.optimizer.lr == 5e-5 and config.optimizer.max_steps == 20_000
    assert config.run.init_ckpt == "spidr-vp20" and not config.run.active_forgetting
    data = config.data
    assert (data.min_sample_size, data.max_sample_size, data.max_batch_length) == (0, 320_000, 3_800_000)
    assert (data.num_buckets, data.bucket_method) == (5, "percentile")
    model = tiny_model(ema_start_decay=config.model.ema_start_decay, codebook_decay=config.model.codebook_decay)
    assert {model.teacher_decay(step) for step in (1, 10_000, 20_000)} == {1.0}
    assert config.model.codebook_decay < 1  # codebooks keep learning
    shortest = min_samples(config.model)
    assert f"too short for two frames ({shortest} samples)" in header(FOLDER / "adapt-to-language.toml")


def test_the_recipe_of_spidr_adapt():
    config = load("adapt-spidr-adapt")
    assert config.run.active_forgetting and config.run.init_ckpt in published()
    assert (config.model.ema_start_decay, config.model.freeze_step, config.model.codebook_decay) == (1, 0, 0.8)
    assert {learning_rate(config.optimizer, step) for step in (601, 4000, 8000)} == {5e-6}
    assert learning_rate(config.optimizer, 300) < 5e-6 and config.optimizer.max_steps == 8000
    errors = {name: card["results"]["text"] for name, card in published().items() if name.startswith("spidr-adapt")}
    best = min(errors, key=lambda name: float(re.search(r": ([\d.]+), as the authors", errors[name])[1]))
    assert config.run.init_ckpt == best and "on average: 3.76 %" in header(FOLDER / "adapt-spidr-adapt.toml")
    for milliseconds, minutes in ((135, 18), (207, 28)):
        assert config.optimizer.max_steps * milliseconds / 60_000 == pytest.approx(minutes, abs=0.5)
