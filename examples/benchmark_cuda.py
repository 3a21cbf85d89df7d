#!/usr/bin/env python
"""Where a pretraining step spends its time on a GPU: the whole step, its modules, its kernels.

    python examples/benchmark_cuda.py --json examples/benchmark_results/NAME.json            # one full batch, bfloat16
    python examples/benchmark_cuda.py --frozen --parts step                                  # as after the freeze
    python examples/benchmark_cuda.py --size tiny --batch 2 --seconds 1 --device cpu         # that it works, anywhere

Parts: step (ms, share of the chip's peak, peak memory; with layers compiled or not, own kernels on or off, and `spidr`
as it trains, compiled and fed what its collator makes, where it is installed: all take turns on the same batch),
modules (forward and backward of extractor, positional convolutions, a layer and the objective, each alone), kernels
(each own kernel beside its plain form and that form compiled, errors included), profile (the GPU's busiest kernels in
one step), compile (seconds until the first compiled step is done, in this process: a second start shows the cache).

A step is all of it: student and teacher, dropout as in the recipe, masked frames from the host, backward, clipping,
AdamW, codebooks and teacher. Audio is noise. Figures are medians over rounds; the first rounds warm up.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

if not __package__:  # run as a command: `conversion` lies beside this folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from spidr_hf import SpidrConfig, SpidrForPretraining
from spidr_hf.benchmark_peers import difference, installed_peers, make_peer
from spidr_hf.benchmarking import Timing, describe_machine, interleave, peak_flops, peak_memory, speedup, training_flops
from spidr_hf.codebooks_spidr import StatisticsBuffer
from spidr_hf.files import write_text
from spidr_hf.kernels_spidr import (
    grouped_conv1d,
    kernels_run,
    norm_gelu,
    plain_grouped_conv1d,
    plain_norm_gelu,
    use_kernels,
)
from spidr_hf.pretraining import compile_layers, make_optimizer, scale_and_clip
from spidr_hf.run_config import OptimizerSection

PARTS = ("step", "modules", "kernels", "profile", "compile")
MASKED = 0.55  # share of frames that the recipe's spans cover
TINY = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "conv_dim": (64,) * 7,
    "num_codebooks": 2,
    "codebook_size": 64,
}


class StepBenchmark:
    """Models, a batch on the host, and the rows of the result."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        self.config = SpidrConfig(**(TINY if args.size == "tiny" else {}))
        self.rows: list[dict] = []
        torch.manual_seed(0)
        samples = int(args.seconds * 16_000)
        self.frames = self.new_model().spidr._get_feat_extract_output_lengths(samples)
        on_gpu = self.device.type == "cuda"
        masked = torch.rand(args.batch, self.frames).argsort(1)[:, : int(MASKED * self.frames)].sort(1).values
        # Rotated, so that no batch is in a cache when its turn comes.
        self.batches = [torch.randn(args.batch, samples) for _ in range(3)]
        self.masked = masked
        if on_gpu:
            self.batches, self.masked = [x.pin_memory() for x in self.batches], masked.pin_memory()

    def new_model(self) -> SpidrForPretraining:
        torch.manual_seed(0)
        model = SpidrForPretraining(self.config).to(self.device).train()
        if self.args.frozen:
            model.freeze_feature_encoder()
        return model

    def add(self, part: str, name: str, **facts) -> None:
        self.rows.append({"part": part, "name": name, **facts})
        print(f"{part:8} {name:34} " + "  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)

    def add_times(self, part: str, name: str, timings: dict[str, Timing]) -> None:
        """A row for each form, with how many times faster than the plain one it is."""
        for form, timing in timings.items():
            ratio = round(speedup(timings["plain"], timing), 2)
            self.add(part, f"{name}, {form}", ms=round(timing.wall_ms, 3), times_faster=ratio)

    # ---- the whole step

    def our_step(self, model: SpidrForPretraining, kernels: bool) -> Callable[[], None]:
        optimizer, number = make_optimizer(model, OptimizerSection()), 0
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def run() -> None:
            nonlocal number
            number += 1
            use_kernels(kernels)
            x = self.batches[number % 3].to(self.device, non_blocking=True)
            masked = self.masked.to(self.device, non_blocking=True)
            with torch.autocast(self.device.type, torch.bfloat16):
                output = model(x, mask_time_indices=masked)
            (output.loss * output.num_masked_frames).backward()
            statistics = model.reduce_statistics()
            norm = scale_and_clip(parameters, 1 / statistics.num_masked_frames, 10.0)
            finite = statistics.loss.isfinite() & norm.isfinite()
            optimizer.found_inf = (~finite).float()
            optimizer.step()
            model.update_teacher(number, finite)
            optimizer.zero_grad()

        return run

    def spidr_step(self, model: torch.nn.Module) -> Callable[[], None]:
        """`spidr` as it trains: `model.compile(dynamic=True)`, bool masks and an attention mask from the loader."""
        parameters = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("teacher")]
        optimizer = torch.optim.AdamW(parameters, 5e-4, (0.9, 0.95), 1e-6, 0.01, fused=True)
        rows, frames = self.args.batch, self.frames
        mask = torch.zeros(rows, frames, dtype=torch.bool).scatter_(1, self.masked, True)
        attention = torch.ones(rows, 1, frames, frames, dtype=torch.bool)
        if self.device.type == "cuda":
            mask, attention = mask.pin_memory(), attention.pin_memory()
        number = 0

        def run() -> None:
            nonlocal number
            number += 1
            x, masked, keys = (
                t.to(self.device, non_blocking=True) for t in (self.batches[number % 3], mask, attention)
            )
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = model(x, mask_indices=masked, attention_mask=keys)[0].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 10.0)
            optimizer.step()
            optimizer.zero_grad()
            model.update_ema(number)

        return run

    def step(self) -> None:
        runs = {}
        for compiled in (False, True) if self.device.type == "cuda" else (False,):
            for kernels in (False, True) if self.kernels_there() else (False,):
                model = self.new_model()
                if compiled:
                    compile_layers(model)
                name = f"layers {'compiled' if compiled else 'eager'}, {'own' if kernels else 'plain'} kernels"
                runs[name] = self.our_step(model, kernels)
        best = name
        if "spidr" in installed_peers() and not self.args.frozen:
            from spidr.environment import setup_pytorch

            from conversion.spidr_format import to_spidr

            if self.device.type == "cuda":
                setup_pytorch(use_deterministic=False)  # for all that is timed from here on
            for compiled in (False, True) if self.device.type == "cuda" else (False,):
                model = self.new_model().eval()
                peer = make_peer("spidr", model, to_spidr)
                peer.model.to(self.device)
                print(f"outputs differ by {difference(peer, model, self.batches[0][:1].to(self.device)):.2g}")
                peer.model.train()
                if compiled:
                    peer.model.compile(dynamic=True)
                runs[f"spidr {'compiled' if compiled else 'eager'}"] = self.spidr_step(peer.model)
        timings = interleave(runs, self.args.rounds, self.device)
        use_kernels(True)
        flops = training_flops(self.config, self.args.batch, self.batches[0].shape[1], MASKED, self.args.frozen)
        peak = peak_flops(self.device, torch.bfloat16)
        for name, run in runs.items():
            timing = timings[name]
            self.add(
                "step",
                name,
                ms=round(timing.wall_ms, 2),
                best_is_times_faster=round(speedup(timing, timings[best]), 2),
                mfu=round(1000 * flops / timing.wall_ms / peak, 3) if peak else None,
                audio_seconds_per_second=round(self.args.batch * self.args.seconds * 1000 / timing.wall_ms),
                step_memory_gib=round(peak_memory(run, self.device) / 2**30, 2),
            )

    # ---- modules

    def modules(self) -> None:
        model, rows, width = self.new_model(), self.args.batch, self.config.hidden_size
        x = self.batches[0].to(self.device)
        hidden = torch.randn(rows, self.frames, width, device=self.device, requires_grad=True)
        picked = int(MASKED * self.frames) * rows
        targets = torch.randn(self.config.num_codebooks, picked, width, device=self.device)
        predicted = torch.randn_like(targets).requires_grad_()
        encoder, codebooks = model.spidr.encoder, model.codebooks
        statistics = StatisticsBuffer(self.config, self.device)
        means = torch.zeros(self.config.num_codebooks, self.config.codebook_size, device=self.device)

        def objective() -> torch.Tensor:
            labels = codebooks.assign(targets)
            losses = F.cross_entropy(model.heads(predicted).flatten(0, 1).float(), labels.flatten())
            with torch.no_grad():
                statistics.add(labels, targets, losses.expand(len(targets)), means)
            return losses

        parts = {
            "extractor": (lambda: model.spidr.feature_extractor(x), 1),
            "positional convolutions": (lambda: encoder.pos_conv_embed(hidden), 1),
            "transformer layer": (lambda: encoder.layers[0](hidden)[0], self.config.num_hidden_layers),
            "objective, statistics": (objective, 1),
        }
        if self.device.type == "cuda":
            for module, inputs, name in (
                (model.spidr.feature_extractor, x, "extractor, compiled"),
                (encoder.pos_conv_embed, hidden, "positional convolutions, compiled"),
            ):
                parts[name] = (partial(torch.compile(module, dynamic=True), inputs), 1)
        for name, (forward, count) in parts.items():

            def both(forward: Callable = forward) -> None:
                with torch.autocast(self.device.type, torch.bfloat16):
                    out = forward()
                if out.requires_grad:
                    out.backward(torch.ones_like(out))
                model.zero_grad(set_to_none=True)
                hidden.grad = predicted.grad = None

            for kernels in (True, False) if self.kernels_there() else (False,):
                timing = self.with_switch({name: both}, kernels)[name]
                form = "own kernels" if kernels else "plain"
                self.add("modules", f"{name}, {form}", ms=round(timing.wall_ms, 3), in_a_step=count)

    def with_switch(self, runs: dict[str, Callable[[], object]], kernels: bool) -> dict[str, Timing]:
        use_kernels(kernels)
        try:
            return interleave(runs, self.args.rounds, self.device)
        finally:
            use_kernels(True)

    # ---- kernels

    def kernels_there(self) -> bool:
        return kernels_run(torch.empty(0, device=self.device))

    def kernels(self) -> None:
        dtype, config, rows = torch.bfloat16, self.config, self.args.batch
        channels, width, groups = config.conv_dim[-1], config.hidden_size, config.num_conv_pos_embedding_groups
        outputs = self.batches[0].shape[1] // config.conv_stride[0]  # of the first convolution, the largest there are
        weight, bias = (torch.randn(channels, device=self.device, requires_grad=True) for _ in range(2))
        taps = torch.randn(width, width // groups, config.pos_conv_kernel, device=self.device).mul_(0.03)
        taps = taps.to(dtype).requires_grad_()
        bare = {"weight": None, "bias": None, "eps": 1e-5}
        affine = {"weight": weight, "bias": bias, "eps": 1e-5}
        convolution = {"weight": taps, "bias": torch.zeros(width, device=self.device, dtype=dtype), "groups": groups}
        cases = {
            f"norm and GELU of {rows} x {outputs} x {channels}": (
                norm_gelu,
                plain_norm_gelu,
                outputs,
                channels,
                affine,
            ),
            f"norm and GELU of {rows} x {self.frames} x {width}": (
                norm_gelu,
                plain_norm_gelu,
                self.frames,
                width,
                bare,
            ),
            f"grouped convolution, {config.pos_conv_kernel} taps": (
                grouped_conv1d,
                plain_grouped_conv1d,
                self.frames,
                width,
                convolution,
            ),
        }
        for name, (own, plain, length, size, options) in cases.items():
            x = torch.randn(rows, length, size, device=self.device, dtype=dtype, requires_grad=True)
            grad = torch.randn_like(x)
            if plain is plain_norm_gelu:
                plain = autocast_norm_gelu
            forms = {"own": own} if self.kernels_there() else {}
            forms["plain"] = plain
            if self.device.type == "cuda":
                forms["compiled"] = torch.compile(plain, dynamic=True)
            calls = {form: partial(function, x, **options) for form, function in forms.items()}
            both = {form: partial(forward_backward, call, grad) for form, call in calls.items()}
            for what, runs in ((name, calls), (f"{name}, with backward", both)):
                self.add_times("kernels", what, interleave(runs, self.args.rounds, self.device))
            with torch.no_grad():
                error = (own(x, **options).float() - plain(x, **options).float()).abs().max()
            self.add("kernels", name, largest_difference=f"{float(error):.2g}")
            x.grad = None
        self.codebook_kernels()

    def codebook_kernels(self) -> None:
        config, picked = self.config, int(MASKED * self.frames) * self.args.batch
        targets = torch.randn(config.num_codebooks, picked, config.hidden_size, device=self.device)
        codebooks = self.new_model().codebooks
        statistics = StatisticsBuffer(config, self.device)
        losses, means = torch.zeros(config.num_codebooks, device=self.device), statistics.prediction_sums.clone()
        with torch.no_grad():
            labels = codebooks.assign(targets)
            runs = {
                "codebooks, labels": lambda: codebooks.assign(targets),
                "codebooks, statistics": lambda: statistics.add(labels, targets, losses, means),
            }
            for kernels in (True, False) if self.kernels_there() else (False,):
                for name, timing in self.with_switch(runs, kernels).items():
                    self.add("kernels", f"{name}, {'own' if kernels else 'plain'}", ms=round(timing.wall_ms, 3))
            use_kernels(False)
            agree = (codebooks.assign(targets) == labels).float().mean()
            use_kernels(True)
        self.add("kernels", "codebooks, labels", share_equal=round(float(agree), 6))

    # ---- profile, compile

    def profile(self) -> None:
        model = self.new_model()
        if self.device.type == "cuda":
            compile_layers(model)
        run = self.our_step(model, True)
        for _ in range(3):
            run()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as recorded:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        key = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))[: self.args.top]
        for event in events:
            self.add("profile", event.key[:70], ms=round(getattr(event, key) / 1000, 3), calls=event.count)

    def compile(self) -> None:
        if self.device.type != "cuda":
            return
        torch._dynamo.reset()
        model = self.new_model()
        compile_layers(model)
        run, start = self.our_step(model, True), time.perf_counter()
        run()
        torch.cuda.synchronize()
        self.add("compile", "until the first step is done", seconds=round(time.perf_counter() - start, 1))


def autocast_norm_gelu(x: torch.Tensor, weight, bias, eps: float) -> torch.Tensor:
    """The plain form as autocast runs it: in float32."""
    return plain_norm_gelu(x.float(), weight, bias, eps).to(x.dtype)


def forward_backward(forward: Callable[[], torch.Tensor], grad: torch.Tensor) -> None:
    forward().backward(grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--size", choices=("base", "tiny"), default="base", help="default: base")
    parser.add_argument("--batch", type=int, default=20, help="utterances (20)")
    parser.add_argument("--seconds", type=float, default=11.875, help="their length (11.875: 3.8 M samples in all)")
    parser.add_argument("--frozen", action="store_true", help="without training extractor and projection")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (10)")
    parser.add_argument("--top", type=int, default=25, help="kernels that the profile lists (25)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="found out by itself")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    args = parser.parse_args()
    if min(args.batch, args.rounds, args.top) < 1 or args.seconds < 0.1:
        parser.error("--batch, --rounds and --top must be at least 1, --seconds at least 0.1")
    benchmark = StepBenchmark(args)
    machine = describe_machine(benchmark.device)
    print("  ".join(f"{key} {value}" for key, value in machine.items()))
    for part in PARTS:  # `compile` comes last: it forgets what has been compiled
        if part in args.parts:
            getattr(benchmark, part)()
    if args.json:
        content = {"command": sys.argv, "machine": machine, "rows": benchmark.rows}
        write_text(args.json, json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
