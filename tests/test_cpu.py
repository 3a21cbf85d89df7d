"""The forms for CPUs against the obvious ones, and when they must not run."""

from unittest.mock import patch

import pytest
import reference
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch import nn
from transformers.activations import ACT2FN

from spidr_hf import cpu_spidr, layers_spidr
from spidr_hf.cpu_spidr import (
    SpidrDropout,
    attends_by_products,
    convolution_taps,
    dropout,
    fast_products,
    gelu_in_place,
    linear,
    product_attention,
    product_library,
    row_pieces,
    strided_convolution,
)
from spidr_hf.layers_spidr import conv1d_channels_last, masked_var_mean

ON_ONEDNN = ("AuthenticAMD", "AVX512")  # a processor whose float32 products are oneDNN's
with patch.object(cpu_spidr, "processor", lambda: ON_ONEDNN):
    has_it = cpu_spidr.has_onednn()
needs_onednn = pytest.mark.skipif(not has_it, reason="this PyTorch or CPU has no oneDNN products")
processor = cpu_spidr.processor.__wrapped__
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def on_onednn(monkeypatch):
    """Its forms are tested on every processor that has it."""
    monkeypatch.setattr(cpu_spidr, "processor", lambda: ON_ONEDNN)


@pytest.mark.parametrize(
    ("vendor", "instructions", "library"),
    [
        ("GenuineIntel", "AVX512", "PyTorch"),
        ("AuthenticAMD", "AVX512", "oneDNN"),
        ("AuthenticAMD", "AVX2", "PyTorch"),
        ("GenuineIntel", "AVX2", "PyTorch"),  # nothing measured
        ("HygonGenuine", "AVX512", "PyTorch"),
        ("", "DEFAULT", "PyTorch"),
    ],
)
@needs_onednn
def test_the_processor_decides_who_multiplies(monkeypatch, vendor, instructions, library):
    monkeypatch.setattr(cpu_spidr, "processor", lambda: (vendor, instructions))
    x, module = torch.randn(5, 8), nn.Linear(8, 4).requires_grad_(False)
    assert product_library(torch.float32) == library
    assert fast_products(x, module.weight, module.bias) == (library == "oneDNN")
    torch.testing.assert_close(linear(module, x), module(x))
    if cpu_spidr.has_onednn(torch.bfloat16):
        assert product_library(torch.bfloat16) == "oneDNN"


@pytest.mark.parametrize(("text", "vendor"), [("processor: 0\nvendor_id\t: GenuineIntel\n", "GenuineIntel"), ("", "")])
def test_the_processor_is_what_the_system_says(monkeypatch, tmp_path, text, vendor):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu_spidr, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu_spidr.platform, "processor", lambda: "")
    assert processor() == (vendor, torch.backends.cpu.get_cpu_capability())


@pytest.fixture
def forbidden(monkeypatch):
    """No product may run on oneDNN directly."""

    def fail(*args, **kwargs):
        raise AssertionError("ran on oneDNN")

    monkeypatch.setattr(cpu_spidr, "fast_product", fail)


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_products_equal_the_plain_ones(dtype, bias):
    x, module = torch.randn(2, 7, 24).to(dtype), nn.Linear(24, 40, bias=bias).to(dtype)
    if not fast_products(x, module.weight):
        pytest.skip("no bfloat16 on this CPU")
    expected = module(x).float()
    close = {"atol": TOLERANCE[dtype], "rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5}
    torch.testing.assert_close(linear(module, x).float(), expected, **close)
    torch.testing.assert_close(linear(module, x, ACT2FN["gelu"]).float(), F.gelu(expected), **close)
    torch.testing.assert_close(
        linear(module, x, ACT2FN["gelu_new"]).float(), F.gelu(expected, approximate="tanh"), **close
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(module.float(), x.float()).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_products_equal_the_plain_ones(monkeypatch, bias, frozen):
    module, x = nn.Linear(24, 40, bias=bias).requires_grad_(not frozen), torch.randn(2, 7, 24, requires_grad=True)
    inputs = [x, *(() if frozen else module.parameters())]
    expected = torch.autograd.grad(F.gelu(module(x)).square().sum(), inputs)
    calls = []
    product = cpu_spidr.fast_product
    monkeypatch.setattr(cpu_spidr, "fast_product", lambda *args: calls.append(args) or product(*args))
    out = linear(module, x, nn.GELU()).square().sum()
    got = torch.autograd.grad(out, inputs, retain_graph=True)
    assert len(calls) == 2  # forward, and the gradient of x
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    # A gradient that an expanded tensor comes back with, and one that is differentiated in turn.
    (grad,) = torch.autograd.grad(linear(module, x).sum(), x)
    torch.testing.assert_close(grad, module.weight.detach().sum(0).expand_as(x))
    (first,) = torch.autograd.grad(out, x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), x)[0].abs().sum() > 0


def test_bfloat16_gradients_are_pytorchs_own(forbidden):
    module, x = nn.Linear(8, 4), torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        linear(module, x, nn.GELU()).sum().backward()
    assert module.weight.grad is not None


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (7, 3), (10, 5), (2, 4)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("onednn", [pytest.param(True, marks=needs_onednn), False])
def test_gradients_of_strided_convolutions(monkeypatch, kernel, stride, bias, onednn):
    if not onednn:
        monkeypatch.setattr(layers_spidr, "onednn_takes", lambda *tensors: False)
    weight, x = torch.randn(6, 5, kernel, requires_grad=True), torch.randn(2, 8 * stride, 5, requires_grad=True)
    inputs = [x, weight, *([torch.randn(6, requires_grad=True)] if bias else [])]
    outputs = (8 * stride - kernel) // stride + 1
    plain = F.conv1d(x.transpose(1, 2), weight, inputs[2] if bias else None, stride).transpose(1, 2)
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    got = conv1d_channels_last(x, weight, inputs[2] if bias else None, stride)[:, :outputs]
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), inputs), expected, atol=1e-4, rtol=1e-4)


def test_statistics_over_time_without_gradients():
    x = torch.randn(3, 700, 5) + 3
    expected = torch.var_mean(x.double(), dim=1, correction=0, keepdim=True)[::-1]
    for got in (masked_var_mean(x, None), masked_var_mean(x.clone().requires_grad_(), None)):
        torch.testing.assert_close(torch.stack(got).double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


@needs_onednn
@torch.no_grad()
def test_feed_forward_in_pieces(monkeypatch):
    module = tiny_model().spidr.encoder.layers[0].feed_forward
    x = torch.randn(3, 17, module.output_dense.out_features)
    expected = module(x)
    monkeypatch.setattr(cpu_spidr, "PIECE_ROWS", 10)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pieces = row_pieces(x, module.intermediate_dense, module.output_dense)
    assert [len(piece) for piece in pieces] == [17, 17, 17]
    torch.testing.assert_close(module(x), expected)
    assert row_pieces(x[0], module.intermediate_dense) is None
    # What looks at the products of a layer sees each of them once.
    seen = []
    module.intermediate_dense.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    module(x)
    assert seen == [(3, 17, module.intermediate_dense.out_features)]


@torch.no_grad()
def test_nothing_that_records_sees_the_operator(forbidden):
    module, x = nn.Linear(8, 4), torch.randn(3, 8)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        linear(module, x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 4

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = module

        def forward(self, x):
            return gelu_in_place(linear(self.linear, x))

    exported = torch.export.export(Calls(), (x,))
    assert "mkldnn" not in str(exported.graph) and "gelu_" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(x), F.gelu(module(x)))
    traced = torch.jit.trace(Calls(), x, check_trace=False)
    assert "mkldnn" not in str(traced.inlined_graph)


@torch.no_grad()
def test_the_switch_of_pytorch_holds(forbidden):
    with torch.backends.mkldnn.flags(enabled=False):
        linear(nn.Linear(8, 4), torch.randn(3, 8))


@needs_onednn
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (7, 3), (10, 5), (2, 4)])
@torch.no_grad()
def test_strided_convolution(kernel, stride):
    weight, bias, rows = torch.randn(6, 5, kernel), torch.randn(6), 8 * stride
    x = torch.randn(rows, 5)
    expected = F.conv1d(x.t()[None], weight, bias, stride)[0].t()
    taps = convolution_taps(weight, stride, x.dtype)
    assert all(matrix.is_contiguous() for matrix in taps)
    got = strided_convolution(x, taps, bias, stride)
    assert got.shape == (8, 6)
    torch.testing.assert_close(got[: len(expected)], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", [{}, {"conv_bias": True}, {"feat_extract_norm": "group"}])
def test_inference_equals_training_and_the_reference(variant):
    model = tiny_model(**variant).spidr
    waveforms = torch.randn(2, 3000)
    with_gradient = model.get_intermediate_outputs(waveforms)
    assert with_gradient[0].requires_grad
    with torch.no_grad():
        without = model.get_intermediate_outputs(waveforms)
        expected = reference.encoder(
            model.encoder, model.feature_projection(reference.feature_encoder(model, waveforms[0]))
        )[0]
    for a, b, c in zip(with_gradient, without, expected, strict=True):
        torch.testing.assert_close(a.detach(), b, atol=1e-5, rtol=0)
        torch.testing.assert_close(b[0], c, atol=1e-5, rtol=0)


@torch.no_grad()
def test_changed_weights_are_used():
    model, waveform = tiny_model().spidr, torch.randn(1, 2000)
    before = model.extract_features(waveform)[0]
    model.feature_extractor.conv_layers[2].conv.weight.data.mul_(2.0)
    model.feature_extractor.conv_layers[2].layer_norm.weight.data.mul_(2.0)
    assert not torch.allclose(before, model.extract_features(waveform)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(dtype, p):
    x = torch.ones(1000, 301, dtype=dtype, requires_grad=True)
    torch.manual_seed(1)
    out = dropout(x, p)
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5e-3)
    assert kept.float().mean(0).std() < 0.05 and kept.float().mean(1).std() < 0.05
    assert out[kept].float().unique().tolist() == pytest.approx([1 / (1 - p)], rel=5e-3)
    # Sixteen bits of the same number must not decide alike.
    assert abs(torch.corrcoef(kept.float().view(-1, 4)[:, :].t().contiguous())[0, 1]) < 0.02
    out.sum().backward()
    assert torch.equal(x.grad != 0, kept)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, p), out)


def test_dropout_at_the_ends():
    x = torch.ones(64)
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros(64))
    assert torch.equal(SpidrDropout(0.5).eval()(x), x)
    assert (SpidrDropout(0.5)(torch.ones(1000)) == 0).any()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout(monkeypatch, masked):
    qkv = torch.randn(2, 9, 3, 4, 8, requires_grad=True)
    keep = (torch.arange(9) < torch.tensor([9, 5])[:, None])[:, None, None] if masked else None
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    expected = F.scaled_dot_product_attention(query, key, value, keep, scale=0.3).transpose(1, 2)
    (wanted,) = torch.autograd.grad(expected.square().sum(), qkv)
    monkeypatch.setattr(cpu_spidr, "dropout", lambda x, p: x)
    got = product_attention(qkv, keep, 0.3, 0.1)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), qkv)[0], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_bfloat16_is_pytorch_s(masked):
    qkv = torch.randn(2, 60, 3, 4, 8).bfloat16()
    keep = (torch.arange(60) < torch.tensor([60, 31])[:, None])[:, None, None] if masked else None
    exact = F.scaled_dot_product_attention(*qkv.float().permute(2, 0, 3, 1, 4), keep, scale=0.3).transpose(1, 2)
    theirs = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), keep, scale=0.3).transpose(1, 2)
    ours = product_attention(qkv, keep, 0.3, 0.0)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < 2 * (theirs - exact).norm() < 0.02 * exact.norm()


def test_which_attention_is_taken():
    taken = torch.zeros(1, 100, 3, 2, 8, dtype=torch.bfloat16)
    assert attends_by_products(taken, 0.0) == cpu_spidr.has_onednn(torch.bfloat16)
    assert attends_by_products(taken.float(), 0.1)
    assert not attends_by_products(taken.float(), 0.0)
    assert not attends_by_products(taken.repeat(1, 20, 1, 1, 1), 0.0)


@torch.no_grad()
def test_keys_and_values_in_one_piece(monkeypatch):
    attention = tiny_model().base_model.encoder.layers[0].attention
    hidden_states = torch.randn(2, 40, attention.qkv.in_features)
    keep = (torch.arange(40) < torch.tensor([40, 23])[:, None])[:, None, None]
    seen = []

    def recorded(module, query, key, value, *args, **kwargs):
        seen.append(key.is_contiguous() and value.is_contiguous())
        return sdpa(module, query, key, value, *args, **kwargs)

    sdpa = layers_spidr.ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    monkeypatch.setattr(layers_spidr.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: recorded)
    got, _ = attention(hidden_states, keep)
    with torch.enable_grad():
        wanted, _ = attention(hidden_states, keep)
    assert seen == [True, False]
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


def test_attention_drops_weights():
    value = torch.ones(1, 50, 3, 1, 8)
    out = product_attention(value, None, 1.0, 0.5)
    assert out.mean().item() == pytest.approx(1, abs=0.15)
    assert out.std() > 0.05


def test_gelu_in_place_only_without_gradients():
    x = torch.randn(5, requires_grad=True)
    assert torch.equal(gelu_in_place(x), F.gelu(x))
    with torch.no_grad():
        y = x.clone()
        assert gelu_in_place(y) is y and torch.equal(y, F.gelu(x))
