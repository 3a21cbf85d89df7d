"""What hangs on a module is heard: offloading, adapters, hooks, quantisation; a plain module is read, not called."""

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from tiny import VARIANTS, tiny_config
from torch import Tensor, nn
from torch.nn.modules import module as of_all
from torch.nn.utils import parametrizations
from transformers import TorchAoConfig

from spidr_hf import (
    SpidrForAudioFrameClassification,
    SpidrForAudioTokenization,
    SpidrForCTC,
    SpidrForPretraining,
    SpidrForSequenceClassification,
    SpidrForXVector,
    SpidrModel,
    cpu_spidr,
    layers_spidr,
)
from spidr_hf.plain_spidr import is_plain

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

HEADS = {"vocab_size": 9, "pad_token_id": 0, "num_labels": 5, "use_weighted_layer_sum": True, "mask_time_prob": 0.0}
CLASSES = [
    SpidrModel,
    SpidrForPretraining,
    SpidrForAudioTokenization,
    SpidrForCTC,
    SpidrForSequenceClassification,
    SpidrForAudioFrameClassification,
    SpidrForXVector,
]
every_class = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
GROUP_NORM = VARIANTS["group norm, pre-norm, even kernel"]


def make(kind: type, **changes) -> nn.Module:
    torch.manual_seed(0)
    model = kind(tiny_config(**{**HEADS, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(kind: type, padded: bool = True) -> dict[str, Tensor]:
    batch = {"input_values": torch.randn(2, 8123, generator=torch.Generator().manual_seed(0))}
    if padded:
        batch["attention_mask"] = (torch.arange(8123) < torch.tensor([[8123], [6789]])).int()
    if kind is SpidrForPretraining:
        batch["mask_time_indices"] = torch.arange(25).expand(2, -1) % 2 == 0
    return batch


def numbers(output) -> list[Tensor]:
    return [value for value in output.to_tuple() if isinstance(value, Tensor)]


def assert_equal(got, expected) -> None:
    assert len(numbers(got)) == len(numbers(expected)) > 0
    for a, b in zip(numbers(got), numbers(expected), strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that do the work: all without others inside."""
    return {name: module for name, module in model.named_modules() if not list(module.children())}


# ---- offloading


@pytest.fixture(params=["cpu_offload", "cpu_offload, buffers", "disk_offload"])
def offload(request, tmp_path) -> Callable[[nn.Module], nn.Module]:
    if request.param == "disk_offload":
        return lambda model: accelerate.disk_offload(model, tmp_path, torch.device("cpu"), offload_buffers=True)
    buffers = "buffers" in request.param
    return lambda model: accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)


@every_class
@pytest.mark.parametrize("changes", [{}, GROUP_NORM], ids=["layer norm", "group norm"])
@torch.no_grad()
def test_offloaded_models_compute_the_same(kind, changes, offload):
    model, batch = make(kind, **changes), inputs(kind)
    expected = model(**batch)
    offloaded = offload(copy.deepcopy(model))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    for _ in range(2):
        assert_equal(offloaded(**batch), expected)
    if kind is SpidrModel:
        for a, b in zip(
            offloaded.get_intermediate_outputs(batch["input_values"]),
            model.get_intermediate_outputs(batch["input_values"]),
            strict=True,
        ):
            assert torch.equal(a, b)
    elif hasattr(model, "get_codebooks"):
        expected = model.get_codebooks(**{name: batch[name] for name in ("input_values", "attention_mask")})[-1]
        got = offloaded.get_codebooks(**{name: batch[name] for name in ("input_values", "attention_mask")})[-1]
        assert torch.equal(got, expected)


@every_class
@torch.no_grad()
def test_device_maps_with_parts_on_cpu_and_disk(kind, tmp_path):
    model, batch = make(kind), inputs(kind)
    model.save_pretrained(tmp_path / "model")
    base = "" if kind is SpidrModel else "spidr."
    parts = {name: "cpu" for name in (*dict(model.named_children()), *dict(model.named_parameters(recurse=False)))}
    parts |= {name: "cpu" for name, _ in model.named_buffers(recurse=False)}
    parts.pop("spidr", None)
    parts |= {
        f"{base}feature_extractor": "disk",
        f"{base}feature_projection": "cpu",
        f"{base}masked_spec_embed": "cpu",
        f"{base}encoder.pos_conv_embed": "disk",
        f"{base}encoder.layer_norm": "disk",
        f"{base}encoder.dropout": "cpu",
        f"{base}encoder.layers.0": "cpu",
        f"{base}encoder.layers.1": "disk",
        f"{base}encoder.layers.2": "disk",
        f"{base}encoder.layers.3": "cpu",
    }
    if kind is SpidrModel:
        parts.pop("encoder")
    loaded = kind.from_pretrained(tmp_path / "model", device_map=parts, offload_folder=tmp_path / "offload")
    convolutions = loaded.base_model.feature_extractor.conv_layers
    assert all(layer.conv.weight.is_meta for layer in convolutions)
    assert_equal(loaded.eval()(**batch), model(**batch))


# ---- hooks


def hear(kind: str, modules: dict[str, nn.Module], heard: Counter) -> list:
    """Handles of hooks of a kind on all of the modules; `heard` counts how often each one ran."""
    names = {module: name for name, module in modules.items()}

    def listen(module, *_):
        if module in names:
            heard[names[module]] += 1

    if kind.startswith("global"):
        return [getattr(of_all, f"register_module_{kind.removeprefix('global ')}_hook")(listen)]
    return [getattr(module, f"register_{kind}_hook")(listen) for module in modules.values()]


KINDS = ["forward_pre", "forward", "full_backward_pre", "full_backward"]


@every_class
@pytest.mark.parametrize("hook", [*KINDS, *(f"global {kind}" for kind in KINDS)])
@pytest.mark.filterwarnings("ignore:For backward hooks to be called")  # global ones want every module to give tensors
def test_every_hook_runs_once_for_every_module(kind, hook, monkeypatch):
    # So short a limit that a plain extractor would run in pieces where nothing trains.
    monkeypatch.setattr(layers_spidr, "CHUNK_SAMPLES_CPU", 1000)
    monkeypatch.setattr(cpu_spidr, "PIECE_ROWS", 10)
    backward = "backward" in hook
    if backward and kind is SpidrForAudioTokenization:
        pytest.skip("units have no gradient")
    model, batch, heard = make(kind), inputs(kind, padded=False), Counter()
    unread = "layers.3.final_layer_norm"  # which pretraining has no use for
    modules = {
        name: module
        for name, module in model.named_modules()
        if (not list(module.children()) if backward else not isinstance(module, nn.ModuleList))
        and not (backward and name.startswith(("teacher.", "codebooks")))
        and not (hasattr(model, "heads") and name.endswith(unread))
        and name != "objective"  # of labels
    }
    handles = hear(hook, modules, heard)
    try:
        with torch.set_grad_enabled(backward):
            output = model(**batch)
        if backward:
            sum(value.float().sum() for value in numbers(output) if value.requires_grad).backward()
    finally:
        for handle in handles:
            handle.remove()
    # The convolutions of the stack share their activation; a dropout runs after attention and after feed-forward.
    several = {name: heard[name] for name in modules if name.endswith(("pos_conv_embed.activation", ".dropout"))}
    assert min(several.values()) >= 1
    assert {name: heard[name] for name in modules if name not in several} == dict.fromkeys(modules.keys() - several, 1)


@torch.no_grad()
def test_a_hook_that_looks_changes_nothing_and_sees_what_was_computed():
    model, batch = make(SpidrModel), inputs(SpidrModel)
    expected, seen = model(**batch), {}
    for name, module in leaves(model).items():
        module.register_forward_hook(lambda module, _, output, name=name: seen.update({name: output}))
    assert_equal(model(**batch), expected)
    assert set(leaves(model)) == set(seen)
    convolution = seen["feature_extractor.conv_layers.0.conv"]
    layer = model.feature_extractor.conv_layers[0]
    torch.testing.assert_close(
        convolution, nn.functional.conv1d(batch["input_values"][:, None], layer.conv.weight, stride=5)
    )
    # Nothing was written over afterwards.
    norm = nn.functional.layer_norm(convolution.transpose(1, 2), (32,), layer.layer_norm.weight, layer.layer_norm.bias)
    torch.testing.assert_close(seen["feature_extractor.conv_layers.0.layer_norm"], norm)


@torch.no_grad()
def test_a_hook_may_replace_what_a_module_gives():
    model, batch = make(SpidrModel, **GROUP_NORM), inputs(SpidrModel)
    before = model(**batch).last_hidden_state
    for name, module in leaves(model).items():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.LayerNorm, nn.GroupNorm)) or "activation" in name:
            handle = module.register_forward_hook(lambda module, _, output: 0.5 * output)
            assert not torch.allclose(model(**batch).last_hidden_state, before), name
            handle.remove()
    assert torch.equal(model(**batch).last_hidden_state, before)


# ---- other modules in their place


@torch.no_grad()
def test_what_is_more_than_a_plain_module_is_called():
    class Wrapped(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    x = torch.randn(3, 8)
    replaced, meta = nn.Linear(8, 4), nn.Linear(8, 4, device="meta")
    replaced.forward = lambda x: torch.zeros(3, 4)
    normed = parametrizations.weight_norm(nn.Linear(8, 4))
    compiled = nn.Linear(8, 4)
    compiled.compile(backend="eager")
    for module in (Wrapped(8, 4), replaced, meta, normed, compiled):
        assert not is_plain(module)
    assert is_plain(nn.Linear(8, 4)) and is_plain(nn.Conv1d(1, 2, 3)) and is_plain(nn.LayerNorm(3))
    wrapped = Wrapped(8, 4)
    torch.testing.assert_close(cpu_spidr.linear(wrapped, x), x @ wrapped.weight.T + wrapped.bias + 1)
    assert cpu_spidr.linear(replaced, x).sum() == 0
    torch.testing.assert_close(cpu_spidr.linear(normed, x), normed(x))


@pytest.mark.parametrize("changes", [{}, GROUP_NORM], ids=["layer norm", "group norm"])
@pytest.mark.parametrize("trains", [False, True])
def test_a_called_module_computes_what_a_read_one_does(changes, trains, monkeypatch):
    """In training, too, gradients included."""

    def run(model: nn.Module) -> list[Tensor]:
        with torch.set_grad_enabled(trains):
            output = model(**batch).last_hidden_state
        if not trains:
            return [output]
        output.square().sum().backward()
        return [output, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    model, batch = make(SpidrModel, **changes), inputs(SpidrModel)
    expected = run(copy.deepcopy(model))
    for module in model.modules():
        module.register_forward_hook(lambda *_: None)
    got = run(model)
    assert torch.equal(got[0], expected[0]) and len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@every_class
@torch.no_grad()
def test_dynamically_quantised(kind):
    model, batch = make(kind), inputs(kind)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantised.modules())
    for got, expected in zip(numbers(quantised(**batch)), numbers(model(**batch)), strict=True):
        if got.is_floating_point():
            assert (got - expected).norm() < 0.2 * expected.norm()
        else:
            assert (got == expected).float().mean() > 0.5


@every_class
@torch.no_grad()
def test_quantised_while_it_is_loaded(kind, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    make(SpidrForPretraining).save_pretrained(tmp_path / "pretrained")
    torch.manual_seed(0)
    kind.from_pretrained(tmp_path / "pretrained", **HEADS).save_pretrained(tmp_path / "model")
    model, batch = kind.from_pretrained(tmp_path / "model").eval(), inputs(kind)
    int8 = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["teacher"])
    loaded = kind.from_pretrained(tmp_path / "model", quantization_config=int8).eval()
    quantised = {
        name: module
        for name, module in loaded.named_modules()
        if type(getattr(module, "weight", None)).__name__ == "Int8Tensor"
    }
    assert len(quantised) > 4 * 4 - 1 and all(type(module) is nn.Linear for module in quantised.values())
    assert not any(name.startswith("teacher.") for name in quantised)
    got, expected = loaded(**batch)[0], model(**batch)[0]
    if got.is_floating_point():
        assert (got - expected).norm() < 0.2 * expected.norm()
    else:
        assert (got == expected).float().mean() > 0.5
