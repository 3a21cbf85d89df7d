"""The pretraining step as a GPU needs it: nothing waits for the device, nothing breaks a compiled graph."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from interpreted import need_interpreter, run_kernels_anywhere
from runs import load_script, pretrain_here, rows, write_audio, write_config
from tiny import random_mask, tiny_config, tiny_model
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from spidr_hf import SpidrForPretraining
from spidr_hf.data.batches import Batch
from spidr_hf.data.batching import BatchKey, Position
from spidr_hf.pretraining.config import make_config
from spidr_hf.pretraining.setup import compile_layers, make_optimizer, silence
from spidr_hf.pretraining.updates import Updates
from spidr_hf.system.commands import without_cudnn_attention
from spidr_hf.system.host_copy import HostCopy
from spidr_hf.training.checkpoints import TrainerState
from spidr_hf.training.optimizing import LossScale, scale_and_clip
from spidr_hf.training.sharding import distribute
from spidr_hf.training.transfers import BatchMover

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
# Twelve batches of different lengths and, as in training, the fewer rows the longer they are.
SHAPES = [(3 + 8000 // samples, samples) for samples in range(4000, 16_000, 1000)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def frame_indices(model: SpidrForPretraining, batch: int, samples: int) -> torch.Tensor:
    """Half the frames of every row, B x M."""
    mask = random_mask(batch, model.spidr._get_feat_extract_output_lengths(samples))
    return mask.nonzero()[:, 1].view(batch, -1)


class Loop:
    """The body of `examples/pretrain.py`'s loop, from a batch on the host to the numbers of the update before."""

    def __init__(self, model: SpidrForPretraining, late: bool | None = None):
        section = make_config({"run": {"model_type": "spidr"}, "data": {"manifest": "x"}}).optimizer
        self.model, self.move, self.step = model, BatchMover(model.device), 0
        self.optimizer = make_optimizer(model, section)
        self.reported: list[tuple[int, float]] = []
        reporter = SimpleNamespace(
            batch=lambda batch: None,
            say=lambda line: None,
            update=lambda step, epoch, result, lr, decay: self.reported.append((step, result.loss)),
        )
        state, scale = TrainerState(data="x"), LossScale(False)
        self.updates = Updates(model, self.optimizer, state, scale, reporter, 10, late=late)

    def update(self, *batches: Batch) -> None:
        self.step += 1
        for batch in batches:
            with torch.autocast(self.model.device.type, torch.bfloat16):
                output = self.model(**self.move(batch).inputs)
            (output.loss * output.num_masked_frames).backward()
        statistics = self.model.reduce_statistics()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        norm = scale_and_clip(parameters, 1 / statistics.num_masked_frames, 10.0)
        self.updates.make(self.step, batches, 1e-3, statistics, norm)


def host_batch(masked: torch.Tensor, samples: int) -> Batch:
    rows = len(masked)
    return Batch(torch.randn(rows, samples), masked, None, BatchKey(0, 0, range(rows), Position()), rows * samples)


class NothingFromTheHost(TorchDispatchMode):
    """Fails on tensors made from Python numbers, which on a GPU are copied there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.lift_fresh.default, "a tensor is made from Python numbers"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", ["spidr", "dinosr"])
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_no_operation_of_an_update_needs_a_value(monkeypatch, objective, kernels):
    """With tensors that have shapes but no values, whatever asks for one fails: `.item()`, `if tensor`, `nonzero`.

    From the batch to `Updates.make`, over the freeze; only what is read a step late has values.
    """
    if kernels:
        run_kernels_anywhere(monkeypatch)
    monkeypatch.setattr(HostCopy, "tolist", lambda self: [2.0] * len(self._values))
    with FakeTensorMode():
        loop = Loop(tiny_model(objective=objective, layerdrop=0.1, freeze_step=2, **DROPOUT).train(), late=True)
        batches = [host_batch(torch.zeros(2, 9, dtype=torch.int64), 6000) for _ in range(2)]
        loop.update(*batches)  # the first makes what stays: moments, statistics
        with NothingFromTheHost():
            for number in (2, 3):
                loop.update(*batches)
                assert loop.reported[-1] == (number - 1, 2.0)
        with pytest.raises(Exception, match=r"aten\.nonzero"):  # the check checks something
            loop.model(batches[0].input_values, mask_time_indices=torch.ones(2, 18, dtype=torch.bool))
    assert not loop.model.spidr.feature_projection.projection.weight.requires_grad


@needs_cuda
def test_no_update_waits_for_the_device():
    """From page-locked batches to `Updates.make` and the numbers of the update before, over the freeze."""
    loop = Loop(SpidrForPretraining(tiny_config(freeze_step=4, **DROPOUT)).cuda().train())
    assert loop.updates.late
    batches = [
        host_batch(frame_indices(loop.model, 2, samples), samples).pin_memory()
        for samples in (6000, 8000, 9000, 7000, 6000, 5000)
    ]
    for number, batch in enumerate(batches, start=1):
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            loop.update(batch, batch)
            if number == 2:
                with pytest.raises(RuntimeError, match="synchroniz"):  # the check checks something
                    loop.model.heads.bias.sum().item()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    loop.updates.settle()
    assert [step for step, _ in loop.reported] == [1, 2, 3, 4, 5, 6] and all(loss > 0 for _, loss in loop.reported)


class NoValues(TorchDispatchMode):
    """Fails on operations that give Python a value, or a shape that depends on one."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple))
        by_mask = by_mask and any(index is not None and index.dtype == torch.bool for index in args[1])
        assert name not in self.ASKING and not by_mask, f"{func} asks for a value"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(device: str) -> Iterator[None]:
    """On a GPU any synchronisation is an error; on a CPU any value that Python asks for, but what is read late."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    read = torch.Tensor.tolist

    def refuse(self):
        raise AssertionError("`tolist` asks for values")

    with (
        NoValues(),
        patch.object(HostCopy, "tolist", lambda self: read(self._values)),
        patch.object(torch.Tensor, "tolist", refuse),
    ):
        yield


@pytest.mark.parametrize("ask", ["x.item()", "bool(x)", "float(x)", "x.tolist()", "x.nonzero()", "x[x > 0]"])
def test_a_value_that_is_asked_for_is_noticed(ask):
    with nothing_waits("cpu"):
        x = torch.ones(1)
        assert HostCopy(x).tolist() == [1.0]
        with pytest.raises(AssertionError, match=r"asks? for (a )?values?"):
            eval(ask)
    assert eval(ask) is not None


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_nothing_in_the_loop_of_a_run_waits(monkeypatch, tmp_path, device):
    """`examples/pretrain.py` itself, from its third step to the last before it saves: loader, copies, updates, reports.

    On a CPU with updates as on a GPU: decided on the device, reported a step later.
    """
    script, guard, begun, until = load_script(), ExitStack(), [], []
    learning_rate, settle = script.learning_rate, Updates.settle

    def begin_step(section, step):
        if step == 3:
            guard.enter_context(nothing_waits(device))
        begun.append(step)
        return learning_rate(section, step)

    def settle_before_saving(self):
        guard.close()
        until.extend(begun)
        settle(self)

    monkeypatch.setattr(script, "learning_rate", begin_step)
    monkeypatch.setattr(Updates, "settle", settle_before_saving)
    monkeypatch.setattr(script, "Updates", partial(Updates, late=True))
    config = write_config(tmp_path / "tiny.toml", write_audio(tmp_path / "audio"))
    options = ["--run.save_interval", "8", "--optimizer.max_steps", "8", "--model.freeze_step", "5"]
    options += ["--optimizer.dtype", "bfloat16", "--optimizer.gradient_accumulation_steps", "2"]
    if device == "cuda":
        options += ["--data.num_workers", "1"]  # and a thread that page-locks what they make
    with guard:
        folder = pretrain_here(config, tmp_path / "run", *options)
    assert until == begun == list(range(1, 9)) and [row["step"] for row in rows(folder)] == begun


@needs_cuda
def test_the_next_batch_is_copied_beside_the_kernels_of_this_step():
    move = BatchMover(torch.device("cuda"))
    batch = host_batch(torch.zeros(2, 9, dtype=torch.int64), 100_000).pin_memory()
    move(batch)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second of clock cycles
    busy, copied = torch.cuda.Event(), torch.cuda.Event()
    busy.record()
    moved = move(batch)
    copied.record(move.stream)
    copied.synchronize()
    assert not busy.query()
    torch.testing.assert_close(moved.input_values.cpu(), batch.input_values)


def test_attention_has_no_mask_where_nothing_is_padded(monkeypatch):
    """A mask would keep flash attention from running."""
    masks = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, **options):
        masks.append(attn_mask)
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    model = tiny_model().train()
    model(torch.randn(2, 6000), mask_time_indices=frame_indices(model, 2, 6000))
    assert len(masks) == 2 * model.config.num_hidden_layers and all(mask is None for mask in masks)


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_attention_is_flash_attention(compiled, monkeypatch):
    """Student with dropout, forward and backward, and teacher: it is what PyTorch takes by itself in a command, and
    where it cannot run, the context raises."""
    without_cudnn_attention()
    chosen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        chosen.append(torch._fused_sdp_choice(query, key, value, attn_mask, dropout_p, is_causal))
        return attend(query, key, value, attn_mask, dropout_p, is_causal, **options)

    if not compiled:
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        loop = Loop(SpidrForPretraining(tiny_config(hidden_size=64, **DROPOUT)).cuda().train())
        loop.update(host_batch(frame_indices(loop.model, 2, 6000), 6000).pin_memory())
        assert set(chosen) == {SDPBackend.FLASH_ATTENTION.value}
        monkeypatch.undo()
    loop = Loop(SpidrForPretraining(tiny_config(hidden_size=64, **DROPOUT)).cuda().train())
    if compiled:
        torch._dynamo.reset()
        compile_layers(loop.model)
    batch = host_batch(frame_indices(loop.model, 2, 6000), 6000).pin_memory()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        loop.update(batch)
    loop.updates.settle()
    assert loop.reported[0][1] > 0


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
        need_interpreter()
        run_kernels_anywhere(monkeypatch)
    torch._dynamo.reset()
    device = "cuda" if kernels and torch.cuda.is_available() else "cpu"
    model = tiny_model(objective=objective, **DROPOUT).to(device).train()
    backend = CompileCounter()
    compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    shapes = SHAPES[:3] if kernels else SHAPES  # the interpreter is slow
    for number, (batch, samples) in enumerate(shapes, start=1):
        masked = frame_indices(model, batch, samples).to(device)
        output = compiled(torch.randn(batch, samples, device=device), mask_time_indices=masked)
        output.loss.backward()
        model.update_teacher(number)
    assert backend.frame_count <= 2


def update_of_kind(
    model: SpidrForPretraining, number: int, samples: int, batch: int, padded: bool, training: bool
) -> None:
    """An update, or without `training` a look at the loss, of a batch that may be padded or have one row."""
    frames = model.spidr._get_feat_extract_output_lengths(samples)
    masked = torch.arange(frames // 4).expand(batch, -1).contiguous()
    mask = torch.ones(batch, samples, dtype=torch.bool)
    mask[0, samples // 2 :] = False
    model.train(training)
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(batch, samples), mask if padded else None, mask_time_indices=masked).loss
    if training:
        loss.backward()
        model.update_teacher(number)
        model.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [8, 64])
def test_no_kind_of_batch_runs_without_being_compiled(limit):
    """One row or more, padded or not, in training, validation and after the freeze. The compiler's own limit of eight
    graphs for a piece of code would not do."""
    torch._dynamo.reset()
    model, backend = tiny_model(freeze_step=4, **DROPOUT), CompileCounter()
    batches = [(size, padded, training) for size in (3, 1, 2) for padded in (True, False) for training in (True, False)]
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        compile_layers(model, backend=backend)
        torch._dynamo.config.recompile_limit = min(limit, torch._dynamo.config.recompile_limit)
        with pytest.raises(FailOnRecompileLimitHit) if limit == 8 else nullcontext():
            for number, kind in enumerate(2 * batches, start=1):
                update_of_kind(model, number, 6000 + 500 * (number % 5), *kind)
    assert backend.frame_count == 8 or 8 < backend.frame_count <= limit / 2


def test_the_pass_over_silence_is_not_compiled(tmp_path):
    torch._dynamo.reset()
    backend = CompileCounter()
    model = tiny_model().train()
    compile_layers(model, backend=backend)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        distribute(model, SimpleNamespace(num_processes=2, device=torch.device("cpu")), silence(model))
        assert backend.frame_count == 0
    finally:
        torch.distributed.destroy_process_group()


def test_layers_are_the_same_graphs_in_ddp(tmp_path):
    """The compiler cuts graphs of modules in DDP to pieces of a MiB and 25 MiB, which a layer of the base model has."""
    graphs = {}
    for processes in (1, 2):
        torch._dynamo.reset()
        sizes = graphs[processes] = []

        def backend(graph, _, sizes=sizes):
            sizes.append(len(graph.graph.nodes))
            return graph.forward

        model = tiny_model(hidden_size=192, num_attention_heads=4, intermediate_size=1500).train()
        compile_layers(model, backend=backend)
        torch.distributed.init_process_group("gloo", f"file://{tmp_path / str(processes)}", rank=0, world_size=1)
        try:
            launched = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
            shared = distribute(model, launched, silence(model))
            shared(torch.randn(2, 4000), mask_time_indices=frame_indices(model, 2, 4000)).loss.backward()
        finally:
            torch.distributed.destroy_process_group()
    assert len(graphs[1]) == 4 and graphs[1] == graphs[2]


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


@pytest.mark.slow
def test_compiled_convolutions_are_few_graphs_for_all_lengths():
    """Over the freeze, too: of the extractor one graph with gradient and one without, of the student's positional
    convolutions one, of the teacher's one."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model(freeze_step=6).train()
    layers, convolutions = CompileCounter(), CompileCounter()
    compile_layers(model, convolutions=True, backend=convolutions)
    for encoder in (model.spidr.encoder, model.teacher):
        for layer in encoder.layers:
            layer.compile(dynamic=True, backend=layers)
    for number, (batch, samples) in enumerate(SHAPES, start=1):
        masked = frame_indices(model, batch, samples)
        model(torch.randn(batch, samples), mask_time_indices=masked).loss.backward()
        model.update_teacher(number)
    assert convolutions.frame_count <= 4 and layers.frame_count <= 4 and not counters["graph_break"]


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
