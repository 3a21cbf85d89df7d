"""Pretraining with the stock `transformers.Trainer`, for those whose tools are built around it.

`make_trainer` puts one together from a run's configuration; its losses are those of `examples/pretrain.py`:

```python
from spidr_hf.data.open import open_data
from spidr_hf.pretraining.config import load_config
from spidr_hf.pretraining.hf_trainer import make_trainer

config = load_config("examples/configs/demo.toml")
trainer = make_trainer(config, open_data(config.data.manifest), "runs/trainer")
trainer.train()  # or trainer.train(resume_from_checkpoint=True)
```

By hand, with any data set and collator whose batches have what `SpidrForPretraining` takes and `labels`, as many of
them as masked frames (their values do not matter, but for -100, which does not count):

```python
from spidr_hf import SpidrTrainerCallback

callback = SpidrTrainerCallback()
trainer = Trainer(
    model=SpidrForPretraining(SpidrConfig()),
    args=TrainingArguments("runs/trainer", gradient_accumulation_steps=4),
    train_dataset=dataset,
    data_collator=collator,
    compute_loss_func=callback.compute_loss,
    callbacks=[callback],
)
```

What `examples/pretrain.py` has beyond it: checkpoints that a kill cannot spoil, a run folder that only one run may use,
the freeze with several processes, FSDP2, and the position in the data without counting batches.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..configuration_spidr import frame_lengths
from ..data.batches import Batch, PretrainingBatches, dropout_seed, make_sampler
from ..data.batching import BatchKey
from ..data.sources import AudioSource
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..modeling_spidr_pretraining import SpidrForPretraining, SpidrForPretrainingOutput
from ..system.errors import AudioError, ConfigError
from ..training.checkpoints import TrainerState as RunState
from ..training.metrics import Averages, curves
from ..training.optimizing import UpdateGuard
from ..training.schedules import learning_rate
from ..training.sharding import global_norm
from .config import PretrainingConfig
from .setup import CollapseWatch, exclude_parameters, make_optimizer
from .start import initial_model
from .updates import StepResult

logger = logging.getLogger(__name__)


class SpidrTrainerCallback(TrainerCallback):
    """Makes `Trainer` pretrain SpidR and DinoSR: teacher and codebooks move after every optimizer step.

    It also sees to it that accumulated batches and all processes count as one large batch (`compute_loss`), skips
    updates whose loss or gradient is not finite, adds perplexities, losses and active codewords per codebook to what
    Trainer logs, and warns of a collapse.

    Args:
        max_nonfinite_steps: stop after this many updates in a row that were skipped.
    """

    def __init__(self, max_nonfinite_steps: int = 10):
        self._averages, self._watch = Averages(), CollapseWatch()
        self._decay = 1.0
        self._counted = 0  # batches whose loss went through `compute_loss` since the last update
        self._result: StepResult | None = None
        remedy = "Lower the learning rate."
        self._guard = UpdateGuard(RunState(), max_nonfinite_steps, remedy, logger.warning)
        self._hook: Any = None

    def compute_loss(
        self, outputs: SpidrForPretrainingOutput, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """For `Trainer(compute_loss_func=...)`: this batch's share of the mean over all masked frames of the update.

        Trainer's own mean of means weighs the frames of a batch with few of them more heavily.
        """
        if num_items_in_batch is None:
            raise ValueError("The collator must add `labels`, one for each masked frame, so that Trainer counts them.")
        self._counted += 1
        return outputs.loss * outputs.num_masked_frames / num_items_in_batch  # type: ignore[operator]  # not None here

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Check what goes together, and freeze what a resumed run had frozen."""
        model = _pretraining_model(model)
        if args.n_gpu > 1:
            raise ValueError("Trainer's DataParallel is not supported: use `accelerate launch`, or one visible GPU.")
        if args.world_size > 1 and not args.average_tokens_across_devices:
            raise ValueError("Set `average_tokens_across_devices`: the loss is a mean over all processes' frames.")
        if state.global_step >= model.config.freeze_step:
            model.freeze_feature_encoder()
        elif args.world_size > 1 and state.max_steps > model.config.freeze_step:
            raise ValueError(
                f"With several processes Trainer cannot freeze at `freeze_step` {model.config.freeze_step}, before "
                f"max_steps ({state.max_steps}): stop there and resume, or use examples/pretrain.py."
            )
        self._hook = model.register_forward_pre_hook(_seed_dropout, with_kwargs=True)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Leave the model as it was found."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Reduce the statistics; where something is not finite, take the gradients away, so that no update is made."""
        model = _pretraining_model(model)
        if self._counted == 0 and args.world_size * args.gradient_accumulation_steps > 1:
            raise ValueError(
                "Pass `compute_loss_func=callback.compute_loss` to Trainer: without it an update of several batches is "
                "a mean of their means, not the mean over their masked frames."
            )
        self._counted = 0
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._result = StepResult.fetch(model.reduce_statistics(), global_norm(gradients))
        if not self._guard.finite(state.global_step + 1, self._result.loss, self._result.grad_norm):
            for parameter in model.parameters():
                parameter.grad = None

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        """Move codebooks and teacher."""
        model, step = _pretraining_model(model), state.global_step + 1
        if self._result is not None and self._result.finite:
            self._decay = model.update_teacher(step)
            values = self._result.values
            self._averages.add({name: values[name] for name in values if name not in ("loss", "grad_norm")})
        else:
            model.discard_statistics()
            self._decay = model.teacher_decay(step)
        if step >= model.config.freeze_step:
            model.freeze_feature_encoder()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        """Add the means since the last log to a training log, for the callbacks after this one and `log_history`."""
        if logs is None or "loss" not in logs:
            return
        means = self._averages.means()
        logs |= curves({**means, "ema_decay": self._decay})
        if state.log_history:
            state.log_history[-1].update(logs)
        if means and (warning := self._watch.look(means["target_ppl"], means["active_codewords"])):
            logger.warning(warning)
        self._averages.reset()


class UpdateBatches(Dataset[Batch]):
    """The batches of a run from its first update on, those of all processes: item `index` is a whole batch.

    Read in order (`train_sampling_strategy="sequential"`, one item at a time) the processes' shares of them are those
    of `examples/pretrain.py`.
    """

    def __init__(self, batches: PretrainingBatches, sampler: Any, max_steps: int):
        self.batches, self.sampler = batches, sampler
        self._length = max_steps * sampler.batches_per_update
        self._keys: Iterator[BatchKey] = iter(())
        self._next = self._length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self.batches[self.key(range(self._length)[index])]

    def key(self, index: int) -> BatchKey:
        """The batch's name. In ascending order each is found at once."""
        if index < self._next:
            self._keys, self._next = iter(self.sampler), 0
        while True:
            key, self._next = next(self._keys), self._next + 1
            if self._next > index:
                return key

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keys": iter(()), "_next": self._length}  # generators do not travel to workers


class UpdateCollator:
    """An item of `UpdateBatches` as the model's inputs, with `labels` to count and the seed of its dropout."""

    def __init__(self, config: PretrainingConfig):
        if config.run.active_forgetting:
            raise ConfigError("`run.active_forgetting` is done by examples/pretrain.py, not by transformers' Trainer.")
        self.model, self.seed = config.model, config.run.random_seed

    def __call__(self, items: Sequence[Batch]) -> dict[str, Tensor | int]:
        """The one item of a list.

        Raises `AudioError` where its audio cannot be used, `ValueError` for several items.
        """
        if len(items) != 1:
            raise ValueError("Each item is a whole batch already: set `per_device_train_batch_size` to 1.")
        batch = items[0]
        for entry in batch.skipped:
            logger.warning("skipped: %s", entry.reason)
        if batch.failure:
            raise AudioError(batch.failure)
        frames = self._masked_frames(batch)
        # A plain number, which no device has to be asked for.
        seed = dropout_seed(self.seed, batch.key)
        return {**batch.inputs, "labels": torch.zeros(frames, dtype=torch.int64), "dropout_seed": seed}

    def _masked_frames(self, batch: Batch) -> int:
        if batch.mask_time_indices is not None:
            return batch.mask_time_indices.numel()
        rows, samples = batch.input_values.shape
        if batch.attention_mask is None:
            return rows * frame_lengths(self.model, samples)
        return int(frame_lengths(self.model, batch.attention_mask.sum(-1)).sum())


def make_trainer(config: PretrainingConfig, source: AudioSource, output_dir: str | Path, **arguments: Any) -> Trainer:
    """A stock `Trainer` for a run's configuration, with the model, optimizer, schedule and batches of
    `examples/pretrain.py`.

    Args:
        config: the run; its `[run]` says how often Trainer logs and saves.
        source: the audio (`data.open.open_data`).
        output_dir: where Trainer saves.
        arguments: any other `TrainingArguments`.
    """
    run, data, optimizer_section = config.run, config.data, config.optimizer
    given = {
        "max_steps": optimizer_section.max_steps,
        "learning_rate": optimizer_section.lr,
        "gradient_accumulation_steps": optimizer_section.gradient_accumulation_steps,
        "max_grad_norm": optimizer_section.max_norm,
        "bf16": optimizer_section.dtype == "bfloat16",
        "fp16": optimizer_section.dtype == "float16",
        "per_device_train_batch_size": 1,
        "train_sampling_strategy": "sequential",
        "logging_steps": run.log_interval,
        "save_steps": run.save_interval,
        "save_total_limit": None if run.keep_latest < 0 else run.keep_latest,
        "seed": run.random_seed,
        "dataloader_num_workers": data.num_workers,
        "dataloader_prefetch_factor": data.prefetch_factor if data.num_workers else None,
        "dataloader_pin_memory": data.pin_memory and torch.cuda.is_available(),
        "logging_nan_inf_filter": False,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,
        "report_to": "none",
    }
    args = TrainingArguments(str(output_dir), **{**given, **arguments})
    model = initial_model(config.model, run.random_seed)
    exclude_parameters(model, config)
    optimizer = make_optimizer(model.to(args.device), optimizer_section)
    schedule = LambdaLR(optimizer, lambda index: learning_rate(optimizer_section, index + 1) / optimizer_section.lr)
    sampler = make_sampler(
        source, data, config.model, accumulation=args.gradient_accumulation_steps * max(1, args.world_size)
    )
    batches = PretrainingBatches(source, data, config.masking, config.model, run.random_seed)
    callback = SpidrTrainerCallback(run.max_nonfinite_steps)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=UpdateBatches(batches, sampler, args.max_steps),
        data_collator=UpdateCollator(config),
        compute_loss_func=callback.compute_loss,
        processing_class=SpidrFeatureExtractor(do_normalize=data.normalize),
        optimizers=(optimizer, schedule),
    )
    # First in line, so that what it adds to the logs reaches the others.
    trainer.callback_handler.callbacks.insert(0, callback)
    return trainer


# A hook of a compiled model would be compiled, and anew as the seed changes.
@torch.compiler.disable
def _seed_dropout(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Draw dropout from the batch's own seed, as `examples/pretrain.py` does."""
    seed = kwargs.pop("dropout_seed", None)
    if seed is not None:
        torch.manual_seed(seed)
    return args, kwargs


def _pretraining_model(model: nn.Module) -> SpidrForPretraining:
    model = getattr(model, "module", model)
    if not isinstance(model, SpidrForPretraining):
        raise TypeError(f"SpidrTrainerCallback is for SpidrForPretraining, got {type(model).__name__}.")
    return model


__all__ = ["SpidrTrainerCallback", "UpdateBatches", "UpdateCollator", "make_trainer"]
