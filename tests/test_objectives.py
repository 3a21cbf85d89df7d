"""Objectives: strictly by name, whole or not at all, and a third one needs nothing but its class."""

import ast
import json
from pathlib import Path

import pytest
import torch
from runs import pretrain_here, rows, write_audio, write_config
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
    """An objective that exists in this test alone: heads read the final output, the teacher is a running mean."""
    monkeypatch.setattr(objectives_spidr, "registered", dict(objectives_spidr.registered))

    @register_objective
    class RunningMean(Objective):
        name, title, papers = "running-mean", "RunningMean", ("2512.20308",)
        reads_own_layer, own_fields, recipe = False, (), {"layerdrop": 0.0}

        @staticmethod
        def teacher_decay(config, step):
            return step / (step + 1)

    return RunningMean


def test_a_third_objective_trains_and_is_used(third, tmp_path, monkeypatch):
    """With its class alone: config, pretraining, teacher, units, memory and card, by no other's rules."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "tiny.toml", write_audio(tmp_path / "audio"))
    folder = pretrain_here(
        tmp_path / "tiny.toml", tmp_path / "run", "--run.model_type", "running-mean", "--optimizer.max_steps", "3"
    )
    assert [row["ema_decay"] for row in rows(folder)] == [1 / 2, 2 / 3, 3 / 4]
    assert json.loads((folder / "final" / "config.json").read_text())["objective"] == "running-mean"
    assert "# A RunningMean model" in (folder / "final" / "README.md").read_text()
    model = SpidrForPretraining.from_pretrained(folder / "final").eval()
    assert model.spidr.encoder.layers[-1].final_layer_norm.weight.requires_grad  # it is read
    extractor = Extractor(model, SpidrFeatureExtractor(), unit_outputs(model))
    (units,) = extractor([torch.randn(8_000).numpy()])
    logits = model.get_codebooks(torch.zeros(1, 8_000))
    assert sorted(units) == [n for n, x in enumerate(logits, start=1) if x is not None]
    options = {"batch_samples": 160_000, "utterance_samples": 16_000}
    memory = {name: training_memory(tiny_config(objective=name), **options) for name in objective_names()}
    assert memory["running-mean"] == memory["dinosr"] != memory["spidr"]
    assert "running-mean" in trained_card(model.config, "Trained.", "")
    section = to_model_section(tiny_config(objective="running-mean"))
    assert "ema_timescale" not in section and to_spidr_config(section, "running-mean").objective == "running-mean"


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

    with pytest.raises(TypeError, match="teacher_decay"):
        register_objective(Still)
    with pytest.raises(ValueError, match="an objective 'running-mean' already"):
        register_objective(third)


def test_fields_tell_the_objective():
    assert objective_with_fields(["hidden_size", "ema_threshold"]) == "spidr"
    assert objective_with_fields(["hidden_size", "ema_final_decay"]) is None
    assert fields_of_others("dinosr") == {"ema_timescale", "ema_threshold"} and not fields_of_others("spidr")


def test_no_other_file_asks_for_an_objective_by_its_name():
    """The converter speaks of the two that its file formats know."""
    asking = []
    for path in [*(ROOT / "spidr_hf").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            names = {side.value for side in sides if isinstance(side, ast.Constant)} & {"spidr", "dinosr"}
            if names and any("objective" in ast.unparse(side) for side in sides):
                asking.append(f"{path.name}:{node.lineno}")
    assert not asking
