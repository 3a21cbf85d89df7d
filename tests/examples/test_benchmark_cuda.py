"""examples/benchmark_cuda.py runs anywhere, in small."""

import json
import sys
from functools import partial

import pytest
import torch
from commands import fails, run_command
from tiny import tiny_model

from spidr_hf.examples.benchmarks.steps import (
    DEFAULT,
    Form,
    OurStep,
    SpidrStep,
    forms,
    in_a_row,
    noise_batches,
    state_bytes,
)

SMALL = ("--size", "tiny", "--batch", 2, "--seconds", 0.5, "--device", "cpu", "--rounds", 1, "--steps", 1, "--top", 3)


def rows_of(path, *options) -> list[dict]:
    done = run_command("benchmark_cuda", *SMALL, "--json", path, *options)
    assert done.status == 0, done.err
    rows = json.loads(path.read_text())["rows"]
    assert all(row["name"] in done.out for row in rows) and all(row.get("ms", 1) > 0 for row in rows)
    return rows


@pytest.mark.slow
def test_every_part_reports(tmp_path):
    rows = rows_of(tmp_path / "rows.json")
    assert {row["part"] for row in rows} == {"step", "modules", "kernels", "profile"}


def test_what_was_timed_before_it_broke_off_is_written(monkeypatch, tmp_path):
    """And a peer that cannot be imported keeps nothing else from being timed."""

    def gone(self):
        raise ValueError("the machine is taken back")

    monkeypatch.setattr("spidr_hf.examples.benchmark_cuda.StepBenchmark.kernels", gone)
    monkeypatch.setattr("spidr_hf.examples.benchmark_cuda.installed_peers", lambda: ["spidr"])
    monkeypatch.setitem(sys.modules, "spidr.environment", None)
    done = run_command("benchmark_cuda", *SMALL, "--parts", "step", "kernels", "--json", tmp_path / "rows.json")
    assert "the machine is taken back" in done.err and "spidr is left out" in done.err
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["part"] == "step" and row["ms"] > 0


@pytest.mark.slow
def test_what_is_compiled_takes_turns_with_what_is_not(monkeypatch, tmp_path):
    # Graphs as on a GPU, which then run as they are: generating code for a CPU would take minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows = rows_of(tmp_path / "rows.json", "--compile", "--parts", "step", "modules", "compile")
    steps = [row["name"] for row in rows if row["part"] == "step" and not row["name"].startswith("spidr")]
    assert steps == [str(form) for form in forms(True, False)] and len(steps) == 4
    modules = [row["name"] for row in rows if row["part"] == "modules"]
    assert {"extractor, plain", "extractor, compiled, plain", "positional convolutions, compiled, plain"} <= {*modules}
    first, others = (row for row in rows if row["part"] == "compile" and row["name"].startswith("layers compiled"))
    assert first["seconds"] > 0 and others["graphs"] == first["graphs"] == 4
    best = {row["name"]: row for row in rows if row["part"] == "best"}
    assert best.keys() == {"step", "extractor", "positional convolutions", "switches of examples/pretrain.py"}
    assert best["step"]["form"] in steps and best["step"]["times_faster_than_default"] >= 1


def test_what_cannot_be_measured_is_refused():
    fails(run_command("benchmark_cuda", "--rounds", 0), "must be at least 1")
    if not torch.cuda.is_available():
        fails(run_command("benchmark_cuda", "--device", "cuda"), "no CUDA GPU")


def test_forms():
    assert forms(False, False) == [Form("", False)] and DEFAULT in forms(True, True)
    assert len(forms(True, True)) == len({str(form) for form in forms(True, True)}) == 8


def test_our_step_trains():
    model = tiny_model(freeze_step=2)
    step = OurStep(model, noise_batches(model, 2, 6000), Form("", False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    in_a_row(step, 3)()
    assert step.state.skipped_steps == 0 and model.current_step.item() == 3
    assert not torch.equal(before["heads.weight"], model.heads.weight)
    assert not torch.equal(before["codebooks.sums"], model.codebooks.sums)
    weights = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    assert state_bytes(model, step.optimizer) > weights


def test_the_step_of_spidr_trains():
    """The peer as it trains: its optimizer, its collator's batch, its update."""
    pytest.importorskip("spidr", reason="the peer: pip install spidr")
    from spidr_hf.conversion.spidr_format import to_spidr
    from spidr_hf.examples.benchmarks.peers import make_peer, spidr_batch

    model = tiny_model(hidden_dropout=0.1, attention_dropout=0.1)
    peer = make_peer("spidr", model, to_spidr).model
    batches = noise_batches(model, 2, 16_000)
    fed = spidr_batch(peer, batches[0].input_values)
    assert fed.keys() == {"waveforms", "mask_indices"} and fed["mask_indices"].dtype == torch.int64
    step = SpidrStep(peer, batches, torch.device("cpu"), compiled=False)
    before = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    in_a_row(step, 2)()
    after = peer.state_dict()
    for part in ("student.layers.0", "teacher.layers.0", "heads.0", "codebooks.0"):
        assert any(not torch.equal(after[name], before[name]) for name in after if name.startswith(part)), part
