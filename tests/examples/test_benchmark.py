"""The benchmark compares what is equal, counts right, and tells what it measured."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from spidr_hf import SpidrConfig
from spidr_hf.examples.benchmarks import timing
from spidr_hf.examples.benchmarks.peers import TOLERANCE, difference, installed_peers, make_peer
from spidr_hf.examples.benchmarks.timing import (
    Timing,
    inference_flops,
    interleave,
    speedup,
    training_flops,
)

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmark.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("spidr_hf.examples.benchmark")


def run(script, monkeypatch, *options) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", *map(str, options)])
    script.main()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_printed_and_written(script, tmp_path, monkeypatch, capsys, dtype):
    out = tmp_path / "out.json"
    parts = ["training", "inference", "ragged", "extractor", "positional", "codebooks", "masks", "lengths"]
    options = ["--seconds", 0.5, "--longest", 1, "--rounds", 1, "--peers", "data2vec", "--dtype", dtype]
    run(script, monkeypatch, *options, "--json", out, "--plot", tmp_path / "plot.png", "--parts", *parts)
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [p for p in parts if any(row["part"] == p for row in result["results"])] == parts
    for row in result["results"]:
        assert row["wall_ms"] > 0
        assert f"{row['wall_ms']:.1f} ms" in printed
    inference = [row for row in result["results"] if row["part"] == "inference"]
    assert [row["side"] for row in inference] == ["spidr_hf", "data2vec"]
    assert inference[0]["times_faster"] is None and inference[1]["times_faster"] > 0
    assert {row["dtype"] for row in inference} == {dtype}
    assert result["differences"]["data2vec"] < TOLERANCE
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_processes_of_their_own(tmp_path):
    """Memory, and with --targets every part."""
    out = tmp_path / "out.json"
    options = ["--targets", "--size", "tiny", "--parts", "memory", "loader", "masks", "--peers", "--rounds", "1"]
    command = [sys.executable, SCRIPT, "--device", "cpu", "--dtype", "float32", *options, "--json", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["results"]
    assert [row["part"] for row in rows][:4] == ["masks", "masks", "loader", "memory"]
    assert next(row for row in rows if row["part"] == "memory")["peak_mib"] > 5
    assert next(row for row in rows if row["part"] == "loader")["audio_seconds_per_second"] > 1
    fits = [row["samples_that_fit"] for row in rows if row["part"] == "training memory"]
    assert fits == sorted(fits) and 3_800_000 < fits[0] < fits[-1]


def test_every_part_and_dtype_is_a_job(script):
    args = argparse.Namespace(parts=["training", "masks"], dtype=["float32", "bfloat16"], rounds=7)
    found = [(job.parts, job.dtype, job.rounds) for job in script.jobs(args)]
    both = ["float32", "bfloat16"]
    assert found == [(["training"], ["float32"], 7), (["training"], ["bfloat16"], 7), (["masks"], both, 7)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", 0], "must be at least 1"),
        (["--peers", "spidr"], "pip install spidr"),
        (["--seconds", 0], "at least"),
    ],
)
def test_what_cannot_be_measured_is_refused(script, monkeypatch, capsys, options, message):
    monkeypatch.setattr(script, "installed_peers", lambda: ["data2vec"])
    with pytest.raises(SystemExit):
        run(script, monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_targets_are_judged(script):
    def row(part, side, times, dtype="float32"):
        return {"part": part, "side": side, "dtype": dtype, "times_faster": times}

    rows = [
        row("training", "spidr", 1.3, "bfloat16"),
        row("inference", "spidr", 1.2),
        row("masks", "spidr", 25.0, None),
        *(
            {"part": "memory", "side": s, "length": 60.0, "peak_mib": m}
            for s, m in (("spidr_hf", 400), ("spidr", 1000))
        ),
        *({"part": "lengths", "side": "spidr_hf", "length": n, "ms_per_second": c} for n, c in ((5.0, 10), (60.0, 15))),
    ]
    met = {what: ok for what, _, _, _, ok in script.targets(rows)}
    assert met == {
        "training step, bfloat16, against spidr": True,
        "inference, float32, against spidr": False,
        "mask generation, against spidr's, row by row": True,
        "peak memory of 60 s, share of spidr's": True,
        "cost per second of 60 s over 5 s": False,
    }


@pytest.mark.parametrize("name", ["data2vec", "hubert", "wav2vec2"])
def test_peers_have_our_weights(name):
    model = tiny_model(conv_pos_kernel_size=15, conv_pos_depth=5)
    peer = make_peer(name, model)
    assert name in installed_peers() and peer.equal == (name == "data2vec")
    apart = difference(peer, model, torch.randn(2, 2000))
    assert apart < TOLERANCE if peer.equal else apart > TOLERANCE
    ours = model.spidr.extract_features(torch.randn(1, 2000))[0]
    assert (
        peer.model.config.hidden_size == model.config.hidden_size and ours.shape[-1] == peer.model.config.conv_dim[-1]
    )
    if peer.equal:
        torch.nn.init.ones_(peer.model.encoder.layers[0].final_layer_norm.bias)
        with pytest.raises(ValueError, match="disagree"):
            difference(peer, model, torch.randn(2, 2000))


@pytest.mark.parametrize(
    "choose", ["torch.backends.fp32_precision = 'tf32'", "torch.set_float32_matmul_precision('high')"]
)
def test_models_are_compared_without_tf32(monkeypatch, choose):
    """A GPU's convolutions have it by default, and would be taken for a disagreement."""
    model, settings = tiny_model(conv_pos_kernel_size=15, conv_pos_depth=5), []
    peer = make_peer("data2vec", model)
    features = peer.features

    def watched(*inputs):
        settings.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return features(*inputs)

    peer.features = watched
    torch.backends.cuda.matmul.fp32_precision = "none"
    exec(choose)
    try:
        before = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        difference(peer, model, torch.randn(2, 2000))
        after = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
    assert before == after == ("tf32", "tf32") and settings == [("ieee", "ieee")]


def test_a_training_step_is_counted_as_published():
    """55.7 GFLOP per second of audio at 12 s and 55 % masked frames, the small operations included."""
    flops = training_flops(SpidrConfig(), 1, 12 * 16_000, 0.55) / 12
    assert flops == pytest.approx(55.7e9, rel=0.02)


@torch.no_grad()
def test_inference_is_counted_as_torch_counts_it():
    model = tiny_model(attn_implementation="eager").spidr
    samples = 16_000
    frames = model._get_feat_extract_output_lengths(samples)
    with FlopCounterMode(display=False) as counter:
        model.encoder(torch.randn(3, frames, model.config.hidden_size))
    encoder = inference_flops(model.config, 3, samples) - 3 * timing.extractor_flops(model.config, samples)
    assert counter.get_total_flops() == pytest.approx(encoder, rel=0.02)


def test_runs_are_interleaved_and_the_first_round_does_not_count():
    calls = []
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU)
    assert calls == ["a", "b"] * 4
    assert len(timings["a"].wall) == len(timings["b"].cpu) == 3
    calls.clear()
    timings = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, CPU, repeat=2)
    assert calls == ["a", "a", "b", "b"] * 3 and len(timings["a"].wall) == 2


def test_speedup_is_the_median_of_the_rounds():
    slow, fast = Timing([2.0, 9.0, 4.0], [0.0] * 3), Timing([1.0, 1.0, 2.0], [0.0] * 3)
    assert speedup(slow, fast) == 2.0


def test_memory_is_the_peak_above_what_was_there():
    """In a process of its own: this one may have memory left over from other tests, which it would take first."""
    code = """
import torch
from spidr_hf.examples.benchmarks.timing import peak_memory
kept = torch.ones(20 << 20, dtype=torch.uint8)
print(peak_memory(lambda: [torch.ones(60 << 20, dtype=torch.uint8).max() for _ in range(4)], torch.device("cpu")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SCRIPT.parents[1], capture_output=True, text=True, check=True
    )
    assert 50 << 20 < int(done.stdout) < 110 << 20
