"""FSDP2 on CPUs: shards on two processes compute what one process computes, and save what one process saves."""

import copy
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.utils import FullyShardedDataParallelPlugin
from tiny import random_mask, tiny_model
from torch.distributed.tensor import DTensor

from spidr_hf.pretraining.config import make_config
from spidr_hf.pretraining.setup import make_optimizer, save_final, whole_model
from spidr_hf.system.errors import ConfigError
from spidr_hf.training.checkpoints import Checkpoints, TrainerState
from spidr_hf.training.optimizing import drop_frozen, scale_and_clip
from spidr_hf.training.sharding import gradient_sync, is_sharded, shard, sharding_plugin

STEPS, FREEZE, RESUME, ACCUMULATION = 5, 2, 3, 2
CONFIG = make_config(
    {"run": {"model_type": "spidr"}, "data": {"manifest": "x"}, "optimizer": {"lr": 1e-3, "max_norm": 0.5}}
)


def new_model(objective: str):
    return tiny_model(objective=objective, freeze_step=FREEZE, ema_start_decay=0.9).train()


def batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The `ACCUMULATION` batches of 4 rows of a step."""
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randn(4, 6000, generator=generator), random_mask(4, 18, seed=10 * step + micro_batch))
        for micro_batch in range(ACCUMULATION)
    ]


def train(model, optimizer, steps, part: slice, world_size: int, save=lambda step: None) -> list:
    """Updates through the freeze, as `examples/pretrain.py` makes them."""
    log = []
    for step in steps:
        for micro_batch, (waveforms, mask) in enumerate(batches(step)):
            with gradient_sync(model, micro_batch == ACCUMULATION - 1):
                output = model(waveforms[part], None, mask[part])
                (output.loss * output.num_masked_frames).backward()
        statistics = model.reduce_statistics()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norm = scale_and_clip(trained, world_size / statistics.num_masked_frames, CONFIG.optimizer.max_norm)
        optimizer.step()
        model.update_teacher(step)
        optimizer.zero_grad()
        if step == FREEZE:
            drop_frozen(optimizer)
        log.append((statistics.loss, statistics.target_ppl, statistics.pred_ppl, norm))
        save(step)
    return log


def names(model) -> dict:
    return {parameter: name for name, parameter in model.named_parameters()}


def worker(rank: int, folder: str, port: int, objective: str, options: dict) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    assert dist.get_world_size() == 2
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **options)
    part = (slice(0, 1), slice(1, 4))[rank]

    model = new_model(objective)
    shard(model, plugin)
    assert is_sharded(model) and all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = make_optimizer(model, CONFIG.optimizer)
    checkpoints = Checkpoints(Path(folder, "checkpoints"), writes=rank == 0)

    def save(step):
        checkpoints.save(TrainerState(step=step), model, optimizer, wait=True)

    log = train(model, optimizer, range(1, STEPS + 1), part, 2, save)
    assert all(p.grad is None for p in model.spidr.feature_extractor.parameters())  # frozen, so none is computed
    whole = whole_model(model, keep=rank == 0)
    if rank == 0:
        save_final(whole, Path(folder, "final"), CONFIG, "")
    torch.save((whole.state_dict() if rank == 0 else None, log), Path(folder, f"{rank}.pt"))

    # ... and resumes from a checkpoint.
    dist.barrier()
    model = new_model(objective)
    checkpoint = checkpoint_at(folder, RESUME)
    checkpoint.load_model(model)
    model.freeze_feature_encoder()
    shard(model, plugin)
    optimizer = make_optimizer(model, CONFIG.optimizer)
    checkpoint.load_optimizer(optimizer, names(model))
    log = train(model, optimizer, range(RESUME + 1, STEPS + 1), part, 2)
    whole = whole_model(model)
    torch.save((whole.state_dict(), log), Path(folder, f"resumed_{rank}.pt"))
    dist.destroy_process_group()


def checkpoint_at(folder: str | Path, step: int):
    found = Checkpoints(Path(folder, "checkpoints"))
    found.steps = lambda: [step]
    return found.newest()


def run(tmp_path, objective, **options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(worker, (str(tmp_path), port, objective, options), nprocs=2)


def assert_close(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("spidr", {"activation_checkpointing": True}),
        pytest.param("dinosr", {"reshard_after_forward": False}, marks=pytest.mark.slow),
    ],
)
def test_shards_equal_the_whole(objective, options, tmp_path):
    run(tmp_path, objective, **options)
    (state, log), (_, other_log) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = new_model(objective)
    optimizer = make_optimizer(alone, CONFIG.optimizer)
    alone_log = train(alone, optimizer, range(1, STEPS + 1), slice(0, 4), 1)
    assert log == other_log
    torch.testing.assert_close(torch.tensor(log), torch.tensor(alone_log), atol=1e-4, rtol=1e-5)
    assert_close(state, alone.state_dict())
    assert_close(type(alone).from_pretrained(tmp_path / "final").state_dict(), alone.state_dict())

    # A run with shards resumes from its own checkpoints bit for bit ...
    for rank in (0, 1):
        resumed, resumed_log = torch.load(tmp_path / f"resumed_{rank}.pt")
        assert resumed_log == log[RESUME:]
        assert [name for name in state if not torch.equal(state[name], resumed[name])] == []
    # ... and one process from them just as well: they are like any others.
    moved = new_model(objective)
    checkpoint = checkpoint_at(tmp_path, RESUME)
    checkpoint.load_model(moved)
    moved.freeze_feature_encoder()
    optimizer = make_optimizer(moved, CONFIG.optimizer)
    checkpoint.load_optimizer(optimizer, names(moved))
    moved_log = train(moved, optimizer, range(RESUME + 1, STEPS + 1), slice(0, 4), 1)
    torch.testing.assert_close(torch.tensor(moved_log), torch.tensor(alone_log[RESUME:]), atol=1e-4, rtol=1e-5)
    assert_close(copy.deepcopy(moved.state_dict()), alone.state_dict())


def test_what_the_launcher_asks_for(monkeypatch):
    def accelerator(processes: int):
        return SimpleNamespace(num_processes=processes, state=SimpleNamespace())

    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding_plugin(accelerator(2)) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding_plugin(accelerator(1)) is None
    assert sharding_plugin(accelerator(2)).reshard_after_forward is True
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ConfigError, match="leave --fsdp_offload_params out"):
        sharding_plugin(accelerator(2))
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="pass --fsdp_version 2"):
        sharding_plugin(accelerator(2))
