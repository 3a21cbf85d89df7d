"""Fused operations of the CUDA training step, each beside its plain form: `norm_gelu`, `grouped_conv1d`, codebooks.

Off CUDA, where Triton is not installed or cannot start (`kernel_trouble`), and with the switch off, the plain form
runs; `use_kernels(False)`, `--run.kernels false` or the variable SPIDR_HF_KERNELS=0 is that switch. The kernels are in
`triton_spidr`. To the compiler each is one opaque operator, so none breaks a graph or is compiled anew for another
length.

What they save (spidr-base, bf16, 3.8 M samples): under autocast LayerNorm and GELU run apart and in float32, which is
five times the unavoidable traffic over the extractor's activations; here it is one read and one write, and the backward
pass keeps nothing but its input. cuDNN has no fast kernel for convolutions of 48 channels per group; here each tap is a
small tensor-core product out of cache, with neither the copies nor the doubled arithmetic of the block-Toeplitz form.
(The norm and GELU after it stay apart: they need all groups of a frame, and at 18 MB that costs microseconds.)
"""

import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Each copy of this file (the package's, one per repository of remote code) registers operators of its own.
# Their namespaces are ASCII, the names of repositories and folders need not be.
NAMESPACE = re.sub(r"\W+", "_", re.sub(r"[^\x00-\x7f]", lambda letter: f"u{ord(letter[0]):x}", __name__))
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Programs of the kernels that sum over rows: enough for any GPU, and the same on all, so that sums are too.
PROGRAMS = 528
MAX_CHANNELS = 8192  # a row is one block
MAX_GROUP = 64  # channels: for wider groups many GPUs have too little shared memory

_enabled = os.environ.get("SPIDR_HF_KERNELS", "1") != "0"
HAS_TRITON = importlib.util.find_spec("triton") is not None


def use_kernels(enabled: bool) -> bool:
    """Switch for all kernels of this process: off, the plain forms run everywhere. Returns how it was."""
    global _enabled
    before, _enabled = _enabled, enabled
    return before


def kernels_wanted(x: Tensor) -> bool:
    """Whether own kernels are on, there are some for numbers of the type of `x`, and what runs now stays here: an
    exported or traced program has PyTorch's operators alone."""
    # The compiler may take `is_exporting` for true wherever it looks.
    exported = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return _enabled and x.dtype in _DTYPES and not exported and not torch.jit.is_tracing()


def kernels_run(x: Tensor) -> bool:
    """Whether operations on `x` run as kernels."""
    return kernels_wanted(x) and HAS_TRITON and x.is_cuda and _can_launch()


@cache
def kernel_trouble() -> str | None:
    """What keeps kernels from running on this process's GPU, in a line, or None. To be asked where there is a GPU.

    Triton builds what launches its kernels with a C compiler and Python's headers, when the first one starts; slim
    images have neither. It is tried once.
    """
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # of the compiler, of a cache that cannot be written, of the driver
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return (
            f"Triton cannot start: {reason} It needs a C compiler (gcc, or the variable CC), Python's headers "
            "(python3-dev) and a folder to write to (TRITON_CACHE_DIR)."
        )
    return None


# A graph that is compiled asks while it is traced, and keeps the answer.
@torch.compiler.assume_constant_result
def _can_launch() -> bool:
    trouble = kernel_trouble()
    if trouble:
        # Python shows the same warning from the same line once.
        warnings.warn(f"Own kernels stay off, plain forms run instead, slower. {trouble}", stacklevel=2)
    return trouble is None


# ---- LayerNorm and GELU


def norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """GELU (exact) of LayerNorm over the last dimension of `x`, with or without affine parameters (both or neither).

    As a kernel it returns the dtype of `x` and computes in float32; autocast changes nothing about it.
    """
    channels = x.shape[-1]
    if kernels_run(x) and channels <= MAX_CHANNELS and (weight is None) == (bias is None):
        return _norm_gelu(x, weight, bias, eps)
    return plain_norm_gelu(x, weight, bias, eps)


def plain_norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """The obvious form of `norm_gelu`."""
    return F.gelu(F.layer_norm(x, x.shape[-1:], weight, bias, eps))


def _shares(rows: int, block_rows: int, programs: int | None = None) -> tuple[int, int]:
    """Rows that each program sums up, in whole blocks, and how many programs that takes: at most `programs`."""
    rows_per_program = _blocks(_blocks(max(rows, 1), programs or PROGRAMS), block_rows) * block_rows
    return rows_per_program, _blocks(rows, rows_per_program)


def _row_blocks(channels: int) -> tuple[int, int]:
    """(rows, channels) of a block: about 4096 elements, which fit into the registers of four or eight warps."""
    block_channels = _power_of_2(channels)
    return max(1, 4096 // block_channels), block_channels


# With four, the registers of the backward pass leave room for 396 of `PROGRAMS` on an H100; with eight, for half.
_GELU_WARPS = 8


@torch.library.custom_op(f"{NAMESPACE}::norm_gelu", mutates_args=())
def _norm_gelu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    from .triton_spidr import norm_gelu_forward

    x = x.contiguous()
    out = torch.empty_like(x)
    channels = x.shape[-1]
    rows, (block_rows, block_channels) = x.numel() // channels, _row_blocks(channels)
    if rows:
        with _device_of(x):
            norm_gelu_forward[(_blocks(rows, block_rows),)](
                x,
                weight,
                bias,
                out,
                rows,
                channels=channels,
                eps=eps,
                affine=weight is not None,
                block_rows=block_rows,
                block_channels=block_channels,
                num_warps=_GELU_WARPS,
            )
    return out


@_norm_gelu.register_fake
def _(x, weight, bias, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::norm_gelu_backward", mutates_args=())
def _norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_spidr import norm_gelu_backward

    grad, x = grad.contiguous(), x.contiguous()
    channels, affine = x.shape[-1], weight is not None
    rows, (block_rows, block_channels) = x.numel() // channels, _row_blocks(channels)
    grad_x = torch.empty_like(x)
    rows_per_program, programs = _shares(rows, block_rows)
    partial = x.new_empty((2, programs if affine else 0, channels), dtype=torch.float32)
    if rows:
        with _device_of(x):
            norm_gelu_backward[(programs,)](
                grad,
                x,
                weight,
                bias,
                grad_x,
                partial[0],
                partial[1],
                rows,
                rows_per_program,
                channels=channels,
                eps=eps,
                affine=affine,
                block_rows=block_rows,
                block_channels=block_channels,
                num_warps=_GELU_WARPS,
            )
    sums = partial.sum(1).to(weight.dtype if affine else x.dtype)
    return grad_x, sums[0].clone(), sums[1].clone()


@_norm_gelu_backward.register_fake
def _(grad, x, weight, bias, eps):
    like = x if weight is None else weight
    grads = [like.new_empty(x.shape[-1]) for _ in range(2)]
    return torch.empty_like(x, memory_format=torch.contiguous_format), *grads


def _keep_norm_gelu(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _differentiate_norm_gelu(ctx, grad: Tensor):
    x, weight, bias = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _norm_gelu_backward(grad, x, weight, bias, ctx.eps)
    affine = weight is not None
    return grad_x, grad_weight if affine else None, grad_bias if affine else None, None


_norm_gelu.register_autograd(_differentiate_norm_gelu, setup_context=_keep_norm_gelu)


# ---- first convolution, LayerNorm and GELU

_MAX_TAPS = 16  # of the first convolution: one block of a product
_ROWS_AT_A_TIME = 64  # of the forward kernel, which reads the taps once for them


def fuses_first_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether `conv_norm_gelu` can run: weights C x 1 x k, products in 16 bits, no gradient of the samples wanted."""
    channels, inputs, kernel = weight.shape
    fits = inputs == 1 and fits_first_convolution(channels, kernel, _product_dtype(x))
    return fits and kernels_run(x) and not x.requires_grad


def fits_first_convolution(channels: int, kernel: int, dtype: torch.dtype) -> bool:
    """Whether `conv_norm_gelu` is made for this size, products of this type, and GPUs of this maker."""
    # Blocks of float32 fit the shared memory of the largest GPUs only.
    return kernel <= _MAX_TAPS and channels <= 512 and dtype.itemsize == 2 and not torch.version.hip


def _product_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def conv_norm_gelu(x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, stride: int, eps: float) -> Tensor:
    """GELU of the LayerNorm (`gain`, `shift`) of a strided convolution without bias: samples laid end to end (S, a
    multiple of `stride`), weights C x 1 x k -> S/stride x C. Where `fuses_first_convolution`.

    The convolution's output, the largest activation of the model, never exists: the backward pass computes it again.
    Windows that reach beyond the end see zeros there. The result has the autocast dtype where autocast is on.
    """
    return _conv_norm_gelu(x, weight, gain, shift, stride, eps, _product_dtype(x))


def splits_products(device: torch.device) -> bool:
    """Whether Triton divides a product among warps although another follows that uses it: on Hopper alone. Before and
    after, each warp gets all of it, for which registers are too few by far."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def _conv_block(channels: int) -> dict[str, int]:
    """Rows x channels of a block: 8192 elements; products take 16 rows or more."""
    block_channels = max(16, _power_of_2(channels))
    return {"block_rows": max(16, 8192 // block_channels), "block_channels": block_channels}


@torch.library.custom_op(f"{NAMESPACE}::conv_norm_gelu", mutates_args=())
def _conv_norm_gelu(
    x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, stride: int, eps: float, dtype: torch.dtype
) -> Tensor:
    from .triton_spidr import conv_norm_gelu_forward

    x, weight = x.contiguous(), weight.contiguous()
    channels, _, kernel = weight.shape
    rows = x.numel() // stride
    out = x.new_empty((rows, channels), dtype=dtype)
    block = _conv_block(channels)
    rows_per_program = _blocks(_ROWS_AT_A_TIME, block["block_rows"]) * block["block_rows"]
    if rows:
        with _device_of(x):
            conv_norm_gelu_forward[(_blocks(rows, rows_per_program),)](
                x,
                weight,
                gain,
                shift,
                out,
                x.numel(),
                rows,
                rows_per_program,
                channels=channels,
                kernel=kernel,
                stride=stride,
                eps=eps,
                precision=_precision(out),
                widen=not x.is_cuda,
                **block,
                num_warps=8,
            )
    return out


@_conv_norm_gelu.register_fake
def _(x, weight, gain, shift, stride, eps, dtype):
    return x.new_empty((x.numel() // stride, weight.shape[0]), dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::conv_norm_gelu_backward", mutates_args=())
def _conv_norm_gelu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, stride: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_spidr import conv_norm_gelu_backward

    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    channels, _, kernel = weight.shape
    rows, block = x.numel() // stride, _conv_block(channels)
    rows_per_program, programs = _shares(rows, block["block_rows"])
    of_taps = x.new_empty((programs, *weight.shape), dtype=torch.float32)
    of_norm = x.new_empty((2, programs, channels), dtype=torch.float32)
    if rows:
        with _device_of(x):
            conv_norm_gelu_backward[(programs,)](
                grad,
                x,
                weight,
                gain,
                shift,
                of_taps,
                *of_norm,
                x.numel(),
                rows,
                rows_per_program,
                channels=channels,
                kernel=kernel,
                stride=stride,
                eps=eps,
                precision=_precision(grad),
                widen=not x.is_cuda,
                by_hand=not splits_products(x.device),
                **block,
                num_warps=16,  # with fewer, registers do not suffice
                num_stages=3 if splits_products(x.device) else 2,
            )
    sums = of_norm.sum(1).to(gain.dtype)
    return of_taps.sum(0).to(weight.dtype), sums[0].clone(), sums[1].clone()


@_conv_norm_gelu_backward.register_fake
def _(grad, x, weight, gain, shift, stride, eps):
    contiguous = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return contiguous, torch.empty_like(gain), torch.empty_like(shift)


def _keep_conv_norm_gelu(ctx, inputs, output) -> None:
    *tensors, ctx.stride, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_conv_norm_gelu(ctx, grad: Tensor):
    grads = _conv_norm_gelu_backward(grad, *ctx.saved_tensors, ctx.stride, ctx.eps)
    return None, *grads, None, None, None


_conv_norm_gelu.register_autograd(_differentiate_conv_norm_gelu, setup_context=_keep_conv_norm_gelu)


# ---- residual, dropout and LayerNorm


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds for `count` calls of `residual_norm`, from PyTorch's generator of the device: `count` x 2, one a row."""
    # In rows of two, so that every seed lies as Triton likes its addresses.
    return torch.randint(-(1 << 63), (1 << 63) - 1, (count, 2), dtype=torch.int64, device=device)


def residual_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of `residual + dropout(branch + branch_bias)`, ... x C; where `kernels_run`.

    Args:
        p: share of `branch` that is zeroed, decided by `seed` (of `draw_seeds`).
        branch_bias: C, of the product that `branch` comes from, where that has left it out.

    Returns the norm in the dtype of `residual`, and the same in the dtype of `branch`, for products.
    """
    out, copy = _residual_norm(residual, branch, weight, bias, seed if p > 0 else None, branch_bias, eps, p)
    return out, out if residual.dtype == branch.dtype else copy


@torch.library.custom_op(f"{NAMESPACE}::residual_norm", mutates_args=())
def _residual_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    branch_bias: Tensor | None,
    eps: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    from .triton_spidr import residual_norm_forward

    residual, branch = residual.contiguous(), branch.contiguous()
    out, copy = torch.empty_like(residual), _copy_of(residual, branch)
    channels = residual.shape[-1]
    rows, (block_rows, block_channels) = residual.numel() // channels, _row_blocks(channels)
    if rows:
        with _device_of(residual):
            residual_norm_forward[(_blocks(rows, block_rows),)](
                residual,
                branch,
                weight,
                bias,
                seed,
                branch_bias,
                out,
                copy,
                rows,
                channels=channels,
                eps=eps,
                p=p if seed is not None else 0.0,
                copies=copy.numel() > 0,
                has_bias=branch_bias is not None,
                block_rows=block_rows,
                block_channels=block_channels,
            )
    return out, copy


def _copy_of(residual: Tensor, branch: Tensor) -> Tensor:
    """Place for the norm in the dtype of `branch`, where that is another."""
    shape = (0,) if residual.dtype == branch.dtype else residual.shape
    return branch.new_empty(shape)


@_residual_norm.register_fake
def _(residual, branch, weight, bias, seed, branch_bias, eps, p):
    return torch.empty_like(residual, memory_format=torch.contiguous_format), _copy_of(residual, branch)


@torch.library.custom_op(f"{NAMESPACE}::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    grad: Tensor | None,
    grad_copy: Tensor | None,
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    branch_bias: Tensor | None,
    eps: float,
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from .triton_spidr import residual_norm_backward

    residual, branch = residual.contiguous(), branch.contiguous()
    grad, grad_copy = (None if x is None else x.contiguous() for x in (grad, grad_copy))
    channels = residual.shape[-1]
    rows, (block_rows, block_channels) = residual.numel() // channels, _row_blocks(channels)
    grad_residual, grad_branch = torch.empty_like(residual), torch.empty_like(branch)
    rows_per_program, programs = _shares(rows, block_rows)
    has_bias = branch_bias is not None
    partial = residual.new_empty((2 + has_bias, programs, channels), dtype=torch.float32)
    if rows:
        with _device_of(residual):
            residual_norm_backward[(programs,)](
                grad,
                grad_copy,
                residual,
                branch,
                weight,
                seed,
                branch_bias,
                grad_residual,
                grad_branch,
                partial[0],
                partial[1],
                partial[-1],
                rows,
                rows_per_program,
                channels=channels,
                eps=eps,
                p=p if seed is not None else 0.0,
                has_grad=grad is not None,
                has_grad_copy=grad_copy is not None,
                has_bias=has_bias,
                block_rows=block_rows,
                block_channels=block_channels,
            )
    sums = partial.sum(1).to(weight.dtype)
    grad_branch_bias = sums[2].to(branch_bias.dtype, copy=True) if has_bias else sums.new_empty(0)
    return grad_residual, grad_branch, sums[0].clone(), sums[1].clone(), grad_branch_bias


@_residual_norm_backward.register_fake
def _(grad, grad_copy, residual, branch, weight, seed, branch_bias, eps, p):
    whole = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (residual, branch)]
    like = weight.new_empty(0) if branch_bias is None else torch.empty_like(branch_bias)
    return *whole, torch.empty_like(weight), torch.empty_like(weight), like


def _keep_residual_norm(ctx, inputs, output) -> None:
    residual, branch, weight, _, seed, branch_bias, ctx.eps, ctx.p = inputs
    ctx.copies = output[1].numel() > 0
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(residual, branch, weight, seed, branch_bias)


def _differentiate_residual_norm(ctx, grad: Tensor | None, grad_copy: Tensor | None):
    *saved, branch_bias = ctx.saved_tensors
    grad_copy = grad_copy if ctx.copies else None
    *grads, of_bias = _residual_norm_backward(grad, grad_copy, *saved, branch_bias, ctx.eps, ctx.p)
    return *grads, None, None if branch_bias is None else of_bias, None, None


_residual_norm.register_autograd(_differentiate_residual_norm, setup_context=_keep_residual_norm)


# ---- bias and GELU


@torch.library.custom_op(f"{NAMESPACE}::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU (exact) of `x + bias`, ... x C in the dtype of `x`, computed in float32; where `kernels_run`.

    A product whose bias is left to this one needs no pass over its gradient for the bias's.
    """
    from .triton_spidr import bias_gelu_forward

    x = x.contiguous()
    out = torch.empty_like(x)
    channels = x.shape[-1]
    rows, block_channels = x.numel() // channels, min(256, _power_of_2(channels))
    if rows:
        with _device_of(x):
            bias_gelu_forward[(_blocks(rows, 16), _blocks(channels, block_channels))](
                x, bias, out, rows, channels=channels, block_rows=16, block_channels=block_channels
            )
    return out


@bias_gelu.register_fake
def _(x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from .triton_spidr import bias_gelu_backward

    grad, x = grad.contiguous(), x.contiguous()
    grad_x = torch.empty_like(x)
    channels = x.shape[-1]
    rows, block_rows, block_channels = x.numel() // channels, 16, min(256, _power_of_2(channels))
    columns = _blocks(channels, block_channels)
    rows_per_program, programs = _shares(rows, block_rows, _blocks(4 * PROGRAMS, columns))
    partial = x.new_empty((programs, channels), dtype=torch.float32)
    if rows:
        with _device_of(x):
            bias_gelu_backward[(programs, columns)](
                grad,
                x,
                bias,
                grad_x,
                partial,
                rows,
                rows_per_program,
                channels=channels,
                block_rows=block_rows,
                block_channels=block_channels,
            )
    return grad_x, partial.sum(0).to(bias.dtype)


@_bias_gelu_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(bias)


def _keep_bias_gelu(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_bias_gelu(ctx, grad: Tensor):
    return _bias_gelu_backward(grad, *ctx.saved_tensors)


bias_gelu.register_autograd(_differentiate_bias_gelu, setup_context=_keep_bias_gelu)


# ---- parameters in the dtype of products


def copied(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and in that dtype, in one copy; `to` and `contiguous` may be two."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format).copy_(x)


@torch.library.custom_op(f"{NAMESPACE}::cast_together", mutates_args=())
def cast_together(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Each tensor in another dtype, in one launch for all of them, and so are their gradients."""
    copies = [torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


@cast_together.register_fake
def _(tensors, dtype):
    return [torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in tensors]


def _keep_cast(ctx, inputs, output) -> None:
    ctx.dtype = inputs[0][0].dtype


def _differentiate_cast(ctx, grads: list[Tensor]):
    there = [grad.contiguous() for grad in grads if grad is not None]
    cast = iter(cast_together(there, ctx.dtype))
    return [None if grad is None else next(cast) for grad in grads], None


cast_together.register_autograd(_differentiate_cast, setup_context=_keep_cast)


# ---- some frames of all


@torch.library.custom_op(f"{NAMESPACE}::gather_rows", mutates_args=())
def gather_rows(representations: list[Tensor], rows: Tensor) -> Tensor:
    """The frames `rows` (N indices into B * T, no two alike) of K representations B x T x H: K x N x H.

    The last ones may be those frames already (N x H). All lie side by side at once, and gradients are added where they
    belong without the copies that `stack` and `index_select` make.
    """
    out = representations[0].new_empty((len(representations), len(rows), representations[0].shape[-1]))
    for x, of_x in zip(representations, out, strict=True):
        if x.dim() == 2:
            of_x.copy_(x)
        else:
            torch.index_select(x.flatten(0, 1), 0, rows, out=of_x)
    return out


@gather_rows.register_fake
def _(representations, rows):
    return representations[0].new_empty((len(representations), rows.shape[0], representations[0].shape[-1]))


@torch.library.custom_op(f"{NAMESPACE}::scatter_rows", mutates_args=())
def _scatter_rows(grad: Tensor, rows: Tensor, whole: int, batch: int, length: int) -> list[Tensor]:
    # Rows differ, so that adding needs no order.
    grads = [grad.new_zeros((batch * length, grad.shape[-1])).index_add_(0, rows, x) for x in grad[:whole]]
    return [x.view(batch, length, -1) for x in grads] + [x.clone() for x in grad[whole:]]


@_scatter_rows.register_fake
def _(grad, rows, whole, batch, length):
    shapes = [(batch, length, grad.shape[-1])] * whole + [grad.shape[1:]] * (grad.shape[0] - whole)
    return [grad.new_empty(shape) for shape in shapes]


def _keep_gather_rows(ctx, inputs, output) -> None:
    representations, rows = inputs
    ctx.whole = sum(x.dim() == 3 for x in representations)
    ctx.batch, ctx.length = representations[0].shape[:2]
    ctx.save_for_backward(rows)


def _differentiate_gather_rows(ctx, grad: Tensor):
    return _scatter_rows(grad, *ctx.saved_tensors, ctx.whole, ctx.batch, ctx.length), None


gather_rows.register_autograd(_differentiate_gather_rows, setup_context=_keep_gather_rows)


# ---- grouped convolution over time


def grouped_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Convolution that keeps the length: B x T x C, `weight` C x C/groups x k -> B x T x C.

    Frame t sees the frames t - k//2 ... t - k//2 + k - 1, zeros beyond the ends. The result has the autocast dtype
    where autocast is on.
    """
    if kernels_run(x) and weight.shape[0] == x.shape[-1] and weight.shape[1] <= MAX_GROUP:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _grouped_conv(x, weight, bias, groups)
    return plain_grouped_conv1d(x, weight, bias, groups)


def plain_grouped_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The obvious form of `grouped_conv1d`: as a 2-D convolution of height 1, channels-last without a copy."""
    images = x.unsqueeze(1).permute(0, 3, 1, 2)
    images = F.conv2d(images, weight.unsqueeze(2), bias, padding=(0, weight.shape[-1] // 2), groups=groups)
    return images.permute(0, 2, 3, 1).squeeze(1)[:, : x.shape[1]]


def _launch_conv(x: Tensor, taps: Tensor, bias: Tensor | None, before: int) -> Tensor:
    """`grouped_conv` over contiguous B x T x C with taps groups x k x in x out."""
    from .triton_spidr import grouped_conv

    out = torch.empty_like(x)
    groups, kernel, width, _ = taps.shape
    # In float32 without tensor cores larger blocks would spill registers.
    rows, (block_rows, warps) = x.numel() // x.shape[-1], (64, 8) if x.dtype == torch.float32 else (128, 4)
    if rows:
        with _device_of(x):
            grouped_conv[(_blocks(rows, block_rows), groups)](
                x,
                taps,
                bias,
                out,
                rows,
                x.shape[1],
                kernel=kernel,
                before=before,
                groups=groups,
                width=width,
                has_bias=bias is not None,
                precision=_precision(x),
                widen=not x.is_cuda,
                block_rows=block_rows,
                block_width=max(16, _power_of_2(width)),
                num_warps=warps,
            )
    return out


def _grouped_taps(weight: Tensor, groups: int) -> Tensor:
    """Convolution weights C x C/groups x k as groups x out x in x k."""
    return weight.view(groups, -1, *weight.shape[1:])


@torch.library.custom_op(f"{NAMESPACE}::grouped_conv", mutates_args=())
def _grouped_conv(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    taps = copied(_grouped_taps(weight, groups).permute(0, 3, 2, 1), x.dtype)
    return _launch_conv(x.contiguous(), taps, bias, weight.shape[-1] // 2)


@_grouped_conv.register_fake
def _(x, weight, bias, groups):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::grouped_conv_backward", mutates_args=())
def _grouped_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, groups: int, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_spidr import grouped_conv_weight

    grad, x = grad.contiguous(), x.contiguous()
    kernel, width, rows = weight.shape[-1], weight.shape[1], x.numel() // x.shape[-1]
    before, block_rows = kernel // 2, 64
    grad_x = x.new_empty(0)
    if need_x:
        # The input's gradient is the convolution of the output's with the taps turned round.
        taps = copied(_grouped_taps(weight, groups).flip(-1).permute(0, 3, 1, 2), x.dtype)
        grad_x = _launch_conv(grad, taps, None, kernel - 1 - before)
    splits = max(1, min(_blocks(rows, 8 * block_rows), _blocks(4 * PROGRAMS, groups * kernel)))
    rows_per_program, splits = _shares(rows, block_rows, splits)
    partial = x.new_empty((splits, groups, kernel, width, width), dtype=torch.float32)
    if rows:
        with _device_of(x):
            grouped_conv_weight[(kernel, groups, splits)](
                x,
                grad,
                partial,
                rows,
                x.shape[1],
                rows_per_program,
                kernel=kernel,
                before=before,
                groups=groups,
                width=width,
                precision=_precision(x),
                widen=not x.is_cuda,
                block_rows=block_rows,
                block_width=max(16, _power_of_2(width)),
                num_warps=8 if x.dtype == torch.float32 else 4,
            )
    grad_weight = partial.sum(0).permute(0, 3, 2, 1).reshape(weight.shape).to(weight.dtype)
    return grad_x, grad_weight, grad.sum((0, 1), dtype=torch.float32)


@_grouped_conv_backward.register_fake
def _(grad, x, weight, groups, need_x):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return grad_x, grad_weight, x.new_empty(x.shape[-1], dtype=torch.float32)


def _keep_grouped_conv(ctx, inputs, output) -> None:
    x, weight, bias, ctx.groups = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _differentiate_grouped_conv(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    grad_x, grad_weight, grad_bias = _grouped_conv_backward(grad, x, weight, ctx.groups, need_x)
    return (
        grad_x if need_x else None,
        grad_weight,
        None if ctx.bias_dtype is None else grad_bias.to(ctx.bias_dtype),
        None,
    )


_grouped_conv.register_autograd(_differentiate_grouped_conv, setup_context=_keep_grouped_conv)


# ---- targets


@torch.library.custom_op(f"{NAMESPACE}::normalized_rows", mutates_args=())
def normalized_rows(representations: list[Tensor], rows: Tensor, lengths: Tensor | None, eps: float) -> Tensor:
    """K representations B x T x H, each channel normalised over the first `lengths` (B; None: all) frames of its own
    utterance, of the frames `rows` (N indices into B * T): K x N x H, float32. (`instance_norm_rows` has the plain
    form.)"""
    from .triton_spidr import normalized_frames, time_statistics

    rows, lengths = rows.contiguous(), None if lengths is None else lengths.contiguous()
    batch, length, width = representations[0].shape
    frames, block_width = len(rows), min(64, _power_of_2(width))
    out = rows.new_empty((len(representations), frames, width), dtype=torch.float32)
    statistics = rows.new_empty((2, batch, width), dtype=torch.float32)
    with _device_of(rows):
        for x, of_x in zip(representations, out, strict=True):
            x = x.contiguous()
            time_statistics[(batch, _blocks(width, block_width))](
                x,
                lengths,
                *statistics,
                length,
                width=width,
                eps=eps,
                has_lengths=lengths is not None,
                block_frames=64,
                block_width=block_width,
            )
            if frames:
                block_rows, block_columns = _row_blocks(width)
                normalized_frames[(_blocks(frames, block_rows),)](
                    x,
                    rows,
                    *statistics,
                    of_x,
                    frames,
                    length,
                    width=width,
                    block_frames=block_rows,
                    block_width=block_columns,
                )
    return out


@normalized_rows.register_fake
def _(representations, rows, lengths, eps):
    shape = (len(representations), rows.shape[0], representations[0].shape[-1])
    return rows.new_empty(shape, dtype=torch.float32)


# ---- codebooks


@torch.library.custom_op(f"{NAMESPACE}::nearest_codewords", mutates_args=())
def nearest_codewords(targets: Tensor, codewords: Tensor) -> Tensor:
    """Nearest codeword in L2 distance: targets K x N x H, codewords K x V x H, both float32 -> labels K x N.

    Float32 in full whatever autocast and the process's TF32 setting say, since rounding moves labels. One operator in
    both forms: the precision of products is a setting of the process, which no compiled graph can change.
    """
    targets, codewords = targets.contiguous(), codewords.contiguous()
    # The targets' own norms shift all distances alike and are left out.
    half_norms = 0.5 * codewords.square().sum(-1)
    if kernels_run(targets):
        return _nearest_by_kernel(targets, codewords, half_norms)
    return _nearest_plainly(targets, codewords, half_norms)


@nearest_codewords.register_fake
def _(targets, codewords):
    return targets.new_empty(targets.shape[:2], dtype=torch.int64)


def _nearest_plainly(targets: Tensor, codewords: Tensor, half_norms: Tensor) -> Tensor:
    true_products = true_float32() if targets.is_cuda else nullcontext()
    with true_products, torch.autocast(targets.device.type, enabled=False):
        return torch.baddbmm(half_norms.unsqueeze(1), targets, codewords.transpose(1, 2), alpha=-1).argmin(-1)


@contextmanager
def true_float32() -> Iterator[None]:
    """Float32 products on CUDA without TF32, however the process was told to use it."""
    # The older functions refuse to answer a process that has used the newer settings.
    newer = torch.backends.cuda.matmul if hasattr(torch.backends.cuda.matmul, "fp32_precision") else None
    before = torch.get_float32_matmul_precision() if newer is None else newer.fp32_precision
    if before in ("highest", "ieee", "none"):
        yield
        return
    try:
        if newer is None:
            torch.set_float32_matmul_precision("highest")
        else:
            newer.fp32_precision = "ieee"
        yield
    finally:
        if newer is None:
            torch.set_float32_matmul_precision(before)
        else:
            newer.fp32_precision = before


def _nearest_by_kernel(targets: Tensor, codewords: Tensor, half_norms: Tensor) -> Tensor:
    from .triton_spidr import nearest_codeword

    codebooks, frames, width = targets.shape
    size, block_frames = codewords.shape[1], 64
    labels = torch.empty((codebooks, frames), dtype=torch.int64, device=targets.device)
    if frames:
        with _device_of(targets):
            nearest_codeword[(_blocks(frames, block_frames), codebooks)](
                targets,
                codewords,
                half_norms,
                labels,
                frames,
                size=size,
                width=width,
                block_frames=block_frames,
                block_size=min(128, max(16, _power_of_2(size))),
                block_width=32,
                num_warps=8,
            )
    return labels


@torch.library.custom_op(f"{NAMESPACE}::codeword_statistics", mutates_args=())
def codeword_statistics(labels: Tensor, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Labels K x N, targets K x N x H -> how often each of `size` codewords was assigned (K x V) and the sums of its
    targets (K x V x H), both float32. Deterministic. (`StatisticsBuffer.add` has the plain form.)"""
    codebooks, frames = labels.shape
    width = targets.shape[-1]
    from .triton_spidr import codeword_sums

    # What is sorted lies as what it was made from.
    sorted_labels, order = labels.contiguous().sort(dim=1, stable=True)
    codewords = torch.arange(size, device=labels.device).expand(codebooks, size).contiguous()
    ends = torch.searchsorted(sorted_labels, codewords, right=True)
    sums = targets.new_empty((codebooks, size, width))
    block_width = min(128, _power_of_2(width))
    with _device_of(targets):
        codeword_sums[(size, _blocks(width, block_width), codebooks)](
            targets.contiguous(),
            order,
            ends,
            sums,
            frames,
            size=size,
            width=width,
            block_frames=32,
            block_width=block_width,
        )
    return ends.diff(dim=1, prepend=ends.new_zeros(codebooks, 1)).float(), sums


@codeword_statistics.register_fake
def _(labels, targets, size):
    counts = targets.new_empty((labels.shape[0], size))
    return counts, targets.new_empty((labels.shape[0], size, targets.shape[-1]))


# ---- shared


def _device_of(x: Tensor) -> AbstractContextManager:
    """Kernels are launched on the current GPU, which need not be the one of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_2(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _precision(x: Tensor) -> str:
    """Of products with `x`: of float32 on NVIDIA's as the process asks of convolutions. Others know no TF32."""
    if x.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    convolutions = getattr(torch.backends.cudnn, "conv", None)
    if convolutions is None:
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    return "tf32" if convolutions.fp32_precision == "tf32" else "ieee"


__all__ = [
    "MAX_CHANNELS",
    "MAX_GROUP",
    "bias_gelu",
    "cast_together",
    "codeword_statistics",
    "conv_norm_gelu",
    "copied",
    "draw_seeds",
    "fits_first_convolution",
    "fuses_first_convolution",
    "gather_rows",
    "grouped_conv1d",
    "kernel_trouble",
    "kernels_run",
    "kernels_wanted",
    "nearest_codewords",
    "norm_gelu",
    "normalized_rows",
    "plain_grouped_conv1d",
    "plain_norm_gelu",
    "residual_norm",
    "splits_products",
    "true_float32",
    "use_kernels",
]
