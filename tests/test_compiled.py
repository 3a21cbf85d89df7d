"""Training by the stock `Trainer` with `torch_compile=True`, PyTorch's own compiler on a CPU: losses and gradients are
those without it, at every length."""

import os
from unittest import mock

import pytest
import torch
from runs import forget_processes
from tiny import tiny_config
from torch import nn
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback, TrainingArguments

from spidr_hf import SpidrForCTC, SpidrForPretraining, SpidrForSequenceClassification, SpidrTrainerCallback

pytestmark = pytest.mark.slow
LENGTHS = (1000, 1143, 1500, 1777)
# As small as it can be: the compiler takes its time for each layer and for each length of the first two.
TINY = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "conv_pos_depth": 1,
    "conv_pos_kernel_size": 9,
    "num_conv_pos_embedding_groups": 2,
    "num_codebooks": 1,
    "codebook_size": 8,
    "vocab_size": 9,
    "num_labels": 5,
    "classifier_proj_size": 8,
    "feat_proj_dropout": 0.0,
    "activation_dropout": 0.0,
    "final_dropout": 0.0,
    "ctc_zero_infinity": True,
}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    # Scalar code, which is compiled several times faster.
    monkeypatch.setattr("torch._inductor.config.cpp.simdlen", 1)
    with mock.patch.dict(os.environ):  # where Trainer tells accelerate of the compiler
        yield
    forget_processes()
    torch._dynamo.reset()


def batches(model: nn.Module) -> list[dict]:
    torch.manual_seed(1)
    items = []
    for number, samples in enumerate(LENGTHS):
        item = {"input_values": torch.randn(2, samples)}
        if isinstance(model, SpidrForPretraining):
            frames = model._get_feat_extract_output_lengths(samples)
            item["mask_time_indices"] = torch.stack([torch.randperm(frames)[: frames // 2] for _ in range(2)])
            item |= {"labels": torch.zeros(2 * (frames // 2)), "dropout_seed": 1 << (60 - number)}
        else:
            item["attention_mask"] = (torch.arange(samples) < torch.tensor([[samples], [samples - 300]])).long()
            item["labels"] = torch.randint(1, 5, (2, 5) if isinstance(model, SpidrForCTC) else (2,))
        items.append(item)
    return items


class Watch(TrainerCallback):
    """Graphs compiled so far, after every update."""

    def __init__(self):
        self.graphs: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.graphs.append(counters["stats"]["unique_graphs"])


def train(kind: type, folder, *callbacks: TrainerCallback, **arguments) -> list[dict]:
    """Losses and gradient norms of an update for each length."""
    forget_processes()
    torch.manual_seed(0)
    model = kind(tiny_config(**TINY))
    callback = SpidrTrainerCallback() if kind is SpidrForPretraining else None
    args = TrainingArguments(
        str(folder),
        max_steps=len(LENGTHS),
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        optim="sgd",
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=batches(model),
        data_collator=lambda items: items[0],
        compute_loss_func=callback and callback.compute_loss,
        callbacks=[*callbacks, *([callback] if callback else [])],
    )
    trainer.train()
    return [{name: row[name] for name in ("loss", "grad_norm")} for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", [SpidrForCTC, SpidrForSequenceClassification, SpidrForPretraining])
def test_losses_and_gradients_are_eagers_at_every_length(kind, tmp_path):
    expected = train(kind, tmp_path / "eager")
    got = train(kind, tmp_path / "compiled", watch := Watch(), torch_compile=True)
    assert len(got) == len(LENGTHS)
    # A graph for the first length, another for all that follow.
    assert 0 < watch.graphs[0] < watch.graphs[1] and set(watch.graphs[1:]) == {watch.graphs[1]}
    for row, other in zip(got, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
