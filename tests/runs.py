"""A tiny pretraining run: its configuration and audio, and what it leaves in its folder."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from accelerate.state import AcceleratorState, PartialState
from commands import check_counts
from safetensors.torch import load_file

from spidr_hf.pretraining.config import load_config
from spidr_hf.system.fields import dump_toml
from spidr_hf.training.stopping import STOPPING

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "pretrain.py"
TINY = {
    "run": {"model_type": "spidr", "log_interval": 1, "save_interval": 3, "compile": False, "tracker": "none"},
    "data": {
        "num_buckets": 3,
        "max_sample_size": 8_000,
        "max_batch_length": 16_000,
        "num_workers": 0,
    },
    "model": {
        "extractor_conv_layer_config": [
            [16, 10, 5],
            [16, 3, 2],
            [16, 3, 2],
            [16, 3, 2],
            [16, 3, 2],
            [16, 2, 2],
            [16, 2, 2],
        ],
        "encoder_embed_dim": 32,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": 3,
        "encoder_num_heads": 2,
        "encoder_ff_interm_features": 48,
        "encoder_dropout": 0.1,
        "encoder_attention_dropout": 0.1,
        "encoder_layer_drop": 0.1,
        "codebook_size": 12,
        "num_codebooks": 2,
        "codebook_decay": 0.7,
        "ema_timescale": 10,
        "freeze_step": 8,
    },
    "optimizer": {
        "lr": 2e-3,
        "dtype": "float32",
        "max_steps": 12,
        "warmup_steps": 3,
        "hold_steps": 4,
        "decay_steps": 5,
    },
    "masking": {"mask_length": 3},
}


def write_audio(folder: Path) -> Path:
    """Twenty short utterances: coloured noise with a melody, which is enough to train on."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(20):
        length = 5_000 + 250 * index
        pitch = np.repeat(rng.choice([200, 400, 800, 1600], size=length // 800 + 1), 800)[:length]
        wave = 0.3 * np.sin(2 * np.pi * np.cumsum(pitch) / 16_000) + 0.02 * rng.standard_normal(length)
        soundfile.write(folder / f"{index:02d}.flac", wave, 16_000)
    return folder


def write_config(path: Path, audio: Path) -> Path:
    """`TINY` as a file."""
    sections = {name: dict(fields) for name, fields in TINY.items()}
    sections["data"]["manifest"] = str(audio)
    path.write_text(dump_toml(sections))
    return path


@cache
def load_script():
    """The command as a module."""
    return importlib.import_module("spidr_hf.examples.pretrain")


def forget_processes() -> None:
    """What accelerate remembers of an earlier run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def pretrain_here(config: Path, folder: Path, *overrides: str, fresh: bool = False) -> Path:
    """Run the command in this process; returns the run's folder."""
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    forget_processes()
    try:
        load_script().pretrain(load_config(config, overrides), folder, fresh)
    finally:
        signal.alarm(0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        forget_processes()
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def results(folder: Path) -> list[dict]:
    """The rows without the one number that depends on the machine."""
    return [{name: value for name, value in row.items() if name != "audio_seconds_per_second"} for row in rows(folder)]


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def assert_same_run(ours: Path, expected: Path) -> None:
    """Losses and every tensor of the end, bit for bit."""
    assert results(ours) == results(expected)
    left, right = final(ours), final(expected)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def command(
    config: Path, folder: Path, *options: str, processes: int = 1, sharded: bool = False, script: Path = SCRIPT
) -> list[str]:
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    many = ["--use_fsdp", "--fsdp_version", "2"] if sharded else ["--multi_gpu"]
    many = [*many, "--num_processes", str(processes), "--main_process_port", "0"] if processes > 1 else []
    single = ["--num_processes", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
    return [*launch, *(many or single), str(script), "--config", str(config), "--output-dir", str(folder), *options]


def launch(*arguments, **options) -> subprocess.Popen:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command(*arguments, **options),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=900)[0]
    assert process.returncode == code, output
    check_counts(output)
    return output


def wait_for_rows(process: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[0])


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
