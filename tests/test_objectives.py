"""Objectives: strictly by name, whole or not at all, and a third one needs nothing but its class."""

import ast
import json
from pathlib import Path

import pytest
import torch
from runs import pretrain_here, rows, write_audio, write_config
from safetensors.torch import load_file
from tiny import tiny_config, tiny_model

from spidr_hf import SpidrConfig, SpidrFeatureExtractor, SpidrForPretraining, objectives_spidr
from spidr_hf.hub.card import trained_card
from spidr_hf.hub.spidr_names import to_model_section, to_spidr_config
from spidr_hf.objectives_spidr import (
    Objective,
    fields_of_others,
    get_objective,
    objective_names,
    objective_with_fields,
    register_objective,
)
from spidr_hf.pretraining.memory import training_memory
from spidr_hf.units.extractor import Extractor, unit_outputs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def third(monkeypatch) -> type[Objective]:
    """An objective that exists in this test alone, like BEST-RQ (arXiv 2202.01855): the nearest of fixed random
    codewords to a fixed random projection is predicted from the final output, and the teacher stands still."""
    monkeypatch.setattr(objectives_spidr, "registered", dict(objectives_spidr.registered))

    @register_objective
    class RandomQuantiser(Objective):
        name, title, papers = "random-quantiser", "RandomQuantiser", ("2202.01855",)
        reads_own_layer, own_fields, recipe = False, (), {"codebook_decay": 1.0}

        @staticmethod
        def targets(model, projected, lengths, rows):
            shape = (model.config.num_codebooks, model.config.hidden_size, model.config.hidden_size)
            projection = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            features = projected.detach().float().flatten(0, 1)[rows]
            return torch.nn.functional.normalize(features @ projection, dim=-1)

        @staticmethod
        def teacher_decay(config, step):
            return 1.0

    return RandomQuantiser


def test_a_third_objective_trains_and_is_used(third, tmp_path, monkeypatch):
    """With its class alone: config, pretraining, teacher, units, memory and card, by no other's rules."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.toml", write_audio(tmp_path / "audio"))
    options = ["--optimizer.max_steps", "3", "--run.save_interval", "1", "--model.codebook_decay", "1.0"]
    folder = pretrain_here(tmp_path / "tiny.toml", tmp_path / "run", *options, "--run.model_type", "random-quantiser")
    before = pretrain_here(tmp_path / "tiny.toml", tmp_path / "other", *options, "--run.model_type", "dinosr")
    assert [row["ema_decay"] for row in rows(folder)] == [1.0] * 3
    assert rows(folder)[-1]["loss"] != rows(before)[-1]["loss"]
    (start, end) = (load_file(folder / "checkpoints" / f"step_{n}" / "model.safetensors") for n in (1, 3))
    still = [name for name in start if name.startswith(("codebooks.", "teacher."))]
    assert still and all(torch.equal(start[name], end[name]) for name in still)
    assert not torch.equal(start["heads.weight"], end["heads.weight"])
    assert json.loads((folder / "final" / "config.json").read_text())["objective"] == "random-quantiser"
    assert "# A RandomQuantiser model" in (folder / "final" / "README.md").read_text()
    model = SpidrForPretraining.from_pretrained(folder / "final").eval()
    assert model.spidr.encoder.layers[-1].final_layer_norm.weight.requires_grad  # it is read
    extractor = Extractor(model, SpidrFeatureExtractor(), unit_outputs(model))
    (units,) = extractor([torch.randn(8_000).numpy()])
    logits = model.get_codebooks(torch.zeros(1, 8_000))
    assert sorted(units) == [n for n, x in enumerate(logits, start=1) if x is not None]
    options = {"batch_samples": 160_000, "utterance_samples": 16_000}
    memory = {name: training_memory(tiny_config(objective=name), **options) for name in objective_names()}
    assert memory["random-quantiser"] == memory["dinosr"] != memory["spidr"]
    assert "random-quantiser" in trained_card(model.config, "Trained.", "")
    section = to_model_section(tiny_config(objective="random-quantiser"))
    assert (
        "ema_timescale" not in section and to_spidr_config(section, "random-quantiser").objective == "random-quantiser"
    )


def test_names_are_strict():
    assert objective_names() == ("spidr", "dinosr")
    with pytest.raises(ValueError, match="must be one of 'spidr', 'dinosr', got 'best-rq'"):
        get_objective("best-rq")
    with pytest.raises(ValueError, match="`objective` must be one of 'spidr', 'dinosr', got 'spider'"):
        SpidrConfig(objective="spider")
    model = tiny_model()
    model.config.objective = "other"  # nothing falls into another objective's branch
    for use in (
        lambda: model(torch.zeros(1, 4_000)),
        lambda: model.get_codebooks(torch.zeros(1, 4_000)),
        lambda: model.teacher_decay(1),
        lambda: training_memory(model.config, batch_samples=16_000, utterance_samples=16_000),
        lambda: to_model_section(model.config),
        lambda: trained_card(model.config, "", ""),
        lambda: unit_outputs(model)(torch.zeros(1, 4_000), None),
    ):
        with pytest.raises(ValueError, match="got 'other'"):
            use()


def test_an_objective_is_whole_or_an_error(third):
    with pytest.raises(TypeError, match="Half does not say its title, papers, own_fields, recipe"):

        class Half(Objective):
            name, reads_own_layer = "half", True

    class Still(Objective):
        name, title, papers, reads_own_layer, own_fields, recipe = "still", "Still", (), True, (), {}
        targets = third.targets

    with pytest.raises(TypeError, match="teacher_decay"):
        register_objective(Still)
    with pytest.raises(ValueError, match="an objective 'random-quantiser' already"):
        register_objective(third)


def test_fields_tell_the_objective():
    assert objective_with_fields(["hidden_size", "ema_threshold"]) == "spidr"
    assert objective_with_fields(["hidden_size", "ema_final_decay"]) is None
    assert fields_of_others("dinosr") == {"ema_timescale", "ema_threshold"} and not fields_of_others("spidr")


def asks_for_an_objective(node: ast.AST) -> bool:
    """Whether this compares with an objective's name, matches it, or has a table by it."""
    match node:
        case ast.Compare(left=left, comparators=others):
            sides = [left, *others]
        case ast.Subscript(value=ast.Dict(keys=keys), slice=key):
            sides = [key, *filter(None, keys)]
        case ast.Match(subject=subject, cases=cases):
            sides = [subject, *(case.pattern for case in cases)]
        case _:
            return False
    names = {part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)}
    words = " ".join(map(ast.unparse, sides))
    return bool(names & {"spidr", "dinosr"}) and ("objective" in words or "model_type" in words)


@pytest.mark.parametrize(
    "text",
    [
        'config.objective == "spidr"',
        'config.objective in ("spidr", "toy")',
        'run.model_type != "dinosr"',
        '{"spidr": 1, "dinosr": 2}[config.objective]',
        'match config.objective:\n    case "spidr":\n        pass',
    ],
)
def test_the_search_below_finds(text):
    assert any(map(asks_for_an_objective, ast.walk(ast.parse(text))))


def test_no_other_file_asks_for_an_objective_by_its_name():
    """The converter speaks of the two that its file formats know."""
    files = [*(ROOT / "spidr_hf").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    asking = [
        f"{path.name}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if asks_for_an_objective(node)
    ]
    assert not asking
