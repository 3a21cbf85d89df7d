"""A run's folders as MODEL."""

import pytest
import torch
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.hub import loading
from spidr_hf.hub.loading import fast_dtype, load_feature_extractor, load_model
from spidr_hf.training.checkpoints import Checkpoints, TrainerState


@pytest.fixture
def run(tmp_path):
    """A run of two checkpoints, whose audio is not normalised."""
    model = tiny_model()
    beside = {"preprocessor_config.json": SpidrFeatureExtractor(do_normalize=False).to_json_string()}
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", beside=beside)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("[data]\nnormalize = false\n")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    for step in (9, 10):
        checkpoints.save(TrainerState(step=step), model, torch.optim.AdamW(model.parameters()), wait=True)
    return tmp_path / "run"


@pytest.mark.parametrize("hardware", [True, False])
def test_auto_is_bfloat16_where_the_processor_has_it(run, monkeypatch, hardware):
    monkeypatch.setattr(loading, "has_fast_bfloat16", lambda: hardware)
    model, _ = load_model(SpidrForPretraining, str(run / "checkpoints" / "step_10"), dtype="auto")
    assert model.dtype == (torch.bfloat16 if hardware else torch.float32)
    assert load_model(SpidrForPretraining, str(run / "checkpoints" / "step_10"))[0].dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: hardware)
    assert fast_dtype("cuda") == fast_dtype("cpu") == ("bfloat16" if hardware else "float32")
    assert fast_dtype("mps") == "float32"


def test_a_checkpoint_is_a_model(run):
    folder = run / "checkpoints" / "step_10"
    _, extractor = load_model(SpidrForPretraining, str(folder))
    assert not extractor.do_normalize
    assert Checkpoints(run / "checkpoints").newest().state.step == 10  # its checksums know the file


def test_a_checkpoint_of_an_earlier_version_is_one(run, monkeypatch):
    folder = run / "checkpoints" / "step_10"
    (folder / "preprocessor_config.json").unlink()
    _, extractor = load_model(SpidrForPretraining, str(folder))
    assert not extractor.do_normalize  # as its run says
    monkeypatch.chdir(folder)
    assert not load_feature_extractor(".").do_normalize
    (run / "config.toml").unlink()
    assert load_feature_extractor(str(folder)).do_normalize


def test_a_run_says_which_of_its_folders_to_name(run):
    with pytest.raises(ValueError, match=r"no model folder.* is the folder of a run: give .*step_10 or .*step_9\.$"):
        load_model(SpidrForPretraining, str(run))
    tiny_model().save_pretrained(run / "final")
    with pytest.raises(ValueError, match=r"folder of a run: give .*final or .*step_10, for example\.$"):
        load_model(SpidrForPretraining, str(run))
    with pytest.raises(ValueError, match=r"no config.json in it\.$"):
        load_model(SpidrForPretraining, str(run.parent))


def test_a_run_that_has_nothing_yet(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"It is a run that has no checkpoint yet\.$"):
        load_model(SpidrForPretraining, str(tmp_path))
