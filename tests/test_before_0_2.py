"""What was written before 0.2 resumes and loads: the run and the model of `fixtures/before_0_2` (its README).

Kernels of another processor or another PyTorch may differ in the last bits, so results are compared bit for bit only
where `platform` in `expected.json` is this one, and within 1e-5 elsewhere.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import final, pretrain_here, results, rows, write_audio
from safetensors.torch import load_file

from spidr_hf import SpidrForPretraining

FIXTURE = Path(__file__).parent / "fixtures" / "before_0_2"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


def platform() -> str:
    """What decides the last bits."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {processor}"


SAME = platform() == EXPECTED["platform"]


def checksum(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def summary(tensors: dict[str, torch.Tensor]) -> dict[str, list]:
    """Checksum and norm of each tensor."""
    return {name: [checksum(tensor), tensor.double().norm().item()] for name, tensor in sorted(tensors.items())}


def assert_same_tensors(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        tolerance = {"atol": 0, "rtol": 0} if SAME else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(ours[name], tensor, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_resumes_as_if_it_had_never_stopped(tmp_path, monkeypatch, capsys):
    """Stopped after 6 steps by the code of then, continued to 12 by that of today."""
    write_audio(tmp_path / "audio")
    folder = Path(shutil.copytree(FIXTURE / "run", tmp_path / "run"))
    before = (folder / "metrics.jsonl").read_bytes()
    monkeypatch.chdir(tmp_path)
    pretrain_here(folder / "config.toml", folder, "--optimizer.max_steps", "12")
    printed = capsys.readouterr().err
    assert "Continuing from" in printed and "The audio is not" not in printed and "damaged" not in printed
    assert (folder / "metrics.jsonl").read_bytes().startswith(before)
    whole = [json.loads(line) for line in (FIXTURE / "whole_metrics.jsonl").read_text().splitlines()]
    whole = [{name: row[name] for name in row if name != "audio_seconds_per_second"} for row in whole]
    ended = summary(final(folder))
    assert ended.keys() == EXPECTED["final"].keys() and len(rows(folder)) == 12
    if SAME:
        assert results(folder) == whole
        assert ended == {name: list(values) for name, values in EXPECTED["final"].items()}
    for ours, theirs in zip(results(folder), whole, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-5), (theirs["step"], name)
    for name, (_, norm) in EXPECTED["final"].items():
        assert ended[name][1] == pytest.approx(norm, rel=1e-5), name


def test_a_model_loads_with_the_package():
    expected = load_file(FIXTURE / "model_outputs.safetensors")
    model = SpidrForPretraining.from_pretrained(FIXTURE / "model").eval()
    audio = expected.pop("input_values")
    with torch.no_grad():
        outputs = {"loss": model(audio).loss.view(1), "labels": model.get_teacher_labels(audio)}
        outputs["last_hidden_state"] = model.spidr(audio)[0]
    assert_same_tensors(outputs, expected)


# Where spidr_hf cannot be imported, the code beside the weights is all there is.
STRANGER = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spidr_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining

fixture, target = sys.argv[1:]
audio = load_file(f"{fixture}/model_outputs.safetensors")["input_values"]
model = AutoModelForPreTraining.from_pretrained(f"{fixture}/model", trust_remote_code=True).eval()
encoder = AutoModel.from_pretrained(f"{fixture}/model", trust_remote_code=True).eval()
AutoFeatureExtractor.from_pretrained(f"{fixture}/model", trust_remote_code=True)
with torch.no_grad():
    outputs = {"loss": model(audio).loss.view(1), "labels": model.get_teacher_labels(audio).contiguous()}
    outputs["last_hidden_state"] = encoder(audio)[0].contiguous()
assert "spidr_hf" not in sys.modules
save_file(outputs, target)
"""


@pytest.mark.slow
def test_a_model_loads_by_its_own_code_without_the_package(tmp_path):
    target = tmp_path / "outputs.safetensors"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", STRANGER, str(FIXTURE), str(target)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = load_file(FIXTURE / "model_outputs.safetensors")
    del expected["input_values"]
    assert_same_tensors(load_file(target), expected)
