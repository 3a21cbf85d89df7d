"""Two ranks with half the batch each equal one process with all of it."""

import copy
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import random_mask, tiny_model
from torch.nn.parallel import DistributedDataParallel

STEPS, FREEZE = 4, 2


def batches(rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, 6000, generator=generator), random_mask(rows, 18, seed=step)) for step in range(STEPS)]


def train(model, wrap, part: slice, world_size: int) -> tuple[dict, list]:
    """Four updates through the freeze, as a training loop does them."""
    model.train()
    forward = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    log = []
    for step, (waveforms, mask) in enumerate(batches(4), start=1):
        output = forward(waveforms[part], None, mask[part])
        (output.loss * output.num_masked_frames).backward()
        statistics = model.reduce_statistics()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(world_size / statistics.num_masked_frames)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(step)
        if step == FREEZE:
            forward = wrap(model)
        log.append((statistics.loss, statistics.target_ppl, statistics.pred_ppl, statistics.num_masked_frames))
    return copy.deepcopy(model.state_dict()), log


def worker(rank: int, folder: str, port: int, objective: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    model = tiny_model(objective=objective, freeze_step=FREEZE)
    # Halves of unequal size: averages over ranks would weigh the frames unequally.
    part = (slice(0, 1), slice(1, 4))[rank]
    state, log = train(model, lambda m: DistributedDataParallel(m, broadcast_buffers=False), part, 2)
    torch.save((state, log), Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.parametrize("objective", ["spidr", "dinosr"])
def test_two_ranks_equal_one(objective, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (str(tmp_path), port, objective), nprocs=2)
    (first, first_log), (second, second_log) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone, log = train(tiny_model(objective=objective, freeze_step=FREEZE), lambda m: m, slice(0, 4), 1)
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), f"{name} differs between the ranks"
        torch.testing.assert_close(first[name], value, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(torch.tensor(first_log), torch.tensor(log), atol=1e-4, rtol=1e-5)
    assert first_log == second_log
