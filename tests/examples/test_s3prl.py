"""The upstream for s3prl: its interface; and s3prl itself with it.

S3PRL_PYTHON names a Python that has s3prl and what this package requires; this one is tried without it.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor, SpidrModel

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "s3prl" / "spidr"
PYTHON = os.environ.get("S3PRL_PYTHON", sys.executable)


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


def test_a_published_name_is_a_model(hubconf, model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    shutil.copytree(model, tmp_path / "spidr_hf" / "models" / "spidr-base")  # as its first use leaves it
    assert hubconf.spidr("spidr-base").model.config.num_hidden_layers == 4


@pytest.fixture(scope="module")
def s3prl(tmp_path_factory) -> dict[str, str]:
    """Environment in which `S3PRL_PYTHON` imports a copy of its s3prl that has the upstream, as hubconf.py says."""
    script = "import importlib.util as u; print(u.find_spec('s3prl').submodule_search_locations[0])"
    found = subprocess.run([PYTHON, "-c", script], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(
            "s3prl is not installed; S3PRL_PYTHON may name a Python that has it, and this package's requirements"
        )
    folder = tmp_path_factory.mktemp("s3prl")
    copy = shutil.copytree(found.stdout.strip(), folder / "s3prl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(FOLDER, copy / "upstream" / "spidr", ignore=shutil.ignore_patterns("__pycache__"))
    (line,) = re.findall(r"^    (from s3prl\S* import \*)$", (FOLDER / "hubconf.py").read_text(), re.M)
    with (copy / "hub.py").open("a") as hub:
        hub.write(f"\n{line}\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spidr", "spidr_before_residual"])
def test_in_s3prl(s3prl, model, name):
    script = """if True:
        import json, sys
        import torch
        from s3prl.nn import Featurizer, S3PRLUpstream
        upstream = S3PRLUpstream(sys.argv[1], path_or_url=sys.argv[2]).eval()
        featurizer = Featurizer(upstream)
        lengths = torch.tensor([9000, 16_000, 4321])
        with torch.no_grad():
            states, state_lengths = upstream(torch.randn(3, 16_000), lengths)
            mixed, mixed_lengths = featurizer(states, state_lengths)
        found = [upstream.num_layers, upstream.downsample_rates, list(mixed.shape), mixed_lengths.tolist()]
        print(json.dumps(found))
    """
    done = subprocess.run([PYTHON, "-c", script, name, model], env=s3prl, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    layers, rates, shape, lengths = json.loads(done.stdout.splitlines()[-1])
    assert layers == 4 + (name == "spidr") and set(rates) == {320}
    assert shape == [3, 50, 48] and lengths == [29, 50, 14]


@pytest.mark.slow
def test_superbs_command(s3prl, model, tmp_path):
    """s3prl's runner trains its example of a downstream model on the upstream, and writes its checkpoint."""
    config = {
        "runner": {
            "total_steps": 2,
            "gradient_clipping": 1,
            "gradient_accumulate_steps": 1,
            "log_step": 1,
            "eval_step": 10,
            "save_step": 2,
            "max_keep": 1,
            "eval_dataloaders": ["dev"],
        },
        "optimizer": {"name": "AdamW", "lr": 1e-3},
        "downstream_expert": {
            "datarc": {"train_batch_size": 2, "eval_batch_size": 2, "num_workers": 0},
            "modelrc": {"input_dim": 8},
        },
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # YAML has JSON in it
    command = [PYTHON, ROOT / "examples" / "s3prl" / "run_downstream.py", "-m", "train", "-p", tmp_path / "run"]
    command += ["-u", "spidr", "-k", model, "-d", "example", "-c", tmp_path / "config.yaml", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # an s3prl as it was installed
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    states = torch.load(tmp_path / "run" / "states-2.ckpt", weights_only=False)
    assert states["Featurizer"]["weights"].shape == (5,)  # of the encoder's input and four layers
