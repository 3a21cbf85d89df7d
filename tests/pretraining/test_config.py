"""Configs: SpidR's own files as they are, overrides, what is refused and how, and what is written."""

import json
import tomllib
from pathlib import Path

import pytest

from spidr_hf.hub.spidr_names import MODEL_SECTION_FIELDS, to_model_section, to_spidr_config
from spidr_hf.pretraining.config import PretrainingConfig, describe_fields, load_config, make_config
from spidr_hf.system.errors import ConfigError
from spidr_hf.system.fields import differences, dump_toml

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
# As SpidR's own training code writes it, every section and the fields that mean nothing here included.
SPIDR_TOML = """
[run]
workdir = "runs"
wandb_project = "p"
wandb_name = "n"
wandb_mode = "offline"
random_seed = 0
use_deterministic = false
log_interval = 20
save_interval = 100
compile = false
keep_latest = -1
model_type = "spidr"
slurm_validation = { partition = "gpu" }

[data]
manifest = "train.csv"
num_buckets = 20
max_batch_length = 320000
num_workers = 0
pin_memory = false
persistent_workers = false
alignments_path = "ali"

[model]
extractor_mode = "layer_norm"
extractor_conv_layer_config = [[64, 10, 5], [64, 3, 2]]
encoder_embed_dim = 192
encoder_projection_dropout = 0
encoder_num_heads = 4
codebook_decay = 0.6
ema_threshold = 1e-07

[optimizer]
lr = 0.0004
betas = [0.9, 0.95]
max_norm = 10
dtype = "bfloat16"
exclude_from_optimizer = ["teacher"]
to_freeze = ["feature_extractor", "feature_projection"]

[masking]
mask_length = 5
mask_channel_prob = 0.0

[validation.dev]
manifest = "dev.csv"
"""


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "c.toml").write_text(SPIDR_TOML)
    return tmp_path / "c.toml"


def load(path, *overrides) -> PretrainingConfig:
    return load_config(path, overrides)


def test_an_unmodified_file_of_spidr(path):
    config = load(path)
    assert config.optimizer.lr == 4e-4 and config.data.num_buckets == 20 and config.masking.mask_length == 5
    assert config.model.hidden_size == 192 and config.model.objective == "spidr"
    assert config.model.conv_dim == [64, 64] and config.model.codebook_decay == 0.6
    assert config.validation["dev"].manifest == "dev.csv"
    # Defaults are the recipe's.
    assert (config.optimizer.max_steps, config.optimizer.warmup_steps, config.data.min_sample_size) == (
        400_000,
        12_000,
        2_000,
    )
    (note,) = config.notes
    for name in (
        "run.workdir",
        "run.wandb_name",
        "data.alignments_path",
        "masking.mask_channel_prob",
    ):
        assert name in note
    assert "run.slurm_validation" not in note and "run.random_seed" not in note and "data.manifest" not in note


def test_wandb_fields_have_a_meaning_with_wandb(path):
    assert "wandb" not in " ".join(load(path, "--run.tracker", "wandb").notes)


def test_what_is_written_is_read_back(path, tmp_path):
    config = load(path, "--optimizer.lr=1e-3")
    written = config.to_toml()
    assert tomllib.loads(written) == config.to_dict()
    (tmp_path / "again.toml").write_text(written)
    (tmp_path / "again.json").write_text(json.dumps(config.to_dict()))
    for name in ("again.toml", "again.json"):
        assert load(tmp_path / name).to_dict() == config.to_dict()
    assert differences(config.to_dict(), load(path).to_dict()) == {"optimizer.lr": (1e-3, 4e-4)}


def test_overrides(path):
    config = load(
        path,
        *("--optimizer.lr", "1e-3", "--optimizer.max_steps=1e3", "--optimizer.betas", "[0.9, 0.98]"),
        *("--data.manifest", "0123", "--data.enable_padding", "True", "--run.wandb_name", "none"),
        *("--model.encoder_num_layers", "4", "--model.num_codebooks=2", "--model.extractor_mode", "group_norm"),
        *("--validation.test.manifest", "test.csv"),
    )
    assert config.optimizer.lr == 1e-3 and config.optimizer.max_steps == 1000 and config.optimizer.betas == [0.9, 0.98]
    assert config.data.manifest == "0123" and config.data.enable_padding is True and config.run.wandb_name is None
    assert config.model.num_hidden_layers == 4 and config.model.feat_extract_norm == "group"
    assert set(config.validation) == {"dev", "test"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optimizer.lrr", "1"], r"Unknown field `optimizer\.lrr`\. Did you mean 'lr'\?"),
        (["--optimiser.lr", "1"], r"Unknown section \[optimiser\]\. Did you mean 'optimizer'\?"),
        (["--model.encoder_num_layer", "1"], r"\[model\]: .*'encoder_num_layer'\. Did you mean 'encoder_num_layers'\?"),
        (["--model.hidden_size", "1"], r"\[model\]: Unknown model field 'hidden_size'"),
        (
            ["--model.encoder_num_heads", "5"],
            r"\[model\]: `encoder_embed_dim` \(192\) must be divisible by `encoder_num_heads`",
        ),
        (["--model.extractor_mode", "batch"], r"`extractor_mode` must be one of 'layer_norm', 'group_norm'"),
        (["--model.extractor_conv_layer_config", "[[64, 10]]"], r"list of \[channels, kernel, stride\]"),
        (["--model.num_codebooks", "0"], "`num_codebooks` is 0"),
        (["--run.model_type", "hubert"], r"`run\.model_type` must be one of 'spidr', 'dinosr'"),
        (["--optimizer.lr", "fast"], r"`optimizer\.lr` must be a number, got 'fast'"),
        (["--optimizer.lr", "0"], r"`optimizer\.lr` must be positive, got 0"),
        (["--optimizer.lr", "nan"], r"`optimizer\.lr` must be a number"),
        (["--optimizer.max_steps", "1.5"], r"`optimizer\.max_steps` must be an integer, got 1\.5"),
        (["--optimizer.betas", "[0.9]"], r"`optimizer\.betas` must be two numbers in \[0, 1\)"),
        (["--optimizer.betas", "0.9"], r"`optimizer\.betas` must be a list"),
        (["--optimizer.dtype", "bf16"], r"`optimizer\.dtype` must be one of 'bfloat16', 'float32', 'float16'"),
        (["--optimizer.scheduler", "linear"], r"`optimizer\.scheduler` must be one of 'tristage'"),
        (["--optimizer.to_freeze", "[]"], r"set model\.freeze_step beyond the run's end"),
        (["--optimizer.scheduler", "cosine", "--optimizer.max_steps", "100"], "must exceed `warmup_steps`"),
        (["--optimizer.final_lr_scale", "0"], "must be positive with the tristage schedule"),
        (["--data.enable_padding", "1"], r"`data\.enable_padding` must be true or false, got 1"),
        (["--data.bucket_method", "equal"], r"`data\.bucket_method` must be one of 'uniform', 'percentile'"),
        (["--data.max_skipped_share", "2"], r"`data\.max_skipped_share` must be in \[0, 1\]"),
        (["--data.max_batch_length", "1000"], r"too small for one utterance of `max_sample_size` \(320000\)"),
        (["--data.min_sample_size", "400000"], "exceeds `max_sample_size`"),
        (["--data.manifest", "none"], r"`data\.manifest` is missing"),
        (["--validation.x.num_buckets", "3"], r"`validation\.x\.manifest` is missing"),
        (["--masking.mask_prob", "1.5"], r"`masking\.mask_prob` must be in \[0, 1\]"),
        (["--masking.mask_selection", "gauss"], r"\[masking\]: `mask_selection` must be one of static"),
        (["--run.keep_latest", "0"], r"`run\.keep_latest` must be -1 or positive"),
        (["--run.random_seed", "-1"], r"`run\.random_seed` must be at least 0"),
        (["--lr", "1"], r"Unknown argument '--lr'\. Fields are set with `--section\.field value`"),
        (["optimizer.lr", "1"], "Unknown argument 'optimizer.lr'"),
        (["--optimizer.lr"], r"--optimizer\.lr needs a value"),
    ],
)
def test_what_cannot_be_is_refused_by_name(path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(path, *overrides)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[run\n")
    with pytest.raises(ConfigError, match="is not valid TOML"):
        load(tmp_path / "bad.toml")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        load(tmp_path / "bad.json")
    (tmp_path / "flat.toml").write_text("lr = 1\n")
    with pytest.raises(ConfigError, match="expected the sections"):
        load(tmp_path / "flat.toml")
    (tmp_path / "validation.toml").write_text('[data]\nmanifest = "x"\n[validation]\nmanifest = "y"\n')
    with pytest.raises(ConfigError, match=r"\[validation.manifest\] must be a table"):
        load(tmp_path / "validation.toml")


def test_the_objective_without_model_type():
    data = {"manifest": "x"}
    assert make_config({"data": data}).model.objective == "dinosr"
    config = make_config({"data": data, "model": {"ema_timescale": 100}})
    assert config.model.objective == config.run.model_type == "spidr"
    assert "the objective is spidr" in config.notes[0]
    config = make_config({"data": data, "run": {"model_type": "dinosr"}, "model": {"ema_timescale": 100}})
    assert "model.ema_timescale" in config.notes[0]


def test_paths_are_looked_for_here_then_beside_the_file(path, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load(path).data.manifest == "train.csv"
    (tmp_path / "train.csv").touch()
    assert load(path).data.manifest == str(tmp_path / "train.csv")
    (tmp_path / "elsewhere" / "train.csv").touch()
    assert load(path).data.manifest == "train.csv"


# As SpidR-Adapt's tools take it for adapting a model.
ADAPT_TOML = """
[run]
model_type = "spidr_reset"
init_ckpt = "step_200000.pt"

[data]
ssl.manifest = "language.csv"
max_batch_length = 320000

[model]
codebook_decay = 0.8
ema_start_decay = 1.0
freeze_step = 0
adapt_heads = true

[optimizer]
lr = 5e-6
scheduler = "constant"
max_steps = 8000
warmup_steps = 600

[meta_update]
task_interval = 1000000
"""


def test_an_unmodified_file_of_spidr_adapt(tmp_path):
    path = tmp_path / "adapt.toml"
    path.write_text(ADAPT_TOML)
    config = load(path)
    assert config.run.model_type == config.model.objective == "spidr" and config.run.active_forgetting
    assert config.data.manifest == "language.csv" and config.model.freeze_step == 0
    assert config.notes == ["These fields have no meaning here: model.adapt_heads."]
    assert make_config(tomllib.loads(config.to_toml())).to_dict() == config.to_dict()
    path.write_text(ADAPT_TOML.partition("[meta_update]")[0])
    assert not load(path).run.active_forgetting
    assert load(path, "--run.active_forgetting", "true").run.active_forgetting
    assert load(path, "--meta_update.task_interval", "9000").run.active_forgetting
    assert load(path, "--data.ssl.manifest", "other.csv").data.manifest == "other.csv"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--meta_update.task_interval", "8000"), r"`meta_update\.task_interval` \(8000\).*meta-training"),
        (("--meta_update.task_interval", "40"), r"`meta_update\.task_interval` \(40\).*run\.active_forgetting"),
        (("--optimizer.max_steps", "2000000"), r"`meta_update\.task_interval`"),
        (("--meta_update.task_interval", "0"), r"`meta_update\.task_interval` must be positive"),
        (("--meta_update.task_interval", "often"), r"`meta_update\.task_interval` must be an integer"),
        (("--meta_update.inner_lr", "0.1"), r"`meta_update\.inner_lr`: this is SpidR-Adapt's meta-training"),
        (("--data.ssl.languages", "fr"), r"`data\.ssl\.languages`"),
        (("--data.manifest", "both.csv"), r"`data\.ssl`.*in place of `data\.manifest`"),
        (("--data.sl.manifest", "phones.csv"), r"Unknown field `data\.sl`"),
        (("--run.model_type", "spidr_rest"), r"`run\.model_type` must be one of"),
    ],
)
def test_what_of_spidr_adapt_is_refused_by_name(tmp_path, overrides, message):
    (tmp_path / "adapt.toml").write_text(ADAPT_TOML)
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "adapt.toml", *overrides)


def test_every_field_is_described():
    text = describe_fields()
    for name in ("gradient_accumulation_steps", "mask_prob", "max_skipped_share", "init_ckpt", "encoder_embed_dim"):
        assert name in text


@pytest.mark.parametrize(
    "value",
    [
        "plain",
        'quo"te',
        "back\\slash",
        "new\nline",
        "tab\t",
        "\x00\x1f\x7f",
        "é中😀",
        1e-07,
        1e22,
        -0.5,
        3,
        True,
        [1, [2, "x"]],
    ],
)
def test_toml_values_survive(value):
    assert tomllib.loads(dump_toml({"a": {"key": value, "odd key": [value]}}))["a"] == {
        "key": value,
        "odd key": [value],
    }


@pytest.mark.parametrize(
    ("case", "objective"), [("spidr-tiny", "spidr"), ("dinosr-tiny", "dinosr"), ("spidr-tiny-variant", "spidr")]
)
def test_model_sections_survive(case, objective):
    """SpidR's names -> our config -> SpidR's names."""
    section = json.loads((FIXTURES / case / "config.json").read_text())["model"]
    assert to_model_section(to_spidr_config(section, objective)) == section


def test_model_defaults_are_those_of_the_recipes():
    spidr, dinosr = to_spidr_config({}, "spidr"), to_spidr_config({}, "dinosr")
    assert spidr.layerdrop == 0 and dinosr.layerdrop == 0.05
    assert (spidr.hidden_size, spidr.num_codebooks, spidr.codebook_size, spidr.hidden_dropout) == (768, 8, 256, 0.1)
    assert set(to_model_section(spidr)) == set(MODEL_SECTION_FIELDS)


def test_what_spidr_cannot_express_is_refused():
    config = to_spidr_config({}, "spidr")
    config.hidden_act = "relu"
    with pytest.raises(ValueError, match="only knows `hidden_act` = 'gelu'"):
        to_model_section(config)
    with pytest.raises(ValueError, match="objective must be one of"):
        to_spidr_config({}, "hubert")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_configs_that_ship_are_valid(path):
    text = path.read_text()
    assert text.startswith("#")
    sections = tomllib.loads(text)
    sections["data"].setdefault("manifest", "given on the command line")
    assert make_config(sections).notes == []
