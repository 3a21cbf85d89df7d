"""Measuring speed and memory: interleaved runs, arithmetic counted from the configuration, peaks of memory and chips.

On a busy machine wall time tells about the neighbours. Runs that are compared are therefore interleaved (A, B, A, B),
ratios are taken round by round, and on a CPU from the processor time of this process; wall time stands beside it.
"""

import gc
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spidr_hf.configuration_spidr import SpidrConfig, frame_lengths
from spidr_hf.cpu_spidr import fast_product, fast_products, product_library

# Dense bfloat16 products, in 10^12 operations per second, as the manufacturer states them.
GPU_PEAKS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "GH200": 989,
    "A100": 312,
    "A10G": 70,
    "A10": 125,
    "A40": 150,
    "L40S": 362,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


@dataclass
class Timing:
    """Seconds of every round: wall time, and processor time of this process (0 on a GPU)."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def wall_ms(self) -> float:
        """Median, in milliseconds."""
        return 1000 * statistics.median(self.wall)

    @property
    def cpu_ms(self) -> float:
        """Median, in milliseconds."""
        return 1000 * statistics.median(self.cpu)

    @property
    def decisive(self) -> list[float]:
        """What ratios are taken of: processor time where one thread computes, wall time otherwise."""
        return self.cpu if any(self.cpu) and torch.get_num_threads() == 1 else self.wall


def interleave(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, repeat: int = 1
) -> dict[str, Timing]:
    """Times of `runs`, interleaved for `rounds` rounds after one to warm up.

    In each round each runs `repeat` times, of which the last counts: of what follows upon its like, as steps of
    training do, not upon another program with its own places in memory.
    """
    timings = {name: Timing() for name in runs}
    on_gpu = device.type == "cuda"
    for number in range(rounds + 1):
        for name, run in runs.items():
            for _ in range(repeat - 1):
                run()
            if on_gpu:
                torch.cuda.synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if on_gpu:
                torch.cuda.synchronize(device)
            if number:
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].cpu.append(0.0 if on_gpu else time.process_time() - cpu)
    return timings


def speedup(slow: Timing, fast: Timing) -> float:
    """How many times faster `fast` is: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slow.decisive, fast.decisive, strict=True))


def inference_flops(config: SpidrConfig, rows: int, samples: int, num_layers: int | None = None) -> float:
    """Multiplications and additions of products and convolutions, for `rows` utterances of `samples` samples."""
    frames = frame_lengths(config, samples)
    layers = config.num_hidden_layers if num_layers is None else num_layers
    return rows * (extractor_flops(config, samples) + _encoder_flops(config, frames, layers))


def training_flops(config: SpidrConfig, rows: int, samples: int, masked_share: float, frozen: bool = False) -> float:
    """The same of a training step: student forward and backward, teacher forward, heads and codebooks."""
    frames, width = frame_lengths(config, samples), config.hidden_size
    encoder = _encoder_flops(config, frames, config.num_hidden_layers)
    first = 2 * _first_outputs(config, samples) * config.conv_dim[0] * config.conv_kernel[0]
    # The gradient of the waveform is not computed.
    extractor = extractor_flops(config, samples) * (1 if frozen else 3) - (0 if frozen else first)
    heads = 2 * config.num_codebooks * masked_share * frames * width * config.codebook_size
    return rows * (extractor + 4 * encoder + 4 * heads)


def _first_outputs(config: SpidrConfig, samples: int) -> int:
    """Outputs of the first convolution."""
    return (samples - config.conv_kernel[0]) // config.conv_stride[0] + 1


def extractor_flops(config: SpidrConfig, samples: int) -> float:
    flops, length, inputs = 0.0, samples, 1
    for channels, kernel, stride in zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True):
        length = (length - kernel) // stride + 1
        flops += 2 * length * inputs * channels * kernel
        inputs = channels
    return flops + 2 * frame_lengths(config, samples) * inputs * config.hidden_size


def _encoder_flops(config: SpidrConfig, frames: int, layers: int) -> float:
    width = config.hidden_size
    positional = 2 * frames * width * width // config.num_conv_pos_embedding_groups * config.pos_conv_kernel
    layer = 8 * frames * width**2 + 4 * frames**2 * width + 4 * frames * width * config.intermediate_size
    return config.conv_pos_depth * positional + layers * layer


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the device can do: known for GPUs in bfloat16, measured on a CPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for chip, peak in GPU_PEAKS.items() if chip in name]
        return known[0] * 1e12 if known and dtype == torch.bfloat16 else None
    size = 1024
    left, right = (torch.randn(size, size, dtype=dtype) for _ in range(2))
    # Which library multiplies faster depends on the CPU.
    products = [torch.mm, fast_product] if fast_products(left, right) else [torch.mm]
    best = float("inf")
    for product in products * 5:
        start = time.process_time()
        product(left, right)
        best = min(best, time.process_time() - start)
    return 2 * size**3 / max(best, 1e-9) * torch.get_num_threads()


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that `run` needs at its peak beyond what is there before. On a CPU only a process of its own tells."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident()
    if _reset_peak():
        run()
        return max(_resident(peak=True) - before, 0)
    peak, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def _resident(peak: bool = False) -> int:
    """Resident memory of this process, or its peak since the last reset, in bytes (Linux; elsewhere the whole peak)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return _peak_of_process()
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))


def _reset_peak() -> bool:
    """Whether the system forgot this process's peak; some say they do and do not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _resident(peak=True) <= _resident() + (4 << 20)


def _peak_of_process() -> int:
    import resource

    # KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe_machine(device: torch.device) -> dict[str, object]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    products = {}
    if device.type == "cpu":
        products = {f"{kind}_products": product_library(getattr(torch, kind)) for kind in ("float32", "bfloat16")}
    return {
        "device": name,
        **products,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"CPU ({names[0] if names else 'unknown'})"


__all__ = [
    "GPU_PEAKS",
    "Timing",
    "describe_machine",
    "inference_flops",
    "interleave",
    "peak_flops",
    "peak_memory",
    "speedup",
    "training_flops",
]
