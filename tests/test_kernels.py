"""Every kernel against its plain form: values and gradients, in Triton's interpreter, or compiled where a GPU is."""

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import FullyShardedDataParallelPlugin
from interpreted import need_interpreter, run_kernels_anywhere
from tiny import random_mask, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from spidr_hf import SpidrForPretraining, SpidrModel, codebooks_spidr, kernels_spidr, layers_spidr
from spidr_hf.codebooks_spidr import instance_norm_rows
from spidr_hf.kernels_spidr import (
    MAX_GROUP,
    NAMESPACE,
    bias_gelu,
    cast_together,
    codeword_statistics,
    conv_norm_gelu,
    draw_seeds,
    fuses_first_convolution,
    gather_rows,
    grouped_conv1d,
    kernel_trouble,
    kernels_run,
    nearest_codewords,
    norm_gelu,
    plain_grouped_conv1d,
    plain_norm_gelu,
    residual_norm,
    splits_products,
    use_kernels,
)
from spidr_hf.training.sharding import shard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of bfloat16: half a unit in the last place of the result, and of what the plain form rounds on the way.
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
ON_GPU = type("OnGpu", (), {"is_cuda": True, "dtype": torch.bfloat16})()
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run, on whatever device there is."""
    need_interpreter()
    run_kernels_anywhere(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def with_gradients(function, inputs: list[torch.Tensor | None], grad: torch.Tensor) -> list[torch.Tensor]:
    """The function's value and the gradients of its inputs, all in float32."""
    inputs = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(grad.to(out.dtype))
    return [x.float() for x in (out.detach(), *(x.grad for x in inputs if x is not None))]


@both_dtypes
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 48), (67, 48), (9, 512), (3, 768)])
def test_norm_gelu(kernels, rows, channels, affine, dtype):
    x, grad = tensor(2, rows, channels, dtype=dtype) * 3 + 1, tensor(2, rows, channels, seed=1)
    parameters = [tensor(channels, seed=2), tensor(channels, seed=3)] if affine else [None, None]
    ours = with_gradients(lambda x, w, b: norm_gelu(x, w, b, 1e-5), [x, *parameters], grad)
    # The kernel computes in float32 and rounds once.
    plain = with_gradients(lambda x, w, b: plain_norm_gelu(x, w, b, 1e-5), [x.float(), *parameters], grad)
    for one, other in zip(ours, plain, strict=True):
        scale = max(1.0, other.abs().max().item() / 8)  # sums over rows have larger errors
        torch.testing.assert_close(one / scale, other / scale, **TOLERANCE[dtype])


def test_norm_gelu_of_views_of_no_row_and_of_many_rows(kernels, monkeypatch):
    x = tensor(3, 40, 11).transpose(1, 2)[:, ::2]
    torch.testing.assert_close(norm_gelu(x, None, None, 1e-5), plain_norm_gelu(x, None, None, 1e-5))
    weight, bias = torch.ones(8, device=DEVICE, requires_grad=True), torch.zeros(8, device=DEVICE, requires_grad=True)
    empty = norm_gelu(tensor(0, 5, 8), weight, bias, 1e-5)
    empty.sum().backward()
    assert empty.shape == (0, 5, 8) and not weight.grad.any() and not bias.grad.any()
    # More blocks of rows than programs: each program of the backward pass then sums over several of them.
    monkeypatch.setattr(kernels_spidr, "PROGRAMS", 3)
    many, parameters = tensor(700, 64), [tensor(64, seed=1), tensor(64, seed=2)]
    ours = with_gradients(lambda x, w, b: norm_gelu(x, w, b, 1e-5), [many, *parameters], many)
    plain = with_gradients(lambda x, w, b: plain_norm_gelu(x, w, b, 1e-5), [many, *parameters], many)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@both_dtypes
@pytest.mark.parametrize(
    ("samples", "channels", "kernel", "stride"), [(5, 24, 10, 5), (350, 48, 10, 5), (64, 512, 3, 2)]
)
@pytest.mark.parametrize("split", [True, False], ids=["", "as on an A100"])
def test_first_convolution_norm_and_gelu(kernels, monkeypatch, samples, channels, kernel, stride, dtype, split):
    monkeypatch.setattr(kernels_spidr, "splits_products", lambda _: split)
    monkeypatch.setattr(kernels_spidr, "PROGRAMS", 2)
    x, weight = tensor(samples), tensor(channels, 1, kernel, seed=1)
    # What the kernel multiplies, so that the plain form does not round where the kernel does not.
    x, weight = x.to(dtype).float(), weight.to(dtype).float()
    gain, shift, grad = tensor(channels, seed=2), tensor(channels, seed=3), tensor(samples // stride, channels, seed=4)

    def ours(weight, gain, shift):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert fuses_first_convolution(x, weight) == (dtype == torch.bfloat16)
            return conv_norm_gelu(x, weight, gain, shift, stride, 1e-5)

    def plain(weight, gain, shift):
        windows = F.pad(x, (0, max(0, kernel - stride))).unfold(0, kernel, stride)[: samples // stride]
        return plain_norm_gelu(windows @ weight.squeeze(1).t(), gain, shift, 1e-5)

    results = [with_gradients(form, [weight, gain, shift], grad) for form in (ours, plain, ours)]
    for one, other, again in zip(*results, strict=True):
        scale = max(1.0, other.abs().max().item() / 8)
        torch.testing.assert_close(one / scale, other / scale, **TOLERANCE[dtype])
        assert torch.equal(one, again)
    x = x.bfloat16()
    assert fuses_first_convolution(x, weight) and not fuses_first_convolution(x.clone().requires_grad_(), weight)
    assert not fuses_first_convolution(x, tensor(channels, 1, 17)) and not fuses_first_convolution(x, tensor(8, 2, 3))


def test_the_first_layer_is_the_same_in_one_kernel(kernels):
    torch.manual_seed(0)
    layer, x = layers_spidr.SpidrConvLayer(tiny_config(conv_bias=False), 0).to(DEVICE), tensor(2, 500, 1)
    results = []
    for enabled in (True, False):
        use_kernels(enabled)
        layer.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            out = layer(x, length=98)
        out.backward(tensor(*out.shape, seed=1).to(out.dtype))
        results.append([out.detach().float(), *(parameter.grad.clone() for parameter in layer.parameters())])
    use_kernels(True)
    for one, other in zip(*results, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.999


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (2, 3), (8, 3), (7, 2), (10, 5)])
@pytest.mark.parametrize("rows", [11, 4])
def test_polyphase_convolution(rows, kernel, stride):
    x, weight = tensor(rows * stride, 4).double(), tensor(5, 4, kernel, seed=1).double()
    grad, meant = tensor(rows, 5, seed=3).double(), rows - (-(-kernel // stride) - 1)
    grad[max(0, meant) :] = 0  # the caller cuts those off
    for bias in (tensor(5, seed=2).double(), None):
        results = []
        for form in (layers_spidr.PolyphaseConv1d, layers_spidr.StridedConv1d):
            inputs = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias)]
            out = form.apply(*inputs, stride)
            out.backward(grad)
            results.append([out.detach()[: max(0, meant)], *(t.grad for t in inputs if t is not None)])
            assert out.isfinite().all()
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)


@both_dtypes
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "channels"), [(1, 48), (33, 48), (3, 768)])
def test_residual_dropout_and_norm(kernels, monkeypatch, rows, channels, p, dtype):
    monkeypatch.setattr(kernels_spidr, "PROGRAMS", 3)
    residual, branch = tensor(2, rows, channels), tensor(2, rows, channels, dtype=dtype, seed=1)
    parameters, grad = [tensor(channels, seed=2), tensor(channels, seed=3)], tensor(2, rows, channels, seed=4)
    seed = draw_seeds(2, torch.device(DEVICE))[1]
    kept = torch.ones_like(branch)

    def ours(x, y, weight, bias):
        out, copy = residual_norm(x, y, weight, bias, 1e-5, p, seed)
        assert out.dtype == torch.float32 and copy.dtype == dtype
        torch.testing.assert_close(copy.float(), out, rtol=1e-2, atol=0)  # the interpreter cuts digits off
        return out + copy

    def plain(x, y, weight, bias):
        return 2 * F.layer_norm(x + y.float() * kept.float() / (1 - p), (channels,), weight, bias, 1e-5)

    one = with_gradients(ours, [residual, branch, *parameters], grad)
    kept = (one[2] != 0).float()
    for mine, other in zip(one, with_gradients(plain, [residual, branch, *parameters], grad), strict=True):
        scale = max(1.0, other.abs().max().item() / 8)
        torch.testing.assert_close(mine / scale, other / scale, **TOLERANCE[dtype])
    if rows > 1:
        assert kept.mean().sub(1 - p).abs() < 5 * (p * (1 - p) / kept.numel()) ** 0.5 + 1e-6
    again = with_gradients(ours, [residual, branch, *parameters], grad)
    assert all(torch.equal(mine, other) for mine, other in zip(one, again, strict=True))
    if p and rows > 1:
        seed = draw_seeds(1, torch.device(DEVICE))[0]
        assert not torch.equal(one[0], with_gradients(ours, [residual, branch, *parameters], grad)[0])


@both_dtypes
def test_a_bias_that_the_product_has_left_to_the_norm(kernels, monkeypatch, dtype):
    monkeypatch.setattr(kernels_spidr, "PROGRAMS", 3)
    inputs = [tensor(2, 9, 48), tensor(2, 9, 48, dtype=dtype, seed=1), *(tensor(48, seed=n) for n in (2, 3, 4))]
    seed, grad = draw_seeds(1, torch.device(DEVICE))[0], tensor(2, 9, 48, seed=5)
    kept = (with_gradients(lambda *x: residual_norm(*x[:4], 1e-5, 0.3, seed, x[4])[0], inputs, grad)[2] != 0).float()
    for p, keep in ((0.0, torch.ones_like(kept)), (0.3, kept / 0.7)):
        ours = with_gradients(lambda *x, p=p: residual_norm(*x[:4], 1e-5, p, seed, x[4])[0], inputs, grad)
        plain = with_gradients(
            lambda x, y, *w, keep=keep: F.layer_norm(x + (y.float() + w[2]) * keep, (48,), *w[:2], 1e-5), inputs, grad
        )
        for one, other in zip(ours, plain, strict=True):
            scale = max(1.0, other.abs().max().item() / 8)
            torch.testing.assert_close(one / scale, other / scale, **TOLERANCE[dtype])


@pytest.mark.parametrize("read", ["norm", "copy"])
def test_a_norm_of_which_only_one_form_is_read(kernels, read):
    inputs = [tensor(2, 5, 16), tensor(2, 5, 16, dtype=torch.bfloat16, seed=1), tensor(16, seed=2), tensor(16, seed=3)]
    ours = with_gradients(lambda *x: residual_norm(*x, 1e-5)[read == "copy"], inputs, tensor(2, 5, 16, seed=4))
    plain = with_gradients(lambda x, y, *w: F.layer_norm(x + y, (16,), *w), inputs, tensor(2, 5, 16, seed=4))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[torch.bfloat16])


@both_dtypes
@pytest.mark.parametrize(("rows", "channels"), [(1, 48), (67, 300)])
def test_bias_and_gelu(kernels, monkeypatch, rows, channels, dtype):
    monkeypatch.setattr(kernels_spidr, "PROGRAMS", 1)
    x, bias, grad = (
        tensor(2, rows, channels, dtype=dtype) * 3,
        tensor(channels, seed=1),
        tensor(2, rows, channels, seed=2),
    )
    ours = with_gradients(bias_gelu, [x, bias], grad)
    plain = with_gradients(lambda x, bias: F.gelu(x + bias), [x.float(), bias], grad.to(dtype))
    for one, other in zip(ours, plain, strict=True):
        scale = max(1.0, other.abs().max().item() / 8)
        torch.testing.assert_close(one / scale, other / scale, **TOLERANCE[dtype])


@both_dtypes
def test_some_frames_of_all(dtype):
    rows = torch.tensor([7, 0, 9], device=DEVICE)
    inputs, grad = [tensor(2, 5, 4, dtype=dtype), tensor(2, 5, 4, dtype=dtype, seed=1)], tensor(3, 3, 4, seed=2)
    inputs.append(tensor(3, 4, dtype=dtype, seed=3))  # those frames already
    ours = with_gradients(lambda *x: gather_rows(list(x), rows), inputs, grad)
    plain = with_gradients(lambda x, y, z: torch.stack([x.flatten(0, 1)[rows], y.flatten(0, 1)[rows], z]), inputs, grad)
    assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))


def test_parameters_are_cast_together():
    parameters = [tensor(3, 4).requires_grad_(), tensor(5, seed=1).requires_grad_(), tensor(2, 2)]
    copies = cast_together(parameters, torch.bfloat16)
    for copy, parameter in zip(copies, parameters, strict=True):
        assert torch.equal(copy, parameter.bfloat16())
    sum((copy * (number + 1)).sum() for number, copy in enumerate(copies[:2])).backward()
    assert torch.equal(parameters[0].grad, torch.ones(3, 4, device=DEVICE))
    assert torch.equal(parameters[1].grad, torch.full((5,), 2.0, device=DEVICE))


@both_dtypes
@pytest.mark.parametrize("kernel", [16, 19])
@pytest.mark.parametrize(("length", "channels", "groups"), [(1, 32, 2), (70, 48, 1), (67, 24, 2)])
def test_grouped_convolution(kernels, length, channels, groups, kernel, dtype):
    x, grad = tensor(2, length, channels, dtype=dtype), tensor(2, length, channels, seed=1).to(dtype).float()
    parameters = [tensor(channels, channels // groups, kernel, dtype=dtype, seed=2) / 8, tensor(channels, seed=3)]
    ours = with_gradients(lambda x, w, b: grouped_conv1d(x, w, b, groups), [x, *parameters], grad)
    plain = with_gradients(
        lambda x, w, b: plain_grouped_conv1d(x, w, b, groups), [t.float() for t in (x, *parameters)], grad
    )
    for one, other in zip(ours, plain, strict=True):
        scale = max(1.0, other.abs().max().item() / 8)
        torch.testing.assert_close(one / scale, other / scale, **TOLERANCE[dtype])


def test_grouped_convolution_of_views_without_bias_and_with_a_fixed_input(kernels):
    x, weight = tensor(2, 32, 30).transpose(1, 2), tensor(32, 16, 5, seed=1).requires_grad_()
    out = grouped_conv1d(x, weight, None, 2)
    torch.testing.assert_close(out, plain_grouped_conv1d(x, weight, None, 2), **TOLERANCE[torch.float32])
    (ours,) = torch.autograd.grad(out.square().sum(), weight)
    (plain,) = torch.autograd.grad(plain_grouped_conv1d(x, weight, None, 2).square().sum(), weight)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
    weight.requires_grad_(False)
    x = x.clone().requires_grad_()
    (ours,) = torch.autograd.grad(grouped_conv1d(x, weight, None, 2).sum(), x)
    (plain,) = torch.autograd.grad(plain_grouped_conv1d(x, weight, None, 2).sum(), x)
    torch.testing.assert_close(ours, plain, **TOLERANCE[torch.float32])


def test_groups_too_wide_for_the_kernel_are_convolved_plainly(kernels):
    class Called(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.namespace)
            return func(*args, **(kwargs or {}))

    for width, own in ((MAX_GROUP, True), (MAX_GROUP + 1, False)):
        called = []
        with Called():
            grouped_conv1d(tensor(1, 3, 2 * width), tensor(2 * width, width, 3), None, 2)
        assert (NAMESPACE in called) == own


@pytest.mark.parametrize(
    ("capability", "splits"), [((8, 0), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)]
)
def test_products_are_split_on_hopper_alone(monkeypatch, capability, splits):
    """What the compiler makes for the others then spills 14 to 19 KB of registers a thread."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert splits_products(torch.device("cuda")) == splits


def test_many_frames_are_summed_in_parts(kernels):
    x, grad = tensor(2, 600, 16), tensor(2, 600, 16, seed=1)
    weight = tensor(16, 8, 3, seed=2)
    ours = with_gradients(lambda x, w: grouped_conv1d(x, w, None, 2), [x, weight], grad)
    plain = with_gradients(lambda x, w: plain_grouped_conv1d(x, w, None, 2), [x, weight], grad)
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@both_dtypes
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("length", "width"), [(1, 8), (70, 48), (130, 96)])
def test_targets(kernels, length, width, padded, dtype):
    representations = [tensor(3, length, width, dtype=dtype, seed=seed) * 2 + 3 for seed in range(2)]
    representations[1] = representations[1].transpose(1, 2).contiguous().transpose(1, 2)
    lengths = torch.tensor([length, 1 + length // 2, 1], device=DEVICE) if padded else None
    rows = torch.tensor([0, length - 1, length, 3 * length - 1, 0], device=DEVICE)
    rows = torch.stack([rows, rows.flip(0)], 1)[:, 0]
    ours = instance_norm_rows(representations, rows, lengths)
    assert not len(instance_norm_rows(representations, rows[:0], lengths)[0])
    use_kernels(False)
    plain = instance_norm_rows(representations, rows, lengths)
    use_kernels(True)
    assert ours.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("frames", "size", "width"), [(1, 24, 48), (70, 40, 33), (20, 130, 8)])
def test_labels_counts_and_sums(kernels, frames, size, width):
    targets, codewords = tensor(2, frames, width), tensor(2, size, width, seed=1)
    codewords[:, 7] = codewords[:, 5]  # of equals, the first
    targets[:, 0] = codewords[:, 7]
    labels = nearest_codewords(targets, codewords)
    assert torch.equal(labels, torch.cdist(targets.double(), codewords.double()).argmin(-1))
    assert (labels[:, 0] == 5).all()
    counts, sums = codeword_statistics(labels, targets, size)
    onehot = F.one_hot(labels, size).float()
    assert torch.equal(counts, onehot.sum(1))
    torch.testing.assert_close(sums, onehot.transpose(1, 2) @ targets, rtol=1e-5, atol=1e-4)
    assert not sums[counts == 0].any()
    again = codeword_statistics(labels.t().contiguous().t(), targets, size)  # however they lie
    assert torch.equal(counts, again[0]) and torch.equal(sums, again[1])


def test_all_frames_may_have_one_codeword(kernels):
    targets, codewords = tensor(2, 100, 32), tensor(2, 40, 32, seed=1) * 100
    codewords[:, 39] = 0
    labels = nearest_codewords(targets, codewords)
    counts, sums = codeword_statistics(labels, targets, 40)
    assert (labels == 39).all() and (counts[:, 39] == 100).all() and not counts[:, :39].any()
    torch.testing.assert_close(sums[:, 39], targets.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "operation",
    [
        "_norm_gelu",
        "_residual_norm",
        "_conv_norm_gelu",
        "bias_gelu",
        "cast_together",
        "gather_rows",
        "_grouped_conv",
        "nearest_codewords",
        "codeword_statistics",
        "normalized_rows",
    ],
)
def test_the_compiler_is_told_the_truth(kernels, operation):
    x = tensor(2, 9, 16).requires_grad_()
    samples = {
        "_norm_gelu": (x, tensor(16).requires_grad_(), tensor(16).requires_grad_(), 1e-5),
        "_grouped_conv": (x, tensor(16, 8, 4).requires_grad_(), tensor(16).requires_grad_(), 2),
        "nearest_codewords": (tensor(2, 9, 16), tensor(2, 20, 16)),
        "codeword_statistics": (torch.zeros(2, 9, dtype=torch.int64, device=DEVICE), tensor(2, 9, 16), 20),
        "_residual_norm": (x, x.detach().bfloat16(), tensor(16), tensor(16), None, tensor(16), 1e-5, 0.0),
        "_conv_norm_gelu": (
            tensor(60),
            tensor(16, 1, 4).requires_grad_(),
            tensor(16),
            tensor(16),
            3,
            1e-5,
            torch.float32,
        ),
        "bias_gelu": (x, tensor(16).requires_grad_()),
        "cast_together": ([x, tensor(3)], torch.bfloat16),
        "gather_rows": ([x, tensor(2, 16).requires_grad_()], torch.tensor([3, 17], device=DEVICE)),
        "normalized_rows": ([tensor(2, 9, 16)] * 2, torch.tensor([3, 17], device=DEVICE), None, 1e-5),
    }
    function = getattr(kernels_spidr, operation)
    torch.library.opcheck(function, samples[operation], test_utils=("test_schema", "test_faketensor"))


def run_model(seed: int = 0, conv_bias: bool = True, **changes):
    torch.manual_seed(seed)
    model = SpidrForPretraining(tiny_config(conv_bias=conv_bias, **changes)).to(DEVICE).train()
    output = model(tensor(2, 4000, seed=seed), mask_time_indices=random_mask(2, 12).to(DEVICE))
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    statistics = {name: getattr(model.statistics, name).clone() for name in ("counts", "sums", "loss_sums")}
    return output.loss.detach(), gradients, statistics


@pytest.mark.parametrize("kernel", [95, pytest.param(80, marks=pytest.mark.slow)])
def test_the_model_is_the_same_with_and_without(kernels, kernel):
    use_kernels(False)
    plain = run_model(conv_pos_kernel_size=kernel)
    use_kernels(True)
    for ours, theirs in zip(run_model(conv_pos_kernel_size=kernel), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_exported_on_a_gpu_runs_anywhere(kernels):
    """An exported or traced program holds no operator of ours; a compiled one does."""
    model, waveforms, graphs = SpidrModel(tiny_config()).to(DEVICE).eval(), tensor(1, 2000), []
    model.requires_grad_(False)

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    with torch.no_grad():
        exported = str(torch.export.export(model, (waveforms,)).graph)
        traced = str(torch.jit.trace(lambda x: model(x).last_hidden_state, waveforms, check_trace=False).inlined_graph)
        torch._dynamo.reset()
        torch.compile(model, backend=backend)(waveforms)
    assert NAMESPACE not in exported and NAMESPACE not in traced
    assert f"{NAMESPACE}.norm_gelu" in "".join(graphs)


def test_a_sharded_model_drops_and_computes_the_same(kernels, tmp_path):
    """Its layers are in place only while they run, and the encoder decides for them before."""
    changes, inputs = {"hidden_dropout": 0.1, "attention_dropout": 0.1, "conv_pos_kernel_size": 9}, tensor(2, 4000)
    losses = []
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        for sharded in (False, True):
            torch.manual_seed(0)
            model = SpidrForPretraining(tiny_config(**changes)).to(DEVICE).train()
            if sharded:
                shard(model, FullyShardedDataParallelPlugin(fsdp_version=2))
            torch.manual_seed(1)
            losses.append(model(inputs, mask_time_indices=random_mask(2, 12).to(DEVICE)).loss.detach())
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(*losses)


def test_the_model_in_bfloat16_errs_no_more_in_kernels(kernels, monkeypatch):
    """As it trains on a GPU, first layer in one kernel: gradients are as far from float32's as the plain forms' are.

    All have float32's labels: rounding of either kind moves one target in twenty to a neighbouring codeword, and a few
    such targets turn a small layer's gradient by 20 degrees.
    """
    labels, errors = [], {}
    nearest = codebooks_spidr.nearest_codewords
    monkeypatch.setattr(codebooks_spidr, "nearest_codewords", lambda *x: labels[-1].clone())
    for seed in range(3):

        def first(*x):
            labels.append(nearest(*x))
            return labels[-1].clone()

        results = []
        for enabled, narrow in ((False, False), (False, True), (True, True)):
            use_kernels(enabled)
            with monkeypatch.context() as patch, torch.autocast(DEVICE, torch.bfloat16, enabled=narrow):
                if not narrow:
                    patch.setattr(codebooks_spidr, "nearest_codewords", first)
                results.append(run_model(seed, conv_bias=False, conv_pos_kernel_size=31))
        (loss, exact, _), (_, plain, _), (ours, gradients, _) = results
        torch.testing.assert_close(ours, loss, rtol=5e-3, atol=0)
        assert gradients.keys() == plain.keys() == exact.keys()
        for name, gradient in exact.items():
            assert gradients[name].dtype == plain[name].dtype
            of_both = [((g[name] - gradient).norm() / gradient.norm()).square() for g in (gradients, plain)]
            errors[name] = errors.get(name, 0) + torch.stack(of_both)
    use_kernels(True)
    for name, error in errors.items():
        ours, plain = error.sqrt().tolist()
        assert ours < 1.5 * plain, name
    ours, plain = torch.stack(list(errors.values())).sum(0).sqrt().tolist()
    assert ours < 1.2 * plain


def test_the_switch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels_spidr, "HAS_TRITON", True)
    monkeypatch.setattr(kernels_spidr, "kernel_trouble", lambda: None)
    assert kernels_run(ON_GPU) and not kernels_run(torch.zeros(1))
    use_kernels(False)
    assert not kernels_run(ON_GPU)
    use_kernels(True)
    assert kernels_run(ON_GPU)
    monkeypatch.setattr(kernels_spidr, "HAS_TRITON", False)
    assert not kernels_run(ON_GPU)


@pytest.mark.filterwarnings("ignore:Own kernels stay off")
@pytest.mark.parametrize("missing", ["compiler", "a compiler that works", "a place for what it makes"])
def test_where_triton_cannot_start_plain_forms_run(monkeypatch, tmp_path, missing):
    """Triton's own driver for CUDA is made ready, as before the first kernel; one warning says what is missing."""
    runtime = pytest.importorskip("triton.runtime", reason="the kernels need Triton: pip install triton")
    nvidia = pytest.importorskip("triton.backends.nvidia.driver")
    (tmp_path / "file").touch()
    monkeypatch.setattr(type(runtime.driver), "active", property(lambda self: nvidia.CudaDriver()))
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / ("file" if missing.startswith("a place") else "cache")))
    if missing == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", "false")
    kernel_trouble.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Own kernels stay off.*needs a C compiler") as warned:
            assert not kernels_run(ON_GPU)
            assert not kernels_run(ON_GPU)
        assert "\n" not in str(warned[0].message) and "Triton cannot start: " in kernel_trouble()
        compiled = torch.compile(lambda x: x + kernels_run(ON_GPU), backend="eager", fullgraph=True)
        assert compiled(torch.zeros(1)) == 0
    finally:
        kernel_trouble.cache_clear()


@pytest.mark.parametrize("by", ["torch.backends.fp32_precision", "torch.backends.cuda.matmul.fp32_precision", "older"])
@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_labels_are_float32_however_tf32_was_switched_on(by, value):
    torch.backends.cuda.matmul.fp32_precision = "none"  # what other tests chose here would stand above the general one
    if by == "older":
        torch.set_float32_matmul_precision("high" if value == "tf32" else "highest")
    else:
        exec(f"{by} = {value!r}")
    settings = torch.backends.cuda.matmul
    try:
        labels = nearest_codewords(tensor(2, 5, 8), tensor(2, 9, 8, seed=1))
        before = settings.fp32_precision
        with kernels_spidr.true_float32():
            assert settings.fp32_precision != "tf32"
        assert settings.fp32_precision == before == value
        with pytest.raises(ValueError), kernels_spidr.true_float32():
            raise ValueError
        assert settings.fp32_precision == before
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
    assert torch.equal(labels, nearest_codewords(tensor(2, 5, 8), tensor(2, 9, 8, seed=1)))
