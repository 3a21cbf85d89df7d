"""How much memory a pretraining step takes, by a formula: what to expect of a GPU before there is one.

`training_memory` counts what autograd keeps for the backward pass of every part of the model, operation by operation,
next to weights, optimizer and teacher. Activations grow with the audio in a batch, everything else with the model.
The formula is held against what PyTorch keeps and allocates on CPU (`tests/test_memory.py`: activations within 3 %,
the peak of a step within 10 %). What it leaves to `allowance` cannot be counted: the CUDA context, libraries'
workspaces, and a part of the memory that the allocator holds without using it.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..configuration_spidr import SpidrConfig, frame_lengths
from ..cpu_spidr import products_attend_faster
from ..kernels_spidr import fits_first_convolution, kernels_run
from ..modeling_spidr import SpidrForPretraining
from ..objectives_spidr import get_objective
from ..training.checkpoints import Checkpoint
from ..training.planning import NOTE, PROBLEM, Line, size
from ..training.sharding import sharding_plugin
from .config import PretrainingConfig
from .loaders import ExpectedBatches

MASKED_SHARE = 1 - math.exp(-0.8)  # of the recipe's spans, which overlap
_CONTEXT = 1 << 30
_FRAGMENTED = 0.05


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the peak of a training step.

    Attributes:
        parameters: student and heads, float32.
        teacher: float32.
        codebooks: sums and counts, and the statistics of an update.
        gradients, optimizer: float32; two moments.
        weight_copies: the weights in the precision of autocast.
        batch: waveforms and masks.
        extractor, positional, layers, objective: what the backward pass needs of the convolutions of the extractor and
            the projection, the positional convolutions, the transformer layers, and heads and loss.
        transient: the most that is needed for a moment at the peak, beyond what is kept. (Where the peak is in the
            backward pass of the extractor, some of the rest is gone by then: `gradients` and this are what is left to
            make up the total.)
        allowance: CUDA context, workspaces, fragmentation (0 on a CPU).
    """

    parameters: int
    teacher: int
    codebooks: int
    gradients: int
    optimizer: int
    weight_copies: int
    batch: int
    extractor: int
    positional: int
    layers: int
    objective: int
    transient: int
    allowance: int

    @property
    def activations(self) -> int:
        """What is kept for the backward pass."""
        return self.extractor + self.positional + self.layers + self.objective

    @property
    def total(self) -> int:
        """The peak."""
        return sum(dataclasses.astuple(self))

    def as_dict(self) -> dict[str, int]:
        """By name, with the total."""
        return {**dataclasses.asdict(self), "total": self.total}


@cache
def _counts(fields: str) -> Mapping[str, int]:
    with torch.device("meta"):
        model = SpidrForPretraining(SpidrConfig.from_dict(json.loads(fields)))
    extractor = (model.spidr.feature_extractor, model.spidr.feature_projection)
    early = {id(parameter) for module in extractor for parameter in module.parameters()}
    counts = dict.fromkeys(("all", "trained", "matrices", "early", "early_matrices", "teacher", "buffers"), 0)
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        if name.startswith("teacher."):
            counts["teacher"] += count
            continue
        counts["all"] += count
        if not parameter.requires_grad:
            continue
        matrix = count if parameter.dim() > 1 else 0
        counts["trained"] += count
        counts["matrices"] += matrix
        if id(parameter) in early:
            counts["early"] += count
            counts["early_matrices"] += matrix
    counts["buffers"] = sum(buffer.numel() for buffer in model.codebooks.buffers())
    counts["layer"] = sum(parameter.numel() for parameter in model.teacher.layers[0].parameters())
    return counts


def parameter_counts(config: SpidrConfig) -> Mapping[str, int]:
    """Numbers of elements of a model that is not made: `all` of student and heads, `trained` among them, `teacher`,
    `buffers` of the codebooks; of the trained ones `matrices` (more than one dimension), and `early` and
    `early_matrices`, of what freezes at `freeze_step`; and `layer`, of one transformer layer."""
    return _counts(config.to_json_string(use_diff=False))


def training_memory(
    config: SpidrConfig,
    *,
    batch_samples: int = 3_800_000,
    utterance_samples: int = 237_500,
    masked_share: float = MASKED_SHARE,
    dtype: str = "bfloat16",
    device: str = "cuda",
    kernels: bool = True,
    gradient_checkpointing: bool = False,
    frozen: bool = False,
    keeps_gradients: bool = True,
    shards: int = 1,
) -> MemoryEstimate:
    """Memory of a step of pretraining on each device.

    Args:
        config: the model.
        batch_samples: samples in a batch of one process, padding included.
        utterance_samples: samples of each of its rows.
        masked_share: share of the frames that are masked.
        dtype: `optimizer.dtype`.
        device: "cuda" or "cpu". On a CPU attention with dropout keeps T x T weights, norms run in the precision of
            their input, and dropout keeps its factors instead of bits.
        kernels: the fused kernels of `kernels_spidr` run (on CUDA, where Triton is installed).
        gradient_checkpointing: layers keep their input only, and are computed again in the backward pass.
        frozen: after `freeze_step`.
        keeps_gradients: gradients stay from step to step: with several processes (DDP) or accumulation.
        shards: processes over which FSDP2 shards the model.
    """
    sizes, cuda, mixed = parameter_counts(config), device == "cuda", dtype != "float32"
    kernels = kernels and cuda
    rows = batch_samples / utterance_samples
    length = frame_lengths(config, utterance_samples)
    frames = rows * length
    width, e = config.hidden_size, (2 if mixed else 4)
    # What LayerNorm takes and gives: autocast has it in float32 on CUDA, and leaves it as it is on a CPU.
    norm = 4 if cuda or not mixed else e
    masked = frames * masked_share
    stats = 8  # bytes of mean and deviation for each row of a norm

    extractor, workspace = _extractor(config, batch_samples, utterance_samples, e, norm, kernels)
    channels = config.conv_dim[-1]
    # The projection: what its norm takes (the last convolution's output is kept already, unless cast) and gives.
    projection = frames * (channels * ((norm if kernels and norm != e else 0) + e) + stats)
    if frozen:
        extractor = projection = workspace = 0.0

    hidden = frames * width
    norm_gelu = e if kernels and config.conv_pos_norm else (2 * norm if config.conv_pos_norm else e)
    positional = config.conv_pos_depth * (hidden * (e + norm_gelu) + frames * stats) + frames
    residual = norm
    mask = 0 if config.hidden_dropout == 0 else (1 if cuda else residual)
    positional += hidden * (residual + mask) + frames * stats

    layer, end, by_row = _layer(config, rows, length, e, residual, cuda)
    # Of the last representation only the masked frames are computed, and nothing after it.
    own_layer = get_objective(config.objective).reads_own_layer
    last = layer - end - (1 - masked_share) * by_row if own_layer else layer
    layers = (config.num_hidden_layers - 1) * layer + last
    codebooks, codewords = config.num_codebooks, config.codebook_size
    read = codebooks if own_layer else 1
    representations = read * masked * width * e
    objective = representations + codebooks * masked * (4 * codewords + 8)
    # Until the forward pass returns there are the targets too, and the predictions that perplexity is computed from.
    transient = codebooks * masked * (4 * width + 4 * codewords)
    if gradient_checkpointing:
        layers = config.num_hidden_layers * hidden * residual
        transient = max(transient, layer + 2 * hidden * e)

    trained = sizes["trained"] - (sizes["early"] if frozen else 0)
    gradients = 4 * trained / shards
    weight_copies = (sizes["matrices"] - (sizes["early_matrices"] if frozen else 0)) * 2 if mixed else 0
    if shards > 1:
        transient += 2 * 4 * sizes["layer"]  # the layer at hand and the one after it, put together
    kept = extractor + projection + positional + layers + objective
    batch = 4 * batch_samples + 8 * masked
    # The peak: either all is kept and the forward pass ends, or the backward pass has come to the first convolution,
    # and only what the extractor keeps is left.
    late = kept + transient + (gradients if keeps_gradients else 0)
    early = extractor + workspace + gradients
    if early > late:  # told as what there is beyond `kept`, which by then is partly gone
        transient = max(early - gradients - kept, 0.0)
        late = early
    gradients = late - kept - transient
    static = 4 * sizes["all"] / shards + 4 * sizes["teacher"] / shards + 8 * trained / shards + 8 * sizes["buffers"]
    total = static + weight_copies + batch + late
    return MemoryEstimate(
        parameters=round(4 * sizes["all"] / shards),
        teacher=round(4 * sizes["teacher"] / shards),
        codebooks=round(8 * sizes["buffers"]),
        gradients=round(gradients),
        optimizer=round(8 * trained / shards),
        weight_copies=round(weight_copies),
        batch=round(batch),
        extractor=round(extractor + projection),
        positional=round(positional),
        layers=round(layers),
        objective=round(objective),
        transient=round(transient),
        allowance=round(_CONTEXT + _FRAGMENTED * total) if cuda else 0,
    )


def checkpoint_bytes(config: SpidrConfig) -> int:
    """Size of a checkpoint: weights, teacher, codebooks, and two moments of what trains."""
    return model_bytes(config) + 8 * parameter_counts(config)["trained"]


def model_bytes(config: SpidrConfig) -> int:
    """Size of a model folder: weights, teacher, codebooks."""
    counts = parameter_counts(config)
    return 4 * (counts["all"] + counts["teacher"] + counts["buffers"])


def model_plan(config: SpidrConfig, origin: str) -> Iterator[Line]:
    """What the model is, and where it comes from."""
    counts = parameter_counts(config)
    yield Line(
        "model",
        f"{config.objective}: {counts['trained'] / 1e6:.1f} M trained parameters, {counts['teacher'] / 1e6:.1f} M in "
        f"the teacher, {config.num_codebooks} codebooks of {config.codebook_size}",
    )
    yield Line("model", origin)


def plan(
    config: PretrainingConfig,
    accelerator: Accelerator,
    batches: ExpectedBatches | None,
    checkpoint: Checkpoint | None,
) -> Iterator[Line]:
    """Memory of a step on each device, and whether that is there. `batches` None: of the largest size allowed."""
    device, data, optimizer = accelerator.device, config.data, config.optimizer
    longest = min(data.max_sample_size, data.max_batch_length)
    samples, row = (batches.samples, batches.row) if batches else (data.max_batch_length // longest * longest, longest)
    sharding = sharding_plugin(accelerator)
    options: dict[str, Any] = {
        "batch_samples": samples,
        "utterance_samples": row,
        "masked_share": MASKED_SHARE if config.masking.spans() else 1.0,
        "dtype": optimizer.dtype,
        "keeps_gradients": accelerator.num_processes > 1 or optimizer.gradient_accumulation_steps > 1,
        "gradient_checkpointing": bool(sharding and sharding.activation_checkpointing),
        "shards": accelerator.num_processes if sharding else 1,
        "frozen": (checkpoint.state.step if checkpoint else 0) >= config.model.freeze_step,
    }
    fused = config.run.kernels and kernels_run(torch.empty(0, device=device))
    needed = training_memory(config.model, device=device.type, kernels=fused, **options)
    parts = [
        ("weights, teacher, codebooks", needed.parameters + needed.teacher + needed.codebooks + needed.weight_copies),
        ("gradients and optimizer", needed.gradients + needed.optimizer),
        ("activations of the extractor", needed.extractor),
        ("of the encoder", needed.positional + needed.layers + needed.objective),
        ("batch and passing", needed.batch + needed.transient),
        ("CUDA and fragmentation", needed.allowance),
    ]
    shown = ", ".join(f"{name} {size(count)}" for name, count in parts if count)
    yield Line("memory", f"{size(needed.total)} on each {device.type.upper()} ({shown})")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        if needed.total > total:
            yield Line(
                PROBLEM,
                f"a step needs about {size(needed.total)}, {torch.cuda.get_device_name(device)} has {size(total)}: "
                "lower data.max_batch_length, and raise optimizer.gradient_accumulation_steps by as much.",
            )
        return
    gpu = training_memory(config.model, device="cuda", kernels=config.run.kernels, **options)
    plain = training_memory(config.model, device="cuda", kernels=False, **options)
    yield Line("memory", f"on a GPU {size(gpu.total)} ({size(plain.total)} without the fused kernels)")
    if (free := _free_memory()) is not None and needed.total * accelerator.num_processes > free:
        yield Line(NOTE, f"this machine has {size(free)} of memory to spare, which is too little to run it here.")


def _free_memory() -> int | None:
    """Bytes that programs may still take, where the system says so."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _extractor(
    config: SpidrConfig, batch_samples: int, utterance_samples: int, e: int, norm: int, kernels: bool
) -> tuple[float, float]:
    """Bytes that the extractor keeps, and the most that its backward needs beyond them."""
    stride = config.inputs_to_logits_ratio
    samples = batch_samples / utterance_samples * -(-utterance_samples // stride) * stride
    kept, workspace, steps = samples * e, 0.0, 1
    last = config.num_feat_extract_layers - 1
    # The first convolution, its norm and GELU are one kernel, which keeps the samples.
    one_kernel = kernels and config.feat_extract_norm == "layer" and config.feat_extract_activation == "gelu"
    one_kernel = one_kernel and not config.conv_bias
    products = torch.bfloat16 if e == 2 else torch.float32
    one_kernel = one_kernel and fits_first_convolution(config.conv_dim[0], config.conv_kernel[0], products)
    for index, (channels, conv_stride) in enumerate(zip(config.conv_dim, config.conv_stride, strict=True)):
        steps *= conv_stride
        rows = samples / steps
        # What a layer's output is kept as: the next convolution's input; the projection's norm reads the last one.
        output = norm if index == last and not kernels and config.feat_extract_norm == "layer" else e
        if config.feat_extract_norm == "layer":
            inner = e if kernels else 2 * norm
            inner = 0 if one_kernel and index == 0 else inner
            layer = rows * (channels * (inner + output) + 8)
        else:
            # The group norm's statistics are taken in float32, of a copy where it is not the precision.
            inner = e if index else (4 + e if e == 4 else 4 + 2 * e)
            layer = rows * channels * (inner + output)
        if index == 0:  # gradients of its norm's output and input
            both = e if one_kernel else 2 * e
            workspace = rows * channels * (both if kernels else 2 * norm + (e if norm != e else 0))
        kept += layer
    return kept, workspace


def _layer(
    config: SpidrConfig, rows: float, length: int, e: int, residual: int, cuda: bool
) -> tuple[float, float, float]:
    """Bytes that a transformer layer keeps; those of them that follow its representation; and those that lead to it
    from the end of the attention, frame by frame."""
    frames, heads = rows * length, config.num_attention_heads
    hidden = frames * config.hidden_size
    mask = 0 if config.hidden_dropout == 0 else (1 if cuda else e)
    attention = hidden * (e + 3 * e + e)  # input, query-key-value, output
    if not cuda and (config.attention_dropout > 0 or (e == 2 and products_attend_faster(torch.bfloat16, length))):
        # Two products: scaled queries and weights; with dropout its factors, too, and the dropped weights.
        attention += hidden * e + (3 if config.attention_dropout > 0 else 1) * rows * heads * length**2 * e
    else:
        attention += 4 * frames * heads  # one logsumexp per row
    feed_forward = hidden * e + 2 * frames * config.intermediate_size * e
    if config.activation_dropout > 0:
        feed_forward += frames * config.intermediate_size * (1 if cuda else e)
    norm = hidden * residual + 8 * frames
    layer = attention + feed_forward + 2 * norm + 2 * hidden * mask
    end = hidden * mask + (0 if config.do_stable_layer_norm else hidden * residual + 8 * frames)
    return layer, end, feed_forward + norm


__all__ = [
    "MASKED_SHARE",
    "MemoryEstimate",
    "checkpoint_bytes",
    "model_bytes",
    "model_plan",
    "parameter_counts",
    "plan",
    "training_memory",
]
