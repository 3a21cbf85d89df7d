"""FSDP2: parameters, gradients, optimizer moments and the teacher lie in shards, one on each process.

What `accelerate launch --use_fsdp --fsdp_version 2` asks for, on GPUs and (with `ACCELERATE_USE_CPU=true`) on CPUs. The
groups are our own instead of those `Accelerator.prepare` makes, so that the teacher is sharded exactly as the student
and moves shard by shard, without communication. Codebooks and statistics are whole on every process, as with DDP.

Parameters are gathered and gradients reduced in float32, autocast does the rest: the numbers are those of DDP.
Checkpoints hold whole tensors, so that a run can resume with or without shards and on any number of processes.
"""

import gc
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..modeling_spidr import SpidrForPretraining
from ..system.errors import ConfigError


def sharding_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin | None:
    """How the launcher wants the model sharded; None where it does not, or there is one process.

    Raises `ConfigError` for what cannot be done.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or accelerator.num_processes == 1:
        return None
    # On CPUs accelerate falls back to DDP and forgets that it was asked.
    plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError("The launcher asks for FSDP 1: pass --fsdp_version 2 (or leave --use_fsdp out, for DDP).")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError("The launcher asks to offload parameters to the CPU: leave --fsdp_offload_params out.")
    return plugin


def shard(model: SpidrForPretraining, plugin: FullyShardedDataParallelPlugin) -> None:
    """Shard the model's parameters in place, over all processes. It must lie on its device, alike on every process.

    Each transformer layer of student and teacher is a group, as are what is left of either encoder, and the feature
    extractor; the rest (projection, mask embedding, heads) is small.
    """
    # Meant for code that changes the outputs of its modules in place; ours does not.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    if plugin.activation_checkpointing:
        model.gradient_checkpointing_enable()
    student = model.spidr
    for module in (*student.encoder.layers, student.encoder, student.feature_extractor):
        fully_shard(module, mesh=mesh, reshard_after_forward=bool(plugin.reshard_after_forward))
    # The teacher has no backward that would take it apart again.
    for module in (*model.teacher.layers, model.teacher, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for method in ("get_codebooks", "get_teacher_labels"):
        register_fsdp_forward_method(model, method)


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Whether the forward and backward inside share their gradients among the processes, or keep them for later.

    The last batch of an update shares; for the others it would be wasted time. Nothing happens to a model that is
    neither in DDP nor sharded.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def local_shard(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together from all processes, each of which must call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a whole tensor, where the parameter it belongs to is sharded and has its shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters lie in shards."""
    return isinstance(model, FSDPModule)


@torch.no_grad()
def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of all tensors together, over all shards where they are sharded (every process must then call this)."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([local_shard(tensor) for tensor in tensors])))
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return norm
    squares = norm.square()
    dist.all_reduce(squares)
    return squares.sqrt()


def distribute(model: nn.Module, processes: Accelerator | PartialState, silence: Mapping[str, Tensor]) -> nn.Module:
    """The model as the processes share it: in DDP, or as it is where there is one process or it is sharded.

    It is to be wrapped anew when other parameters train than before, since gradients that never come block DDP; what
    it was wrapped in must be let go of first.

    Args:
        model: on its device, and in train mode.
        silence: the model's inputs for a short batch, with gradients for all that trains.
    """
    if processes.num_processes == 1 or is_sharded(model):
        return model
    gc.collect()  # an earlier wrapping's hooks go with it
    device = processes.device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the newer name of `broadcast_buffers` is too new
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.type != "cpu" else None,
            # Codebooks and step move alike on every process; pretraining's own all-reduce sees to it.
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    # After its first backward DDP arranges its buckets anew, and with them the order of its sums. A pass over silence
    # gets that over with, so that a resumed run sums in the order of one never interrupted. It is like no batch of the
    # run: compiled, it would cost graphs that nothing else uses.
    with torch.compiler.set_stance("force_eager"):
        wrapped(**{name: value.to(device) for name, value in silence.items()}).loss.backward()
    model.zero_grad()
    return wrapped


__all__ = [
    "distribute",
    "global_norm",
    "gradient_sync",
    "is_sharded",
    "local_shard",
    "shard",
    "shard_like",
    "sharding_plugin",
    "whole_tensor",
]
