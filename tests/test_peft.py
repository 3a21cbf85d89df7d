"""LoRA by peft on a head's encoder: it trains few parameters, saves, loads and merges."""

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import VARIANTS, tiny_config
from transformers import Trainer, TrainingArguments

from spidr_hf import (
    SpidrForAudioFrameClassification,
    SpidrForAudioTokenization,
    SpidrForCTC,
    SpidrForPretraining,
    SpidrForSequenceClassification,
    SpidrForXVector,
    SpidrModel,
)

peft = pytest.importorskip("peft", reason="peft is not installed")

add_adapter = pytest.param(
    "add_adapter",
    marks=pytest.mark.skipif(
        Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) < Version("0.22"),
        reason="from 5.24 on transformers wants peft 0.22 for `add_adapter`",
    ),
)
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


@pytest.mark.parametrize(
    "kind",
    [
        SpidrModel,
        SpidrForPretraining,
        SpidrForAudioTokenization,
        SpidrForCTC,
        SpidrForSequenceClassification,
        SpidrForAudioFrameClassification,
        SpidrForXVector,
    ],
)
@pytest.mark.parametrize("changes", [{}, VARIANTS["group norm, pre-norm, even kernel"]], ids=["layer", "group"])
def test_every_convolution_and_linear_layer_takes_an_adapter(kind, changes, tmp_path):
    torch.manual_seed(0)
    plain = kind(tiny_config(vocab_size=9, num_labels=5, **changes)).eval()
    targets = [
        name
        for name, module in plain.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv1d)) and not name.startswith("teacher.")
    ]
    assert len(targets) >= 7 + 1 + plain.config.conv_pos_depth + 4 * 4
    values = {"input_values": batch()["input_values"]}
    with torch.no_grad():
        before = plain(**values)[0]
    folder = tmp_path / "model"
    plain.save_pretrained(folder)
    config = peft.LoraConfig(r=4, target_modules=targets)
    model = peft.get_peft_model(kind.from_pretrained(folder), config).eval()
    with torch.no_grad():
        assert torch.equal(model(**values)[0], before)  # an adapter begins as nothing
    if kind is not SpidrForAudioTokenization:  # units have no gradient
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        for _ in range(2):
            model.train()
            model(**values)[0].float().square().sum().backward()
            optimizer.step()
            grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            assert len(grads) == 2 * len(targets) and all(grad is not None for grad in grads.values())
            optimizer.zero_grad()
        assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(kind.from_pretrained(folder), tmp_path / "adapter")
    with torch.no_grad():
        after = model.eval()(**values)[0]
        assert torch.equal(again.eval()(**values)[0], after)
    assert kind is SpidrForAudioTokenization or not torch.allclose(after, before)


@pytest.mark.parametrize("how", ["before", "after", add_adapter])
@pytest.mark.parametrize("reentrant", [True, False])
def test_adapters_in_checkpointed_layers_learn(pretrained, how, reentrant):
    def gradients(checkpointed: bool) -> dict[str, torch.Tensor]:
        model = SpidrForCTC.from_pretrained(pretrained, ctc_zero_infinity=True)
        config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        torch.manual_seed(0)
        if how == "add_adapter":
            model.add_adapter(config)
        if checkpointed and how != "after":
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if how != "add_adapter":
            model = peft.get_peft_model(model, config)
        if checkpointed and how == "after":
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()(**batch()).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, got = gradients(False), gradients(True)
    assert len(got) == len(expected) > 0
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("how", ["get_peft_model", add_adapter, "Trainer"])
def test_an_adapter_on_a_pretraining_checkpoint_is_saved(how, tmp_path):
    """Whose config has no vocabulary: peft then looks for embeddings that were resized."""
    torch.manual_seed(0)
    SpidrForPretraining(tiny_config()).save_pretrained(tmp_path / "pretrained")
    options = {"vocab_size": 9, "pad_token_id": 0, "ctc_zero_infinity": True}
    torch.manual_seed(1)
    model = SpidrForCTC.from_pretrained(tmp_path / "pretrained", **options)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], init_lora_weights=False)
    if how == "add_adapter":
        model.add_adapter(config)
    else:
        model = peft.get_peft_model(model, config)
    if how == "Trainer":
        rows = [{name: value[i] for name, value in batch().items()} for i in range(2)]
        arguments = TrainingArguments(tmp_path / "run", max_steps=1, use_cpu=True, report_to=[], save_steps=1)
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        folder = tmp_path / "run" / "checkpoint-1"
    else:
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
    values = batch()["input_values"]
    with torch.no_grad():
        expected = model.eval()(values).logits
    again = SpidrForCTC.from_pretrained(tmp_path / "pretrained", **options)
    if how == "add_adapter":
        again.load_adapter(folder)
    else:
        again = peft.PeftModel.from_pretrained(again, folder)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(values).logits, expected)
