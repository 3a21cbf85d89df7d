"""Updates decided on the device and reported a step later equal updates decided by Python at once."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import random_mask, tiny_model

from spidr_hf.data.batches import Batch
from spidr_hf.data.batching import BatchKey, Position
from spidr_hf.pretraining.config import make_config
from spidr_hf.pretraining.setup import make_optimizer
from spidr_hf.pretraining.updates import Updates
from spidr_hf.system.errors import RunFolderError
from spidr_hf.system.host_copy import HostCopy
from spidr_hf.training.checkpoints import TrainerState
from spidr_hf.training.optimizing import LossScale, scale_and_clip
from spidr_hf.training.transfers import BatchMover

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


class Report:
    """Writes down what a reporter is told."""

    def __init__(self):
        self.rows, self.lines, self.batches = [], [], []

    def batch(self, batch):
        self.batches.append(batch.key.index)

    def update(self, step, epoch, result, lr, decay):
        self.rows.append((step, epoch, result.values if result.finite else None, lr, decay, len(self.batches)))

    def say(self, line):
        self.lines.append(line)


def batch(index: int, samples: int = 5000) -> Batch:
    generator = torch.Generator().manual_seed(index)
    audio = torch.randn(2, samples, generator=generator)
    masked = random_mask(2, 15, seed=index).nonzero()[:, 1].view(2, -1)
    return Batch(audio, masked, None, BatchKey(index // 3, index, [0, 1], Position()), 2 * samples)


def run(late: bool, poisoned: set[int], *, max_nonfinite: int = 10, steps: int = 6, **changes) -> SimpleNamespace:
    """Six steps, of which some have a non-finite gradient; freezes after the fourth."""
    torch.manual_seed(0)
    model = tiny_model(freeze_step=4, **changes).to(DEVICE).train()
    optimizer = make_optimizer(
        model, make_config({"run": {"model_type": "spidr"}, "data": {"manifest": "x"}}).optimizer
    )
    state, report = TrainerState(data="x"), Report()
    updates = Updates(model, optimizer, state, LossScale(False), report, max_nonfinite, late=late)
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = SimpleNamespace(model=model, optimizer=optimizer, state=state, report=report, updates=updates)
    move = BatchMover(DEVICE)
    for step in range(1, steps + 1):
        micro_batches = [batch(2 * step), batch(2 * step + 1)]
        for micro_batch in micro_batches:
            output = model(**move(micro_batch).inputs)
            (output.loss * output.num_masked_frames).backward()
        statistics = model.reduce_statistics()
        if step in poisoned:
            model.heads.bias.grad[0, 0] = math.nan
            model.statistics.sums.fill_(math.nan)
        updates.make(
            step,
            micro_batches,
            0.1 * step,
            statistics,
            scale_and_clip(parameters, 1 / statistics.num_masked_frames, 10.0),
        )
        if step == model.config.freeze_step:
            model.freeze_feature_encoder()  # as the loop does, for updates that were skipped
            parameters = [p for p in parameters if p.requires_grad]
    updates.settle()
    updates.settle()  # there is nothing left to report
    return result


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """To the last bit on a CPU; a GPU adds gradients in any order."""
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if DEVICE.type == "cuda" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(one, other, equal_nan=True, **tolerance)


@pytest.mark.parametrize("poisoned", [set(), {1}, {3, 4}, {6}])
def test_the_same_updates_are_made_and_reported(poisoned):
    now, late = (run(late, poisoned, ema_exclude_layers=["pos_conv_embed"]) for late in (False, True))
    assert now.state == late.state and now.state.skipped_steps == len(poisoned)
    told = [[re.sub(r"loss [\d.]+", "loss", line) for line in run.report.lines] for run in (now, late)]
    assert told[0] == told[1]
    for one, other in zip(now.report.rows, late.report.rows, strict=True):
        assert (*one[:2], *one[3:]) == (*other[:2], *other[3:]) and (one[2] is None) == (other[2] is None)
        for name, value in (one[2] or {}).items():
            same(torch.tensor(value), torch.tensor(other[2][name]))
    assert [row[0] for row in late.report.rows] == [1, 2, 3, 4, 5, 6]
    assert [row[-1] for row in late.report.rows] == [2, 4, 6, 8, 10, 12]  # each with its own batches
    assert {row[0] for row in late.report.rows if row[2] is None} == poisoned
    theirs = late.model.state_dict()
    for name, tensor in now.model.state_dict().items():
        assert tensor.isfinite().all(), name
        same(tensor, theirs[name])
    for one, other in zip(now.optimizer.state.values(), late.optimizer.state.values(), strict=True):
        for name in one:
            same(one[name], other[name])
        assert int(one["step"]) <= 6 - len(poisoned)


@pytest.mark.parametrize("late", [False, True])
def test_too_many_in_a_row_end_the_run(late):
    with pytest.raises(
        RunFolderError, match="2 updates in a row had a non-finite loss or gradient, the last at step 4"
    ):
        run(late, {1, 3, 4}, max_nonfinite=2)


def test_numbers_are_read_late_only_where_it_gains_something():
    for scale, expected in ((LossScale(False), DEVICE.type == "cuda"), (LossScale(True), False)):
        updates = Updates(tiny_model().to(DEVICE), None, TrainerState(data="x"), scale, Report(), 10)
        assert updates.late is expected


@needs_cuda
def test_no_update_waits_for_the_device():
    torch.cuda.set_sync_debug_mode("default")
    run(True, set(), steps=2)  # what is made once is made
    try:
        torch.cuda.set_sync_debug_mode("error")
        values = HostCopy(torch.arange(3.0, device=DEVICE))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values.tolist() == [0.0, 1.0, 2.0]
