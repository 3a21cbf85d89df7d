"""What a training step asks of a GPU, counted where there is none: operations, bytes, flops, memory, waiting.

The step is the real one, on fake tensors, which have shapes and no values. A few lines of C++ make a PyTorch without
CUDA believe in a device, so that forward and backward are those of a GPU: autocast, own kernels, fused AdamW, flash
attention (with padding the memory-efficient one). Nothing is computed. A process that has counted is of no other use.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves
from torch.utils.cpp_extension import include_paths, library_paths
from torch.utils.flop_counter import flop_registry

from spidr_hf import kernels_spidr, layers_spidr, plain_spidr
from spidr_hf.configuration_spidr import SpidrConfig, frame_lengths
from spidr_hf.data.batches import Batch
from spidr_hf.data.batching import BatchKey, Position
from spidr_hf.modeling_spidr import SpidrForPretraining
from spidr_hf.system.files import replaced_file
from spidr_hf.system.host_copy import HostCopy

from . import steps

# A CUDA device of which nothing works but its being there.
_DEVICE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using namespace c10;
struct Guard final : impl::DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  Guard() = default;
  Guard(DeviceType) {}
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getNewStream(Device, int = 0) const override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
struct Hooks : at::CUDAHooksInterface {
  Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
"""
_PRETENDING = "SPIDR_HF_COUNTS"
# What writes without having read, and what moves nothing.
_ONLY_WRITE = ("zero_", "fill_", "copy_")
_MOVE_NOTHING = (
    "count_forward",
    "device",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
)
_ASK = ("_local_scalar_dense", "nonzero", "masked_select", "equal")


@dataclass
class Count:
    """What a step takes: operations that move data, bytes read and written (each tensor of each operation once), flops,
    the most bytes alive at a time, and how often Python asks for a value; `parts` has the first three by part."""

    operations: int = 0
    moved: int = 0
    flops: int = 0
    peak: int = 0
    reads: int = 0
    parts: dict[str, "Count"] = field(default_factory=dict)

    def add(self, moved: int, flops: int, operations: int = 1) -> None:
        """An operation, or several of a kind."""
        self.operations, self.moved, self.flops = self.operations + operations, self.moved + moved, self.flops + flops


def compiler() -> str | None:
    """The C++ compiler that the device needs, or None."""
    return os.environ.get("CXX") or shutil.which("g++")


def pretend_cuda() -> None:
    """Make this process believe that it has a CUDA device, by starting it anew with one: PyTorch looks once, when it is
    imported. Raises `ValueError` where it cannot be made to believe."""
    if os.environ.pop(_PRETENDING, None):
        os.environ.pop("LD_PRELOAD")  # not for processes that this one starts
        return
    if torch.backends.cuda.is_built():
        raise ValueError("--count needs a PyTorch without CUDA: pip install torch --index-url .../whl/cpu.")
    if compiler() is None:
        raise ValueError("--count needs a C++ compiler: apt-get install g++ (or set CXX).")
    version = hashlib.sha256(f"{torch.__version__} {_DEVICE}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir(), f"spidr_hf_fake_cuda_{os.getuid()}", f"{version}.so")
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        with replaced_file(library) as partial:
            command = [compiler(), "-shared", "-fPIC", "-std=c++20", "-O0", "-w", "-x", "c++", "-", "-o", str(partial)]
            command += [f"-I{path}" for path in include_paths()]
            for path in library_paths():
                command += [f"-L{path}", f"-Wl,-rpath,{path}"]
            command += ["-ltorch_cpu", "-lc10"]
            done = subprocess.run(command, input=_DEVICE, text=True, capture_output=True)
            if done.returncode:
                raise ValueError(f"--count: {command[0]} fails: {' '.join(done.stderr.split())[-300:]}")
    environment = {**os.environ, "LD_PRELOAD": str(library), _PRETENDING: "1"}
    os.execve(sys.executable, sys.orig_argv, environment)


def count_step(
    config: SpidrConfig,
    rows: int,
    samples: int,
    *,
    kernels: bool = True,
    frozen: bool = False,
    padded: bool = False,
    compiled: bool = False,
) -> Count:
    """Count one update of a run, its second; after `pretend_cuda`.

    Args:
        rows, samples: utterances of the batch, and samples of each.
        kernels, frozen, padded, compiled: own kernels run; feature extractor and projection do not train; rows differ
            in length; layers are compiled (needs Triton; takes minutes).
    """
    counter = _Counter()
    with ExitStack() as stack:
        stack.enter_context(_fake_cuda())
        if compiled:
            from .counting_compiled import fake_compiler

            stack.enter_context(fake_compiler(counter.launched))
        stack.enter_context(counter)
        model = _fake_model(config).train()
        if frozen:
            model.freeze_feature_encoder()
        masked = int(steps.MASKED * frame_lengths(config, samples))
        batch = Batch(
            torch.empty(rows, samples, device="cuda"),
            torch.empty(rows, masked, dtype=torch.int64, device="cuda"),
            torch.empty(rows, samples, dtype=torch.bool, device="cuda") if padded else None,
            BatchKey(0, 0, np.arange(rows), Position()),
            rows * samples,
        )
        step = steps.OurStep(model, [batch], steps.Form("layers" if compiled else "", kernels))
        step()
        counter.begin()
        step()
    return counter.count


class _Counter(fake_tensor.FakeTensorMode):
    """Gives every operation its fake results; looks at them, and counts from `begin` on.

    It looks from inside and not from a mode of its own, under which nothing compiled would run.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        self.count, self._counting, self._alive, self._inside = Count(), False, 0, False
        self._storages: set[int] = set()

    def begin(self) -> None:
        self._counting, self.count.peak = True, self._alive

    def launched(self, moved: int, flops: int = 0, operations: int = 1) -> None:
        if self._counting:
            self.count.add(moved, flops, operations)
            part = "backward" if torch._C._current_autograd_node() is not None else "forward, update"
            self.count.parts.setdefault(part, Count()).add(moved, flops, operations)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._inside:  # what an operation is made of
            return super().__torch_dispatch__(func, types, args, kwargs)
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _ASK:
            self.count.reads += self._counting
        self._inside = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = False
        for tensor in _tensors(out):
            self._keep(tensor)
        if self._counting:
            self.count.peak = max(self.count.peak, self._alive)
            if not _is_view(func) and name not in _MOVE_NOTHING:
                counted = _moved(func, args, kwargs, out), _flops(func, args, kwargs, out), _operations(name, args)
                self.launched(*counted)
        return out

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type != "cuda" or key in self._storages:
            return
        size = -(-storage.nbytes() // 512) * 512  # as PyTorch's allocator rounds
        self._storages.add(key)
        self._alive += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self._alive -= size


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _operations(name: str, args: tuple) -> int:
    """One; of lists of tensors as many as there are where one is taken after the other."""
    if name in ("gather_rows", "scatter_rows"):  # of each tensor, which the second fills with zeros first
        return len(args[0]) * (1 if name == "gather_rows" else 2)
    lists = [x for x in args if isinstance(x, list)] if name.startswith("_foreach") else []
    return len(lists[0]) if len(lists) > 2 and any(x.dim() == 0 for x in lists[2]) else 1


def _is_view(func) -> bool:
    returns = [r.alias_info for r in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returns)


def _moved(func, args, kwargs, out) -> int:
    """Bytes of every tensor that goes in or comes out, of those changed in place twice."""
    different = {id(x): x for x in _tensors((args, kwargs, out))}
    total = _size(list(different.values()))
    name = func.overloadpacket.__name__
    if name == "gather_rows":  # reads of whole representations the rows alone
        total -= sum(_size([x.flatten(0, 1)[len(args[1]) :]]) for x in args[0] if x.dim() > 2)
    if name == "scatter_rows":  # reads and writes again the rows that it adds to
        total += 2 * _size([args[0][: args[2]]])
    if name in _ONLY_WRITE:
        return total
    # Fused optimizers write gradients only where they scale them.
    read_only = name.startswith("_fused_") and kwargs.get("grad_scale") is None
    for index, argument in enumerate(func._schema.arguments):
        if read_only and argument.name == "grads":
            continue
        if argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out:
            total += _size(_tensors(args[index] if index < len(args) else kwargs.get(argument.name)))
    return total


def _flops(func, args, kwargs, out) -> int:
    name = func.overloadpacket.__name__
    if name == "convolution_backward":  # PyTorch's formula takes groups for one
        return 2 * args[0].numel() * args[2][0].numel() * sum(args[-1][:2])
    if func.overloadpacket in flop_registry:
        return flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
    if name == "grouped_conv":
        return 2 * args[0].numel() * args[1].shape[1] * args[1].shape[2]
    if name == "grouped_conv_backward":
        return 2 * args[1].numel() * args[2].shape[1] * args[2].shape[2] * (1 + args[4])
    if name.startswith("conv_norm_gelu"):  # what is computed again is not counted
        outputs, weight = (args[0], args[2]) if name.endswith("backward") else (out, args[1])
        return 2 * outputs.shape[0] * weight.numel()
    if name == "nearest_codewords":
        return 2 * args[0].numel() * args[1].shape[1]
    return 0


def _fake_model(config: SpidrConfig) -> SpidrForPretraining:
    """On the device, without values."""
    with torch.device("meta"):
        model = SpidrForPretraining(config)
    for module in model.modules():
        for name, x in list(module._parameters.items()):
            if x is not None:
                like = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(like, requires_grad=x.requires_grad)
        for name, x in list(module._buffers.items()):
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    return model


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """What PyTorch takes on a GPU in half precision: flash attention, with a mask the memory-efficient form."""
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    bias = bias.expand(*query.shape[:3], key.shape[2])
    arguments = (query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal)
    return aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]


@contextmanager
def _fake_cuda() -> Iterator[None]:
    """What else has to be believed: no copies from or to a host, kernels that could be launched."""

    def keep(self: HostCopy, tensor: Tensor) -> None:
        self._values, self._event = tensor.detach(), None

    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        library.impl("_fused_sgd_", lambda *_, **__: None, "Meta")  # PyTorch has none
        for target, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (fake_tensor, "init_gpu_context", lambda *_: None),
            (F, "scaled_dot_product_attention", _attention),
            (HostCopy, "__init__", keep),
            (HostCopy, "tolist", lambda self: [2.0] * len(self._values)),
            (steps, "BatchMover", lambda device: lambda batch: batch),
            # Fake tensors are no reason to call every module by itself.
            (layers_spidr, "plain_mode", lambda: True),
            (plain_spidr, "_in_place", lambda module: True),
            (kernels_spidr, "HAS_TRITON", True),
            (kernels_spidr, "kernel_trouble", lambda: None),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield


__all__ = ["Count", "compiler", "count_step", "pretend_cuda"]
