"""The fine-tuning heads: they learn, ignore padding, load the encoder's checkpoints, refuse labels they cannot use."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments, Wav2Vec2CTCTokenizer, Wav2Vec2Processor, logging, pipeline

from spidr_hf import (
    SpidrConfig,
    SpidrFeatureExtractor,
    SpidrForAudioFrameClassification,
    SpidrForCTC,
    SpidrForPretraining,
    SpidrForSequenceClassification,
    SpidrForXVector,
    SpidrModel,
)
from spidr_hf.modeling_spidr_heads import AMSoftmaxLoss

HEADS = (SpidrForCTC, SpidrForSequenceClassification, SpidrForAudioFrameClassification, SpidrForXVector)
WEIGHTED_HEADS = HEADS[1:]
SAMPLES = (8000, 6100, 3000)
FRAMES = 24
NUM_LABELS = 4


def tiny_config(**fields) -> SpidrConfig:
    return SpidrConfig(
        **{
            "vocab_size": 12,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "conv_dim": [8] * 7,
            "conv_pos_kernel_size": 9,
            "conv_pos_depth": 2,
            "num_conv_pos_embedding_groups": 2,
            "num_codebooks": 2,
            "codebook_size": 8,
            "classifier_proj_size": 12,
            "num_labels": NUM_LABELS,
            "tdnn_dim": [16, 16, 20],
            "tdnn_kernel": [3, 3, 1],
            "tdnn_dilation": [1, 2, 1],
            "xvector_output_dim": 10,
            **fields,
        }
    )


def make(head, seed=0, **fields):
    torch.manual_seed(seed)
    model = head(tiny_config(**fields)).eval()
    with torch.no_grad():  # far from the initialisation, where all layers and labels look alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def batch(head=None) -> dict[str, torch.Tensor]:
    """Three utterances of different lengths and, with a head, labels for it. The padding holds noise, not zeros."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "input_values": torch.randn(3, max(SAMPLES), generator=generator),
        "attention_mask": (torch.arange(max(SAMPLES)) < torch.tensor(SAMPLES)[:, None]).int(),
    }
    if head is SpidrForCTC:
        inputs["labels"] = torch.tensor([[3, 4, 5, 6], [7, 7, -100, -100], [8, 9, 10, -100]])
    elif head is SpidrForAudioFrameClassification:
        inputs["labels"] = torch.randint(NUM_LABELS, (3, FRAMES), generator=generator)
    elif head is not None:
        inputs["labels"] = torch.tensor([0, 3, 1])
    return inputs


@pytest.mark.parametrize("weighted", [False, True], ids=["last layer", "weighted sum"])
@pytest.mark.parametrize("head", HEADS)
def test_learns_a_batch_by_heart(head, weighted):
    torch.manual_seed(0)
    model = head(tiny_config(use_weighted_layer_sum=weighted, hidden_dropout=0.0, mask_time_prob=0.0)).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    losses = []
    for _ in range(25):
        loss = model(**batch(head)).loss
        optimizer.zero_grad()
        loss.backward()
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not unused, f"parameters without a gradient keep DistributedDataParallel waiting: {unused}"
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("weighted", [False, True], ids=["last layer", "weighted sum"])
@pytest.mark.parametrize("head", HEADS)
def test_padded_rows_equal_the_rows_alone(head, weighted, norm):
    model = make(head, use_weighted_layer_sum=weighted, feat_extract_norm=norm)
    inputs = batch()
    with torch.no_grad():
        padded = model(**inputs)
        for row, samples in enumerate(SAMPLES):
            alone = model(inputs["input_values"][row : row + 1, :samples])
            logits = padded.logits[row : row + 1]
            if head in (SpidrForCTC, SpidrForAudioFrameClassification):
                logits, padding = logits.split([alone.logits.shape[1], FRAMES - alone.logits.shape[1]], dim=1)
                if head is SpidrForCTC:
                    assert (padding.argmax(-1) == model.config.pad_token_id).all()
            torch.testing.assert_close(logits, alone.logits, atol=1e-5, rtol=1e-4)
            if head is SpidrForXVector:
                torch.testing.assert_close(padded.embeddings[row : row + 1], alone.embeddings, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(head):
    model = make(head, ctc_loss_reduction="sum")
    inputs = batch(head)
    losses, weights = [], []
    with torch.no_grad():
        for row, samples in enumerate(SAMPLES):
            frames = model._get_feat_extract_output_lengths(samples)
            labels = inputs["labels"][row : row + 1]
            if head is SpidrForAudioFrameClassification:
                labels = labels[:, :frames]
            losses.append(model(inputs["input_values"][row : row + 1, :samples], labels=labels).loss)
            weights.append(float(frames) if head is SpidrForAudioFrameClassification else 1.0)
        loss = model(**inputs).loss
    expected = sum(losses) if head is SpidrForCTC else torch.tensor(losses) @ torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)


def test_speaker_embeddings_pool_mean_and_deviation():
    """The pooled statistics are torch's own mean and (unbiased) deviation of the frames that saw no padding."""
    model = make(SpidrForXVector)
    frames = torch.randn(2, 9, 5)
    frames[..., 0] = 0.0  # a channel silenced by the ReLU
    frames.requires_grad_()
    pooled = model.pool_statistics(frames, torch.tensor([9, 4]))
    for row, length in enumerate((9, 4)):
        valid = frames[row, :length]
        torch.testing.assert_close(pooled[row], torch.cat([valid.mean(0), valid.std(0)]), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(model.pool_statistics(frames, None)[0], pooled[0])
    pooled.sum().backward()
    assert frames.grad.isfinite().all()


def test_margin_softmax():
    torch.manual_seed(0)
    loss = AMSoftmaxLoss(6, 5)
    torch.nn.init.normal_(loss.weight)
    hidden_states, labels = torch.randn(4, 6), torch.tensor([0, 4, 2, 2])
    cosines = F.cosine_similarity(hidden_states[:, None], loss.weight.T[None], dim=-1)
    expected = 0.0
    for row, label in enumerate(labels):
        logits = 30 * cosines[row]
        logits[label] -= 30 * 0.4
        expected += F.cross_entropy(logits, label) / 4
    torch.testing.assert_close(loss(hidden_states, labels), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(hidden_states, labels), expected)


def test_ctc_loss_is_that_of_each_utterance_in_float32():
    model = make(SpidrForCTC)
    inputs = batch(SpidrForCTC)
    with torch.no_grad():
        output = model(**inputs)
    expected = []
    for row, samples in enumerate(SAMPLES):
        frames = model._get_feat_extract_output_lengths(samples)
        target = [label for label in inputs["labels"][row].tolist() if label != -100]
        log_probs = output.logits[row, :frames].float().log_softmax(-1)
        expected.append(F.ctc_loss(log_probs, torch.tensor(target), torch.tensor(frames), torch.tensor(len(target))))
    torch.testing.assert_close(output.loss, torch.stack(expected).mean())
    with torch.no_grad():  # padding with the blank, as tokenizers do
        blanks = model(**{**inputs, "labels": inputs["labels"].masked_fill(inputs["labels"] == -100, 0)}).loss
        torch.testing.assert_close(blanks, output.loss)
        model.bfloat16()
        output = model(**inputs)
    assert output.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32


def test_impossible_alignments_can_count_as_zero():
    labels = torch.full((3, 30), 5)  # longer than the frames
    assert make(SpidrForCTC)(**{**batch(), "labels": labels}).loss.isinf()
    assert make(SpidrForCTC, ctc_zero_infinity=True)(**{**batch(), "labels": labels}).loss == 0


def test_frame_labels_as_numbers_or_one_hot():
    model = make(SpidrForAudioFrameClassification)
    inputs = batch(SpidrForAudioFrameClassification)
    with torch.no_grad():
        loss = model(**inputs).loss
        one_hot = F.one_hot(inputs["labels"], NUM_LABELS)
        for labels in (one_hot, one_hot.float()):
            torch.testing.assert_close(model(**{**inputs, "labels": labels}).loss, loss)
        ignored = inputs["labels"].clone()
        ignored[:, 3:] = -100
        output = model(**{**inputs, "labels": ignored})
    expected = F.cross_entropy(output.logits[:, :3].flatten(0, 1), inputs["labels"][:, :3].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("head", WEIGHTED_HEADS)
def test_weighted_layer_sum_covers_all_hidden_states(head):
    model = make(head, use_weighted_layer_sum=True, do_stable_layer_norm=True)
    assert model.layer_weights.shape == (4,)
    inputs = batch()
    with torch.no_grad():
        hidden_states = model.spidr(**inputs, output_hidden_states=True).hidden_states
        heard = []
        for name, module in model.named_children():
            if name != "spidr":
                module.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
        assert model(**inputs).hidden_states is None
        expected = torch.stack(hidden_states) * model.layer_weights.softmax(-1).view(-1, 1, 1, 1)
        torch.testing.assert_close(heard[0], expected.sum(0))
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 4
    assert not hasattr(make(head), "layer_weights")


def test_fresh_layer_weights_are_even():
    assert not SpidrForSequenceClassification(tiny_config(use_weighted_layer_sum=True)).layer_weights.any()


@pytest.mark.parametrize("head", HEADS)
def test_starts_from_a_pretraining_checkpoint(head, tmp_path, capsys):
    torch.manual_seed(0)
    pretrained = SpidrForPretraining(tiny_config())
    pretrained.save_pretrained(tmp_path)
    model, info = head.from_pretrained(tmp_path, use_weighted_layer_sum=True, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert info["missing_keys"] and not any(key.startswith("spidr.") for key in info["missing_keys"])
    for name, tensor in pretrained.spidr.state_dict().items():
        torch.testing.assert_close(model.spidr.state_dict()[name], tensor, rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert model(**batch(head)).loss.isfinite()


@pytest.mark.parametrize("head", HEADS)
def test_saves_and_loads(head, tmp_path):
    model = make(head, use_weighted_layer_sum=True)
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits, rtol=0, atol=0)
    encoder = SpidrModel.from_pretrained(tmp_path)
    for name, tensor in model.spidr.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_freezing(head):
    model = head(tiny_config())
    model.freeze_feature_encoder()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("spidr.feature_extractor.") for name in trained)
    assert "spidr.feature_projection.projection.weight" in trained
    model.freeze_base_model()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and not any(name.startswith("spidr.") for name in trained)
    model.train()(**batch(head)).loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in trained)


@pytest.mark.parametrize("mask_time_prob", [0.0, 0.5])
def test_the_mask_embedding_trains_only_where_frames_are_masked(mask_time_prob, tmp_path):
    model = SpidrForCTC(tiny_config(mask_time_prob=mask_time_prob))
    model.save_pretrained(tmp_path)
    for instance in (model, SpidrForCTC.from_pretrained(tmp_path)):
        assert instance.spidr.masked_spec_embed.requires_grad == (mask_time_prob > 0)
        assert all(p.requires_grad for n, p in instance.named_parameters() if n != "spidr.masked_spec_embed")


@pytest.mark.parametrize("head", HEADS)
def test_runs_in_bfloat16(head):
    inputs = batch(head)
    model = make(head, use_weighted_layer_sum=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    torch.testing.assert_close(model(**inputs).loss, loss, rtol=0.1, atol=0.1)
    loss = model.bfloat16()(**inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize("head", HEADS)
def test_spec_augment_keeps_every_parameter_in_use(head, tmp_path):
    """DistributedDataParallel without a search for unused parameters raises in the second step if one was not used."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = head(tiny_config(mask_time_prob=0.3, mask_time_length=2, mask_feature_prob=0.3, mask_feature_length=2))
        parallel = DistributedDataParallel(model.train())
        for _ in range(3):
            parallel(**batch(head)).loss.backward()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("head", HEADS)
def test_the_trainer_divides_by_its_accumulation_steps(head, tmp_path):
    """The losses are means over the batch, whatever number of items the Trainer counts over several batches."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], gradient_accumulation_steps=2)
    assert not Trainer(head(tiny_config()), arguments).model_accepts_loss_kwargs


@pytest.mark.parametrize(
    "head, labels, message",
    [
        (SpidrForCTC, torch.full((3, 2), 12), "holds 12, and `config.vocab_size` allows 0 to 11"),
        (SpidrForCTC, torch.full((3, 2), -1), "holds -1"),
        (SpidrForSequenceClassification, torch.tensor([0, 1, 4]), "holds 4, and `config.num_labels` allows 0 to 3"),
        (SpidrForSequenceClassification, torch.tensor([0.0, 1.0, 2.0]), "must be integers, got torch.float32"),
        (SpidrForAudioFrameClassification, torch.full((3, FRAMES), 4), "holds 4, and `config.num_labels`"),
        (SpidrForAudioFrameClassification, torch.zeros(3, 20).long(), r"shape \(3, 24\) .* got \(3, 20\): crop or pad"),
        (SpidrForAudioFrameClassification, torch.zeros(3, FRAMES, 5), r"or \(3, 24, 4\) \(one-hot\), got \(3, 24, 5\)"),
        (SpidrForXVector, torch.tensor([0, 1, 7]), "holds 7, and `config.num_labels`"),
    ],
)
def test_refuses_labels_it_cannot_use(head, labels, message):
    with pytest.raises(ValueError, match=message):
        make(head)(**{**batch(), "labels": labels})


def test_refuses_configurations_without_a_vocabulary_or_blank():
    with pytest.raises(ValueError, match="`vocab_size` is None: set it to the size of the tokenizer's vocabulary"):
        SpidrForCTC(tiny_config(vocab_size=None))
    for blank in (None, 12):
        model = make(SpidrForCTC)
        model.config.pad_token_id = blank
        with pytest.raises(ValueError, match=rf"`pad_token_id` is the blank .* got {blank}"):
            model(**batch(SpidrForCTC))


def test_refuses_utterances_too_short_for_a_speaker_embedding():
    model = make(SpidrForXVector)
    # 7 frames make one output of convolutions that span 3 and 5 frames.
    assert model(torch.randn(1, 2320)).embeddings.isfinite().all()
    with pytest.raises(ValueError, match=r"An utterance of 6 frames is too short .* needs 7 frames \(2320 samples\)"):
        model(torch.randn(1, 2319))
    mask = torch.ones(2, 4000, dtype=torch.int32)
    mask[1, 1500:] = 0
    with pytest.raises(ValueError, match="An utterance of 4 frames is too short"):
        model(torch.randn(2, 4000), attention_mask=mask)


@pytest.fixture
def errors():
    """Messages of level error and above of transformers: its pipelines log when a class is unknown to them."""
    messages: list[str] = []
    handler = logging.logging.Handler(level=logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.add_handler(handler)
    yield messages
    logging.remove_handler(handler)


def test_pipelines(tmp_path, errors):
    (tmp_path / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate("_#$?|abcdefg")}))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(tmp_path / "vocab.json"), pad_token="_", bos_token="#", eos_token="$", unk_token="?"
    )
    make(SpidrForCTC).save_pretrained(tmp_path / "ctc")
    Wav2Vec2Processor(SpidrFeatureExtractor(), tokenizer).save_pretrained(tmp_path / "ctc")
    waveforms = [np.random.default_rng(seed).normal(size=n).astype(np.float32) for seed, n in enumerate((8000, 5000))]
    recognize = pipeline("automatic-speech-recognition", model=str(tmp_path / "ctc"), device="cpu")
    texts = [recognize(waveform)["text"] for waveform in waveforms]
    assert any(texts)
    assert [out["text"] for out in recognize(list(waveforms), batch_size=2)] == texts

    make(SpidrForSequenceClassification, id2label=dict(enumerate("wxyz"))).save_pretrained(tmp_path / "classes")
    SpidrFeatureExtractor().save_pretrained(tmp_path / "classes")
    classify = pipeline("audio-classification", model=str(tmp_path / "classes"), device="cpu")
    scores = classify(waveforms[0])
    assert {score["label"] for score in scores} == set("wxyz")
    assert sum(score["score"] for score in scores) == pytest.approx(1)
    together = classify(list(waveforms), batch_size=2)
    for waveform, batched in zip(waveforms, together, strict=True):
        alone = {score["label"]: score["score"] for score in classify(waveform)}
        assert {score["label"]: score["score"] for score in batched} == pytest.approx(alone, abs=1e-5)
    assert not errors
