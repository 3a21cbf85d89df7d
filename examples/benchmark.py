#!/usr/bin/env python
"""Speed and memory of a SpidR training step and of inference on this machine.

    python examples/benchmark.py                              # spidr-base, float32
    python examples/benchmark.py --size tiny --json out.json
    python examples/benchmark.py --dtype bfloat16 --batch 16 --seconds 14.8     # on a GPU

Weights are random and the audio is noise: neither changes the time. A training step is all of it: student and teacher,
dropout as in the recipe, codebooks, backward, clipping, AdamW, teacher update. Inference computes the representations
of all layers. Times are medians. Memory is this process's peak so far (resident memory on a CPU, so that training's
contains inference's; allocated memory on a GPU), the interpreter and the libraries included.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers

from spidr_hf import SpidrConfig, SpidrForPretraining, SpidrModel

TINY = {
    "hidden_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "conv_dim": (64, 64, 128, 128, 128, 128, 128),
    "num_codebooks": 4,
    "codebook_size": 64,
}
SIZES = {"base": {}, "tiny": TINY}
MASKED = 0.55  # share of frames that the recipe's spans cover


def main() -> None:
    args = parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    config = SpidrConfig(**SIZES[args.size])
    audio = torch.randn(args.batch, int(args.seconds * 16_000), device=device)
    audio_seconds = args.batch * args.seconds
    # What model.forward sees under the recipe's mixed precision: float32 weights, bfloat16 products.
    autocast = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()

    rows = []
    for name, make in (("inference", inference), ("training step", training_step)):
        times, peak = measure(make(config, audio, autocast), args.repeats, device)
        rows.append(
            {
                "name": name,
                "milliseconds": round(1000 * statistics.median(times), 1),
                "slowest_milliseconds": round(1000 * max(times), 1),
                "audio_seconds_per_second": round(audio_seconds / statistics.median(times), 1),
                "peak_mebibytes": round(peak / 2**20),
            }
        )
    result = {
        "size": args.size,
        "parameters": sum(p.numel() for p in SpidrModel(config).parameters()),
        "batch": args.batch,
        "seconds": args.seconds,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "results": rows,
    }
    print(
        f"spidr {args.size}, {result['parameters'] / 1e6:.1f} M parameters, {args.batch} x {args.seconds:g} s, "
        f"{args.dtype}, {result['device']}, {result['threads']} threads, torch {torch.__version__}\n"
    )
    print(f"{'':15}{'ms (median)':>13}{'ms (slowest)':>14}{'audio s/s':>11}{'peak MiB':>10}")
    for row in rows:
        print(
            f"{row['name']:15}{row['milliseconds']:13.1f}{row['slowest_milliseconds']:14.1f}"
            f"{row['audio_seconds_per_second']:11.1f}{row['peak_mebibytes']:10d}"
        )
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten to {args.json}")


def inference(config: SpidrConfig, audio: torch.Tensor, autocast) -> Callable[[], None]:
    """One pass over the batch, representations of all layers."""
    model = SpidrModel(config).to(audio.device).eval()

    @torch.inference_mode()
    def run() -> None:
        with autocast:
            model.get_intermediate_outputs(audio)

    return run


def training_step(config: SpidrConfig, audio: torch.Tensor, autocast) -> Callable[[], None]:
    """One complete step, the teacher's update included."""
    model = SpidrForPretraining(config).to(audio.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=5e-4, betas=(0.9, 0.95), eps=1e-6, fused=audio.device.type == "cuda" or None
    )
    frames = model.spidr._get_feat_extract_output_lengths(audio.shape[1])
    masked = torch.rand(len(audio), frames).argsort(1)[:, : int(MASKED * frames)].sort(1).values.to(audio.device)
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        with autocast:
            loss = model(audio, mask_time_indices=masked).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(step)

    return run


def measure(run: Callable[[], None], repeats: int, device: torch.device) -> tuple[list[float], int]:
    """Seconds of `repeats` runs after two to warm up, and the peak memory in bytes."""
    on_gpu = device.type == "cuda"
    for _ in range(2):
        run()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        if on_gpu:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    if on_gpu:
        return times, torch.cuda.max_memory_allocated(device)
    # KiB on Linux, bytes on macOS
    return times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="base", help="default: base")
    parser.add_argument("--batch", type=int, default=2, help="utterances per batch (2)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each utterance (4)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (5)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="found out by itself")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    args = parser.parse_args()
    if args.batch < 1 or args.repeats < 1 or args.seconds < 0.1:
        parser.error("--batch and --repeats must be at least 1, --seconds at least 0.1")
    return args


if __name__ == "__main__":
    main()
