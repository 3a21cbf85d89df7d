"""Checkpoints of both formats become this project's tensors, exactly, and SpidR's format again; or one clear error."""

import json
import stat
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForPreTraining

from spidr_hf import SpidrForPretraining
from spidr_hf.conversion import convert_checkpoint, export_checkpoint
from spidr_hf.conversion.checkpoint_file import read_checkpoint
from spidr_hf.conversion.checkpoints import read_pretraining_checkpoint
from spidr_hf.conversion.errors import ConversionError, TensorMismatchError
from spidr_hf.conversion.fairseq_format import convert_fairseq, parse_conv_layers, settings, update_count
from spidr_hf.conversion.safe_pickle import StandIn
from spidr_hf.conversion.spidr_format import config_from_spidr, config_to_spidr, convert_spidr, objective_of
from spidr_hf.conversion.tensors import same_bits
from spidr_hf.hub_spidr import AUTO_MAP, HUB_FILES

FIXTURES = Path(__file__).parents[1] / "fixtures"
PARITY = FIXTURES / "parity"
FAIRSEQ = PARITY / "dinosr-fairseq" / "checkpoint.ckpt"
SPIDR_FILES = {
    "wrapped": ("spidr-tiny/checkpoint.pt", None),
    "bare": ("spidr-tiny/bare_state_dict.pt", None),
    "full, DDP": ("spidr-tiny/full_checkpoint_ddp.pt", None),
    "DinoSR": ("dinosr-tiny/checkpoint.pt", "dinosr"),
    "variant": ("spidr-tiny-variant/checkpoint.pt", None),
}


def stored(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a SpidR file under their own names, read in the plainest way."""
    checkpoint = torch.load(path, weights_only=True)
    model = checkpoint.get("model", checkpoint)
    return {name.removeprefix("module."): tensor for name, tensor in model.items()}


def raw_config(folder: str) -> dict:
    return json.loads((PARITY / folder / "config.json").read_text())


def convert(source: Path, output: Path, **options) -> Path:
    convert_checkpoint.convert(str(source), str(output), **options)
    return output


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the smallest checkpoint, to be changed by a test."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("checkpoint.pt", "config.json"):
        (folder / name).write_bytes((PARITY / "spidr-tiny" / name).read_bytes())
    return folder / "checkpoint.pt"


# ---- SpidR's own format


@pytest.mark.parametrize("kind", SPIDR_FILES)
def test_convert_load_save_load_export_gives_the_original_bits(kind: str, tmp_path: Path) -> None:
    name, objective = SPIDR_FILES[kind]
    original = stored(PARITY / name)
    folder = convert(PARITY / name, tmp_path / "converted", objective=objective)
    model = AutoModelForPreTraining.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    SpidrForPretraining.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    export_checkpoint.export(tmp_path / "again", tmp_path / "out" / "back.pt")

    exported = torch.load(tmp_path / "out" / "back.pt", weights_only=True)
    assert set(exported) == {"model"}
    assert set(exported["model"]) == set(original)
    assert all(same_bits(exported["model"][name], tensor) for name, tensor in original.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model"] == raw_config(name.split("/")[0])["model"]
    assert config["run"] == {"model_type": model.config.objective}


def test_every_tensor_has_its_place(tmp_path: Path) -> None:
    """Held against a list written by hand, so that a swap in the key table does not cancel out on the way back."""
    original = stored(PARITY / "spidr-tiny-variant" / "checkpoint.pt")
    converted = load_file(
        convert(PARITY / "spidr-tiny-variant" / "checkpoint.pt", tmp_path / "o") / "model.safetensors"
    )
    expected = {"spidr.masked_spec_embed": original["mask_embedding"], "current_step": original["current_step"]}
    for i in range(7):
        for part in ("conv.weight", "conv.bias", *(("layer_norm.weight", "layer_norm.bias") if i == 0 else ())):
            name = f"feature_extractor.conv_layers.{i}.{part}"
            expected[f"spidr.{name}"] = original[name]
    for part in ("layer_norm.weight", "layer_norm.bias", "projection.weight", "projection.bias"):
        expected[f"spidr.feature_projection.{part}"] = original[f"feature_projection.{part}"]
    inner = [f"pos_conv_embed.convs.{j}.{part}" for j in range(5) for part in ("weight", "bias")]
    inner += ["layer_norm.weight", "layer_norm.bias"]
    for i in range(4):
        for module in ("attention.qkv", "attention.proj", "layer_norm", "final_layer_norm"):
            inner += [f"layers.{i}.{module}.weight", f"layers.{i}.{module}.bias"]
        for module in ("feed_forward.intermediate_dense", "feed_forward.output_dense"):
            inner += [f"layers.{i}.{module}.weight", f"layers.{i}.{module}.bias"]
    for name in inner:
        expected[f"spidr.encoder.{name}"] = original[f"student.{name}"]
        expected[f"teacher.{name}"] = original[f"teacher.{name}"]
    for ours, theirs in (
        ("heads.weight", "heads.{}.0.weight"),
        ("heads.bias", "heads.{}.0.bias"),
        ("codebooks.sums", "codebooks.{}.codebook"),
        ("codebooks.counts", "codebooks.{}.counts"),
    ):
        expected[ours] = torch.stack([original[theirs.format(k)] for k in range(2)])
    assert set(converted) == set(expected)
    assert all(same_bits(converted[name], tensor) for name, tensor in expected.items())


def test_the_folder_is_complete(tmp_path: Path) -> None:
    folder = convert(PARITY / "spidr-tiny" / "checkpoint.pt", tmp_path / "facebook" / "spidr-base")
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", *HUB_FILES}
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["architectures"] == ["SpidrForPretraining"]
    assert type(AutoFeatureExtractor.from_pretrained(folder)).__name__ == "SpidrFeatureExtractor"
    assert list(folder.parent.iterdir()) == [folder]
    # Readable to whom a new folder is, although temporary folders are private.
    (tmp_path / "new").mkdir()
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)


def test_a_whole_run_config_tells_the_objective(tmp_path: Path) -> None:
    run = {"run": {"model_type": "dinosr", "workdir": "x"}, "data": {}, "model": raw_config("dinosr-tiny")["model"]}
    (tmp_path / "run.json").write_text(json.dumps(run))
    folder = convert(PARITY / "dinosr-tiny" / "checkpoint.pt", tmp_path / "o", config=str(tmp_path / "run.json"))
    assert AutoModelForPreTraining.from_pretrained(folder).config.objective == "dinosr"


def test_a_config_of_bare_fields_and_one_of_transformers(tiny: Path, tmp_path: Path) -> None:
    fields = raw_config("spidr-tiny")["model"]
    tiny.with_name("config.json").write_text(json.dumps(fields))
    folder = convert(tiny, tmp_path / "o")
    tiny.with_name("config.json").write_bytes((folder / "config.json").read_bytes())
    again = convert(tiny, tmp_path / "again")
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_a_run_config_without_a_model_section_means_the_defaults(tiny: Path) -> None:
    tiny.with_name("config.json").write_text(json.dumps({"run": {"model_type": "spidr"}, "data": {"manifest": "x"}}))
    with pytest.raises(TensorMismatchError, match="encoder_embed_dim is 48 in the tensors, 768 in the configuration"):
        read_pretraining_checkpoint(tiny)


def test_defaults_are_those_of_spidr() -> None:
    assert config_from_spidr({}, "spidr").layerdrop == 0
    assert config_from_spidr({}, "dinosr").layerdrop == 0.05
    base = config_to_spidr(config_from_spidr({}, "spidr"))["model"]
    assert base["encoder_embed_dim"] == 768 and base["ema_timescale"] == 20_000
    assert base["extractor_conv_layer_config"][:2] == [[512, 10, 5], [512, 3, 2]]


@pytest.mark.parametrize(
    ("raw", "objective", "result"),
    [
        ({"model": {"ema_timescale": 5}}, None, "spidr"),
        ({"ema_timescale": 5}, "spidr", "spidr"),
        ({"run": {"model_type": "dinosr"}, "model": {}}, None, "dinosr"),
        ({"run": {"model_type": "spidr_reset"}, "model": {}}, None, "spidr"),
        ({"run": {"model_type": "spidr_reset"}, "model": {}}, "spidr", "spidr"),
        ({"model_type": "dinosr"}, None, "dinosr"),
        ({"model_type": "spidr", "hidden_size": 48, "objective": "dinosr"}, None, "dinosr"),
        ({"model": {}}, None, None),
        (None, "dinosr", "dinosr"),
    ],
)
def test_where_the_objective_is_found(raw, objective, result) -> None:
    assert objective_of(raw, objective) == result


@pytest.mark.parametrize(
    ("raw", "objective"),
    [
        ({"model": {"ema_timescale": 5}}, "dinosr"),
        ({"run": {"model_type": "dinosr"}, "model": {"ema_timescale": 5}}, None),
        ({"run": {"model_type": "dinosr"}}, "spidr"),
        ({"run": {"model_type": "hubert"}}, None),
    ],
)
def test_contradictory_objectives_are_refused(raw, objective) -> None:
    with pytest.raises(ConversionError, match="says"):
        objective_of(raw, objective)


def test_without_objective_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="--objective spidr or --objective dinosr"):
        convert(PARITY / "dinosr-tiny" / "checkpoint.pt", tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_without_config_other_sizes_are_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    tiny.with_name("config.json").unlink()
    with pytest.raises(ConversionError) as error:
        convert(tiny, tmp_path / "o", objective="spidr")
    for text in ("encoder_embed_dim is 48 in the tensors, 768 by default", "num_codebooks is 3", "--config"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_num_layer": 4}, "'encoder_num_layer'.* mean 'encoder_num_layers'"),
        ({"encoder_num_heads": 5}, "`encoder_embed_dim`.*`encoder_num_heads`"),
        ({"extractor_mode": "batch_norm"}, "extractor_mode"),
        ({"extractor_conv_layer_config": [[1, 2]]}, "extractor_conv_layer_config"),
        ({"extractor_conv_layer_config": [[0, 2, 1]]}, "extractor_conv_layer_config"),
        ({"num_codebooks": 0}, "num_codebooks"),
        ({"encoder_dropout": 2}, "`encoder_dropout`"),
    ],
)
def test_impossible_configurations_are_refused_in_the_words_of_the_file(change, message, tiny, tmp_path) -> None:
    config = raw_config("spidr-tiny")
    config["model"] |= change
    tiny.with_name("config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        convert(tiny, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_one_error_lists_every_wrong_tensor_and_nothing_is_written(tiny: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(tiny, weights_only=True)
    model = checkpoint["model"]
    del model["student.layers.2.attention.proj.bias"], model["codebooks.1.counts"]
    model["student.layers.0.feed_forward.output_dense.weight"] = torch.zeros(48, 95)
    model["student.extra"] = torch.zeros(3)
    torch.save(checkpoint, tiny)
    with pytest.raises(TensorMismatchError) as error:
        convert(tiny, tmp_path / "out" / "o")
    message = str(error.value)
    assert "2 missing, 1 unexpected, 1 wrongly shaped" in message
    for text in (
        "missing: student.layers.2.attention.proj.bias [48]",
        "missing: codebooks.1.counts [24]",
        "unexpected: student.extra [3]",
        "wrong shape: student.layers.0.feed_forward.output_dense.weight is [48, 95], the configuration means [48, 96]",
    ):
        assert text in message
    assert not (tmp_path / "out").exists()


def test_the_configuration_of_another_model_is_named(tiny: Path, tmp_path: Path) -> None:
    config = raw_config("spidr-tiny")
    config["model"]["encoder_num_layers"] = 5
    tiny.with_name("config.json").write_text(json.dumps(config))
    with pytest.raises(TensorMismatchError, match="encoder_num_layers is 4 in the tensors, 5 in the configuration"):
        convert(tiny, tmp_path / "o")


def test_half_precision_and_shared_memory_are_stored_as_float32(tiny: Path, tmp_path: Path, capsys) -> None:
    checkpoint = torch.load(tiny, weights_only=True)
    model, original = checkpoint["model"], stored(tiny)
    model["mask_embedding"] = model["mask_embedding"].half()
    both = torch.stack([original["student.layer_norm.weight"], original["student.layer_norm.bias"]])
    model["student.layer_norm.weight"], model["student.layer_norm.bias"] = both.unbind()
    model["feature_projection.projection.weight"] = original["feature_projection.projection.weight"].T.contiguous().T
    torch.save(checkpoint, tiny)
    tensors = load_file(convert(tiny, tmp_path / "o") / "model.safetensors")
    assert torch.equal(tensors["spidr.masked_spec_embed"], original["mask_embedding"].half().float())
    assert "torch.float16" in capsys.readouterr().err
    for name in ("layer_norm.weight", "layer_norm.bias"):
        assert same_bits(tensors[f"spidr.encoder.{name}"], original[f"student.{name}"])


def test_prefixes_of_wrappers_are_taken_off(tiny: Path) -> None:
    expected = read_pretraining_checkpoint(tiny).tensors
    checkpoint = torch.load(tiny, weights_only=True)
    checkpoint["model"] = {f"module._orig_mod.{name}": tensor for name, tensor in checkpoint["model"].items()}
    torch.save(checkpoint, tiny)
    found = read_pretraining_checkpoint(tiny).tensors
    assert all(same_bits(found[name], tensor) for name, tensor in expected.items())


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "empty").mkdir()
    source = PARITY / "spidr-tiny" / "checkpoint.pt"
    with pytest.raises(ConversionError, match="not empty"):
        convert(source, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    with pytest.raises(ConversionError, match="is no folder"):
        convert(source, tmp_path / "full" / "mine.txt")
    assert (convert(source, tmp_path / "empty") / "model.safetensors").exists()


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def fail(*_args, **_options):
        raise OSError("No space left on device")

    monkeypatch.setattr(convert_checkpoint, "converted_card", fail)
    code = convert_checkpoint.main([str(PARITY / "spidr-tiny" / "checkpoint.pt"), str(tmp_path / "a" / "b")])
    assert code == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_kinds_of_files(tmp_path: Path, capsys) -> None:
    torch.save({"weights": {"a": torch.zeros(2)}}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello")
    whole = (PARITY / "spidr-tiny" / "checkpoint.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name, message in {
        "other.pt": "holds no SpidR or DinoSR pretraining model (it has 'weights')",
        "list.pt": "holds a list",
        "text.pt": "no PyTorch checkpoint, or a damaged one",
        "cut.pt": "no PyTorch checkpoint, or a damaged one",
        "absent.pt": "does not exist",
    }.items():
        assert convert_checkpoint.main([str(tmp_path / name), str(tmp_path / "o")]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
        assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 3}'])
def test_broken_configurations(text: str, tiny: Path, tmp_path: Path) -> None:
    tiny.with_name("config.json").write_text(text)
    with pytest.raises(ConversionError, match="onfiguration"):
        convert(tiny, tmp_path / "o")


# ---- SpidR-Adapt


@pytest.mark.parametrize("kind", ["ssl", "sl"])
def test_spidr_adapt_converts_by_its_configuration(kind: str, tmp_path: Path, capsys) -> None:
    source = PARITY / f"spidr-adapt-{kind}" / "step_5.pt"
    original = stored(source)
    folder = convert(source, tmp_path / "converted")
    said = "phone classifiers of SpidR-Adapt's training (nl, sk) are left out"
    assert (said in capsys.readouterr().err) == (kind == "sl")
    export_checkpoint.export(folder, tmp_path / "out" / "back.pt")
    exported = stored(tmp_path / "out" / "back.pt")
    assert set(exported) == {name for name in original if not name.startswith("supervised_classifiers.")}
    assert all(same_bits(tensor, original[name]) for name, tensor in exported.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["run"] == {"model_type": "spidr"}


def test_phone_classifiers_tell_the_objective(tmp_path: Path) -> None:
    fields = {name: value for name, value in raw_config("spidr-adapt-sl")["model"].items() if "supervised" not in name}
    for name in ("ema_timescale", "ema_threshold", "adapt_heads"):
        del fields[name]
    for kind in ("sl", "ssl"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "step_5.pt").write_bytes((PARITY / f"spidr-adapt-{kind}" / "step_5.pt").read_bytes())
        (folder / "config.json").write_text(json.dumps(fields))
    converted = read_pretraining_checkpoint(tmp_path / "sl" / "step_5.pt")
    assert converted.config.objective == "spidr"
    with pytest.raises(ConversionError, match="--objective spidr or --objective dinosr"):
        read_pretraining_checkpoint(tmp_path / "ssl" / "step_5.pt")
    with pytest.raises(ConversionError, match="phone classifier of SpidR-Adapt's says spidr"):
        read_pretraining_checkpoint(tmp_path / "sl" / "step_5.pt", objective="dinosr")
    # Bare, the first is known to be SpidR's, of other sizes than the default; the second might be either.
    for kind, message in (("sl", "Give the model's configuration with --config"), ("ssl", "--objective")):
        (tmp_path / kind / "config.json").unlink()
        with pytest.raises(ConversionError, match=message):
            read_pretraining_checkpoint(tmp_path / kind / "step_5.pt")


def test_fields_of_spidr_adapt_are_spidrs_alone() -> None:
    for name in ("supervised_every_step", "supervised_layer", "num_supervised_layers", "supervised_languages"):
        assert objective_of({"model": {name: None}}) == "spidr"
        with pytest.raises(ConversionError, match=f"the field {name} says spidr"):
            objective_of({"model": {name: 3}}, "dinosr")
    with pytest.raises(ConversionError, match="unexpected: supervised_classifiers"):
        checkpoint = torch.load(PARITY / "spidr-adapt-sl" / "step_5.pt", weights_only=True)["model"]
        checkpoint["supervised_classifiers.nl.output_layer.scale"] = torch.zeros(2)
        convert_spidr(checkpoint, raw_config("spidr-adapt-sl"), None)


# ---- export


def test_export_refuses_what_spidr_cannot_hold(tmp_path: Path) -> None:
    folder = convert(PARITY / "spidr-tiny" / "checkpoint.pt", tmp_path / "o")
    with pytest.raises(ConversionError, match=r"config\.json exists already"):
        export_checkpoint.export(folder, folder / "out.pt")  # its own config.json is in the way
    with pytest.raises(ConversionError, match="is a folder"):
        export_checkpoint.export(folder, tmp_path)
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ConversionError, match="no pretraining model"):
        export_checkpoint.export(tmp_path / "encoder", tmp_path / "x" / "out.pt")
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConversionError, match="not a model folder"):
        export_checkpoint.export(tmp_path, tmp_path / "x" / "out.pt")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-7}))
    with pytest.raises(ConversionError, match="layer_norm_eps"):
        export_checkpoint.export(folder, tmp_path / "x" / "out.pt")


def test_export_never_overwrites_and_is_a_command(tmp_path: Path, capsys) -> None:
    folder = convert(PARITY / "dinosr-tiny" / "checkpoint.pt", tmp_path / "o", objective="dinosr")
    output = tmp_path / "out.pt"
    assert export_checkpoint.main([str(folder), str(output)]) == 0
    assert export_checkpoint.main([str(folder), str(output)]) == 1
    assert "exists already" in capsys.readouterr().err
    # With its config.json beside it, an exported DinoSR needs no --objective.
    assert read_pretraining_checkpoint(output).config.objective == "dinosr"


# ---- the original DinoSR (fairseq)


def fairseq_fields() -> dict:
    return dict(torch.load(FAIRSEQ, weights_only=True)["cfg"]["model"])


@pytest.mark.parametrize("name", ["checkpoint.ckpt", "checkpoint_namespace.ckpt"])
def test_fairseq_tensors_have_their_place(name: str, tmp_path: Path) -> None:
    original = torch.load(FAIRSEQ, weights_only=True)["model"]
    converted = load_file(convert(FAIRSEQ.with_name(name), tmp_path / "o") / "model.safetensors")
    expected = {
        "spidr.masked_spec_embed": original["mask_emb"],
        "current_step": torch.tensor([5]),
        "heads.weight": torch.stack([original[f"heads.{k}.weight"] for k in range(3)]),
        "heads.bias": torch.stack([original[f"heads.{k}.bias"] for k in range(3)]),
        "codebooks.sums": torch.stack([original[f"_codebook{k}"] for k in range(3)]),
        "codebooks.counts": torch.stack([original[f"_codebook_cnts{k}"] for k in range(3)]),
    }
    for part in ("weight", "bias"):
        expected[f"spidr.feature_projection.layer_norm.{part}"] = original[f"layer_norm.{part}"]
        expected[f"spidr.feature_projection.projection.{part}"] = original[f"post_extract_proj.{part}"]
    for i in range(7):
        ours, theirs = f"spidr.feature_extractor.conv_layers.{i}", f"feature_extractor.conv_layers.{i}"
        expected[f"{ours}.conv.weight"] = original[f"{theirs}.0.weight"]
        for part in ("weight", "bias"):
            expected[f"{ours}.layer_norm.{part}"] = original[f"{theirs}.2.1.{part}"]
    student = {name.removeprefix("encoder."): t for name, t in original.items() if name.startswith("encoder.")}
    for prefix, tensors in (("spidr.encoder.", student), ("teacher.", original["_ema"])):
        for part in ("weight", "bias"):
            expected[f"{prefix}layer_norm.{part}"] = tensors[f"layer_norm.{part}"]
            for j in range(5):
                expected[f"{prefix}pos_conv_embed.convs.{j}.{part}"] = tensors[f"pos_conv.{j}.0.{part}"]
            for i in range(4):
                ours, theirs = f"{prefix}layers.{i}", f"layers.{i}"
                expected[f"{ours}.attention.qkv.{part}"] = torch.cat(
                    [tensors[f"{theirs}.self_attn.{p}_proj.{part}"] for p in "qkv"]
                )
                for module, module_there in (
                    ("attention.proj", "self_attn.out_proj"),
                    ("layer_norm", "self_attn_layer_norm"),
                    ("final_layer_norm", "final_layer_norm"),
                    ("feed_forward.intermediate_dense", "fc1"),
                    ("feed_forward.output_dense", "fc2"),
                ):
                    expected[f"{ours}.{module}.{part}"] = tensors[f"{theirs}.{module_there}.{part}"]
    assert set(converted) == set(expected)
    assert all(same_bits(converted[name], tensor) for name, tensor in expected.items())
    # The teacher's positional convolutions are its own, one update behind the student's.
    name = "pos_conv_embed.convs.0.weight"
    assert not torch.equal(converted[f"teacher.{name}"], converted[f"spidr.encoder.{name}"])


def test_fairseq_configuration() -> None:
    config = read_pretraining_checkpoint(FAIRSEQ).config
    assert (config.objective, config.attention_bias, config.feat_extract_norm) == ("dinosr", True, "layer")
    assert list(config.conv_kernel) == [10, 3, 3, 3, 3, 2, 2] and list(config.conv_dim) == [32] * 7
    assert (config.freeze_step, config.ema_final_step, config.num_codebooks) == (200_000, 30_000, 3)
    assert list(config.ema_exclude_layers) == ["pos_conv_embed"]


def test_fairseq_export_and_back(tmp_path: Path) -> None:
    folder = convert(FAIRSEQ, tmp_path / "o")
    export_checkpoint.export(folder, tmp_path / "out.pt")
    assert json.loads((tmp_path / "config.json").read_text())["model"]["encoder_qkv_bias"] is True
    again = convert(tmp_path / "out.pt", tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["omegaconf_2_0.ckpt", "omegaconf_2_4.ckpt"])
def test_omegaconf_settings(name: str) -> None:
    """Written with the real omegaconf: structured, with an enum, a reference to another section and a meter object."""
    checkpoint = read_checkpoint(FIXTURES / "conversion" / name)
    assert isinstance(checkpoint["cfg"], StandIn)
    fields = settings(checkpoint)
    assert fields["extractor_mode"] == "layer_norm"
    assert fields["ema_anneal_end_step"] == 77
    assert fields["latent_temp"] == [2.0, 0.5, 0.999995]
    assert set(fields) == set(fairseq_fields())
    converted = convert_fairseq(checkpoint)
    assert converted.config.layerdrop == 0.05 and converted.config.ema_final_step == 77
    assert converted.tensors["current_step"].tolist() == [9]  # the history has no count, the optimizer does
    assert torch.equal(converted.tensors["codebooks.sums"][1], checkpoint["model"]["_codebook1"])


def variant_of_fairseq(**changes) -> dict:
    """The recorded fairseq checkpoint with other options and the tensors that fairseq has for them."""
    checkpoint = torch.load(FAIRSEQ, weights_only=True)
    fields, model = checkpoint["cfg"]["model"], checkpoint["model"]
    fields.update(changes)
    generator = torch.Generator().manual_seed(0)
    if fields["extractor_mode"] == "default":
        for name in [name for name in model if ".2.1." in name]:
            tensor = model.pop(name)
            if name.startswith("feature_extractor.conv_layers.0."):
                model[name.replace(".2.1.", ".2.")] = tensor
    if fields["pos_conv_depth"] == 1:
        for tensors, prefix in ((model, "encoder."), (model["_ema"], "")):
            for name in [name for name in tensors if name.startswith(f"{prefix}pos_conv.")]:
                del tensors[name]
            tensors[f"{prefix}pos_conv.0.bias"] = torch.randn(48, generator=generator)
            tensors[f"{prefix}pos_conv.0.weight_g"] = torch.rand(1, 1, fields["conv_pos"], generator=generator)
            tensors[f"{prefix}pos_conv.0.weight_v"] = torch.randn(48, 3, fields["conv_pos"], generator=generator)
    return checkpoint


def test_fairseq_group_norm_and_conv_bias() -> None:
    checkpoint = variant_of_fairseq(extractor_mode="default", conv_bias=True, layer_norm_first=True)
    for i in range(7):
        checkpoint["model"][f"feature_extractor.conv_layers.{i}.0.bias"] = torch.full((32,), float(i))
    converted = convert_fairseq(checkpoint)
    assert converted.config.feat_extract_norm == "group" and converted.config.do_stable_layer_norm
    norm = "feature_extractor.conv_layers.0.2.weight"
    assert torch.equal(
        converted.tensors["spidr.feature_extractor.conv_layers.0.layer_norm.weight"], checkpoint["model"][norm]
    )
    assert converted.tensors["spidr.feature_extractor.conv_layers.5.conv.bias"].tolist() == [5.0] * 32


@pytest.mark.parametrize("kernel", [31, 32])
@pytest.mark.parametrize("new_names", [False, True])
def test_fairseq_single_positional_convolution(kernel: int, new_names: bool) -> None:
    """Of depth 1, fairseq's positional convolution is weight-normed, and no LayerNorm follows it."""
    checkpoint = variant_of_fairseq(pos_conv_depth=1, conv_pos=kernel)
    original = checkpoint["model"]["_ema"]
    magnitude, direction = original["pos_conv.0.weight_g"], original["pos_conv.0.weight_v"]
    weight = magnitude * direction / direction.norm(dim=(0, 1), keepdim=True)
    bias = original["pos_conv.0.bias"]
    if new_names:
        for tensors, prefix in ((checkpoint["model"], "encoder."), (original, "")):
            for i, part in enumerate("gv"):
                tensor = tensors.pop(f"{prefix}pos_conv.0.weight_{part}")
                tensors[f"{prefix}pos_conv.0.parametrizations.weight.original{i}"] = tensor
    converted = convert_fairseq(checkpoint)
    torch.testing.assert_close(converted.tensors["teacher.pos_conv_embed.convs.0.weight"], weight)
    model = SpidrForPretraining(converted.config)
    model.load_state_dict(converted.tensors)
    hidden = torch.randn(2, 40, 48, generator=torch.Generator().manual_seed(1))
    expected = F.conv1d(hidden.transpose(1, 2), weight, bias, padding=kernel // 2, groups=16)[..., :40]
    with torch.no_grad():
        result = model.teacher.pos_conv_embed(hidden)
    torch.testing.assert_close(result, F.gelu(expected).transpose(1, 2))
    with pytest.raises(ConversionError, match="no norm"):
        config_to_spidr(converted.config)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("activation_fn", "relu"),
        ("layer_type", "conformer"),
        ("codebook_end_decay", 0.99),
        ("freeze_pre_enc_modules", False),
        ("instance_norm_target_layer", False),
        ("layer_norm_target_layer", True),
        ("discrete", False),
        ("crop_seq_to_multiple", 4),
        ("feature_grad_mult", 0.1),
        ("extractor_mode", "batch"),
        ("freeze_teacher_step", 0),
    ],
)
def test_fairseq_options_that_cannot_be_represented_are_named(option, value) -> None:
    with pytest.raises(ConversionError, match=option):
        convert_fairseq(variant_of_fairseq(**{option: value}))


def test_fairseq_teacher_of_everything_is_refused() -> None:
    with pytest.raises(ConversionError, match="ema_transformer_only"):
        convert_fairseq(variant_of_fairseq(ema_layers_only=False, ema_transformer_only=False))
    assert list(convert_fairseq(variant_of_fairseq(ema_layers_only=False)).config.ema_exclude_layers) == []
    checkpoint = variant_of_fairseq()
    checkpoint["model"]["_pre_encoder_cnn.conv_layers.0.0.weight"] = torch.zeros(1)
    with pytest.raises(ConversionError, match="_pre_encoder_cnn"):
        convert_fairseq(checkpoint)


def test_fairseq_missing_settings_and_tensors_are_listed() -> None:
    checkpoint = variant_of_fairseq()
    del checkpoint["cfg"]["model"]["conv_pos"], checkpoint["cfg"]["model"]["ema_decay"]
    with pytest.raises(ConversionError, match=r"lack conv_pos, ema_decay\. .*--config"):
        convert_fairseq(checkpoint)
    convert_fairseq(checkpoint, raw_config={"model": fairseq_fields()})
    del checkpoint["cfg"]
    with pytest.raises(ConversionError, match="no settings"):
        convert_fairseq(checkpoint)
    checkpoint = variant_of_fairseq()
    del checkpoint["model"]["encoder.layers.1.self_attn.k_proj.bias"], checkpoint["model"]["_ema"]["layer_norm.bias"]
    checkpoint["model"]["final_proj.weight"] = torch.zeros(2)
    with pytest.raises(TensorMismatchError) as error:
        convert_fairseq(checkpoint)
    for text in (
        "missing: encoder.layers.1.self_attn.k_proj.bias [48]",
        "missing: _ema.layer_norm.bias [48]",
        "unexpected: final_proj.weight [2]",
    ):
        assert text in str(error.value)


def test_fairseq_update_count() -> None:
    assert update_count({"optimizer_history": [{"num_updates": 3}, {"num_updates": 7}]}) == 7
    assert update_count({"optimizer_history": [], "last_optimizer_state": {"state": {4: {"step": 6}}}}) == 6
    assert update_count({"last_optimizer_state": None}) is None
    for count in (None, "7", -1, float("nan"), float("inf"), 2**63, [7], torch.zeros(3)):
        assert update_count({"optimizer_history": [{"num_updates": count}]}) is None
        assert update_count({"last_optimizer_state": {"state": {0: {"step": count}}}}) is None
        states = {"state": {0: {"step": torch.tensor(5.0)}}}
        assert update_count({"optimizer_history": [{"num_updates": count}], "last_optimizer_state": states}) == 5
    for strange in (3, [], [None], {"a": 1}):
        assert update_count({"optimizer_history": strange, "last_optimizer_state": strange}) is None
    checkpoint = variant_of_fairseq()
    checkpoint["optimizer_history"] = checkpoint["last_optimizer_state"] = None
    converted = convert_fairseq(checkpoint)
    assert converted.tensors["current_step"].tolist() == [0] and "current_step is 0" in converted.notes[0]


def test_conv_layers_are_parsed_not_evaluated() -> None:
    assert parse_conv_layers("[(512,10,5)] + [(512,3,2)] * 2 + 2*[(512, 2, 2)]") == (
        [(512, 10, 5)] + [(512, 3, 2)] * 2 + [(512, 2, 2)] * 2
    )
    assert parse_conv_layers([[8, 10, 5]]) == [(8, 10, 5)]
    for bad in (
        "__import__('os').system('true')",
        "[(1,2,3)] * 10**9",
        "[(1,2,3)] * 10000000",
        "[(512, 10)]",
        "[x for x in ()]",
        "[]",
        "",
        "3",
        None,
        "(" * 5000,
    ):
        with pytest.raises(ConversionError, match="conv_feature_layers"):
            parse_conv_layers(bad)
