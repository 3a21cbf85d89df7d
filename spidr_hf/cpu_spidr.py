"""What runs faster on CPUs in another form than PyTorch's own: matrix products, attention, and dropout.

**Products.** On x86 `F.linear` in float32 goes to MKL, which is slower than oneDNN on some CPUs and cannot
apply the GELU in the same pass; `_FLOAT32` has the faster one by processor. oneDNN is reached by the operator that the
compiler uses for it. It has no gradient: where one is wanted, `_Product` gives it for float32 (in bfloat16 PyTorch
takes oneDNN by itself). A module that is
more than a plain `nn.Linear` (quantised, wrapped, offloaded, with hooks) is called, and computes the same products.

**Attention.** Two batched products, where PyTorch's fused form has no fast one: see `attends_by_products`.

**Dropout.** PyTorch draws one Bernoulli number per element on a CPU, which is slow. Sixteen
bits of a random integer decide as well: the rate is rounded to a multiple of 1/65536 and the scale follows it.
"""

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain_spidr import are_ordinary, call, is_plain, is_untouched, plain_mode

_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Which library multiplies float32 matrices faster, by vendor and instruction set; PyTorch's own choice (MKL) where
# nothing is measured. The time of a forward pass of spidr-base with oneDNN's over that with MKL's, one thread, PyTorch
# 2.13:
_FLOAT32 = {
    ("GenuineIntel", "AVX512"): "MKL",  # Sapphire Rapids: 2 x 6 s of audio 1.10, 4 x 10 s 1.09, 60 s 1.00
    ("AuthenticAMD", "AVX512"): "oneDNN",  # EPYC: 2 x 6 s 0.92
    ("AuthenticAMD", "AVX2"): "MKL",  # EPYC, Zen 3: 2 x 6 s 1.27, 4 x 10 s 1.15, 60 s 1.10, training on 2 x 2 s 1.14
}
_LEVELS = 1 << 16
PIECE_ROWS = 512
_LONGEST_PRODUCT_ATTENTION = 1024  # frames; beyond, the fused form's smaller memory makes it as fast


@cache
def processor() -> tuple[str, str]:
    """Vendor and widest instruction set that PyTorch uses, as processors and PyTorch call them."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            vendor = next(line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id"))
    except (OSError, StopIteration):  # other systems
        vendor = next((name for name in ("GenuineIntel", "AuthenticAMD") if name in platform.processor()), "")
    return vendor, torch.backends.cpu.get_cpu_capability()


def product_library(dtype: torch.dtype) -> str:
    """What multiplies matrices of `dtype` (float32 or bfloat16) on this CPU: "oneDNN", or "PyTorch" as it sees fit.

    Processor and settings of the process decide, never a measurement: results must not depend on what else runs.
    """
    return "oneDNN" if has_onednn(dtype) else "PyTorch"


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AMX, or AVX-512 with BF16), and PyTorch lets it."""
    return has_onednn(torch.bfloat16) and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def has_onednn(dtype: torch.dtype = torch.float32) -> bool:
    """Whether products of `dtype` (float32 or bfloat16) go to oneDNN: it is here, the process has not switched it off,
    and on this processor it is not the slower one."""
    return (
        _X86
        and (dtype != torch.float32 or _FLOAT32.get(processor(), "MKL") == "oneDNN")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with `x` has: autocast's where that is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def fast_products(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether products of `x` with `weights` (which may be None) run on oneDNN, and nothing wants their gradient."""
    return not _wants_gradient(x, *weights) and onednn_takes(x, *weights)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def onednn_takes(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether oneDNN can be given products of `x` with `weights` directly: see the top of the file."""
    tensors = [x, *(weight for weight in weights if weight is not None)]
    dtype = product_dtype(x)
    if (
        dtype not in (torch.float32, torch.bfloat16)
        or x.device.type != "cpu"
        or not plain_mode()
        or not has_onednn(dtype)
    ):
        return False
    if not are_ordinary(*tensors):
        return False
    autocast = torch.is_autocast_enabled("cpu")
    for tensor in tensors:
        if tensor.device != x.device:
            return False
        if tensor.dtype not in (torch.float32, torch.bfloat16) or (tensor.dtype != x.dtype and not autocast):
            return False
    return True


def fast_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """`x @ weight.T + bias`, with exact GELU on request; where `fast_products` holds. x: ... x I, weight: O x I."""
    dtype = product_dtype(x)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if not weight.t().is_contiguous():
        weight = weight.contiguous()
    activation, algorithm = ("gelu", "none") if gelu else ("none", "")
    return torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, activation, [], algorithm)


def row_pieces(x: Tensor, *modules: nn.Module) -> tuple[Tensor, ...] | None:
    """`x` (... x C) in pieces of rows to be led through `modules` by themselves; None where that pays nothing.

    What is made of a piece stays in the cache, and oneDNN chooses poor blocks for some numbers of rows above these.
    """
    if not plain_mode() or not all(is_plain(module) and fast_products(x, module.weight) for module in modules):
        return None
    rows = x.numel() // x.shape[-1]
    pieces = -(-rows // (PIECE_ROWS * torch.get_num_threads()))
    return x.reshape(rows, -1).tensor_split(pieces) if pieces > 1 else None


def linear(module: nn.Module, x: Tensor, activation: nn.Module | None = None) -> Tensor:
    """`activation(module(x))`, in one pass where that can be done and the activation is the exact GELU."""
    if not plain_mode():
        x = module(x)
    elif not is_plain(module):
        x = call(module, x, F.linear, product)
    elif activation is not None and is_exact_gelu(activation) and fast_products(x, module.weight, module.bias):
        return fast_product(x, module.weight, module.bias, gelu=True)
    else:
        x = product(x, module.weight, module.bias)
    return x if activation is None else activation(x)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` in the form that is fastest on a CPU."""
    if onednn_takes(x, weight, bias):
        if not _wants_gradient(x, weight, bias):
            return fast_product(x, weight, bias)
        if product_dtype(x) == torch.float32 == x.dtype == weight.dtype:
            return _Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    """`fast_product` in float32, with gradients."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return fast_product(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        grad_x = None
        if need_x and torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            grad_x = grad @ weight
        elif need_x:
            grad_x = fast_product(rows, weight.t()).view_as(x)
        # MKL is as fast for this one.
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None
        return grad_x, grad_weight, rows.sum(0) if ctx.has_bias and need_bias else None


def is_exact_gelu(activation: nn.Module) -> bool:
    """transformers' and PyTorch's GELU without approximation, which nothing watches."""
    exact = getattr(activation, "act", None) is F.gelu or getattr(activation, "approximate", None) == "none"
    return exact and is_untouched(activation)


def gelu_in_place(x: Tensor) -> Tensor:
    """Exact GELU, in `x` itself where no gradient and no recording could need what it held."""
    if x.requires_grad or not plain_mode():
        return F.gelu(x)
    return torch.ops.aten.gelu_(x)


def convolution_taps(weight: Tensor, stride: int, dtype: torch.dtype) -> list[Tensor]:
    """Weights O x C x k of a strided convolution as one matrix per shift: tap `i` is applied `i` steps later."""
    # oneDNN takes a strided matrix, but very slowly.
    return [part.transpose(1, 2).flatten(1).to(dtype).contiguous() for part in weight.split(stride, dim=2)]


def strided_convolution(x: Tensor, taps: list[Tensor], bias: Tensor | None, stride: int) -> Tensor:
    """Convolution of R x C rows laid end to end (R a multiple of `stride`) -> R/stride x O, without gradients.

    Outputs whose taps reach past the last row hold no meaningful value.
    """
    windows = x.view(-1, stride * x.shape[1])
    out = None
    for shift, matrix in enumerate(taps):
        inputs = windows[shift:, : matrix.shape[1]]
        if out is None:
            out = fast_product(inputs, matrix, bias)
        elif shift < len(out):
            out[:-shift] += fast_product(inputs, matrix)
    return out


def _keep_mask(like: Tensor, p: float) -> Tensor:
    """Random factors 0 or 1 / (1 - p) of the shape and dtype of `like`."""
    dropped = round(p * _LEVELS)
    count = like.numel()
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
    keep = numbers[:count].view(like.shape) >= dropped - _LEVELS // 2
    return keep.to(like.dtype).mul_(_LEVELS / (_LEVELS - dropped))


def _fast_dropout(x: Tensor, p: float) -> bool:
    # A rate that rounds to 0 or 1 is left to PyTorch.
    return x.device.type == "cpu" and x.is_floating_point() and plain_mode() and 1e-4 < p < 1 - 1e-4


class SpidrDropout(nn.Dropout):
    """Dropout, with cheaper random numbers on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, p: float) -> Tensor:
    """`x` with each element zeroed with probability `p` and the others divided by `1 - p`."""
    return x * _keep_mask(x, p) if _fast_dropout(x, p) else F.dropout(x, p)


def attends_by_products(qkv: Tensor, p: float) -> bool:
    """Whether `product_attention` replaces PyTorch's attention. `qkv`: B x T x ..., `p`: dropout of the weights.

    PyTorch has no fused form with dropout on a CPU. Its fused form in bfloat16 hands oneDNN a product per head and
    block of keys, and getting them started costs more than the products themselves unless sequences are long.
    """
    if p > 0:
        return _fast_dropout(qkv, p)
    return qkv.device.type == "cpu" and plain_mode() and products_attend_faster(qkv.dtype, qkv.shape[1])


def products_attend_faster(dtype: torch.dtype, length: int) -> bool:
    """The same without dropout, for sequences of `length` frames on this CPU."""
    return dtype == torch.bfloat16 and length <= _LONGEST_PRODUCT_ATTENTION and has_onednn(dtype)


def reads_faster_in_one_piece(qkv: Tensor) -> bool:
    """Whether PyTorch's fused attention gains by a copy of keys and values with each head's frames side by side.

    It reads them once for every block of queries; in `qkv` (B x T x 3 x heads x D) each frame lies on another page.
    """
    return qkv.device.type == "cpu" and qkv.dtype == torch.float32 and plain_mode() and not _wants_gradient(qkv)


def product_attention(qkv: Tensor, keep: Tensor | None, scaling: float, p: float) -> Tensor:
    """
    Attention as two batched products, in the dtype of its input; dropout on its weights.

    Args:
        qkv: B x T x 3 x heads x D, queries, keys and values.
        keep: bool, broadcastable to B x heads x T x T; False where a key is hidden.
        scaling: factor of the scores.
        p: share of the weights that is zeroed.

    Returns B x T x heads x D.
    """
    batch, length, _, heads, width = qkv.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4).reshape(3, batch * heads, length, width).unbind(0)
    # Autocast would copy the scores to float32 for a softmax that computes in float32 as it is.
    with torch.autocast("cpu", enabled=False):
        scores = torch.bmm(query * scaling, key.transpose(1, 2))
        if keep is not None:
            by_head = scores.view(batch, heads, length, length)
            scores = by_head.masked_fill(~keep, torch.finfo(scores.dtype).min).view_as(scores)
        weights = scores.softmax(-1)
        context = torch.bmm(dropout(weights, p) if p > 0 else weights, value)
    return context.view(batch, heads, length, width).transpose(1, 2)


__all__ = [
    "SpidrDropout",
    "attends_by_products",
    "convolution_taps",
    "dropout",
    "fast_product",
    "fast_products",
    "gelu_in_place",
    "has_fast_bfloat16",
    "is_exact_gelu",
    "linear",
    "onednn_takes",
    "product",
    "product_attention",
    "product_dtype",
    "product_library",
    "products_attend_faster",
    "reads_faster_in_one_piece",
    "row_pieces",
    "strided_convolution",
]
