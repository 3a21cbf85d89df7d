"""The parts of a pretraining step that are more than one line in the loop of `examples/pretrain.py`."""

import gc
import importlib.util
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from safetensors import SafetensorError
from torch import Tensor, nn

from ..data.batches import Batch, dropout_seed, min_samples
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..hub.card import trained_card
from ..kernels_spidr import kernel_trouble, use_kernels
from ..modeling_spidr import SpidrForPretraining
from ..modeling_spidr_pretraining import SpidrForPretrainingOutput
from ..system.errors import ConfigError, RunFolderError
from ..system.files import replaced_folder
from ..system.messages import counted
from ..training.checkpoints import Checkpoint, whole_copies
from ..training.optimizing import LossScale, drop_frozen, scale_and_clip
from ..training.schedules import FREEZABLE, OptimizerSection
from ..training.sharding import distribute, gradient_sync, is_sharded, shard, sharding_plugin
from ..training.transfers import BatchMover
from .config import PretrainingConfig
from .forgetting import forget

_PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}
# Fewer masked frames than this per codeword and update, and codewords starve at a decay above the one below.
_FRAMES_PER_CODEWORD = 10
_SMALL_BATCH_DECAY = 0.75
_COLLAPSE_SHARE = 0.25
# How long processes wait for one that scans audio, or writes to a slow disk. (NCCL by itself: ten minutes.)
_PATIENCE = timedelta(hours=1)
# Graphs of a compiled layer, see `compile_layers`.
_GRAPHS = 64


def make_accelerator(config: PretrainingConfig, output_dir: str | Path) -> tuple[Accelerator, list[str]]:
    """Process group, device, autocast and trackers of a run; and what the user should know about them."""
    notes = []
    dtype = config.optimizer.dtype
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", _PRECISIONS[dtype]):
        notes.append(f"the launcher asks for {launched}, `optimizer.dtype` for {dtype}: {dtype} it is.")
    tracker = config.run.tracker
    if tracker == "auto":
        tracker = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    try:
        accelerator = Accelerator(
            mixed_precision="no" if dtype == "float16" else _PRECISIONS[dtype],
            log_with=None if tracker == "none" else tracker,
            project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir)),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
        )
    except ValueError as error:
        raise ConfigError(f"`optimizer.dtype` is {dtype}, `run.tracker` {tracker}: {error}") from error
    if dtype == "float16" and accelerator.device.type == "cpu":
        raise ConfigError("`optimizer.dtype` float16 needs a GPU. Use bfloat16 or float32 on CPU.")
    return accelerator, notes


def autocast(config: PretrainingConfig, device: torch.device) -> torch.autocast:
    """Autocast in `optimizer.dtype`."""
    if config.optimizer.dtype == "float32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=getattr(torch, config.optimizer.dtype))


def spidr_name(name: str) -> str:
    """A parameter's name in SpidR's own code, which `exclude_from_optimizer` goes by."""
    name = name.removeprefix("spidr.")
    if name == "masked_spec_embed":
        return "mask_embedding"
    return "student." + name.removeprefix("encoder.") if name.startswith("encoder.") else name


def exclude_parameters(model: nn.Module, config: PretrainingConfig) -> None:
    """Stop training what `exclude_from_optimizer` names, and a mask embedding that a run without masks never reads."""
    prefixes = tuple(config.optimizer.exclude_from_optimizer)
    if config.masking.spans() is None:
        prefixes += ("mask_embedding",)
    for name, parameter in model.named_parameters():
        if spidr_name(name).startswith(prefixes):
            parameter.requires_grad_(False)


def make_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over what trains, in two groups; the second leaves at the freeze (`drop_frozen`)."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    freezes = [p for name, p in trained if spidr_name(name).startswith(FREEZABLE)]
    stays = [p for name, p in trained if not spidr_name(name).startswith(FREEZABLE)]
    groups = [{"params": group} for group in (stays, freezes) if group]
    return torch.optim.AdamW(
        groups,
        lr=section.lr,
        betas=tuple(section.betas),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )


def choose_code(
    model: SpidrForPretraining, config: PretrainingConfig, accelerator: Accelerator, folder: Path | None
) -> list[str]:
    """Own kernels and compiled layers, as `[run]` asks and this machine can; returns what the user should know.

    Args:
        folder: where compiled code is kept; None: compile nothing.
    """
    if not config.run.compile:
        folder = None
    if folder is not None and accelerator.device.type == "cuda":
        keep_compiled(folder)  # first: what Triton builds to start is kept there, too
    if trouble := choose_kernels(config, accelerator):
        return trouble
    if folder is None:
        return []
    if accelerator.device.type != "cuda":
        return ["`run.compile` has no effect on this device."]
    compile_layers(model, convolutions=config.run.compile_convolutions)
    return []


def choose_kernels(config: PretrainingConfig, accelerator: Accelerator) -> list[str]:
    """Own kernels, as `run.kernels` asks and this machine can; a note where it can neither launch nor compile any."""
    trouble = kernel_trouble() if accelerator.device.type == "cuda" else None
    use_kernels(config.run.kernels and trouble is None)
    if trouble and (config.run.kernels or config.run.compile):
        return [f"neither own kernels nor compiled layers, which makes steps slower. {trouble}"]
    return []


def compile_layers(model: SpidrForPretraining, convolutions: bool = False, **options: Any) -> None:
    """Compile each transformer layer of student and teacher: one small graph, used many times.

    Batches and lengths are symbols from the start, so that no length costs a compilation. `options` go to
    `torch.compile`. All layers are one piece of code to the compiler, which makes a graph of it for each kind of
    batch: student or teacher, last layer or not, padded or not, one row or more, with gradients or without. Beyond its
    usual 8 it would run the others as they are; its limit is raised for the process. In DDP it would cut each graph in
    two where DDP's first buckets end, which is for models that are one graph; that is switched off.

    Args:
        convolutions: compile feature extractor and positional convolutions, too. Without it they run as what they are
            made of: the extractor as matrix products over the batch laid end to end, each followed by the own kernel
            for norm and GELU; the positional convolutions as the own grouped kernel and the same norm and GELU (both
            in plain form where own kernels are off or cannot run). Compiled, the extractor's convolutions are cuDNN's
            and the compiler fuses norm and GELU, or leaves them to the own kernel where that is on.
            `examples/benchmark_cuda.py` times every combination and names the fastest.
    """
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.optimize_ddp = False
    for encoder in (model.spidr.encoder, model.teacher):
        for layer in encoder.layers:
            layer.compile(dynamic=True, **options)
    if convolutions:
        for module in (model.spidr.feature_extractor, model.spidr.encoder.pos_conv_embed, model.teacher.pos_conv_embed):
            module.compile(dynamic=True, **options)


class Learner:
    """The model as it trains, on its device, frozen, compiled, and in DDP or shards as the run wants it.

    Args:
        model: on any device, the same on every process.
        config, accelerator: of the run.
        checkpoint: where the run resumes: it has the optimizer's moments.
        compiled: compile what `run.compile` names, and keep that in this folder; None: compile nothing.

    Attributes:
        optimizer: over what trains. `parameters`: the same, as a list.
        loss_scale: of float16.
        notes: what a user should know.
    """

    def __init__(
        self,
        model: SpidrForPretraining,
        config: PretrainingConfig,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None = None,
        compiled: Path | None = None,
    ):
        self.model = model
        self.notes: list[str] = []
        self._distributed: Any = None  # the model as the processes share it
        self._accelerator, self._seed = accelerator, config.run.random_seed
        self._precision, self._move = autocast(config, accelerator.device), BatchMover(accelerator.device)
        model.to(accelerator.device).train()
        exclude_parameters(model, config)
        if (checkpoint.state.step if checkpoint else 0) >= model.config.freeze_step:
            model.freeze_feature_encoder()
        self.notes += choose_code(model, config, accelerator, compiled)
        if sharding := sharding_plugin(accelerator):
            shard(model, sharding)
            self.notes.append(f"The model lies in shards on {counted(accelerator.num_processes, 'process')} (FSDP2).")
        self.optimizer = make_optimizer(model, config.optimizer)
        scale = checkpoint.state.loss_scale if checkpoint else None
        self.loss_scale = LossScale(config.optimizer.dtype == "float16", scale)
        if checkpoint:
            checkpoint.load_optimizer(self.optimizer, {p: name for name, p in model.named_parameters()})
        self._share()

    def __call__(self, batch: Batch) -> SpidrForPretrainingOutput:
        """Forward of a micro-batch."""
        # Named after the batch, the random numbers of dropout need not be saved and belong to no process.
        torch.manual_seed(dropout_seed(self._seed, batch.key))
        with self._precision:
            return self._distributed(**self._move(batch).inputs)

    def forgetting(self, batches: Iterator[Batch], count: int) -> Iterator[Batch]:
        """The batches, but before it gives the first the model forgets (`forget`): it looks at the first `count`."""
        first = list(islice(batches, count))
        looked_at = ((dropout_seed(self._seed, batch.key), self._move(batch).inputs) for batch in first)
        forget(self.model, looked_at, self._precision, self._seed)
        yield from chain(first, batches)

    def gradient_sync(self, enabled: bool) -> AbstractContextManager[None]:
        """Whether the forward and backward inside share their gradients among the processes, or keep them for later."""
        return gradient_sync(self._distributed, enabled)

    def clip_gradients(self, scale: Tensor, max_norm: float) -> Tensor:
        """Scale all gradients, then clip their norm. Returns the norm between the two."""
        return scale_and_clip(self.parameters, scale, max_norm)

    def freeze(self) -> None:
        """Feature extractor and projection no longer train: neither optimizer nor processes have to do with them."""
        self.model.freeze_feature_encoder()
        drop_frozen(self.optimizer)
        self._share()

    def release(self) -> None:
        """Let go of the process group."""
        # DDP must not be the last to do so: it would wait, Python's lock in hand, for a thread of the group that wants
        # this lock.
        self._distributed = None
        gc.collect()

    def _share(self) -> None:
        self._distributed = None  # an earlier wrapping goes first
        self._distributed = distribute(self.model, self._accelerator, silence(self.model))
        self.model.discard_statistics()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def silence(model: SpidrForPretraining) -> dict[str, Tensor]:
    """Inputs of two frames of silence, one of them masked if the mask embedding trains: what `distribute` needs."""
    inputs = {"input_values": torch.zeros(1, min_samples(model.config))}
    if model.spidr.masked_spec_embed.requires_grad:
        inputs["mask_time_indices"] = torch.zeros(1, 1, dtype=torch.int64)
    return inputs


def keep_compiled(folder: Path) -> None:
    """Where compiled code goes, to be found by the next start; variables that say otherwise hold.

    Of a run on several machines that is a folder on each machine's own disk: on one that they share, processes that
    begin without compiled code take each other's half-written files.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) < int(os.environ.get("WORLD_SIZE", "1")):
        folder = Path(tempfile.gettempdir(), f"spidr_hf_compiled_{os.getuid()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder.absolute() / "inductor"))
    # Not TRITON_CACHE_DIR, in whose place PyTorch has a folder for each GPU, under the one above.
    os.environ.setdefault("TRITON_HOME", str(folder.absolute()))


class CollapseWatch:
    """Notices when targets fall onto few codewords: the loss then looks better than ever, and nothing is learnt.

    It compares target perplexity and the active codewords of each codebook with the highest they have been.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        state = state or {}
        self._highest: list[float] = state.get("highest", [])
        self._warned_at: float = state.get("warned_at", _COLLAPSE_SHARE)

    def look(self, target_ppl: float, active_codewords: Sequence[float]) -> str | None:
        """A warning with advice when the smallest share of the highest value is below a quarter (then half of that)."""
        values = [target_ppl, *active_codewords]
        self._highest = [max(pair) for pair in zip(self._highest or values, values, strict=True)]
        share = min(value / max(highest, 1e-9) for value, highest in zip(values, self._highest, strict=True))
        if share >= self._warned_at:
            return None
        self._warned_at = share / 2
        active = ", ".join(f"{value:.0f}" for value in active_codewords)
        return (
            f"THE CODEBOOKS ARE COLLAPSING: target perplexity {target_ppl:.1f} ({self._highest[0]:.1f} at its best), "
            f"active codewords per codebook {active}. What helps: more audio per update "
            "(optimizer.gradient_accumulation_steps, more processes), a smaller model.codebook_decay (0.5 to 0.7 with "
            "small batches), a lower optimizer.lr, optimizer.dtype float32; from an earlier checkpoint."
        )

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"highest": self._highest, "warned_at": self._warned_at}


def recipe_notes(config: PretrainingConfig, world_size: int) -> Iterator[str]:
    """Warnings of what will not train well: updates with too few masked frames for codebooks with so slow a decay, and
    a warm-up that ends after the run."""
    optimizer = config.optimizer
    if optimizer.warmup_steps >= optimizer.max_steps:
        yield (
            f"the learning rate is still rising at the end: `optimizer.warmup_steps` is {optimizer.warmup_steps}, "
            f"`optimizer.max_steps` {optimizer.max_steps}. A shorter run wants a shorter schedule."
        )
    updates = world_size * optimizer.gradient_accumulation_steps
    frames = updates * config.data.max_batch_length / config.model.inputs_to_logits_ratio
    spans = config.masking.spans()
    masked = frames * (1 - math.exp(-spans.prob)) if spans else frames
    per_codeword = masked / config.model.codebook_size
    if per_codeword < _FRAMES_PER_CODEWORD and _SMALL_BATCH_DECAY < config.model.codebook_decay < 1:
        yield (
            f"an update has about {masked:.0f} masked frames, {per_codeword:.1f} for each of "
            f"{config.model.codebook_size} codewords: with model.codebook_decay {config.model.codebook_decay:g} "
            "codewords die out. Use 0.5 to 0.7, or larger updates (optimizer.gradient_accumulation_steps)."
        )


def whole_model(model: SpidrForPretraining, keep: bool = True) -> SpidrForPretraining:
    """The model itself, or where it is sharded a whole copy in main memory, for the processes that `keep` it.

    Every process of a sharded model must call it.
    """
    if not is_sharded(model):
        return model
    tensors = whole_copies(model.state_dict(), keep)
    with torch.device("meta"):
        whole = SpidrForPretraining(model.config)
    if keep:
        whole.load_state_dict(tensors, assign=True)
    return whole


def save_final(
    model: SpidrForPretraining,
    folder: str | Path,
    config: PretrainingConfig,
    summary: str,
    files: Mapping[str, str] | None = None,
) -> None:
    """A Hub-ready model folder: weights, config, feature extractor, code files and a card; and further text `files`.

    Raises `RunFolderError` where it cannot be written.
    """
    with replaced_folder(Path(folder)) as partial:
        try:
            model.save_pretrained(partial)
        except SafetensorError as error:
            raise RunFolderError(
                f"Cannot write the model into {folder}: {error}. Once the cause is removed, the same command does so."
            ) from error
        SpidrFeatureExtractor(do_normalize=config.data.normalize).save_pretrained(partial)
        run = config.run
        card = trained_card(model.config, summary, config.to_toml(), model_id=run.push_to_hub, start=run.init_ckpt)
        for name, text in {"README.md": card, **(files or {})}.items():
            (partial / name).write_text(text, encoding="utf-8")


__all__ = [
    "CollapseWatch",
    "Learner",
    "autocast",
    "choose_code",
    "choose_kernels",
    "compile_layers",
    "exclude_parameters",
    "keep_compiled",
    "make_accelerator",
    "make_optimizer",
    "recipe_notes",
    "save_final",
    "silence",
    "spidr_name",
    "whole_model",
]
