#!/usr/bin/env python
"""Speed and memory of SpidR on this machine, beside whichever of its peers are installed.

    python examples/benchmark.py                                    # a tiny model, everything once, a minute or two
    python examples/benchmark.py --size base --parts inference training --seconds 6 --dtype bfloat16
    python examples/benchmark.py --targets --threads 1 --hour       # what the project holds itself to; hours on a CPU
    python examples/benchmark.py --size base --device cuda --batch 16 --seconds 14.8 --dtype bfloat16 --plot cost.png

Peers: `spidr` (pip install spidr), and Data2VecAudio, HuBERT and Wav2Vec2 of transformers in the same shape. They
have the same weights as far as the architecture allows; where it does throughout, outputs must agree before anything
is timed. Runs are interleaved (A, B, A, B; steps of training in twos, of which the second counts); a ratio is the
median over the rounds and says how many times faster spidr_hf is: by processor time with one thread, by wall time
otherwise.

Parts: training (a whole step: student and teacher, dropout as in the recipe, backward, clipping, AdamW, teacher update,
the same optimizer on both sides), inference (features of all layers), ragged (rows of different lengths), extractor,
positional, codebooks, masks, loader, lengths (cost per second of audio from 1 to 60 s; with --hour an hour, in
windows), memory (peak above the loaded weights, each in a process of its own, and what training is counted to need).

With --targets each part, and each dtype of the first two, has a process of its own: what ran before leaves traces in
the heap and in oneDNN's caches.

float32 is float32 throughout. bfloat16 is autocast in training and bfloat16 weights in inference.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import transformers

from spidr_hf import SpidrConfig, SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.codebooks_spidr import StatisticsBuffer
from spidr_hf.conversion.spidr_format import to_spidr
from spidr_hf.data.batches import PretrainingBatches
from spidr_hf.data.batching import BucketSampler
from spidr_hf.data.manifests import open_manifest
from spidr_hf.data.masking import SpanMask, masked_frames
from spidr_hf.data.sections import DataSection, MaskingSection
from spidr_hf.pretraining.memory import training_memory
from spidr_hf.system.allocation import keep_freed_memory, prepare_training_process
from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path, picture_path
from spidr_hf.system.files import replaced_file, write_text
from spidr_hf.system.processes import device_of
from spidr_hf.units.extractor import Extractor, feature_outputs

from .benchmarks.parity import whole_float32
from .benchmarks.peers import PEERS, Peer, difference, installed_peers, make_peer, spidr_span_masks
from .benchmarks.timing import (
    Timing,
    describe_machine,
    inference_flops,
    interleave,
    peak_flops,
    peak_memory,
    speedup,
    training_flops,
)

RATE = 16_000
MASKED = 0.55  # share of frames that the recipe's spans cover
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARTS = (
    "training",
    "inference",
    "ragged",
    "extractor",
    "positional",
    "codebooks",
    "masks",
    "loader",
    "lengths",
    "memory",
)
TARGET_SECONDS = {"inference": 6.0, "training": 2.0}
LENGTHS = (1, 5, 15, 30, 60)
OURS = "spidr_hf"


class Benchmark:
    """The measurements. Each part is a method and appends rows to `rows`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = device_of(args.device)
        self.longest = max(args.seconds or TARGET_SECONDS.values())
        torch.manual_seed(0)
        self.config = SpidrConfig(**SIZES[args.size])
        self.rows: list[dict] = []
        self.differences: dict[str, float] = {}
        self.model = SpidrForPretraining(self.config).to(self.device).eval()
        self.peers: dict[str, Peer] = {}
        for name in args.peers:
            peer = make_peer(name, self.model, to_spidr)
            peer.model.to(self.device)
            self.differences[name] = difference(peer, self.model, self.audio(2, 2.0))
            self.peers[name] = peer
        self.peaks = {name: peak_flops(self.device, DTYPES[name]) for name in args.dtype}

    def audio(self, batch: int, seconds: float) -> torch.Tensor:
        """Noise: what is in it does not change the time."""
        return torch.randn(batch, int(seconds * RATE), device=self.device)

    def add(
        self, part: str, timings: dict[str, Timing], seconds: float | None = None, flops: float | None = None, **facts
    ) -> None:
        """A row for each side: times, how many times faster we are, audio per second, share of the chip's peak."""
        ours = timings.get(OURS)
        for side, timing in timings.items():
            busy = np.median(timing.decisive)
            peak = self.peaks.get(facts.get("dtype", ""))
            self.rows.append(
                {
                    "part": part,
                    "side": side,
                    **facts,
                    "wall_ms": round(timing.wall_ms, 2),
                    "cpu_ms": round(timing.cpu_ms, 2),
                    "times_faster": None if ours is None or side == OURS else round(speedup(timing, ours), 3),
                    "audio_seconds_per_second": None if seconds is None else round(seconds / busy, 1),
                    "mfu": None if flops is None or not peak else round(flops / busy / peak, 3),
                }
            )
            print(line(self.rows[-1]), flush=True)

    def time(self, runs: dict[str, Callable[[], object]], repeat: int = 1) -> dict[str, Timing]:
        return interleave(runs, self.args.rounds, self.device, repeat)

    def cast(self, dtype: str) -> None:
        """Casts the models for inference: one set of weights in memory."""
        for module in (self.model.spidr, *(peer.model for peer in self.peers.values())):
            module.to(DTYPES[dtype])

    def inference(self) -> None:
        args = self.args
        for dtype in args.dtype:
            self.cast(dtype)
            for seconds in args.seconds or [TARGET_SECONDS["inference"]]:
                x = self.audio(args.batch, seconds).to(DTYPES[dtype])
                runs = {OURS: lambda x=x: self.model.spidr.get_intermediate_outputs(x)}
                runs |= {name: lambda x=x, p=peer: p.features(x, None) for name, peer in self.peers.items()}
                with torch.inference_mode():
                    timings = self.time(runs)
                flops = inference_flops(self.config, args.batch, x.shape[1])
                self.add(
                    "inference", timings, args.batch * seconds, flops, dtype=dtype, batch=args.batch, length=seconds
                )
        self.cast("float32")

    def ragged(self) -> None:
        """Rows of a quarter of the length to the whole: ours packed by length, the peers padded with a mask."""
        seconds = self.longest
        lengths = [int(RATE * seconds * share) for share in np.linspace(0.25, 1, max(4, self.args.batch))]
        rows = [np.random.default_rng(0).standard_normal(n, dtype=np.float32) for n in lengths]
        extractor = Extractor(
            self.model.spidr,
            SpidrFeatureExtractor(),
            feature_outputs(self.model.spidr, [self.config.num_hidden_layers]),
            max_batch_seconds=2 * seconds,
        )
        padded = torch.zeros(len(rows), max(lengths), device=self.device)
        mask = torch.zeros_like(padded, dtype=torch.long)
        for i, row in enumerate(rows):
            padded[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
        runs = {OURS: lambda: extractor(rows), f"{OURS}, padded": lambda: self.model.spidr(padded, mask)}
        for name, peer in self.peers.items():
            if name != "spidr":  # its mask is over pairs of frames, and the caller's to make
                runs[name] = lambda p=peer: p.features(padded, mask)
        with torch.inference_mode():
            timings = self.time(runs)
        self.add("ragged", timings, sum(lengths) / RATE, dtype="float32", batch=len(rows), length=seconds)

    def training(self) -> None:
        args = self.args
        for dtype in args.dtype:
            for seconds in args.seconds or [TARGET_SECONDS["training"]]:
                x = self.audio(args.batch, seconds)
                frames = self.model.spidr._get_feat_extract_output_lengths(x.shape[1])
                masked = torch.rand(args.batch, frames).argsort(1)[:, : int(MASKED * frames)].sort(1).values
                masked = masked.to(self.device)
                if "spidr" in self.peers:
                    self.check_losses(x, masked)
                runs = {OURS: training_step(self.model, self.loss_of(OURS, x, masked), dtype, self.device)}
                if peer := self.peers.get("spidr"):
                    runs["spidr"] = training_step(peer.model, self.loss_of("spidr", x, masked), dtype, self.device)
                    if args.compile:
                        compiled = torch.compile(peer.model)
                        loss = self.loss_of("spidr", x, masked, compiled)
                        runs["spidr compiled"] = training_step(peer.model, loss, dtype, self.device)
                timings = self.time(runs, repeat=2)
                flops = training_flops(self.config, args.batch, x.shape[1], MASKED)
                self.add(
                    "training", timings, args.batch * seconds, flops, dtype=dtype, batch=args.batch, length=seconds
                )
                for module in (self.model, *(peer.model for peer in self.peers.values())):
                    module.eval()

    def loss_of(self, side: str, x: torch.Tensor, masked: torch.Tensor, module=None) -> Callable[[], torch.Tensor]:
        if side == OURS:
            return lambda: self.model(x, mask_time_indices=masked).loss
        module = self.peers[side].model if module is None else module
        return lambda: module(x, mask_indices=masked)[0].mean()

    @torch.no_grad()
    def check_losses(self, x: torch.Tensor, masked: torch.Tensor) -> None:
        """Both losses on the same batch without dropout, before either has trained."""
        if "loss" in self.differences:
            return
        with whole_float32():
            ours, theirs = (float(self.loss_of(side, x, masked)()) for side in (OURS, "spidr"))
        self.differences["loss"] = abs(ours - theirs)
        if abs(ours - theirs) > 1e-3:
            raise ValueError(f"The losses of the same batch differ: {ours:.5f} and {theirs:.5f} of spidr.")

    def extractor(self) -> None:
        """The convolutions over the waveform; the peers' are all alike, so one of them is enough."""
        x = self.audio(self.args.batch, self.longest)
        runs = {OURS: lambda: self.model.spidr.feature_extractor(x)}
        if names := [name for name in self.peers if name != "spidr"]:
            runs[names[0]] = lambda: self.peers[names[0]].model.feature_extractor(x)
        with torch.inference_mode():
            seconds = self.args.batch * self.longest
            self.add("extractor", self.time(runs), seconds, dtype="float32", batch=len(x), length=self.longest)

    def positional(self) -> None:
        x = torch.randn(self.args.batch, int(50 * self.longest), self.config.hidden_size, device=self.device)
        runs = {OURS: lambda: self.model.spidr.encoder.pos_conv_embed(x)}
        if "data2vec" in self.peers:
            module = self.peers["data2vec"].model.encoder.pos_conv_embed
            runs["data2vec"] = lambda: module(x)
        with torch.inference_mode():
            self.add("positional", self.time(runs), dtype="float32", batch=len(x), length=self.longest)

    def codebooks(self) -> None:
        """Labels and their statistics: stacked and with index_add, or codebook by codebook with one-hot matrices."""
        config = self.config
        frames = int(MASKED * 50 * self.longest) * self.args.batch
        targets = torch.randn(config.num_codebooks, frames, config.hidden_size, device=self.device)
        statistics = StatisticsBuffer(config, self.device)
        codebooks = self.model.codebooks
        losses = torch.zeros(config.num_codebooks, device=self.device)
        predictions = torch.zeros(config.num_codebooks, config.codebook_size, device=self.device)

        def ours() -> None:
            statistics.add(codebooks.assign(targets), targets, losses, predictions)

        def one_hot() -> None:
            for k, rows in enumerate(targets):
                labels = torch.cdist(rows, codebooks.sums[k] / codebooks.counts[k][:, None]).argmin(-1)
                matrix = F.one_hot(labels, config.codebook_size).to(rows.dtype)
                matrix.sum(0), matrix.t() @ rows

        with torch.inference_mode():
            self.add("codebooks", self.time({OURS: ours, "one by one": one_hot}), frames=frames)

    def masks(self) -> None:
        """Masks of 20 rows of 600 frames: all rows at once, or one row and span at a time."""
        lengths, rng = np.full(20, 600), np.random.default_rng(0)
        runs = {OURS: lambda: masked_frames(lengths, SpanMask(), rng)}
        with suppress(ImportError):  # the obvious form is beside the tests, in the repository alone
            from tests.reference_masking import reference_span_mask, reference_thin

            runs["row by row"] = lambda: reference_thin(reference_span_mask(lengths, rng), rng)
        if "spidr" in self.peers and (draw := spidr_span_masks()):
            random = torch.Generator()
            recipe = (0.8, 10, "static", 0.0, 2, 1)  # probability, length, kind, other, fewest spans, space
            runs["spidr"] = lambda: draw((20, 600), None, *recipe, no_overlap=False, generator=random)
        timings = interleave(runs, max(21, self.args.rounds), torch.device("cpu"))
        self.add("masks", timings, batch=20)

    def loader(self) -> None:
        """Reading, standardising, cropping and masking in one process: FLAC files of noise."""
        rng, count, seconds = np.random.default_rng(0), 16, 5
        with tempfile.TemporaryDirectory() as folder:
            for i in range(count):
                noise = 0.1 * rng.standard_normal(seconds * RATE)
                soundfile.write(f"{folder}/{i}.flac", noise.clip(-1, 1), RATE)
            source = open_manifest(folder)
            data = DataSection(manifest=folder, max_batch_length=4 * seconds * RATE)
            batches = PretrainingBatches(source, data, MaskingSection(), self.config)
            sampler = BucketSampler(source.num_samples, max_batch_length=data.max_batch_length)
            keys = [key for key, _ in zip(iter(sampler), range(count // 4), strict=False)]
            timings = interleave({OURS: lambda: [batches[key] for key in keys]}, self.args.rounds, torch.device("cpu"))
        self.add("loader", timings, count * seconds, batch=4, length=seconds)

    def lengths(self) -> None:
        """Cost per second of audio of one recording; in each run as much audio of every length as of the longest."""
        lengths = [float(n) for n in LENGTHS if n <= self.args.longest]
        spidr = self.model.spidr
        extractor = Extractor(spidr, SpidrFeatureExtractor(), feature_outputs(spidr, [self.config.num_hidden_layers]))
        recordings = {n: self.audio(1, n)[0].cpu().numpy() for n in lengths}
        times = {str(n): int(lengths[-1] // n) for n in lengths}
        runs = {str(n): lambda n=n, x=x: [extractor([x]) for _ in range(times[str(n)])] for n, x in recordings.items()}
        timings = {
            name: Timing([t / times[name] for t in timing.wall], [t / times[name] for t in timing.cpu])
            for name, timing in interleave(runs, self.args.rounds, self.device).items()
        }
        if self.args.hour:
            x = np.random.default_rng(0).standard_normal(3600 * RATE, dtype=np.float32)
            timings["3600.0"] = once(lambda: extractor([x]), self.device)
        for name, timing in timings.items():
            n = float(name)
            flops = inference_flops(self.config, 1, int(min(n, extractor.window / 50) * RATE)) if n <= 60 else None
            self.add("lengths", {OURS: timing}, n, flops, dtype="float32", batch=1, length=n)
            self.rows[-1]["ms_per_second"] = round(1000 * float(np.median(timing.decisive)) / n, 2)

    def memory(self) -> None:
        """Peaks above the loaded weights, measured; and what training is counted to need."""
        sides = [OURS, *(name for name in self.peers if name == "spidr")]
        for seconds in (60.0, *([3600.0] if self.args.hour else [])):
            for side in sides if seconds <= 60 else [OURS]:
                case = {"side": side, "seconds": seconds, "size": self.args.size, "device": str(self.device)}
                row = {"part": "memory", "side": side, "dtype": "float32", "batch": 1, "length": seconds}
                self.rows.append({**row, "peak_mib": round(alone(peak_of, case) / 2**20)})
                print(line(self.rows[-1]), flush=True)
        need = training_memory(SpidrConfig()).total
        for card in (24, 40, 80):
            fits = 100_000 * bisect(range(100_000, 100_000_000, 100_000), card * 2**30, key=_needed)
            side = f"{card} GB, spidr-base, bfloat16"
            self.rows.append({"part": "training memory", "side": side, "samples_that_fit": fits})
            print(f"training memory: {need / 2**30:.1f} GiB for 3.8 M samples (counted); {card} GB: {fits / 1e6:.1f} M")


def _needed(samples: int) -> int:
    return training_memory(SpidrConfig(), batch_samples=samples).total


def once(run: Callable[[], object], device: torch.device) -> Timing:
    """One run, without another to warm up."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Timing([time.perf_counter() - wall], [0.0 if device.type == "cuda" else time.process_time() - cpu])


def training_step(model, loss_of: Callable[[], torch.Tensor], dtype: str, device: torch.device) -> Callable[[], None]:
    """One complete step of a model, the teacher's update included; the same for ours and for `spidr`'s."""
    model.train()
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("teacher")]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.01, fused=True)
    update = model.update_teacher if hasattr(model, "update_teacher") else model.update_ema
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        # What the recipe's mixed precision is: float32 weights, bfloat16 products.
        with torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext():
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 10.0)
        optimizer.step()
        optimizer.zero_grad()
        update(step)

    return run


def peak_of(case: dict) -> int:
    """Peak memory of a case in bytes: loads one model, warms up on a second of audio, and measures."""
    torch.set_num_threads(1)
    device = torch.device(case["device"])
    model = SpidrForPretraining(SpidrConfig(**SIZES[case["size"]]))
    if case["side"] == OURS:
        spidr = model.spidr.to(device).eval()
        layers = list(range(1, model.config.num_hidden_layers + 1))
        extractor = Extractor(
            spidr, SpidrFeatureExtractor(), feature_outputs(spidr, layers if case["seconds"] <= 60 else layers[-1:])
        )

        def run(x: torch.Tensor) -> object:
            return (
                extractor([x.numpy()]) if case["seconds"] > 60 else spidr.get_intermediate_outputs(x[None].to(device))
            )
    else:
        peer = make_peer(case["side"], model).model.to(device)

        def run(x: torch.Tensor) -> object:
            return peer.get_intermediate_outputs(x[None].to(device))

    del model
    x = torch.randn(int(case["seconds"] * RATE))
    with torch.inference_mode():
        run(x[:RATE])
        return peak_memory(lambda: run(x), device)


def line(row: dict) -> str:
    """A row as the terminal shows it."""
    facts = [f"{row['length']:g} s" if "length" in row else "", f"x {row['batch']}" if "batch" in row else ""]
    cells = [f"{row['part']:11}{row.get('dtype') or '':9}{facts[0]:>8}{facts[1]:>5}  {row['side']:18}"]
    if "peak_mib" in row:
        return cells[0] + f"{row['peak_mib']:8d} MiB above the weights"
    ratio = f"{row['times_faster']:.2f}x" if row.get("times_faster") else ""
    cells.append(f"{ratio:>8}{row['wall_ms']:11.1f} ms{row['cpu_ms']:11.1f} ms cpu")
    if row.get("audio_seconds_per_second"):
        cells.append(f"{row['audio_seconds_per_second']:9.1f} audio s/s")
    if row.get("mfu"):
        cells.append(f"  MFU {100 * row['mfu']:.0f} %")
    return "".join(cells)


def targets(rows: list[dict]) -> list[tuple[str, float, str, float, bool]]:
    """(what, measured, relation, target, met) of everything that the rows allow to judge."""

    def best(part: str, side: str, dtype: str | None = None) -> float | None:
        found = [r for r in rows if r["part"] == part and r["side"] == side and dtype in (None, r.get("dtype"))]
        return found[-1]["times_faster"] if found else None

    wanted = [
        ("training step, bfloat16, against spidr", best("training", "spidr", "bfloat16"), ">=", 1.25),
        ("training step, bfloat16, against spidr compiled", best("training", "spidr compiled", "bfloat16"), ">=", 1.1),
        ("training step, float32, against spidr", best("training", "spidr", "float32"), ">=", 1.1),
        ("inference, float32, against spidr", best("inference", "spidr", "float32"), ">=", 1.25),
        *((f"inference, float32, against {n}", best("inference", n, "float32"), ">=", 1.15) for n in PEERS[1:]),
        ("mask generation, against spidr's, row by row", best("masks", "spidr"), ">=", 20.0),
    ]
    peaks = {r["side"]: r["peak_mib"] for r in rows if r["part"] == "memory" and r["length"] == 60}
    if "spidr" in peaks:
        wanted.append(("peak memory of 60 s, share of spidr's", peaks[OURS] / peaks["spidr"], "<=", 0.5))
    cost = {r["length"]: r["ms_per_second"] for r in rows if r["part"] == "lengths"}
    for long, short, limit in ((60.0, 5.0, 1.4), (3600.0, 60.0, 1.1)):
        if long in cost and short in cost:
            wanted.append((f"cost per second of {long:g} s over {short:g} s", cost[long] / cost[short], "<=", limit))
    return [
        (what, value, relation, target, value >= target if relation == ">=" else value <= target)
        for what, value, relation, target in wanted
        if value is not None
    ]


def draw(rows: list[dict], path: Path) -> None:
    """Cost per second of audio over the length, of every side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["part"] in ("lengths", "inference", "training") and row.get("audio_seconds_per_second"):
            name = f"{row['part']}, {row['side']}, {row['dtype']}"
            curves.setdefault(name, []).append((row["length"], 1000 / row["audio_seconds_per_second"]))
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xlabel="length of an utterance (s)", ylabel="ms per second of audio", xscale="log", ylim=(0, None))
    axes.legend(fontsize=7)
    with replaced_file(path) as partial:
        figure.savefig(partial, dpi=150)


def main() -> None:
    args = parse_args()
    with clear_errors(needs=["matplotlib"] if args.plot else []):
        if args.threads:
            torch.set_num_threads(args.threads)
        machine = describe_machine(device_of(args.device))
        print(f"spidr {args.size} on {machine['device']}, {machine['threads']} threads, torch {torch.__version__}")
        if args.targets:
            results = [alone(measure, job, number == 0) for number, job in enumerate(jobs(args))]
        else:
            results = [measure(args)]
        rows = [row for result in results for row in result["results"]]
        met = targets(rows) if args.targets else []
        if met:
            print("\ntargets")
        for what, value, relation, target, ok in met:
            print(f"  {'met   ' if ok else 'MISSED'}  {what}: {value:.2f} ({relation} {target:g})")
        if args.plot:
            draw(rows, args.plot)
        if args.json:
            result = {
                **machine,
                "transformers": transformers.__version__,
                "size": args.size,
                "rounds": args.rounds,
                "differences": {name: value for result in results for name, value in result["differences"].items()},
                "peak_flops": {name: value for result in results for name, value in result["peak_flops"].items()},
                "results": rows,
                "targets": [dict(zip(("what", "value", "relation", "target", "met"), t, strict=True)) for t in met],
            }
            write_text(args.json, json.dumps(result, indent=2) + "\n")


def jobs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The parts one by one, and those of models in one dtype at a time."""
    options = vars(args)
    return [
        argparse.Namespace(**{**options, "parts": [part], "dtype": dtype})
        for part in args.parts
        for dtype in ([[name] for name in args.dtype] if part in ("training", "inference") else [args.dtype])
    ]


def alone(function: Callable, *arguments):
    """What a function returns in a process of its own, where no heap, cache or weights of earlier work are left."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(args: argparse.Namespace, announce: bool = True) -> dict:
    """Measures `args.parts`: `results` (rows), `differences` of outputs from the peers', `peak_flops` by dtype."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if "training" in args.parts:
        prepare_training_process()  # as the pretraining command does; both sides gain
    if "lengths" in args.parts:
        keep_freed_memory()  # as the extraction commands do
    benchmark = Benchmark(args)
    if announce:
        for name, value in benchmark.differences.items():
            kind = "weights alike" if benchmark.peers[name].equal else "but for the positional convolution alike"
            print(f"features of {name}: {kind}, largest difference {value:.1g} standard deviations", flush=True)
    for part in args.parts:
        getattr(benchmark, part)()
    return {"results": benchmark.rows, "differences": benchmark.differences, "peak_flops": benchmark.peaks}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), help="default: tiny; base with --targets")
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help="what to measure (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument(
        "--seconds",
        type=float,
        nargs="+",
        help="lengths of utterances (default: 2; with --targets 2 in training, 6 in inference)",
    )
    parser.add_argument("--batch", type=int, default=2, help="utterances per batch")
    parser.add_argument(
        "--longest", type=float, help="longest recording of the part lengths (default: 15; 60 with --targets)"
    )
    parser.add_argument("--hour", action="store_true", help="an hour, too, in the parts lengths and memory")
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="models beside ours; --peers alone: none (default: all installed)"
    )
    parser.add_argument("--compile", action="store_true", help="spidr's compiled form, too (needs a C++ compiler)")
    parser.add_argument(
        "--targets", action="store_true", help="spidr-base in the shapes of the targets, and whether met"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--threads", type=int, help="threads of the CPU (default: torch's choice)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU where there is one"
    )
    parser.add_argument("--json", type=output_path, help="write the numbers here, too")
    parser.add_argument("--plot", type=picture_path, help="draw cost against length here (needs matplotlib)")
    args = parser.parse_args()
    args.size = args.size or ("base" if args.targets else "tiny")
    # Training comes first: casting for inference rounds the weights, and losses are compared before.
    args.parts = sorted(args.parts or PARTS, key=PARTS.index)
    args.seconds = args.seconds or ([] if args.targets else [2.0])
    args.longest = args.longest or (60.0 if args.targets else 15.0)
    installed = installed_peers()
    if args.peers is None:
        args.peers = installed
    elif missing := set(args.peers) - set(installed):
        parser.error(f"{', '.join(sorted(missing))} is not installed: pip install {' '.join(sorted(missing))}")
    if args.batch < 1 or args.rounds < 1 or min(args.seconds, default=1) < 0.1 or (args.threads or 1) < 1:
        parser.error("--batch, --rounds and --threads must be at least 1, --seconds at least 0.1")
    return args


if __name__ == "__main__":
    main()
