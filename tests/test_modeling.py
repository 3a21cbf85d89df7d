"""Fast forms against the obvious ones, padding, dtypes, gradients, and what training promises."""

import copy
import logging
from collections.abc import Callable

import pytest
import reference
import torch
from tiny import VARIANTS, random_mask, tiny_config, tiny_model
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoModelForAudioTokenization, AutoModelForPreTraining

from spidr_hf import SpidrForAudioTokenization, SpidrForPretraining, SpidrModel, modeling_spidr_pretraining

LENGTHS = (8000, 5000, 2411)


@pytest.fixture(params=VARIANTS, scope="module")
def model(request) -> SpidrForPretraining:
    return tiny_model(**VARIANTS[request.param])


def waveforms(lengths=LENGTHS, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], value: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    mask = torch.stack([(torch.arange(longest) < len(row)).long() for row in rows])
    batch = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=value) for row in rows])
    return batch, mask


@torch.no_grad()
def test_forward_equals_the_obvious_form(model):
    for row in waveforms():
        features = reference.feature_encoder(model.spidr, row)
        representations, outputs, final = reference.encoder(model.spidr.encoder, model.spidr.project(features))
        result = model.spidr(row[None], output_hidden_states=True)
        torch.testing.assert_close(result.extract_features[0], features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(result.last_hidden_state[0], final, atol=3e-5, rtol=1e-5)
        assert len(result.hidden_states) == model.config.num_hidden_layers + 1
        torch.testing.assert_close(result.hidden_states[-1], result.last_hidden_state)
        for got, expected in zip(model.spidr.get_intermediate_outputs(row[None]), representations, strict=True):
            torch.testing.assert_close(got[0], expected, atol=2e-5, rtol=1e-5)
        after = model.spidr.get_intermediate_outputs(row[None], before_residual=False)
        for got, expected in zip(after, outputs, strict=True):
            torch.testing.assert_close(got[0], expected, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "attn_implementation", ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_padded_rows_equal_the_rows_alone(model, attn_implementation):
    model = copy.deepcopy(model)
    model.set_attn_implementation(attn_implementation)
    rows = waveforms()
    # Whatever stands in the padding must not matter.
    batch, mask = padded(rows, value=7.0)
    together = model.spidr.get_intermediate_outputs(batch, mask)
    last = model.spidr(batch, mask).last_hidden_state
    labels, codebooks = model.get_teacher_labels(batch, mask), model.get_codebooks(batch, mask)
    for index, row in enumerate(rows):
        frames = model._get_feat_extract_output_lengths(len(row))
        alone = model.spidr.get_intermediate_outputs(row[None])
        assert alone[0].shape[1] == frames
        for layer, (a, b) in enumerate(zip(together, alone, strict=True), start=1):
            torch.testing.assert_close(a[index, :frames], b[0], atol=1e-4, rtol=1e-4, msg=f"layer {layer}")
        torch.testing.assert_close(
            last[index, :frames], model.spidr(row[None]).last_hidden_state[0], atol=1e-4, rtol=1e-4
        )
        assert torch.equal(labels[index, :, :frames], model.get_teacher_labels(row[None])[0])
        assert (labels[index, :, frames:] == -1).all()
        for a, b in zip(codebooks, model.get_codebooks(row[None]), strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a[index, :frames], b[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_objective_equals_the_obvious_form_also_when_padded(model):
    rows = waveforms()
    batch, attention_mask = padded(rows)
    frames = [model._get_feat_extract_output_lengths(len(row)) for row in rows]
    masks = [random_mask(1, length, seed=length)[0] for length in frames]
    mask = torch.stack([torch.nn.functional.pad(m, (0, max(frames) - len(m)), value=True) for m in masks])
    expected = reference.objective(model, rows, masks)
    model.train()
    got = model(batch, attention_mask, mask)
    counts, sums = model.statistics.counts.clone(), model.statistics.sums.clone()
    model.discard_statistics()
    model.eval()
    if model.config.layerdrop:
        got = model(batch, attention_mask, mask)
    for name in ("loss", "target_ppl", "pred_ppl"):
        torch.testing.assert_close(got[name], expected[name], atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(torch.stack(got.layer_losses), expected["layer_losses"], atol=1e-5, rtol=1e-5)
    assert got.num_masked_frames == sum(m.sum() for m in masks)
    torch.testing.assert_close(counts, expected["counts"])
    torch.testing.assert_close(sums, expected["sums"], atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_frame_numbers_and_bool_masks_are_the_same(model):
    batch = torch.stack(waveforms((6000, 6000)))
    mask = random_mask(2, model._get_feat_extract_output_lengths(6000))
    indices = mask.nonzero()[:, 1].view(2, -1)
    for form in (indices, mask.long(), mask.to(torch.uint8)):
        a, b = model(batch, None, mask), model(batch, None, form)
        torch.testing.assert_close(a.loss, b.loss)
        assert a.num_masked_frames == b.num_masked_frames == mask.sum()


def test_gradients_of_the_extractor_equal_those_of_the_obvious_form(model):
    batch = torch.stack(waveforms((4000, 4000))).requires_grad_()
    weights = torch.linspace(-1, 1, model.config.conv_dim[-1])
    parameters = list(model.spidr.feature_extractor.parameters())
    fast = (model.spidr.extract_features(batch)[0] @ weights).square().sum()
    obvious = sum((reference.feature_encoder(model.spidr, row) @ weights).square().sum() for row in batch)
    torch.testing.assert_close(fast, obvious, atol=1e-4, rtol=1e-5)
    got = torch.autograd.grad(fast, [*parameters, batch])
    expected = torch.autograd.grad(obvious, [*parameters, batch])
    # A bias before the group norm has no gradient but rounding, so the scale is that of all gradients together.
    scale = max(float(gradient.abs().max()) for gradient in expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4 * float(b.abs().max()) + 1e-5 * scale, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3200, 4321, 10_000])
def test_extraction_in_pieces_is_exact(model, chunk, monkeypatch):
    batch = torch.stack(waveforms((9000, 9000)))
    monkeypatch.setattr("spidr_hf.layers_spidr.CHUNK_SAMPLES_CPU", 1_000_000)
    whole = model.spidr.extract_features(batch)[0]
    monkeypatch.setattr("spidr_hf.layers_spidr.CHUNK_SAMPLES_CPU", chunk)
    torch.testing.assert_close(model.spidr.extract_features(batch)[0], whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_output_does_not_depend_on_how_attention_is_computed(model):
    batch, mask = padded(waveforms())
    expected = model.spidr(batch, mask, output_attentions=True)
    weights = torch.stack(expected.attentions)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    torch.testing.assert_close(
        model.spidr(batch, mask).last_hidden_state[0], expected.last_hidden_state[0], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("pre_norm", [False, True])
def test_the_last_representation_of_some_frames(pre_norm):
    """Those of the masked frames in training, and of no others."""
    model = tiny_model(do_stable_layer_norm=pre_norm)
    encoder = model.spidr.encoder
    hidden, rows = torch.randn(2, 30, model.config.hidden_size), torch.tensor([3, 4, 29, 41])
    options = {"first_representation": 3, "representation_only": True}
    whole = encoder(hidden, **options).representations
    some = encoder(hidden, **options, last_rows=rows).representations
    assert torch.equal(some[0], whole[0])
    torch.testing.assert_close(some[1], whole[1].flatten(0, 1)[rows])
    computed = []
    encoder.layers[-1].feed_forward.register_forward_hook(lambda module, inputs, output: computed.append(output))
    audio = torch.randn(2, 8000)
    mask = random_mask(2, int(model.spidr._get_feat_extract_output_lengths(8000)))
    model(audio, mask_time_indices=mask)
    assert computed[0].shape == (int(mask.sum()), model.config.hidden_size)


@torch.no_grad()
def test_stopping_early_gives_the_first_layers(model):
    batch = torch.stack(waveforms((6000,)))
    everything = model.spidr.get_intermediate_outputs(batch)
    for before in (True, False):
        everything = model.spidr.get_intermediate_outputs(batch, before_residual=before)
        first = model.spidr.get_intermediate_outputs(batch, before_residual=before, num_layers=2)
        assert len(first) == 2
        assert all(torch.equal(a, b) for a, b in zip(first, everything, strict=False))
    with pytest.raises(ValueError, match="between 1 and 4, got 5"):
        model.spidr.get_intermediate_outputs(batch, num_layers=5)


@pytest.mark.parametrize("attn_implementation", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", [v if v == "spidr" else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_compiles_without_graph_breaks(variant, attn_implementation):
    torch._dynamo.reset()
    model = tiny_model(**VARIANTS[variant])
    model.set_attn_implementation(attn_implementation)
    compiled = torch.compile(model.spidr, backend="aot_eager", fullgraph=True)
    batch, mask = padded(waveforms())
    for inputs in ((batch,), (batch, mask)):
        with torch.no_grad():
            expected = model.spidr(*inputs).last_hidden_state
            torch.testing.assert_close(compiled(*inputs).last_hidden_state, expected, atol=3e-5, rtol=1e-4)
    model.train()
    compiled(batch).last_hidden_state.sum().backward()


@pytest.mark.parametrize("kwargs", [{"use_reentrant": False}, {"use_reentrant": True}])
def test_activation_checkpointing_changes_nothing(kwargs):
    model = tiny_model().train()
    batch, mask = torch.stack(waveforms((6000, 6000))), random_mask(2, 18)
    model(batch, None, mask).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    assert model.spidr.encoder.layers[0].gradient_checkpointing
    model(batch, None, mask).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)


@pytest.mark.parametrize("objective", ["spidr", "dinosr"])
@pytest.mark.parametrize("layerdrop", [0.0, 1.0])
def test_every_trained_parameter_has_a_gradient(objective, layerdrop):
    model = tiny_model(objective=objective, layerdrop=layerdrop).train()
    model(torch.stack(waveforms((6000, 6000))), None, random_mask(2, 18)).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_a_dropped_layer_leaves_the_stream_but_still_predicts():
    model = tiny_model(layerdrop=1.0)
    features = model.spidr.project(model.spidr.extract_features(torch.stack(waveforms((6000,))))[0])
    model.spidr.encoder.train()
    output = model.spidr.encoder(features, first_representation=1)
    assert torch.equal(output.last_hidden_state, output.embeddings)
    assert len({x.sum().item() for x in output.representations}) == 4


def in_bfloat16(how: str) -> SpidrForPretraining:
    """A new model that is made in bfloat16."""
    config = tiny_config()
    if how == "from_config":
        return AutoModelForPreTraining.from_config(config, dtype=torch.bfloat16)
    if how == "config.dtype":
        config.dtype = torch.bfloat16
        return AutoModelForPreTraining.from_config(config)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return SpidrForPretraining(config)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["autocast", "loaded", "moved", "from_config", "default dtype", "config.dtype"])
def test_codebooks_and_targets_stay_float32(how, tmp_path):
    model = tiny_model()
    batch, mask = torch.stack(waveforms((6000, 6000))), random_mask(2, 18)
    if how in ("from_config", "default dtype", "config.dtype"):
        model = in_bfloat16(how)
    elif how == "loaded":
        model.save_pretrained(tmp_path)
        model = SpidrForPretraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    elif how == "moved":
        model = model.to(torch.bfloat16).half().bfloat16()
    assert model.codebooks.sums.dtype == model.codebooks.counts.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.teacher.parameters())
    assert model.current_step.dtype == torch.int64
    expected = tiny_model()
    if how in ("loaded", "moved"):
        assert torch.equal(model.codebooks.sums, expected.codebooks.sums)
        assert model.spidr.masked_spec_embed.dtype == torch.bfloat16
    model.train()
    seen = {}
    assign = model.codebooks.assign
    model.codebooks.assign = lambda targets: seen.setdefault("labels", assign(seen.setdefault("targets", targets)))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = model(batch, None, mask)
        assert output.loss.dtype == output.target_ppl.dtype == torch.float32
        output.loss.backward()
        exact = torch.stack(
            [
                reference.one_hot_statistics(*pair, 24)[1]
                for pair in zip(seen["labels"], seen["targets"].double(), strict=True)
            ]
        )
        torch.testing.assert_close(model.statistics.sums.double(), exact, atol=1e-5, rtol=1e-6)
        model.update_teacher(1)
    assert seen["targets"].dtype == torch.float32
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_several_forwards_count_as_one_large_batch():
    together, apart = tiny_model().train(), tiny_model().train()
    rows, mask = waveforms((6000,) * 4), random_mask(4, 18)
    together(torch.stack(rows), None, mask).loss.backward()
    for part in (slice(0, 1), slice(1, 4)):
        output = apart(torch.stack(rows[part]), None, mask[part])
        (output.loss * output.num_masked_frames / mask.sum()).backward()
    for (name, a), (_, b) in zip(together.named_parameters(), apart.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4, msg=name)
    a, b = together.reduce_statistics(), apart.reduce_statistics()
    for name in ("loss", "layer_losses", "target_ppl", "pred_ppl", "num_masked_frames", "active_codewords"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-5, rtol=1e-5)
    assert together.update_teacher(1) == apart.update_teacher(1)
    torch.testing.assert_close(together.codebooks.sums, apart.codebooks.sums)
    torch.testing.assert_close(together.codebooks.counts, apart.codebooks.counts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_equal_the_obvious_form(variant):
    model = tiny_model(**VARIANTS[variant]).train()
    old = copy.deepcopy(model.state_dict())
    student = {name: p + 0.1 for name, p in model.spidr.encoder.named_parameters()}
    model.spidr.encoder.load_state_dict(student)
    model(torch.stack(waveforms((6000, 6000))))
    counts, sums = model.statistics.counts.clone(), model.statistics.sums.clone()
    decay = model.update_teacher(3)
    reference.update_codebooks(
        old["codebooks.sums"], old["codebooks.counts"], sums, counts, model.config.codebook_decay
    )
    teacher = {name.removeprefix("teacher."): value for name, value in old.items() if name.startswith("teacher.")}
    reference.update_teacher(teacher, student, decay, tuple(model.config.ema_exclude_layers))
    torch.testing.assert_close(model.codebooks.sums, old["codebooks.sums"])
    torch.testing.assert_close(model.codebooks.counts, old["codebooks.counts"])
    untouched = counts == 0
    assert untouched.any()
    for name, parameter in model.teacher.named_parameters():
        torch.testing.assert_close(parameter, teacher[name], atol=1e-6, rtol=1e-5, msg=name)
    assert model.current_step.item() == 3


def test_codebook_decay_of_one_turns_updates_off():
    model = tiny_model(codebook_decay=1.0).train()
    sums = model.codebooks.sums.clone()
    model(torch.stack(waveforms((6000,))))
    model.update_teacher(1)
    assert torch.equal(model.codebooks.sums, sums)


def test_evaluation_leaves_no_trace():
    model = tiny_model()
    state = copy.deepcopy(model.state_dict())
    model(torch.stack(waveforms((6000,))))
    model.teacher_decay(1)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="No forward in train mode"):
        model.reduce_statistics()


def test_teacher_never_trains(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for candidate in (model, SpidrForPretraining.from_pretrained(tmp_path), copy.deepcopy(model)):
        candidate.train()
        assert not any(module.training for module in candidate.teacher.modules())
        assert not any(parameter.requires_grad for parameter in candidate.teacher.parameters())
        frozen = [n for n, p in candidate.named_parameters() if not p.requires_grad and not n.startswith("teacher.")]
        assert frozen == [f"spidr.encoder.layers.3.final_layer_norm.{name}" for name in ("weight", "bias")]
    assert all(p.requires_grad for p in SpidrModel.from_pretrained(tmp_path).parameters())


def test_freeze_step_ends_the_training_of_the_extractor():
    model = tiny_model(freeze_step=2).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.5)
    batch, mask = torch.stack(waveforms((6000, 6000))), random_mask(2, 18)
    frozen = ("spidr.feature_extractor.", "spidr.feature_projection.")
    for step in (1, 2, 3):
        before = copy.deepcopy(model.state_dict())
        model(batch, None, mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(step)
        for name, value in model.state_dict().items():
            if name.startswith(frozen):
                assert torch.equal(value, before[name]) == (step == 3), (step, name)
        assert not torch.equal(model.codebooks.sums, before["codebooks.sums"])
    assert model.spidr.masked_spec_embed.requires_grad


@pytest.mark.parametrize(
    ("objective", "step", "decay"),
    [
        ("spidr", 1, 0.9990951626),
        ("spidr", 1000, 1.0),
        ("dinosr", 15, 0.99945),
        ("dinosr", 31, 0.9999),
        ("dinosr", 100, 1),
    ],
)
def test_teacher_decay(objective, step, decay):
    model = tiny_model(objective=objective, ema_final_step=30)
    assert model.teacher_decay(step) == pytest.approx(decay, abs=1e-9)
    with pytest.raises(ValueError, match="counted from 1"):
        model.update_teacher(0)


def test_loading_a_late_checkpoint_freezes_nothing(tmp_path):
    """Adapting a published checkpoint (step 400 000, far past the freeze) trains extractor and teacher."""
    model = tiny_model(freeze_step=5)
    model.current_step.fill_(400_000)
    model.save_pretrained(tmp_path)
    model = SpidrForPretraining.from_pretrained(tmp_path).train()
    before = copy.deepcopy(model.state_dict())
    model(torch.stack(waveforms((6000, 6000))), None, random_mask(2, 18)).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    assert model.update_teacher(1) < 1
    for name in ("spidr.feature_extractor.conv_layers.0.conv.weight", "teacher.layers.0.attention.qkv.weight"):
        assert not torch.equal(model.state_dict()[name], before[name])
    assert model.current_step.item() == 1


def test_one_folder_serves_every_class(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    batch = torch.stack(waveforms((6000, 6000)))
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert isinstance(loaded, SpidrForPretraining)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(encoder, SpidrModel) and not any(info.values())
    torch.testing.assert_close(encoder(batch).last_hidden_state, model.spidr(batch).last_hidden_state)
    assert not any("teacher" in name for name, _ in encoder.named_parameters())
    units, info = AutoModelForAudioTokenization.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(units, SpidrForAudioTokenization) and not any(info.values())
    codes = units.encode(batch).audio_codes
    assert codes.shape == (2, 3, 18) and codes.dtype == torch.int64
    for k, probabilities in enumerate(model.get_codebooks(batch)[1:]):
        assert torch.equal(probabilities.argmax(-1), codes[:, k])
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 18))
    assert torch.equal(model.get_codebooks(batch, onehot=True)[3].argmax(-1), codes[:, 2])


@torch.no_grad()
def test_units_of_a_padded_batch():
    model = SpidrForAudioTokenization(tiny_config()).eval()
    rows = waveforms()
    batch, mask = padded(rows)
    codes = model.encode(batch, mask).audio_codes
    for index, row in enumerate(rows):
        frames = model._get_feat_extract_output_lengths(len(row))
        assert torch.equal(codes[index, :, :frames], model.encode(row[None]).audio_codes[0])
        assert (codes[index, :, frames:] == -1).all()


def test_spec_augment_masks_frames_and_channels_in_training_only():
    torch.manual_seed(0)
    model = SpidrModel(
        tiny_config(mask_time_prob=0.3, mask_time_length=4, mask_feature_prob=0.2, mask_feature_length=4)
    )
    hidden = torch.ones(3, 60, 48)
    assert torch.equal(model.eval().spec_augment(hidden, None), hidden)
    model.train()
    model.masked_spec_embed.data.fill_(2.0)
    lengths = torch.tensor([60, 30, 9])
    masked = model.spec_augment(hidden, lengths)
    for row, length in zip(masked, lengths.tolist(), strict=True):
        frames = (row == 2).any(-1)
        assert not frames[length:].any()
        assert 4 <= frames.sum() <= 0.3 * length + 8
        assert 4 <= (row == 0).all(0).sum() <= 16
    model.config.apply_spec_augment = False
    assert torch.equal(model.spec_augment(hidden, lengths), hidden)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.zeros(16000),), "must be batch x samples.*input_values\\[None\\]"),
        ((torch.zeros(1, 2, 16000),), "several channels"),
        ((torch.zeros(1, 399),), "one frame needs 400 samples"),
        ((torch.zeros(1, 800), torch.ones(1, 2)), "over samples: expected shape \\(1, 800\\)"),
        (
            (torch.zeros(2, 800), (torch.arange(800) < torch.tensor([[800], [399]])).long()),
            "row of the batch holds 399",
        ),
    ],
)
def test_refused_audio(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().spidr(*inputs)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 18, dtype=torch.bool), "masks no frame"),
        (torch.zeros(2, 17, dtype=torch.bool), "covers 17 frames, the audio has 18"),
        (torch.zeros(3, 18, dtype=torch.bool), "must be 2 x 18"),
        (torch.zeros(2, 18), "must be 2 x 18"),
    ],
)
def test_refused_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(torch.zeros(2, 6000), None, mask)


def test_models_without_codebooks_are_refused():
    for cls in (SpidrForPretraining, SpidrForAudioTokenization):
        with pytest.raises(ValueError, match="num_codebooks"):
            cls(tiny_config(num_codebooks=0))


def test_initialisation_is_the_recipe():
    torch.manual_seed(0)
    model = SpidrForPretraining(tiny_config(hidden_size=192, intermediate_size=768, attention_bias=True))
    layer = model.spidr.encoder.layers[0]
    assert layer.feed_forward.intermediate_dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.attention.qkv.weight.abs().max().item() == pytest.approx((6 / (4 * 192)) ** 0.5 / 2**0.5, rel=0.01)
    assert layer.attention.proj.weight.abs().max().item() == pytest.approx((6 / (2 * 192)) ** 0.5, rel=0.01)
    assert not layer.attention.qkv.bias.any() and not layer.feed_forward.output_dense.bias.any()
    conv = model.spidr.feature_extractor.conv_layers[1].conv.weight
    assert conv.std().item() == pytest.approx((2 / (32 * 3)) ** 0.5, rel=0.1)
    assert 0 <= model.spidr.masked_spec_embed.min() < model.spidr.masked_spec_embed.max() < 1
    assert model.heads.weight.abs().max().item() == pytest.approx(192**-0.5, rel=0.01)
    torch.testing.assert_close(model.codebooks.sums.mean(1), torch.zeros(3, 192), atol=1e-6, rtol=0)
    torch.testing.assert_close(model.codebooks.sums.std(1, correction=0), torch.ones(3, 192), atol=1e-4, rtol=0)
    assert (model.codebooks.counts == 1).all() and model.current_step.tolist() == [0]
    for (name, teacher), student in zip(
        model.teacher.named_parameters(), model.spidr.encoder.parameters(), strict=True
    ):
        drawn_anew = "attention" in name or "feed_forward" in name
        if teacher.dim() > 1 or not drawn_anew:
            assert torch.equal(teacher, student) != drawn_anew, name


def test_base_model_size():
    with torch.device("meta"):
        from spidr_hf import SpidrConfig

        model = SpidrForPretraining(SpidrConfig())
    sizes = {"teacher": 0, "student": 0}
    for name, parameter in model.named_parameters():
        sizes["teacher" if name.startswith("teacher.") else "student"] += parameter.numel()
    assert sizes["teacher"] / 1e6 == pytest.approx(88.5, abs=0.05)
    assert sizes["student"] / 1e6 == pytest.approx(94.7, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_masks_of_any_dtype_count_alike(dtype):
    batch, mask = padded(waveforms((6003, 4111)))
    model = tiny_model()
    assert torch.equal(model.get_teacher_labels(batch, mask.to(dtype)), model.get_teacher_labels(batch, mask))
    assert torch.equal(model.spidr(batch, mask.to(dtype))[0], model.spidr(batch, mask)[0])
    frames = model._get_feature_vector_attention_mask(18, mask.to(dtype))
    assert torch.equal(frames, model._get_feature_vector_attention_mask(18, mask))


@pytest.fixture
def said(caplog) -> Callable[[], list[str]]:
    """The warnings so far, of this test alone."""
    logging.Logger.warning_once.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_padding_stands_at_the_end(said):
    model, (batch, mask) = tiny_model().spidr, padded(waveforms((6003, 4111)))
    for training in (True, False):
        with pytest.raises(ValueError, match="begins with padding"):
            model.train(training)(batch.flip(1), mask.flip(1))
    assert not said()
    holes = mask.clone()
    holes[1, 1000:1500] = 0
    shorter = (torch.arange(batch.shape[1]) < holes.sum(-1, keepdim=True)).long()
    for _ in range(2):
        assert torch.equal(model(batch, holes)[0], model(batch, shorter)[0])
    assert len(said()) == 1 and "padding before samples" in said()[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_loop_that_forgets_the_teacher_is_told_once(compiled, said, monkeypatch):
    assert modeling_spidr_pretraining.FORWARDS_WITHOUT_UPDATE == 500
    monkeypatch.setattr(modeling_spidr_pretraining, "FORWARDS_WITHOUT_UPDATE", 4)
    model, batch, graphs = tiny_model().train(), torch.randn(1, 2000), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    run = torch.compile(model, backend=graphs, fullgraph=True) if compiled else model
    for step in range(1, 4):
        for _ in range(3):
            run(batch)
        model.update_teacher(step)
    for _ in range(3):
        run(batch)
    model.discard_statistics()
    known = graphs.frame_count
    with torch.no_grad():
        for _ in range(5):
            run(batch)
    model.eval()
    run(batch)
    assert not said()
    model.train()
    for _ in range(9):
        run(batch)
    assert len(said()) == 1 and "SpidrTrainerCallback" in said()[0] and "update_teacher" in said()[0]
    # Whatever the count stands at, the graph is the same: the first forward makes the buffer of statistics.
    assert known == (2 if compiled else 0) and graphs.frame_count == (4 if compiled else 0)
