"""Compiled layers, counted where there is no GPU: the compiler writes its code for an H100, which runs on fake tensors.

The wrapper that Inductor writes around its kernels is run as it is: buffers that it makes count as alive, its matrix
products, attention and own kernels as the operations that they are. Its Triton kernels are not compiled: a launch
counts the tensors that it is given, those changed in place twice.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.cuda.random
import torch.utils._triton
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config as inductor
from torch._inductor import scheduler
from torch._inductor.fx_passes import fuse_attention, joint_graph, pad_mm
from torch._inductor.graph import GraphLowering
from triton.backends.compiler import GPUTarget

# What the compiler asks about a GPU.
_H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    gcnArchName="",
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=227 * 1024,
    shared_memory_per_multiprocessor=228 * 1024,
    is_integrated=False,
    uuid="",
)


class _Driver:
    """Stands for Triton's own, which builds a stub and asks the GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, *_) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


class _Kernel:
    """Stands for a Triton kernel that the compiler wrote. `launched` is told the bytes of each launch."""

    def __init__(self, name: str, source: str, launched: Callable[[int], None]):
        found = re.search(rf"def {name}\(([^)]*)\)", source)
        assert found, name
        self.parameters = [parameter.partition(":")[0].strip() for parameter in found.group(1).split(",")]
        self.launched = launched

    def run(self, *arguments: object, **_) -> None:
        moved = 0
        for parameter, argument in zip(self.parameters, arguments, strict=False):
            if isinstance(argument, Tensor):
                moved += argument.numel() * argument.element_size() * (2 if parameter.startswith("in_out") else 1)
        self.launched(moved)


def _runnable(source: str, launched: Callable[[int], None]) -> Callable:
    """The wrapper's `call`, of what stands in for its tensors and kernels."""
    here = {
        "empty_strided_cuda": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda"),
        "reinterpret_tensor": lambda x, size, stride, offset=0: x.as_strided(size, stride, offset),
        "assert_size_stride": lambda *_, **__: None,
        "assert_alignment": lambda *_, **__: None,
        "get_raw_stream": lambda *_: 0,
        "_kernel": lambda name, code, **_: _Kernel(name, code, launched),
    }
    source = re.sub(rf"^({'|'.join(here)}) = .*$", "", source, flags=re.MULTILINE)
    source = re.sub(r"^from torch._C import _cuda_getCurrentRawStream.*$", "", source, flags=re.MULTILINE)
    source = source.replace("async_compile.triton(", "_kernel(").replace("async_compile.wait(globals())", "pass")
    space = {**here, "__name__": "compiled"}
    exec(compile(source, "compiled", "exec"), space)
    return space["call"]


@contextmanager
def fake_compiler(launched: Callable[[int], None]) -> Iterator[None]:
    """Inside, `torch.compile` writes for an H100 what fake tensors can run; `launched` gets each launch's bytes."""

    def to_module(graph: GraphLowering) -> SimpleNamespace:
        code, _ = graph.codegen()
        call = _runnable(getattr(code, "value", code), launched)
        return SimpleNamespace(call=call, __file__="compiled", key="compiled", __name__="compiled")

    worker = CudaInterface.Worker
    with ExitStack() as stack:
        for target, name, value in (
            (GraphLowering, "compile_to_module", to_module),
            # Patterns that these would learn by tracing on the device.
            (fuse_attention, "_sfdp_init", lambda *_, **__: None),
            (pad_mm, "_pad_mm_init", lambda *_, **__: None),
            (joint_graph, "lazy_init", lambda *_, **__: None),
            (torch.version, "cuda", "13.0"),
            (torch.utils._triton, "has_triton", lambda *_, **__: True),
            (scheduler, "has_triton", lambda *_, **__: True),  # which has taken its own where it came first
            *((torch.cuda, name, value) for name, value in _answers().items()),
            *((torch.cuda.random, name, _answers()[name]) for name in ("get_rng_state", "set_rng_state")),
            (torch._C, "_cuda_getCurrentRawStream", lambda *_: 0),
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            (CudaInterface, "device_count", staticmethod(lambda: 1)),
            (CudaInterface, "current_device", staticmethod(lambda: 0)),
            (CudaInterface, "get_raw_stream", staticmethod(lambda *_: 0)),
            (CudaInterface, "get_compute_capability", staticmethod(lambda *_, **__: 90)),
            (CudaInterface, "raise_if_triton_unavailable", staticmethod(lambda *_, **__: None)),
            (worker, "get_device_properties", staticmethod(lambda *_, **__: _H100)),
            (worker, "current_device", staticmethod(lambda: 0)),
        ):
            stack.enter_context(patch.object(target, name, value, create=True))
        options = {"compile_threads": 1, "benchmark_kernel": False, "joint_graph_constant_folding": False}
        stack.enter_context(inductor.patch(options | {"triton.autotune_at_compile_time": False}))
        stack.enter_context(inductor.patch({"force_disable_caches": True}))
        triton.runtime.driver.set_active(_Driver())
        yield


def _answers() -> dict[str, Callable]:
    """Of `torch.cuda`, by function."""
    return {
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "synchronize": lambda *_: None,
        "get_device_name": lambda *_: _H100.name,
        "get_device_properties": lambda *_, **__: _H100,
        "_get_device_properties": lambda *_: _H100,
        "get_device_capability": lambda *_: (9, 0),
        "get_arch_list": lambda: ["sm_90"],
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda *_, **__: None,
        "_exchange_device": lambda *_: 0,
        "_maybe_exchange_device": lambda *_: 0,
    }


__all__ = ["fake_compiler"]
