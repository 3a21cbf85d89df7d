"""The upstream for s3prl: its interface; and s3prl itself with it, where it is installed."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor, SpidrModel

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "s3prl" / "spidr"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(layerdrop=0.5, mask_time_prob=0.5).save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hubconf():
    """The folder as the package it becomes in s3prl/upstream."""
    spec = importlib.util.spec_from_file_location(
        "s3prl_upstream_spidr", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])
    return importlib.import_module(f"{spec.name}.hubconf")


@pytest.fixture
def wavs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.05 * torch.randn(samples, generator=generator) for samples in (9000, 16_000, 4321)]


@pytest.mark.parametrize("name", ["spidr", "spidr_before_residual"])
def test_hidden_states_are_those_of_the_utterances_alone(hubconf, model, wavs, name):
    upstream = getattr(hubconf, name)(ckpt=str(model), refresh=False)  # s3prl passes `refresh` to every upstream
    upstream.train()  # dropout aside, training a downstream model must not change what it reads
    with torch.no_grad():
        states = upstream(wavs)["hidden_states"]
    ours, extractor = SpidrModel.from_pretrained(model).eval(), SpidrFeatureExtractor()
    assert len(states) == 4 + (name == "spidr") and upstream.get_downsample_rates("hidden_states") == 320
    for row, wav in enumerate(wavs):
        inputs = extractor(np.asarray(wav), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            if name == "spidr":
                expected = ours(**inputs, output_hidden_states=True).hidden_states
            else:
                expected = ours.get_intermediate_outputs(**inputs)
        for state, layer in zip(states, expected, strict=True):
            torch.testing.assert_close(state[row, : layer.shape[1]], layer[0], atol=1e-4, rtol=1e-4)


def test_gradients_reach_the_encoder(hubconf, model, wavs):
    upstream = hubconf.spidr(str(model))
    upstream(wavs)["hidden_states"][-1].sum().backward()
    assert upstream.model.encoder.layers[0].attention.qkv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["spidr", "spidr_before_residual"])
def test_in_s3prl(hubconf, model, wavs, name, monkeypatch):
    nn = pytest.importorskip("s3prl.nn", reason="s3prl is not installed")
    from s3prl import hub

    monkeypatch.setattr(hub, name, getattr(hubconf, name), raising=False)
    upstream = nn.S3PRLUpstream(name, path_or_url=str(model)).eval()
    featurizer = nn.Featurizer(upstream)
    lengths = torch.tensor([len(wav) for wav in wavs])
    padded = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    with torch.no_grad():
        states, state_lengths = upstream(padded, lengths)
        mixed, mixed_lengths = featurizer(states, state_lengths)
    assert upstream.num_layers == 4 + (name == "spidr") and set(upstream.downsample_rates) == {320}
    assert mixed.shape == (3, 50, 48) and mixed_lengths.tolist() == [29, 50, 14]
