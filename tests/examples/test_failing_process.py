"""An error in one of two launched processes, when workers decode audio for both: the whole job ends, and at once."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import write_audio, write_config
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = 45  # a launcher gives its other process 30 to end by SIGTERM, which a process in a collective does not see

# The command, whose third update fails in one process.
SCRIPT = """
import itertools, os, pathlib, sys, time
sys.path.insert(0, {root!r})
import spidr_hf.examples.{command} as command
import {module} as module

updates, update = itertools.count(1), module.scale_and_clip

def failing(*arguments):
    if os.environ["RANK"] == "{rank}" and next(updates) == 3:
        pathlib.Path({mark!r}).write_text(str(time.time()))
        raise {error}
    return update(*arguments)

module.scale_and_clip = failing
command.main()
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> dict[str, list[str]]:
    """What each command is called with, before its options; OUT stands for the run's folder."""
    folder = tmp_path_factory.mktemp("failing")
    audio = write_audio(folder / "audio")
    config = write_config(folder / "tiny.toml", audio)
    labels = [json.dumps({"id": path.stem, "text": "ab ba"}) for path in sorted(audio.glob("*.flac"))]
    (folder / "labels.jsonl").write_text("\n".join(labels) + "\n")
    tiny_model().save_pretrained(folder / "model")
    SpidrFeatureExtractor().save_pretrained(folder / "model")
    data = [str(folder / "model"), str(audio), "OUT", "--valid", str(audio), "--labels", str(folder / "labels.jsonl")]
    return {
        "pretrain": ["--config", str(config), "--output-dir", "OUT", "--data.num_workers", "2"],
        "finetune_ctc": [*data, "--units", "characters", "--batch-seconds", "2", "--freeze-encoder-steps", "0"],
    }


@pytest.mark.parametrize(
    ("rank", "error"), [(1, "RuntimeError('broken')"), (0, "OSError(5, 'broken')"), (1, "OSError(5, 'broken')")]
)
@pytest.mark.parametrize(
    ("command", "module"),
    [("pretrain", "spidr_hf.pretraining.setup"), ("finetune_ctc", "spidr_hf.finetuning.loop")],
)
def test_an_error_in_one_process_ends_all(arguments, tmp_path, command, module, rank, error):
    script, mark = tmp_path / "command.py", tmp_path / "mark"
    script.write_text(
        SCRIPT.format(root=str(ROOT), command=command, module=module, mark=str(mark), rank=rank, error=error)
    )
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    options = [str(tmp_path / "run") if text == "OUT" else text for text in arguments[command]]
    process = subprocess.Popen(
        [*launcher, "--num_processes", "2", "--main_process_port", "0", str(script), *options],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    # It returns when the last of its processes, the workers included, has closed the pipe.
    output = process.communicate(timeout=600)[0]
    assert mark.exists(), output
    assert time.time() - float(mark.read_text()) < SECONDS, output
    assert process.returncode == 1 and "broken" in output, output
