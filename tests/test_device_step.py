"""The pretraining step as a GPU needs it: nothing waits for the device, nothing breaks a compiled graph."""

import pytest
import torch
from tiny import random_mask, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from spidr_hf import SpidrForPretraining, kernels_spidr
from spidr_hf.batching import BatchKey, Position
from spidr_hf.data import Batch
from spidr_hf.pretraining import compile_layers, make_optimizer, scale_and_clip
from spidr_hf.run_config import make_config
from spidr_hf.transfers import BatchMover

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
# Twelve batches of different lengths and, as in training, the fewer rows the longer they are.
SHAPES = [(3 + 8000 // samples, samples) for samples in range(4000, 16_000, 1000)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def frame_indices(model: SpidrForPretraining, batch: int, samples: int) -> torch.Tensor:
    """Half the frames of every row, B x M."""
    mask = random_mask(batch, model.spidr._get_feat_extract_output_lengths(samples))
    return mask.nonzero()[:, 1].view(batch, -1)


def step(model: SpidrForPretraining, optimizer: torch.optim.Optimizer, audio, masked, number: int) -> None:
    """All of a step but reading its numbers."""
    with torch.autocast(audio.device.type, torch.bfloat16):
        output = model(audio, mask_time_indices=masked)
    (output.loss * output.num_masked_frames).backward()
    statistics = model.reduce_statistics()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scale_and_clip(parameters, 1 / statistics.num_masked_frames, 10.0)
    optimizer.step()
    model.update_teacher(number)
    optimizer.zero_grad()


class NothingFromTheHost(TorchDispatchMode):
    """Fails on tensors made from Python numbers, which on a GPU are copied there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made from Python numbers"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["spidr", "dinosr"])
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_no_operation_of_a_step_needs_a_value(monkeypatch, objective, kernels):
    """With tensors that have shapes but no values, whatever asks for one fails: `.item()`, `if tensor`, `nonzero`."""
    if kernels:
        monkeypatch.setattr(kernels_spidr, "kernels_run", lambda x: True)
    section = make_config({"run": {"model_type": objective}, "data": {"manifest": "x"}}).optimizer
    with FakeTensorMode():
        model = tiny_model(objective=objective, layerdrop=0.1, **DROPOUT).train()
        optimizer = make_optimizer(model, section)
        audio, masked = torch.randn(2, 6000), torch.zeros(2, 9, dtype=torch.int64)
        # The first step makes what stays: moments, statistics.
        step(model, optimizer, audio, masked, 1)
        with NothingFromTheHost():
            step(model, optimizer, audio, masked, 2)
        with pytest.raises(Exception, match=r"aten\.nonzero"):  # the check checks something
            model(audio, mask_time_indices=torch.ones(2, 18, dtype=torch.bool))


@needs_cuda
def test_no_step_waits_for_the_device():
    model = SpidrForPretraining(tiny_config(**DROPOUT)).cuda().train()
    section = make_config({"run": {"model_type": "spidr"}, "data": {"manifest": "x"}}).optimizer
    optimizer, move = make_optimizer(model, section), BatchMover(torch.device("cuda"))
    batches = []
    for samples in (6000, 8000, 9000):
        masked = frame_indices(model, 2, samples)
        key = BatchKey(0, 0, torch.arange(2).numpy(), Position())
        batches.append(Batch(torch.randn(2, samples), masked, None, key, 2 * samples).pin_memory())
    for number, batch in enumerate(batches, start=1):
        moved = move(batch)
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            step(model, optimizer, moved.input_values, moved.mask_time_indices, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_batch_is_moved_whole():
    key = BatchKey(0, 0, torch.arange(2).numpy(), Position())
    batch = Batch(torch.randn(2, 50), torch.zeros(2, 1, dtype=torch.int64), None, key, 100)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    moved = BatchMover(device)(batch)
    assert moved.key is key and moved.input_values.device.type == device.type
    torch.testing.assert_close(moved.input_values.cpu(), batch.input_values)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["spidr", "dinosr"])
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_the_forward_is_one_graph_for_all_lengths(monkeypatch, objective, kernels):
    """No graph breaks anywhere in it (`fullgraph`), and twelve lengths take no more than two graphs."""
    if kernels:
        pytest.importorskip("triton", reason="the kernels need Triton: pip install triton")
        monkeypatch.setattr(kernels_spidr, "kernels_run", lambda x: True)
    torch._dynamo.reset()
    model = tiny_model(objective=objective, **DROPOUT).train()
    backend = CompileCounter()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    shapes = SHAPES[:3] if kernels else SHAPES  # the interpreter is slow
    for number, (batch, samples) in enumerate(shapes, start=1):
        output = compiled(torch.randn(batch, samples), mask_time_indices=frame_indices(model, batch, samples))
        output.loss.backward()
        model.update_teacher(number)
    assert backend.frame_count <= 2


def test_compiled_layers_are_few_graphs_for_all_lengths():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    plain = tiny_model().train()
    model = tiny_model().train()
    backend = CompileCounter()
    compile_layers(model, backend=backend)
    for number, (batch, samples) in enumerate(SHAPES, start=1):
        audio = torch.randn(batch, samples)
        masked = frame_indices(model, batch, samples)
        torch.testing.assert_close(
            model(audio, mask_time_indices=masked).loss, plain(audio, mask_time_indices=masked).loss
        )
        model.update_teacher(number)
        plain.update_teacher(number)
    # Student and teacher, and in either the last layer, of which only the representation is computed.
    assert backend.frame_count == 4 and not counters["graph_break"]


def test_what_is_frozen_is_computed_once_and_without_gradient(monkeypatch):
    model = tiny_model().train()
    model.freeze_feature_encoder()
    calls = []
    extract = model.spidr.feature_extractor.forward
    monkeypatch.setattr(
        model.spidr.feature_extractor, "forward", lambda *args: calls.append(extract(*args)) or calls[-1]
    )
    audio = torch.randn(2, 6000)
    model(audio, mask_time_indices=frame_indices(model, 2, 6000)).loss.backward()
    assert len(calls) == 1 and not calls[0].requires_grad
    assert not model.spidr.project(calls[0]).requires_grad
