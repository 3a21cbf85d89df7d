"""Whole training steps to be timed: ours in every form that may be the best on a GPU, and that of the `spidr` package.

A step is all of it, from a batch in page-locked memory to the numbers that a run reports: both sides copy the batch,
run forward and backward with the recipe's dropout, clip, step their optimizer, move codebooks and teacher. Ours is made
of the parts of `examples/pretrain.py`'s loop, its late reading of the numbers included.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from spidr_hf.configuration_spidr import frame_lengths
from spidr_hf.data.batches import Batch
from spidr_hf.data.batching import BatchKey, Position
from spidr_hf.kernels_spidr import use_kernels
from spidr_hf.modeling_spidr import SpidrForPretraining
from spidr_hf.pretraining.setup import compile_layers, make_optimizer
from spidr_hf.pretraining.updates import StepResult, Updates
from spidr_hf.training.checkpoints import TrainerState
from spidr_hf.training.optimizing import LossScale, scale_and_clip
from spidr_hf.training.schedules import OptimizerSection
from spidr_hf.training.transfers import BatchMover

from .peers import spidr_batch

MASKED = 0.55  # share of frames that the recipe's spans cover


@dataclass(frozen=True)
class Form:
    """How the model runs. Attributes: what is compiled ("", "layers", "layers and convolutions", "forward"), and
    whether own kernels run."""

    compiled: str
    kernels: bool

    def __str__(self) -> str:
        return f"{self.compiled or 'nothing'} compiled, {'own' if self.kernels else 'plain'} kernels"

    def prepare(self, model: SpidrForPretraining) -> None:
        """Compile what is to be compiled."""
        if self.compiled == "forward":
            model.compile(dynamic=True)
        elif self.compiled:
            compile_layers(model, convolutions=self.compiled != "layers")


def forms(compiles: bool, kernels: bool) -> list[Form]:
    """The forms that can run; the first is the plain one."""
    compiled = ("", "layers", "layers and convolutions", "forward") if compiles else ("",)
    return [Form(what, own) for what in compiled for own in ((False, True) if kernels else (False,))]


# What `examples/pretrain.py` does on a GPU unless told otherwise.
DEFAULT = Form("layers", True)


class _Silent:
    """Stands for a run's reporter."""

    def batch(self, batch: Batch) -> None:
        pass

    def update(self, step: int, epoch: int, result: StepResult, lr: float, decay: float) -> None:
        pass

    def say(self, message: str | None) -> None:
        pass


def noise_batches(model: SpidrForPretraining, rows: int, samples: int, count: int = 3) -> list[Batch]:
    """Batches as a loader gives them: on the host, page-locked where there is a GPU."""
    frames = frame_lengths(model.config, samples)
    batches = []
    for index in range(count):
        masked = torch.rand(rows, frames).argsort(1)[:, : int(MASKED * frames)].sort(1).values
        key = BatchKey(0, index, np.arange(rows), Position())
        batch = Batch(torch.randn(rows, samples), masked, None, key, rows * samples)
        batches.append(batch.pin_memory() if model.device.type == "cuda" else batch)
    return batches


class OurStep:
    """Calling it makes an update of `model` in `form`, from the next of `batches`."""

    def __init__(self, model: SpidrForPretraining, batches: Sequence[Batch], form: Form):
        self.model, self.batches, self.form = model.train(), batches, form
        form.prepare(model)
        self.optimizer = make_optimizer(model, OptimizerSection())
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.move, self.number = BatchMover(model.device), 0
        self.state = TrainerState(data="noise")
        self.updates = Updates(model, self.optimizer, self.state, LossScale(False), _Silent(), max_nonfinite=10)

    def __call__(self) -> None:
        self.number += 1
        model, batch = self.model, self.batches[self.number % len(self.batches)]
        before = use_kernels(self.form.kernels)
        try:
            with torch.autocast(model.device.type, torch.bfloat16):
                output = model(**self.move(batch).inputs)
            (output.loss * output.num_masked_frames).backward()
            statistics = model.reduce_statistics()
            norm = scale_and_clip(self.parameters, 1 / statistics.num_masked_frames, 10.0)
            self.updates.make(self.number, [batch], 5e-4, statistics, norm)
        finally:
            use_kernels(before)


class SpidrStep:
    """Calling it makes an update of the `spidr` package's model as that package trains: its own optimizer, gradient
    scaler and schedule, batches of its own collator, compiled as its own loop compiles it (`compiled`)."""

    def __init__(self, model: nn.Module, batches: Sequence[Batch], device: torch.device, compiled: bool):
        from spidr.config import OptimizerConfig
        from spidr.optimizer import build_optimizer

        self.model, self.device, self.number = model.train(), device, 0
        self.max_norm = OptimizerConfig().max_norm
        self.optimizer, self.scaler, self.schedule = build_optimizer(model, OptimizerConfig())
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.batches = [spidr_batch(model, batch.input_values) for batch in batches]
        if device.type == "cuda":
            self.batches = [{name: x.pin_memory() for name, x in batch.items()} for batch in self.batches]
        if compiled:
            model.compile(dynamic=True)

    def __call__(self) -> None:
        self.number += 1
        batch = self.batches[self.number % len(self.batches)]
        inputs = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(inputs.pop("waveforms"), **inputs)[0].mean()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.model.update_ema(self.number)


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What a model and its optimizer hold between steps."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return sum(x.numel() * x.element_size() for x in tensors)


def in_a_row(step: Callable[[], None], count: int) -> Callable[[], None]:
    """`count` steps, between which nothing waits for the device unless a step does, as in training."""

    def run() -> None:
        for _ in range(count):
            step()

    return run


__all__ = ["DEFAULT", "MASKED", "Form", "OurStep", "SpidrStep", "forms", "in_a_row", "noise_batches", "state_bytes"]
