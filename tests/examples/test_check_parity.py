"""examples/check_parity.py tells whether a machine computes what was recorded, and notices where it does not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import fails, run_command
from interpreted import need_interpreter, run_kernels_anywhere
from safetensors.torch import load_file, save_file

from spidr_hf.examples.benchmarks.parity import judge

PARITY = Path(__file__).parents[1] / "fixtures" / "parity"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def check(*arguments: object) -> list[dict]:
    """Runs the command, which must find everything within tolerance; returns its rows."""
    path = arguments[-1] / "rows.json"
    done = run_command("check_parity", *arguments[:-1], "--json", path)
    assert done.status == 0, f"{done.out}\n{done.err}"
    assert "PASS: " in done.out and "FAIL" not in done.out
    return json.loads(path.read_text())["rows"]


def test_on_a_cpu(tmp_path):
    rows = check(PARITY / "spidr-tiny", PARITY / "dinosr-fairseq", "--device", "cpu", tmp_path)
    found = {(row["folder"], row["dtype"]) for row in rows}
    assert found == {(name, dtype) for name in ("spidr-tiny", "dinosr-fairseq") for dtype in ("float32", "bfloat16")}
    labels = [row for row in rows if row["tensor"].endswith(("label", "labels")) and row["dtype"] == "float32"]
    assert len(labels) == 5 and not any(row["largest"] for row in labels)
    names = {row["tensor"] for row in rows if row["folder"] == "spidr-tiny"}
    assert {"feature_extractor", "layer.4.ffn", "teacher.2.target", "loss", "training grad_norm"} <= names
    assert {"training final.student", "training final.codebooks", "training final.teacher"} <= names
    assert {row["form"] for row in rows} == {"plain"}
    assert max(row["largest"] for row in rows if row["dtype"] == "float32" and "ppl" not in row["tensor"]) < 1e-4


@pytest.mark.slow
def test_all_folders_compiled(tmp_path):
    rows = check("--forms", "plain", "compiled", "--device", "cpu", tmp_path)
    assert {row["folder"] for row in rows} == {path.parent.name for path in PARITY.glob("*/expected.safetensors")}
    assert {row["form"] for row in rows} == {"plain", "compiled"}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_kernels_in_the_interpreter(monkeypatch, tmp_path, dtype):
    need_interpreter(on_cpu=True)
    run_kernels_anywhere(monkeypatch)
    check(PARITY / "spidr-tiny", "--forms", "plain", "kernels", "--dtypes", dtype, "--device", "cpu", tmp_path)


@needs_cuda
def test_on_a_gpu(tmp_path):
    rows = check(tmp_path)
    assert {row["form"] for row in rows} == {"plain", "compiled", "kernels", "both"}


def test_what_is_not_the_same_is_noticed(tmp_path):
    """One value of one representation, and one label."""
    folder = shutil.copytree(PARITY / "spidr-tiny", tmp_path / "spidr-other")
    (folder / "trajectory.safetensors").unlink()
    recorded = load_file(folder / "expected.safetensors")
    recorded["layer.2.ffn"][0, 3, 5] += 3e-4
    recorded["teacher.1.label"][4] += 1
    save_file(recorded, folder / "expected.safetensors")
    done = run_command("check_parity", folder, "--dtypes", "float32", "--device", "cpu")
    assert done.status == 1
    marked = [line.split() for line in done.out.splitlines() if line.endswith("!")]
    assert [line[0] for line in marked] == ["layer.2.ffn", "teacher.1.label"]
    assert marked[0][1] == "3.0e-04!" and "FAIL: " in done.out


def test_bad_input_is_refused(tmp_path):
    fails(run_command("check_parity", tmp_path, "--device", "cpu"), "expected.safetensors")
    folder = tmp_path / "spidr-empty"
    folder.mkdir()
    shutil.copy(PARITY / "spidr-tiny" / "expected.safetensors", folder)
    fails(run_command("check_parity", folder, "--device", "cpu"), "spidr-empty", "no checkpoint.pt")
    recorded = load_file(folder / "expected.safetensors")
    save_file({**recorded, "other": torch.zeros(1)}, folder / "expected.safetensors")
    for name in ("checkpoint.pt", "config.json"):
        shutil.copy(PARITY / "spidr-tiny" / name, folder)
    fails(run_command("check_parity", folder, "--device", "cpu"), "other")
    if not torch.cuda.is_available():
        fails(run_command("check_parity", "--device", "cuda"), "no CUDA GPU")
        fails(run_command("check_parity", "--forms", "kernels"), "pip install triton")


@pytest.mark.parametrize(
    ("name", "error", "dtype", "passes"),
    [
        ("loss", 0.9e-4, "float32", True),
        ("loss", 1.1e-4, "float32", False),
        ("target_ppl", 9e-3, "float32", True),  # of a hundred
        ("training final.codebooks", 5e-4, "float32", False),
        ("training final.student", 5e-4, "float32", True),
        ("layer.1.ffn", 2.0, "bfloat16", True),
        ("layer.1.ffn", 4.0, "bfloat16", False),
        ("teacher.1.target", 4.0, "bfloat16", True),
        ("nopad.loss", 7.0, "bfloat16", False),
        ("layer.1.ffn", float("nan"), "bfloat16", False),
    ],
)
def test_tolerances(name, error, dtype, passes):
    recorded = torch.full((3, 4), 100.0, dtype=torch.float64)
    assert judge(name, recorded + error, recorded, dtype).passed is passes


def test_labels_must_be_the_same_in_float32():
    recorded = torch.arange(100)
    moved = recorded.clone()
    moved[7] = 0
    assert judge("labels", recorded, recorded, "float32").passed
    assert (
        not judge("labels", moved, recorded, "float32").passed and judge("labels", moved, recorded, "bfloat16").passed
    )
    assert not judge("labels", torch.zeros(100, dtype=torch.int64), recorded, "bfloat16").passed
    assert not judge("labels", recorded[:50], recorded, "bfloat16").passed
