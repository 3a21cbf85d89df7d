"""The kernels compile for a GPU, without there being one: tensor cores are used, and registers suffice."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton: pip install triton"),
]
# NVIDIA's A100, H100 and RTX 5090; AMD's MI250X and MI300X, each with the shared memory that a program may have.
TARGETS = {"cuda:80": 163, "cuda:90": 227, "cuda:120": 99, "hip:gfx90a": 64, "hip:gfx942": 64}  # KiB

SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from spidr_hf import triton_spidr as kernels

tool = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
backend, _, chip = sys.argv[1].partition(":")
target = GPUTarget("cuda", int(chip), 32) if backend == "cuda" else GPUTarget("hip", chip, 64)
results = {}

def stack_and_products(compiled):
    # Bytes of registers that lie in memory, and whether products run on the units made for bfloat16.
    if backend == "hip":
        code = compiled.asm["amdgcn"]
        stack = int(re.search(r"private_segment_fixed_size: *(\\d+)", code).group(1))
        return stack, bool(re.search(r"v_mfma_f32\\w*bf16", code))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = lambda option: subprocess.run([tool, option, file.name], capture_output=True, text=True).stdout
        return int(re.search(r"STACK:(\\d+)", dump("-res-usage")).group(1)), bool(re.search(r"HG?MMA", dump("-sass")))

def check(name, pointers, numbers, constants, **options):
    kernel = getattr(kernels, name)
    names = kernel.arg_names
    types = {**{n: "*" + t for n, t in pointers.items()}, **dict.fromkeys(numbers, "i32")}
    signature = {n: types.get(n, "constexpr") for n in names}
    values = {(names.index(n),): v for n, v in constants.items()}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    compiled = triton.compile(source, target=target, options=options)
    stack, tensor_cores = stack_and_products(compiled)
    key = f"{name} {dtype}"
    results[key] = {"stack": stack, "shared": compiled.metadata.shared, "tensor_cores": tensor_cores}

for dtype in ("bf16", "fp32"):
    blocks = {"channels": 512, "eps": 1e-5, "affine": True, "block_rows": 8, "block_channels": 512}
    rest = {"weight": "fp32", "bias": "fp32"}
    check("norm_gelu_forward", {"x": dtype, **rest, "out": dtype}, ["rows"], blocks, num_warps=8)
    grads = {"grad_x": dtype, "grad_weight": "fp32", "grad_bias": "fp32"}
    inputs = {"grad": dtype, "x": dtype, **rest}
    check("norm_gelu_backward", {**inputs, **grads}, ["rows", "rows_per_program"], blocks, num_warps=8)
    blocks = {"channels": 768, "eps": 1e-5, "p": 0.1, "block_rows": 4, "block_channels": 1024}
    blocks |= {"has_bias": True}
    inputs = {"residual": "fp32", "branch": dtype, **rest, "seed": "i64", "branch_bias": "fp32"}
    check("residual_norm_forward", {**inputs, "out": "fp32", "copy": dtype}, ["rows"], {**blocks, "copies": True})
    grads = {"grad_residual": "fp32", "grad_branch": dtype, "grad_weight": "fp32", "grad_bias": "fp32"}
    grads |= {"grad_branch_bias": "fp32"}
    inputs = {"grad": "fp32", "grad_copy": dtype, **{name: t for name, t in inputs.items() if name != "bias"}}
    blocks |= {"has_grad": True, "has_grad_copy": True}
    check("residual_norm_backward", {**inputs, **grads}, ["rows", "rows_per_program"], blocks)
    blocks = {"channels": 3072, "block_rows": 16, "block_channels": 256}
    check("bias_gelu_forward", {"x": dtype, "bias": "fp32", "out": dtype}, ["rows"], blocks)
    grads = {"grad": dtype, "x": dtype, "bias": "fp32", "grad_x": dtype, "grad_bias": "fp32"}
    check("bias_gelu_backward", grads, ["rows", "rows_per_program"], blocks)
    half = dtype == "bf16"
    shape = {"kernel": 19, "before": 9, "groups": 16, "width": 48, "widen": False, "block_width": 64}
    shape["precision"] = "ieee"
    forward = {**shape, "has_bias": True, "block_rows": 128 if half else 64}
    conv = {"x": dtype, "taps": dtype, "bias": "fp32", "out": dtype}
    check("grouped_conv", conv, ["rows", "length"], forward, num_warps=4 if half else 8)
    conv = {"x": dtype, "grad": dtype, "grad_taps": "fp32"}
    numbers = ["rows", "length", "rows_per_program"]
    check("grouped_conv_weight", conv, numbers, {**shape, "block_rows": 64}, num_warps=4 if half else 8)
    statistics = {"x": dtype, "lengths": "i64", "means": "fp32", "scales": "fp32"}
    blocks = {"width": 768, "eps": 1e-5, "has_lengths": True, "block_frames": 64, "block_width": 64}
    check("time_statistics", statistics, ["length"], blocks)
    pointers = {"x": dtype, "rows": "i64", "means": "fp32", "scales": "fp32", "out": "fp32"}
    blocks = {"width": 768, "block_frames": 4, "block_width": 1024}
    check("normalized_frames", pointers, ["frames", "length"], blocks)
dtype = "bf16"
if backend == "cuda":
    shape = {"channels": 512, "kernel": 10, "stride": 5, "eps": 1e-5, "precision": "ieee", "widen": False}
    shape |= {"block_rows": 16, "block_channels": 512}
    inputs = {"x": "fp32", "weight": "fp32", "gain": "fp32", "shift": "fp32"}
    numbers = ["samples", "rows", "rows_per_program"]
    check("conv_norm_gelu_forward", {**inputs, "out": "bf16"}, numbers, shape, num_warps=8)
    grads = {"grad_taps": "fp32", "grad_gain": "fp32", "grad_shift": "fp32"}
    split = int(chip) == 90
    shape["by_hand"], options = not split, {"num_warps": 16, "num_stages": 3 if split else 2}
    check("conv_norm_gelu_backward", {"grad": "bf16", **inputs, **grads}, numbers, shape, **options)
dtype = "fp32"
full = {"targets": "fp32", "codewords": "fp32", "half_norms": "fp32", "labels": "i64"}
blocks = {"size": 256, "width": 768, "block_frames": 64, "block_size": 128, "block_width": 32}
check("nearest_codeword", full, ["frames"], blocks, num_warps=8)
full = {"targets": "fp32", "order": "i64", "ends": "i64", "sums": "fp32"}
check("codeword_sums", full, ["frames"], {"size": 256, "width": 768, "block_frames": 32, "block_width": 128})
print(json.dumps(results))
"""


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_without_spilling(tmp_path, target):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, target], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == (24 if target.startswith("cuda") else 22)
    for name, result in results.items():
        # Some registers of five hundred threads, once per sixteen rows: cheaper than half the threads.
        few = {"cuda:80": 72, "cuda:120": 104} if name == "conv_norm_gelu_backward bf16" else {}
        assert result["stack"] <= few.get(target, 0) and result["shared"] <= 1024 * TARGETS[target], (name, result)
        # Labels come from true float32 products, which tensor cores do not have.
        products = ("grouped_conv bf16", "grouped_conv_weight bf16")
        products += ("conv_norm_gelu_forward bf16", "conv_norm_gelu_backward bf16")
        assert result["tensor_cores"] == (name in products), (name, result)
