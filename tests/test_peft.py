"""LoRA by peft on a head's encoder: it trains few parameters, saves, loads and merges."""

import pytest
import torch
from tiny import tiny_config

from spidr_hf import SpidrForCTC

peft = pytest.importorskip("peft", reason="peft is not installed")

# What README names: the projections of attention and of the feed-forward network.
TARGETS = ["attention.qkv", "attention.proj", "feed_forward.intermediate_dense", "feed_forward.output_dense"]


@pytest.fixture
def pretrained(tmp_path) -> str:
    torch.manual_seed(0)
    SpidrForCTC(tiny_config(vocab_size=9)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def lora(folder: str) -> "peft.PeftModel":
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["lm_head"])
    torch.manual_seed(1)
    return peft.get_peft_model(SpidrForCTC.from_pretrained(folder, ctc_zero_infinity=True), config)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 8000, generator=generator)
    return {"input_values": values, "labels": torch.tensor([[1, 2, 3], [4, 5, -100]])}


def test_trains_saves_loads_and_merges(pretrained, tmp_path):
    model = lora(pretrained)
    layers = model.base_model.model.spidr.encoder.layers
    adapted = [name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(adapted) == len(TARGETS) * len(layers)
    trained, total = model.get_nb_trainable_parameters()
    assert trained < 0.35 * total
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)

    values = batch()["input_values"]
    model.eval()
    with torch.no_grad():
        expected = model(values).logits
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(SpidrForCTC.from_pretrained(pretrained), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(values).logits, expected)

    # Merged, it is a model like any other, without peft.
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = SpidrForCTC.from_pretrained(tmp_path / "merged").eval()
    assert type(plain) is SpidrForCTC and not [name for name, _ in plain.named_parameters() if "lora" in name]
    with torch.no_grad():
        torch.testing.assert_close(plain(values).logits, expected, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(SpidrForCTC.from_pretrained(pretrained).eval()(values).logits, expected, atol=1e-2)
