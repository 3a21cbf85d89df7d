"""Training under `torch.compile` with its own compiler on a CPU: losses and gradients are eager's at every length."""

import pytest
import torch
from tiny import tiny_config

from spidr_hf import SpidrForCTC, SpidrForPretraining, SpidrForSequenceClassification

pytestmark = pytest.mark.slow
LENGTHS = ((2, 8000), (2, 9123))


@pytest.mark.parametrize("kind", [SpidrForCTC, SpidrForSequenceClassification, SpidrForPretraining])
def test_losses_and_gradients_are_eagers_at_every_length(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = tiny_config(
        num_hidden_layers=2,
        num_codebooks=2,
        conv_pos_depth=2,
        vocab_size=9,
        num_labels=5,
        feat_proj_dropout=0.0,
        activation_dropout=0.0,
        final_dropout=0.0,
        ctc_zero_infinity=True,
    )
    model = kind(config).train()
    compiled = torch.compile(model)
    for rows, samples in LENGTHS:
        batch = {"input_values": torch.randn(rows, samples)}
        batch["attention_mask"] = (torch.arange(samples) < torch.tensor([[samples], [samples - 2000]])).long()
        if kind is SpidrForPretraining:
            frames = model._get_feat_extract_output_lengths(samples)
            batch["mask_time_indices"] = (torch.arange(frames) % 2 == 0).expand(rows, -1)
        else:
            batch["labels"] = torch.randint(1, 5, (rows, 5) if kind is SpidrForCTC else (rows,))
        results = []
        for run in (model, compiled):
            loss = run(**batch).loss
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            model.zero_grad()
        expected, got = results
        torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)
        assert len(got) == len(expected) > 10
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)
