#!/usr/bin/env python
"""Where a pretraining step spends its time on a GPU: the whole step, its modules, its kernels.

    python examples/benchmark_cuda.py --json examples/benchmark_results/NAME.json            # one full batch, bfloat16
    python examples/benchmark_cuda.py --frozen --parts step                                  # as after the freeze
    python examples/benchmark_cuda.py --parts step --new-lengths                             # as a run's batches are
    python examples/benchmark_cuda.py --count                                                # without a GPU
    python examples/benchmark_cuda.py --size tiny --batch 2 --seconds 1 --device cpu         # that it works, anywhere

Parts: step (ms, share of the chip's peak, peak memory; with layers, layers and convolutions, or the whole forward
compiled, own kernels on or off; and `spidr` as it trains, compiled and on what its collator makes, where it is
installed: interleaved, on the same audio), modules (forward and backward of extractor, positional convolutions, a
layer and the objective, each alone), kernels (each own kernel beside its plain form and that form compiled, errors
included), profile (the GPU's busiest kernels in one step), compile (seconds until the first compiled step is done, and
how many graphs it and other lengths take; a second start shows the cache). At the end `best` says which form of the
step, of the extractor and of the positional convolutions was the fastest, and how `examples/pretrain.py` is told to
use it.

--count computes nothing: it counts what the uncompiled step takes on a GPU (operations, bytes read and written, flops,
memory, values that Python waits for), with a PyTorch for CPUs and a C++ compiler. With --compile it counts the step
with compiled layers, too (minutes; needs Triton): the compiler writes its code for an H100.

A step is all of it: a batch copied from the host, student and teacher, dropout as in the recipe, backward, clipping,
AdamW, codebooks and teacher, the numbers that a run reports. Several run in a row, as in training, without waiting
for the device in between. Audio is noise. Figures are medians over rounds; the first rounds warm up.
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
from torch._dynamo.utils import counters

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf import SpidrConfig, SpidrForPretraining
from spidr_hf.codebooks_spidr import StatisticsBuffer
from spidr_hf.kernels_spidr import (
    grouped_conv1d,
    kernels_run,
    norm_gelu,
    plain_grouped_conv1d,
    plain_norm_gelu,
    use_kernels,
)
from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path
from spidr_hf.system.files import write_text
from spidr_hf.system.processes import device_of

from .benchmarks.counting import count_step, pretend_cuda
from .benchmarks.peers import difference, installed_peers, make_peer
from .benchmarks.steps import (
    DEFAULT,
    MASKED,
    Form,
    OurStep,
    SpidrStep,
    forms,
    in_a_row,
    noise_batches,
    state_bytes,
)
from .benchmarks.timing import Timing, describe_machine, interleave, peak_flops, peak_memory, speedup, training_flops

PARTS = ("step", "modules", "kernels", "profile", "compile")
TINY = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 768,
    "conv_dim": (64,) * 7,
    "num_codebooks": 2,
    "codebook_size": 64,
}


# What --count counts: options of `count_step`.
COUNTED: dict[str, dict[str, bool]] = {
    "own kernels": {},
    "padded": {"padded": True},
    "after the freeze": {"frozen": True},
    "plain": {"kernels": False},
}
# What a run on a GPU does; the compiler takes minutes.
COMPILED = {"compiled": {"compiled": True}}
OTHER_LENGTHS = (0.9, 0.77, 0.62, 0.5)  # shares of --seconds
# What tells `examples/pretrain.py` to run in a form.
SWITCHES = {"": "--run.compile false", "layers": "", "layers and convolutions": "--run.compile_convolutions true"}


class StepBenchmark:
    """Models, batches on the host, and the rows of the result."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, device_of(args.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA GPU here (leave --device out for the CPU).")
        self.machine = describe_machine(self.device)
        self.config = SpidrConfig(**(TINY if args.size == "tiny" else {}))
        self.compiles = self.device.type == "cuda" or args.compile
        self.rows: list[dict] = []
        self.times: dict[str, dict[str, float]] = {}  # ms by what has several forms, and form
        model = self.new_model()
        self.samples = int(args.seconds * 16_000)
        self.frames = model.spidr._get_feat_extract_output_lengths(self.samples)
        # Several, so that no batch is in a cache when it is used again; every length once, where lengths are to be new.
        self.batches = noise_batches(model, args.batch, self.samples)
        if args.new_lengths:
            stride, count = self.config.inputs_to_logits_ratio, (args.rounds + 1) * args.steps
            lengths = [self.samples - number * stride for number in range(count)]
            if lengths[-1] < 10 * stride:
                raise ValueError("--new-lengths: a longer --seconds, or fewer --rounds and --steps.")
            self.batches = [batch for length in lengths for batch in noise_batches(model, args.batch, length, count=1)]

    def new_model(self) -> SpidrForPretraining:
        torch.manual_seed(0)
        model = SpidrForPretraining(self.config).to(self.device).train()
        if self.args.frozen:
            model.freeze_feature_encoder()
        return model

    def kernels_there(self) -> bool:
        return kernels_run(torch.empty(0, device=self.device))

    def default_form(self) -> Form:
        """What pretraining would use here."""
        return Form(DEFAULT.compiled if self.compiles else "", self.kernels_there())

    def add(self, part: str, name: str, **facts) -> None:
        self.rows.append({"part": part, "name": name, **facts})
        print(f"{part:8} {name:50} " + "  ".join(f"{key} {value}" for key, value in facts.items()), flush=True)

    def write(self) -> None:
        """The rows so far, so that those of a command that is cut off are there."""
        if self.args.json:
            content = {"command": sys.argv, "machine": self.machine, "rows": self.rows}
            write_text(self.args.json, json.dumps(content, indent=1, default=str) + "\n")

    def add_times(self, part: str, name: str, timings: dict[str, Timing]) -> None:
        """A row for each form, with how many times faster than the plain one it is."""
        for form, timing in timings.items():
            ratio = round(speedup(timings["plain"], timing), 2)
            self.add(part, f"{name}, {form}", ms=round(timing.wall_ms, 3), times_faster=ratio)

    # ---- the whole step

    def step(self) -> None:
        """In groups, each beside the default form; what compiles for minutes comes when the others are written."""
        ours = forms(self.compiles, self.kernels_there())
        quick = [form for form in ours if form.compiled in ("", DEFAULT.compiled)]
        self.time_steps({str(form): partial(self.our_step, form) for form in quick})
        if "spidr" in installed_peers() and not self.args.frozen:
            self.step_of_spidr()
        if slow := [form for form in ours if form not in quick]:
            self.time_steps({str(form): partial(self.our_step, form) for form in slow})

    def step_of_spidr(self) -> None:
        try:
            from spidr.environment import setup_pytorch

            setup_pytorch(use_deterministic=False)  # for all that is timed from here on
            names = {"spidr eager": False} | ({"spidr compiled": True} if self.compiles else {})
            self.time_steps({name: partial(self.spidr_step, compiled) for name, compiled in names.items()})
        except ImportError as error:
            print(f"spidr is left out, something that it needs is not installed: {error}", file=sys.stderr)

    def our_step(self, form: Form) -> OurStep:
        return OurStep(self.new_model(), self.batches, form)

    def spidr_step(self, compiled: bool) -> SpidrStep:
        from spidr_hf.conversion.spidr_format import to_spidr

        model = self.new_model().eval()
        peer = make_peer("spidr", model, to_spidr)
        peer.model.to(self.device)
        row = self.batches[0].input_values[:1].to(self.device)
        print(f"outputs differ by {difference(peer, model, row):.2g} standard deviations")
        return SpidrStep(peer.model, self.batches, self.device, compiled)

    def time_steps(self, made: dict[str, Callable[[], OurStep | SpidrStep]]) -> None:
        """Time what is `made`, beside the default form, and add rows of it."""
        default = str(self.default_form())
        steps = {name: make() for name, make in made.items()}
        beside = {} if default in steps else {default: self.our_step(self.default_form())}
        count = self.args.steps
        runs = {name: in_a_row(step, count) for name, step in (beside | steps).items()}
        timings = interleave(runs, self.args.rounds, self.device)
        flops = training_flops(self.config, self.args.batch, self.samples, MASKED, self.args.frozen)
        peak, ours = peak_flops(self.device, torch.bfloat16), timings[default]
        for name, step in steps.items():
            ms = timings[name].wall_ms / count
            memory = peak_memory(step, self.device) + state_bytes(step.model, step.optimizer)
            self.add(
                "step",
                name,
                ms=round(ms, 2),
                default_is_times_faster=round(speedup(timings[name], ours), 2),
                mfu=round(1000 * flops / ms / peak, 3) if peak else None,
                audio_seconds_per_second=round(self.args.batch * self.args.seconds * 1000 / ms),
                memory_gib=round(memory / 2**30, 2),
            )
            if isinstance(step, OurStep):
                self.times.setdefault("step", {})[name] = ms
        self.write()

    # ---- modules

    def modules(self) -> None:
        model, rows, width = self.new_model(), self.args.batch, self.config.hidden_size
        x = self.batches[0].input_values.to(self.device)
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
        alone = {
            "extractor": (model.spidr.feature_extractor, x),
            "positional convolutions": (encoder.pos_conv_embed, hidden),
        }
        if self.compiles:
            for name, (module, inputs) in alone.items():
                parts[f"{name}, compiled"] = (partial(torch.compile(module, dynamic=True), inputs), 1)
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
                what, _, compiled = name.partition(", ")
                if what in alone:
                    self.times.setdefault(what, {})[", ".join(filter(None, (compiled, form)))] = timing.wall_ms

    def with_switch(self, runs: dict[str, Callable[[], object]], kernels: bool) -> dict[str, Timing]:
        before = use_kernels(kernels)
        try:
            return interleave(runs, self.args.rounds, self.device)
        finally:
            use_kernels(before)

    # ---- kernels

    def kernels(self) -> None:
        dtype, config, rows = torch.bfloat16, self.config, self.args.batch
        channels, width, groups = config.conv_dim[-1], config.hidden_size, config.num_conv_pos_embedding_groups
        outputs = self.samples // config.conv_stride[0]  # of the first convolution, the largest there are
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
            functions = {"own": own} if self.kernels_there() else {}
            functions["plain"] = plain
            if self.compiles:
                functions["compiled"] = torch.compile(plain, dynamic=True)
            calls = {form: partial(function, x, **options) for form, function in functions.items()}
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
            before = use_kernels(False)
            agree = (codebooks.assign(targets) == labels).float().mean()
            use_kernels(before)
        self.add("kernels", "codebooks, labels", share_equal=round(float(agree), 6))

    # ---- profile, compile

    def profile(self) -> None:
        run = OurStep(self.new_model(), self.batches, self.default_form())
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
            self.add("profile", event.key[:50], ms=round(getattr(event, key) / 1000, 3), calls=event.count)

    def compile(self) -> None:
        """Seconds and graphs of the first step, and of one step each at other lengths, which should cost no more."""
        if not self.compiles:
            return
        default = self.default_form()
        for form in (default, Form("layers and convolutions", default.kernels)):
            torch._dynamo.reset()
            counters.clear()
            step = OurStep(self.new_model(), self.batches, form)
            seconds, graphs = self.timed(step)
            self.add("compile", f"{form}: the first step", seconds=seconds, graphs=graphs)
            total = 0.0
            for share in OTHER_LENGTHS:
                step.batches = noise_batches(step.model, self.args.batch, int(share * self.samples), count=1)
                more, graphs = self.timed(step)
                total += more
            name = f"{form}: {len(OTHER_LENGTHS)} more lengths"
            self.add("compile", name, seconds=round(total, 1), graphs=graphs)

    def timed(self, step: OurStep) -> tuple[float, int]:
        """Seconds of one step, and the graphs that there are after it."""
        start = time.perf_counter()
        step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return round(time.perf_counter() - start, 1), counters["stats"]["unique_graphs"]

    def best(self) -> None:
        """The fastest form of what has several, and how much faster than the default it is."""
        default = self.default_form()
        for what, times in self.times.items():
            if len(times) == 1:
                continue
            usual = str(default) if what == "step" else "own kernels" if default.kernels else "plain"
            fastest = min(times, key=lambda form: times[form])
            gain = round(times[usual] / times[fastest], 2)
            self.add("best", what, form=fastest, ms=round(times[fastest], 2), times_faster_than_default=gain)
            for form in forms(self.compiles, self.kernels_there()) if what == "step" else ():
                if str(form) == fastest:
                    self.add("best", "switches of examples/pretrain.py", switches=switches(form))


def count(args: argparse.Namespace) -> list[dict]:
    """Print what a step takes in each of `COUNTED`; returns the rows."""
    changes = dict(TINY) if args.size == "tiny" else {}
    if args.layers:
        changes |= {"num_hidden_layers": args.layers, "num_codebooks": min(args.layers, SpidrConfig().num_codebooks)}
    rows = []
    for form, options in (COUNTED | (COMPILED if args.compile else {})).items():
        counted = count_step(SpidrConfig(**changes), args.batch, int(args.seconds * 16_000), **options)
        row = {"form": form, "operations": counted.operations, "gb": round(counted.moved / 1e9, 2)}
        row |= {"tflop": round(counted.flops / 1e12, 3), "peak_gib": round(counted.peak / 2**30, 2)}
        row["values_asked_for"] = counted.reads
        for part, of_part in counted.parts.items():
            row[f"{part}: operations"], row[f"{part}: gb"] = of_part.operations, round(of_part.moved / 1e9, 2)
        rows.append(row)
        print(f"{form:18}" + "  ".join(f"{key} {value}" for key, value in row.items() if key != "form"), flush=True)
    return rows


def switches(form: Form) -> str:
    """What to add to the command of a run on a GPU, so that it uses this form."""
    if form.compiled not in SWITCHES:
        return "none: this form is for comparison only"
    found = [SWITCHES[form.compiled], "" if form.kernels else "--run.kernels false"]
    return " ".join(filter(None, found)) or "none: it is the default"


def autocast_norm_gelu(x: torch.Tensor, weight, bias, eps: float) -> torch.Tensor:
    """The plain form as autocast runs it: in float32."""
    return plain_norm_gelu(x.float(), weight, bias, eps).to(x.dtype)


def forward_backward(forward: Callable[[], torch.Tensor], grad: torch.Tensor) -> None:
    forward().backward(grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--batch", type=int, default=20, help="utterances")
    parser.add_argument("--seconds", type=float, default=11.875, help="their length; 11.875 makes 3.8 M samples in all")
    parser.add_argument("--new-lengths", action="store_true", help="another length in every step, none of them twice")
    parser.add_argument("--count", action="store_true", help="count the step instead of timing it; needs no GPU")
    parser.add_argument("--layers", type=int, help="with --count: layers of the model (default: those of --size)")
    parser.add_argument("--frozen", action="store_true", help="without training extractor and projection")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds")
    parser.add_argument("--steps", type=int, default=3, help="steps in a row in each round of the part step")
    parser.add_argument("--top", type=int, default=25, help="kernels that the profile lists")
    parser.add_argument("--compile", action="store_true", help="compile on a CPU, too, and for --count")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU where there is one"
    )
    parser.add_argument("--json", type=output_path, help="write the rows here, too")
    args = parser.parse_args()
    if min(args.batch, args.rounds, args.steps, args.top) < 1 or args.seconds < 0.1:
        parser.error("--batch, --rounds, --steps and --top must be at least 1, --seconds at least 0.1")
    with clear_errors():
        if args.count:
            pretend_cuda()
            rows = count(args)
            if args.json:
                content = {"command": sys.argv, "torch": torch.__version__, "rows": rows}
                write_text(args.json, json.dumps(content, indent=1) + "\n")
            return
        benchmark = StepBenchmark(args)
        print("  ".join(f"{key} {value}" for key, value in benchmark.machine.items()))
        for part in PARTS:  # `compile` comes last: it forgets what has been compiled
            if part in args.parts:
                getattr(benchmark, part)()
                benchmark.write()
        benchmark.best()
        benchmark.write()


if __name__ == "__main__":
    main()
