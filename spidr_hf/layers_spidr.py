"""Layers of the SpidR encoder: convolutional feature extractor, positional convolutions, transformer.

Everything runs channels-last (B x T x C). The convolutions of the extractor are matrix products over the whole batch
laid end to end, which is faster than convolving and needs no transpose around the norms. The obvious forms stand in
`tests/reference.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.utils import _single
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_spidr import SpidrConfig, conv_output_length, frame_lengths, receptive_field
from .cpu_spidr import (
    SpidrDropout,
    attends_by_products,
    convolution_taps,
    fast_product,
    fast_products,
    gelu_in_place,
    is_exact_gelu,
    linear,
    onednn_takes,
    product_attention,
    product_dtype,
    reads_faster_in_one_piece,
    row_pieces,
    strided_convolution,
)
from .kernels_spidr import (
    MAX_CHANNELS,
    NAMESPACE,
    bias_gelu,
    cast_together,
    conv_norm_gelu,
    copied,
    draw_seeds,
    fuses_first_convolution,
    gather_rows,
    grouped_conv1d,
    kernels_run,
    norm_gelu,
    residual_norm,
)
from .plain_spidr import call, is_plain, is_untouched, plain_mode

# Samples of a batch that the extractor takes at a time where no gradient is needed: about 80 MB of activations in
# float32 on CPU (smaller pieces are slower), and enough to fill a GPU.
CHUNK_SAMPLES_CPU = 64_000
CHUNK_SAMPLES = 4_000_000


class StridedConv1d(torch.autograd.Function):
    """Strided convolution of R x C rows laid end to end, as ceil(kernel / stride) matrix products without copies.

    `stride` neighbouring rows seen as one of `stride * C` are the input of the first `stride` taps; the same view one
    row further down is the input of the next ones. Outputs whose taps reach past their utterance's end mix with the
    next utterance: the caller slices them off.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        taps = convolution_taps(weight, stride, x.dtype)
        ctx.save_for_backward(x, *taps)
        ctx.stride, ctx.shape, ctx.has_bias = stride, weight.shape, bias is not None
        ctx.fast = x.dtype == torch.float32 and onednn_takes(x, weight, bias)
        if ctx.fast:
            return strided_convolution(x, taps, bias, stride)
        windows = x.view(-1, stride * x.shape[1])
        out = F.linear(windows[:, : taps[0].shape[1]], taps[0], bias)
        for shift, matrix in enumerate(taps[1:], start=1):
            if shift < len(out):
                out[:-shift].addmm_(windows[shift:, : matrix.shape[1]], matrix.t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, *taps = ctx.saved_tensors
        out_channels, channels, kernel = ctx.shape
        windows = x.view(-1, ctx.stride * channels)
        grad = grad.contiguous()
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_windows = grad.new_zeros(windows.shape) if need_x and kernel < ctx.stride else None
        if need_x and grad_windows is None:
            grad_windows = torch.empty_like(windows)
        grad_weight = grad.new_empty(ctx.shape) if need_weight else None
        for shift, matrix in enumerate(taps):
            outputs = grad[: len(grad) - shift]
            inputs, width = windows[shift:, : matrix.shape[1]], matrix.shape[1]
            if need_x and ctx.fast:
                product = fast_product(outputs, matrix.t())
                if shift:
                    grad_windows[shift:, :width] += product
                elif width == grad_windows.shape[1]:
                    grad_windows = product
                else:
                    grad_windows[:, :width] = product
            elif need_x and shift == 0:
                torch.mm(outputs, matrix, out=grad_windows[:, :width])
            elif need_x:
                grad_windows[shift:, :width].addmm_(outputs, matrix)
            if need_weight:
                product = (outputs.t() @ inputs).view(out_channels, -1, channels)
                first = shift * ctx.stride
                grad_weight[:, :, first : first + product.shape[1]] = product.transpose(1, 2)
        grad_bias = grad.sum(0) if ctx.has_bias else None
        return (grad_windows.view_as(x) if need_x else None), grad_weight, grad_bias, None


class PolyphaseConv1d(torch.autograd.Function):
    """`StridedConv1d` for a GPU, where every pass over an activation costs: one product has all taps.

    Windows of neighbouring outputs overlap, which no library multiplies in place. Those of every `n`-th output do not
    (`n` times the stride being what the kernel covers): they lie end to end: a product for each of `n` phases.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        matrix = copied(weight.transpose(1, 2), x.dtype).flatten(1)
        ctx.save_for_backward(x, matrix)
        ctx.stride, ctx.shape, ctx.dtype, ctx.has_bias = stride, weight.shape, weight.dtype, bias is not None
        rows = x.view(-1, stride * x.shape[1])
        out = x.new_empty(len(rows), len(matrix))
        phases = -(-weight.shape[2] // stride)
        for windows, place in _phases(rows, out, phases):
            windows = windows[:, : matrix.shape[1]]
            if bias is None:
                torch.mm(windows, matrix.t(), out=place)
            else:
                torch.addmm(bias, windows, matrix.t(), out=place)
        if phases > 1:
            out[max(0, len(out) - phases + 1) :].zero_()  # their windows reach beyond the end
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, matrix = ctx.saved_tensors
        out_channels, channels, kernel = ctx.shape
        step = ctx.stride * channels
        grad, rows, phases = grad.contiguous(), x.view(-1, step), -(-kernel // ctx.stride)
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = grad_weight = None
        if need_x:
            grad_x = torch.zeros_like(rows) if kernel < ctx.stride else torch.empty_like(rows)
            taps = matrix.split(step, dim=1)
            last = taps[-1].shape[1]  # so many columns of a row are seen by all phases, the others by one less
            for columns, seen in ((slice(0, last), taps), (slice(last, None), taps[:-1])):
                blocks = torch.cat([tap[:, columns] for tap in reversed(seen)]) if seen else matrix[:0]
                if blocks.numel() == 0:
                    continue
                out, phases_here = grad_x[:, columns], len(seen)
                for windows, place in _phases(grad, out[phases_here - 1 :], phases_here):
                    torch.mm(windows, blocks, out=place)
                for row in range(min(phases_here - 1, len(grad))):  # the first have no gradient before them
                    before = grad[: row + 1].view(1, -1)
                    torch.mm(before, blocks[-before.shape[1] :], out=out[row : row + 1])
            grad_x = grad_x.view_as(x)
        if need_weight:
            parts = list(_phases(rows, grad, phases))
            partial = matrix.new_empty(len(parts), *matrix.shape)
            for part, (windows, place) in zip(partial, parts, strict=True):
                torch.mm(place.t(), windows[:, : matrix.shape[1]], out=part)
            total = partial[0] if len(parts) == 1 else partial.sum(0)
            grad_weight = copied(total.view(out_channels, kernel, channels).transpose(1, 2), ctx.dtype)
        return grad_x, grad_weight, grad.sum(0) if ctx.has_bias else None, None


def _phases(rows: Tensor, outputs: Tensor, phases: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of `phases` neighbouring `rows` (R x C) end to end, and their places among `outputs`: every `phases`-th,
    from the first, the second ..."""
    for phase in range(phases):
        count = (len(rows) - phase) // phases
        if count > 0:
            yield rows[phase : phase + count * phases].view(count, -1), outputs[phase::phases][:count]


def conv1d_channels_last(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, taps: list[Tensor] | None = None
) -> Tensor:
    """Convolution without padding of B x T x C (T a multiple of `stride`) -> B x T/stride x O.

    The last `ceil(kernel / stride) - 1` outputs of each row reach beyond it and hold no meaningful value. The
    result has the autocast dtype where autocast is on. `taps`: `weight` as `prepare_taps` gives it.
    """
    batch, length, channels = x.shape
    out_channels, _, kernel = weight.shape
    fast = fast_products(x, weight, bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        # On a GPU the weights' cast is part of the copy that lays their taps side by side.
        x, weight = x.to(dtype), weight if x.is_cuda and channels > 1 else weight.to(dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if channels == 1:
        # One product over copied windows: splitting the ten taps would write the largest activation of the model twice.
        windows = F.pad(x.reshape(-1), (0, max(kernel - stride, 0))).unfold(0, kernel, stride)
        matrix = weight.view(out_channels, kernel)
        out = fast_product(windows.contiguous(), matrix, bias) if fast else F.linear(windows, matrix, bias)
    elif fast:
        taps = convolution_taps(weight, stride, x.dtype) if taps is None else taps
        out = strided_convolution(x.reshape(batch * length, channels), taps, bias, stride)
    else:
        form = PolyphaseConv1d if x.is_cuda else StridedConv1d
        out = form.apply(x.reshape(batch * length, channels), weight, bias, stride)
    return out.view(batch, length // stride, out_channels)


def _exact_conv1d(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """`F.conv1d` as `conv1d_channels_last` computes it, B x C x T -> B x O x T', all of it meaningful."""
    if _single(padding) != (0,) or _single(dilation) != (1,) or groups != 1:
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)
    (stride,) = _single(stride)
    length = conv_output_length(x.shape[2], weight.shape[2], stride)
    rows = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[2] % stride))
    return conv1d_channels_last(rows, weight, bias, stride)[:, :length].transpose(1, 2)


@torch.library.custom_op(f"{NAMESPACE}::convolution", mutates_args=())
def _convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], groups: int
) -> Tensor:
    return F.conv1d(x, weight, bias, stride, padding, 1, groups).contiguous()


@_convolution.register_fake
def _(x, weight, bias, stride, padding, groups):
    length = conv_output_length(x.shape[2] + 2 * padding[0], weight.shape[2], stride[0])
    return x.new_empty(x.shape[0], weight.shape[0], length)


@torch.library.custom_op(f"{NAMESPACE}::convolution_backward", mutates_args=())
def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: list[int], padding: list[int], groups: int, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    backward = torch.ops.aten.convolution_backward
    grads = backward(grad, x, weight, [len(weight)], stride, padding, [1], False, [0], groups, needed)
    return tuple(x.new_empty(0) if part is None else part.contiguous() for part in grads)


@_convolution_backward.register_fake
def _(grad, x, weight, stride, padding, groups, needed):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, needed, strict=True))


def _keep_convolution(ctx, inputs, output) -> None:
    x, weight, _, *ctx.form = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_convolution(ctx, grad: Tensor):
    needed = list(ctx.needs_input_grad[:3])
    grads = _convolution_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.form, needed)
    return *(part if wanted else None for part, wanted in zip(grads, needed, strict=True)), None, None, None


_convolution.register_autograd(_differentiate_convolution, setup_context=_keep_convolution)


def _convolved(conv: nn.Module, x: Tensor) -> Tensor:
    """`conv(x)`, B x C x T -> B x O x T', where it may be compiled.

    On a CPU a copy of `x` is read: views that the backward pass needs are put in order by their strides, and the
    compiler cannot tell whether a length of floor divisions is above 0 ("cannot determine truth value of Relational").
    Not `contiguous`, which asks whether `x` is the whole: samples that fill the last frame would take a graph of their
    own. And the convolution is an operator of its own, since PyTorch 2.13 compiles the gradient of its own one for a
    single length, so that each length would be compiled anew. An exported model has PyTorch's.
    """
    if not torch.compiler.is_compiling() or x.device.type != "cpu":
        return conv(x)
    x = x.clone(memory_format=torch.contiguous_format)
    if torch.compiler.is_exporting() or not is_plain(conv):
        return conv(x)
    dtype = product_dtype(x)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    form = list(conv.stride), list(conv.padding), conv.groups
    return _convolution(x.to(dtype), conv.weight.to(dtype), bias, *form)


class SpidrConvLayer(nn.Module):
    """Conv1d without padding, norm, activation (SPEC: feat_extract_norm)."""

    def __init__(self, config: SpidrConfig, index: int):
        super().__init__()
        in_channels = config.conv_dim[index - 1] if index else 1
        channels = config.conv_dim[index]
        self.conv = nn.Conv1d(
            in_channels, channels, config.conv_kernel[index], config.conv_stride[index], bias=config.conv_bias
        )
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        elif index == 0:
            self.layer_norm = nn.GroupNorm(channels, channels, eps=config.layer_norm_eps)
        else:
            self.layer_norm = None
        self.activation = ACT2FN[config.feat_extract_activation]
        self.norms_over_time = config.feat_extract_norm == "group" and index == 0
        self.fuses = config.feat_extract_norm == "layer" and config.feat_extract_activation == "gelu"

    def is_plain(self) -> bool:
        """Whether nothing hangs on the layer or in it: then its weights may be read, and it may run in pieces."""
        read = [self.conv] if self.layer_norm is None else [self.conv, self.layer_norm]
        return is_untouched(*self.modules()) and all(is_plain(module) for module in read)

    def prepare_taps(self, x: Tensor) -> list[Tensor] | None:
        """The weights as a plain layer uses them on inputs like `x`, for several calls; None where it takes its own."""
        weight = self.conv.weight
        if weight.shape[1] == 1 or not fast_products(x, weight, self.conv.bias):
            return None
        return convolution_taps(weight, self.conv.stride[0], product_dtype(x))

    def forward(
        self,
        hidden_states: Tensor,
        lengths: Tensor | None = None,
        length: int | None = None,
        taps: list[Tensor] | None = None,
    ) -> Tensor:
        """B x T x C -> B x T' x O.

        Args:
            lengths: B, the outputs of each row that are no padding, where rows differ; only the group norm, which
                normalises over time, needs them.
            length: how many of the T' outputs mean anything, of a plain layer whose rows lie end to end (T is a
                multiple of the stride, and T' is T / stride). Without it all do.
            taps: see `prepare_taps`.
        """
        conv, norm, read = self.conv, self.layer_norm, length is not None
        if read and self.fuses and conv.bias is None and fuses_first_convolution(hidden_states, conv.weight):
            stride, batch = conv.stride[0], len(hidden_states)
            rows = conv_norm_gelu(hidden_states, conv.weight, norm.weight, norm.bias, stride, norm.eps)
            return rows.view(batch, -1, rows.shape[1])
        if read:
            hidden_states = conv1d_channels_last(hidden_states, conv.weight, conv.bias, conv.stride[0], taps)
        elif plain_mode():
            # Contiguous, since the GELU of a view has other last digits.
            hidden_states = call(conv, hidden_states.transpose(1, 2), F.conv1d, _exact_conv1d)
            hidden_states = hidden_states.transpose(1, 2).contiguous()
        else:
            hidden_states = _convolved(conv, hidden_states.transpose(1, 2)).transpose(1, 2)
        if self.fuses and kernels_run(hidden_states) and is_plain(norm) and is_untouched(self.activation):
            return norm_gelu(hidden_states, norm.weight, norm.bias, norm.eps)
        if self.norms_over_time:
            hidden_states = _group_norm(hidden_states, norm, length, lengths)
        elif norm is not None:
            hidden_states = norm(hidden_states)
        return gelu_in_place(hidden_states) if self.fuses and read else self.activation(hidden_states)


def _group_norm(x: Tensor, norm: nn.Module, length: int | None, lengths: Tensor | None) -> Tensor:
    """GroupNorm with a group per channel over the first `length` frames of B x T x C, `lengths` (B) of each row.

    torch's own would let padding into the statistics, so that a row would depend on its neighbours' lengths.
    """

    def form(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return _norm_over_time(x.transpose(1, 2), weight, bias, eps, length, lengths).transpose(1, 2)

    if is_plain(norm):
        return _norm_over_time(x, norm.weight, norm.bias, norm.eps, length, lengths)
    return call(norm, x.transpose(1, 2), F.group_norm, form).transpose(1, 2)


def _norm_over_time(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, length: int | None, lengths: Tensor | None
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # float32 whatever the dtype of `x`
        mean, var = masked_var_mean(x[:, :length].float(), lengths)
        scale = weight.float() * torch.rsqrt(var + eps)
        return torch.addcmul(bias.float() - mean * scale, x, scale).to(x.dtype)


def masked_var_mean(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over time of B x T x C, each B x 1 x C, over the first `lengths` frames of each row."""
    if lengths is None and x.device.type == "cpu" and not x.requires_grad:
        # var_mean takes one number after the other there.
        mean = x.mean(1, keepdim=True)
        return mean, (x - mean).square_().mean(1, keepdim=True)
    if lengths is None:
        var, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return mean, var
    valid = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).unsqueeze(-1)
    count = lengths.clamp(min=1).view(-1, 1, 1).to(x.dtype)
    mean = torch.where(valid, x, 0).sum(1, keepdim=True) / count
    var = torch.where(valid, x - mean, 0).square().sum(1, keepdim=True) / count
    return mean, var


def gather_frames(representations: Sequence[Tensor], rows: Tensor | None) -> Tensor:
    """K representations B x T x H as K x N x H: of the frames `rows` (N indices into B * T), or of all.

    The last ones may be those frames already (N x H).
    """
    if rows is not None and kernels_run(representations[0]):
        return gather_rows(list(representations), rows)

    def select(x: Tensor) -> Tensor:
        # Not `[rows]`, whose gradient is sorted by row on a GPU: rows differ, so that adding needs no order.
        return x.reshape(-1, x.shape[-1]) if rows is None or x.dim() == 2 else x.flatten(0, 1).index_select(0, rows)

    selected = [select(x) for x in representations]
    return torch.stack(selected) if len(selected) > 1 else selected[0].unsqueeze(0)


class SpidrFeatureEncoder(nn.Module):
    """Waveforms B x S -> features B x T x conv_dim[-1], one frame per 320 samples."""

    def __init__(self, config: SpidrConfig):
        super().__init__()
        self.config = config
        self.conv_layers = nn.ModuleList(SpidrConvLayer(config, i) for i in range(config.num_feat_extract_layers))

    def forward(self, input_values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`lengths` (B): valid samples of each row, None when every row is full."""
        batch, samples = input_values.shape
        config, stride = self.config, self.config.inputs_to_logits_ratio
        if not plain_mode() or not all(layer.is_plain() for layer in self.conv_layers):
            return self._convolve_exactly(input_values, lengths)
        if config.feat_extract_norm == "group" or (torch.is_grad_enabled() and self._trains(input_values)):
            return self._convolve(input_values, lengths)
        taps = [layer.prepare_taps(input_values) for layer in self.conv_layers]
        # A frame sees nothing outside its receptive field, so pieces give exactly what the whole gives, and the first
        # convolution's output, the largest activation of the model, never exists as a whole.
        frames, field = frame_lengths(config, samples), receptive_field(config)
        budget = CHUNK_SAMPLES_CPU if input_values.device.type == "cpu" else CHUNK_SAMPLES
        chunk = max(budget // (batch * stride), 10)
        pieces = [
            self._convolve(
                input_values[:, first * stride : (min(first + chunk, frames) - 1) * stride + field], None, taps
            )
            for first in range(0, frames, chunk)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _trains(self, input_values: Tensor) -> bool:
        return input_values.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def _convolve_exactly(self, input_values: Tensor, lengths: Tensor | None) -> Tensor:
        """Layer after layer as they stand, every module called once."""
        config, hidden_states = self.config, input_values.unsqueeze(-1)
        # Without what no frame sees, the layers' lengths are multiples of the number of frames. A compiler that is
        # given floors of floors instead is minutes slower. The group norm sees all.
        used = (frame_lengths(config, input_values.shape[1]) - 1) * config.inputs_to_logits_ratio
        used += receptive_field(config)
        for layer, kernel, stride in zip(self.conv_layers, config.conv_kernel, config.conv_stride, strict=True):
            if torch.compiler.is_compiling() and (layer is not self.conv_layers[0] or not layer.norms_over_time):
                hidden_states = hidden_states[:, :used]
            lengths = None if lengths is None else conv_output_length(lengths, kernel, stride)
            hidden_states = layer(hidden_states, lengths)
            used = conv_output_length(used, kernel, stride)
        return hidden_states

    def _convolve(
        self, input_values: Tensor, lengths: Tensor | None, taps: list[list[Tensor] | None] | None = None
    ) -> Tensor:
        length = input_values.shape[1]
        # Rows padded to whole frames can be laid end to end: every layer's stride then divides their length.
        hidden_states = F.pad(input_values, (0, -length % self.config.inputs_to_logits_ratio)).unsqueeze(-1)
        taps = [None] * len(self.conv_layers) if taps is None else taps
        for layer, kernel, stride, matrices in zip(
            self.conv_layers, self.config.conv_kernel, self.config.conv_stride, taps, strict=True
        ):
            length = conv_output_length(length, kernel, stride)
            lengths = None if lengths is None else conv_output_length(lengths, kernel, stride)
            hidden_states = layer(hidden_states, lengths, length, matrices)
        return hidden_states[:, :length]


class SpidrFeatureProjection(nn.Module):
    """LayerNorm and projection to the encoder's width: B x T x conv_dim[-1] -> B x T x H."""

    def __init__(self, config: SpidrConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.conv_dim[-1], config.hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return linear(self.projection, self.layer_norm(features))


def _convolve_frames(conv: nn.Module, x: Tensor) -> Tensor:
    """Grouped convolution of B x T x H that keeps the length; an even kernel looks back one frame further."""
    if is_plain(conv) and (plain_mode() or kernels_run(x)):
        return grouped_conv1d(x, conv.weight, conv.bias, conv.groups)
    x, length = x.transpose(1, 2), x.shape[1]
    x = call(conv, x, F.conv1d, _conv1d_as_images) if plain_mode() else _convolved(conv, x)
    return x[:, :, :length].transpose(1, 2)


def _conv1d_as_images(x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """`F.conv1d`, B x C x T -> B x O x T', as `plain_grouped_conv1d` computes it."""
    if isinstance(padding, str):
        return F.conv1d(x, weight, bias, stride, padding, dilation, groups)
    sizes = (1, *_single(stride)), (0, *_single(padding)), (1, *_single(dilation))
    return F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), bias, *sizes, groups).squeeze(2)


class SpidrPositionalConvEmbedding(nn.Module):
    """Stack of grouped convolutions, each followed by a norm without parameters and the activation: B x T x H.

    The norm can be left out (`conv_pos_norm`), as in original DinoSR models with a single convolution.
    """

    def __init__(self, config: SpidrConfig):
        super().__init__()
        kernel = config.pos_conv_kernel
        self.convs = nn.ModuleList(
            nn.Conv1d(
                config.hidden_size,
                config.hidden_size,
                kernel,
                padding=kernel // 2,
                groups=config.num_conv_pos_embedding_groups,
            )
            for _ in range(config.conv_pos_depth)
        )
        self.activation = ACT2FN[config.feat_extract_activation]
        self.norm = config.conv_pos_norm
        self.eps = config.layer_norm_eps
        self.fuses = config.conv_pos_norm and config.feat_extract_activation == "gelu"

    def forward(self, hidden_states: Tensor, frame_mask: Tensor | None = None) -> Tensor:
        """`frame_mask` (B x T, bool): the frames that are not padding. Padded frames of the result are zero."""
        keep = None if frame_mask is None else frame_mask.unsqueeze(-1)
        for conv in self.convs:
            if keep is not None:
                hidden_states = hidden_states * keep
            hidden_states = _convolve_frames(conv, hidden_states)
            if self.fuses and kernels_run(hidden_states) and is_untouched(self.activation):
                hidden_states = norm_gelu(hidden_states, None, None, self.eps)
                continue
            if self.norm:
                hidden_states = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)
            hidden_states = self.activation(hidden_states)
        return hidden_states if keep is None else hidden_states * keep


def _for_products(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters (or None) as products with `x` take them: under autocast in its dtype, all in one launch."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    there = [parameter for parameter in parameters if parameter is not None]
    if all(parameter.dtype == dtype for parameter in there) or len({parameter.dtype for parameter in there}) > 1:
        return list(parameters)
    cast = iter(cast_together(there, dtype))
    return [None if parameter is None else next(cast) for parameter in parameters]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out, B x heads x T x D -> B x T x heads x D, with its weights B x heads x T x T."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(F.softmax(scores, dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights.to(value.dtype), value).transpose(1, 2).contiguous(), weights


class SpidrAttention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection (order q, k, v)."""

    def __init__(self, config: SpidrConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        without_bias: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """B x T x H -> the same, and attention weights; `without_bias`: that of `proj`, where `reads_weights`."""
        batch, length, _ = hidden_states.shape
        project_in, project_out = partial(linear, self.qkv), partial(linear, self.proj)
        if kernels_run(hidden_states) and self.reads_weights():
            parameters = self.qkv.weight, self.qkv.bias, self.proj.weight, None if without_bias else self.proj.bias
            weight_in, bias_in, weight_out, bias_out = _for_products(hidden_states, *parameters)
            project_in = partial(F.linear, weight=weight_in, bias=bias_in)
            project_out = partial(F.linear, weight=weight_out, bias=bias_out)
        qkv = project_in(hidden_states).view(batch, length, 3, self.num_heads, self.head_dim)
        dropout = self.dropout if self.training else 0.0
        if self.config._attn_implementation == "sdpa" and not output_attentions and attends_by_products(qkv, dropout):
            context = product_attention(qkv, attention_mask, self.scaling, dropout)
            return project_out(context.reshape(batch, length, -1)), None
        # Unbound where they lie, so that their gradients are laid side by side in one go.
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        if reads_faster_in_one_piece(qkv):
            key, value = qkv[:, :, 1:].permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        attention: Callable = eager_attention_forward
        if not output_attentions:
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
        )
        return project_out(context.reshape(batch, length, -1)), weights

    def reads_weights(self) -> bool:
        return is_plain(self.qkv) and is_plain(self.proj)


class SpidrFeedForward(nn.Module):
    """Linear, activation, dropout, Linear: the representation that units, targets and ABX use."""

    def __init__(self, config: SpidrConfig):
        super().__init__()
        self.intermediate_dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = SpidrDropout(config.activation_dropout)
        self.output_dense = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        up, down = self.intermediate_dense, self.output_dense
        if kernels_run(hidden_states) and is_plain(up) and is_plain(down) and is_exact_gelu(self.activation):
            weight, next_weight, next_bias = _for_products(hidden_states, up.weight, down.weight, down.bias)
            return F.linear(self.dropout(bias_gelu(F.linear(hidden_states, weight), up.bias)), next_weight, next_bias)
        pieces = None
        if is_untouched(self.activation, self.dropout):
            pieces = row_pieces(hidden_states, self.intermediate_dense, self.output_dense)
        if pieces is not None:
            return torch.cat([self._transform(piece) for piece in pieces]).view(hidden_states.shape)
        return self._transform(hidden_states)

    def _transform(self, hidden_states: Tensor) -> Tensor:
        hidden_states = linear(self.intermediate_dense, hidden_states, self.activation)
        return linear(self.output_dense, self.dropout(hidden_states))


class SpidrEncoderLayer(GradientCheckpointingLayer):
    """Transformer layer, post-norm or pre-norm (`do_stable_layer_norm`)."""

    def __init__(self, config: SpidrConfig):
        super().__init__()
        self.attention = SpidrAttention(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = SpidrFeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = SpidrDropout(config.hidden_dropout)
        self.pre_norm = config.do_stable_layer_norm

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        representation_only: bool = False,
        rows: Tensor | None = None,
        copy: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        """B x T x H -> (output, representation, attention weights, copy of the output).

        The representation is the feed-forward output before dropout, residual and the last norm. With
        `representation_only` nothing after it is computed and the output is None; the representation is then N x H
        where `rows` (N indices into B * T) are given. `copy`: the input in the dtype of products, where there is one;
        `seeds`: of dropout in kernels (2 x 2, see `draw_seeds`).
        """
        fuses = self.fuses(hidden_states)
        inputs = self.layer_norm(hidden_states) if self.pre_norm else hidden_states if copy is None else copy
        # Left to the kernel, the bias needs no pass over its gradient.
        leaves = fuses and is_untouched(self.attention) and self.attention.reads_weights()
        context, weights = self.attention(inputs, attention_mask, output_attentions, leaves)
        if not fuses:
            hidden_states = hidden_states + self.dropout(context)
        if representation_only and rows is not None:
            hidden_states = gather_frames([hidden_states], rows).flatten(0, 1)
            context = gather_frames([context], rows).flatten(0, 1) if fuses else context
        if fuses:
            p = self.dropout.p if self.dropout.training else 0.0
            seeds = draw_seeds(2, hidden_states.device) if p > 0 and seeds is None else seeds
            seed, next_seed = (None, None) if seeds is None else seeds
            hidden_states, copy = _residual_norm(
                self.layer_norm, hidden_states, context, p, seed, self.attention.proj.bias if leaves else None
            )
            representation = self.feed_forward(copy)
        elif self.pre_norm:
            representation = self.feed_forward(self.final_layer_norm(hidden_states))
        else:
            hidden_states = self.layer_norm(hidden_states)
            representation = self.feed_forward(hidden_states)
        if representation_only:
            return None, representation, weights, None
        if fuses:
            output, copy = _residual_norm(self.final_layer_norm, hidden_states, representation, p, next_seed)
            return output, representation, weights, copy
        output = hidden_states + self.dropout(representation)
        return (output if self.pre_norm else self.final_layer_norm(output)), representation, weights, None

    def fuses(self, hidden_states: Tensor) -> bool:
        """Whether dropout, residual and norm are one kernel each time."""
        norms = self.layer_norm, self.final_layer_norm
        plain = not self.pre_norm and is_untouched(self.dropout) and all(is_plain(norm) for norm in norms)
        return plain and kernels_run(hidden_states) and hidden_states.shape[-1] <= MAX_CHANNELS


def _residual_norm(
    norm: nn.LayerNorm, x: Tensor, branch: Tensor, p: float, seed: Tensor | None, branch_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return residual_norm(x, branch, norm.weight, norm.bias, norm.eps, p, seed, branch_bias)


class SpidrEncoderOutput(NamedTuple):
    """What `SpidrEncoder` returns; lists hold one entry per layer that was asked for, B x T x H each."""

    last_hidden_state: Tensor | None
    representations: list[Tensor]
    layer_outputs: list[Tensor]
    embeddings: Tensor
    attentions: list[Tensor]

    @property
    def hidden_states(self) -> tuple[Tensor, ...]:
        """The L + 1 hidden states of transformers: the input of the first layer and the output of each."""
        return (self.embeddings, *self.layer_outputs[:-1], self.last_hidden_state)


class SpidrEncoder(nn.Module):
    """Positional convolutions and transformer layers over projected features B x T x H."""

    def __init__(self, config: SpidrConfig):
        super().__init__()
        self.config = config
        self.pos_conv_embed = SpidrPositionalConvEmbedding(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = SpidrDropout(config.hidden_dropout)
        self.layers = nn.ModuleList(SpidrEncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        hidden_states: Tensor,
        frame_mask: Tensor | None = None,
        *,
        num_layers: int | None = None,
        first_representation: int | None = None,
        output_layers: bool = False,
        output_attentions: bool = False,
        representation_only: bool = False,
        last_rows: Tensor | None = None,
    ) -> SpidrEncoderOutput:
        """
        Args:
            frame_mask: B x T, True on frames that are not padding; None when nothing is padded.
            num_layers: stop after this many layers (all by default); a final norm is then not applied.
            first_representation: keep the representations of this layer (counted from 1) and the later ones.
            output_layers: keep every layer's output, after the residual.
            representation_only: compute nothing after the last layer's representation; `last_hidden_state` is None.
            last_rows: with `representation_only`, the frames (N indices into B * T) of which that representation is
                read; it is then N x H.
        """
        positions, copy = self.pos_conv_embed(hidden_states, frame_mask), None
        if self._fuses(hidden_states):
            hidden_states, copy = _residual_norm(self.layer_norm, hidden_states, positions, 0.0, None)
        else:
            hidden_states = hidden_states + positions
            if not self.config.do_stable_layer_norm:
                hidden_states = self.layer_norm(hidden_states)
        if self.training and self.config.hidden_dropout > 0:
            copy = None
        hidden_states = embeddings = self.dropout(hidden_states)
        if self.training and torch.is_grad_enabled() and not hidden_states.requires_grad and self._checkpoints():
            # Re-entrant checkpointing gives what is inside no gradients otherwise, as where only adapters train.
            hidden_states.requires_grad_()
        attention_mask = self._attention_mask(hidden_states, frame_mask, output_attentions)

        seeds = self._seeds(hidden_states)
        representations, outputs, attentions = [], [], []
        num_layers = len(self.layers) if num_layers is None else num_layers
        for number, layer in enumerate(self.layers[:num_layers], start=1):
            output, representation, weights, copy = layer(
                hidden_states,
                attention_mask,
                output_attentions,
                representation_only and number == num_layers,
                last_rows,
                copy,
                None if seeds is None else seeds[number - 1],
            )
            if self.training and self.config.layerdrop > 0 and output is not None:
                # The layer has run all the same: its representation reaches the objective, its parameters have
                # gradients on every process, and nothing waits for a random number on the host.
                kept = torch.rand((), device=output.device) >= self.config.layerdrop
                output, copy = torch.where(kept, output, hidden_states), None
            hidden_states = output
            if first_representation is not None and number >= first_representation:
                representations.append(representation)
            if output_layers:
                outputs.append(output)
            if output_attentions:
                attentions.append(weights)
        if self.config.do_stable_layer_norm and hidden_states is not None and num_layers == len(self.layers):
            hidden_states = self.layer_norm(hidden_states)
        return SpidrEncoderOutput(hidden_states, representations, outputs, embeddings, attentions)

    def _fuses(self, hidden_states: Tensor) -> bool:
        """Whether sum and norm of positions are one kernel, which leaves them in the dtype that it is given."""
        fuses = not self.config.do_stable_layer_norm and kernels_run(hidden_states)
        fits = hidden_states.shape[-1] <= MAX_CHANNELS and hidden_states.dtype == torch.float32
        return fuses and fits and is_plain(self.layer_norm) and is_untouched(self.dropout)

    def _seeds(self, hidden_states: Tensor) -> Tensor | None:
        """Of dropout in the layers' kernels, in one launch for all.

        Not only where the layers can be seen to need them: those of a sharded model are in place only while they run.
        """
        drops = self.training and self.config.hidden_dropout > 0 and not self.config.do_stable_layer_norm
        if not (drops and kernels_run(hidden_states)):
            return None
        return draw_seeds(2 * len(self.layers), hidden_states.device).unflatten(0, (-1, 2))

    def _checkpoints(self) -> bool:
        return any(layer.gradient_checkpointing for layer in self.layers)

    def _attention_mask(self, hidden_states: Tensor, frame_mask: Tensor | None, output_attentions: bool):
        if frame_mask is None:
            return None
        implementation = self.config._attn_implementation
        if output_attentions or implementation == "eager":
            padding = torch.zeros_like(frame_mask, dtype=hidden_states.dtype)
            return padding.masked_fill(~frame_mask, torch.finfo(hidden_states.dtype).min)[:, None, None, :]
        if implementation == "sdpa":
            return frame_mask[:, None, None, :]
        return create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=frame_mask.to(torch.int64)
        )


__all__ = [
    "SpidrEncoder",
    "SpidrEncoderLayer",
    "SpidrEncoderOutput",
    "SpidrFeatureEncoder",
    "SpidrFeatureProjection",
    "conv1d_channels_last",
    "gather_frames",
    "masked_var_mean",
]
