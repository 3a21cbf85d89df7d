"""Saved folders load without this package (`trust_remote_code=True`), compute the same, and can be saved again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config

import spidr_hf
from spidr_hf import (
    SpidrConfig,
    SpidrFeatureExtractor,
    SpidrForAudioTokenization,
    SpidrForCTC,
    SpidrForPretraining,
    SpidrModel,
)
from spidr_hf.hub_spidr import AUTO_MAP, HUB_FILES

PACKAGE = Path(spidr_hf.__file__).parent

# A process in which spidr_hf cannot be imported: loads all that a folder offers, and saves it again.
STRANGER = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "spidr_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())

import json
import torch
import transformers
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCTC

source, target = sys.argv[1:3]

try:
    AutoConfig.from_pretrained(f"{source}/pretrained")
    raise SystemExit("loaded without being trusted")
except ValueError as error:
    assert "trust_remote_code" in str(error), error

config = AutoConfig.from_pretrained(f"{source}/pretrained", trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained(f"{source}/pretrained", trust_remote_code=True)
audio = torch.sin(torch.arange(6000) / torch.arange(9000, 3000, -1)).numpy()
batch = extractor([audio, audio[:4000]], sampling_rate=16000, padding=True, return_tensors="pt")
results = {"input_values": batch["input_values"]}

for auto_class in config.auto_map:
    if not auto_class.startswith("AutoModel"):
        continue
    loaded, info = getattr(transformers, auto_class).from_pretrained(
        f"{source}/pretrained", trust_remote_code=True, output_loading_info=True
    )
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    assert not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())
    loaded.eval()
    with torch.no_grad():
        output = loaded(**batch)
    if auto_class in ("AutoModel", "AutoModelForPreTraining", "AutoModelForAudioTokenization"):
        assert not info["missing_keys"], info
        results[auto_class] = output[0]
    if auto_class == "AutoModelForPreTraining":
        loaded.save_pretrained(f"{target}/pretrained")
extractor.save_pretrained(f"{target}/pretrained")

ctc = AutoModelForCTC.from_pretrained(f"{source}/ctc", trust_remote_code=True).eval()
with torch.no_grad():
    results["ctc"] = ctc(**batch).logits
ctc.save_pretrained(f"{target}/ctc")

# New weights are drawn as the package draws them, which the zero biases show.
fresh = AutoModel.from_config(config, trust_remote_code=True)
assert not fresh.encoder.layers[0].attention.proj.bias.any()

assert "spidr_hf" not in sys.modules
torch.save(results, f"{target}/results.pt")
"""


def visit(source: Path, target: Path) -> dict[str, torch.Tensor]:
    """Loads `source` in a process without this package, saves to `target` and returns what the models computed."""
    target.mkdir()
    environment = os.environ | {"HF_MODULES_CACHE": str(target / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.run(
        [sys.executable, "-c", STRANGER, str(source), str(target)],
        cwd=target,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return torch.load(target / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = SpidrConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        conv_dim=[8] * 7,
        conv_pos_kernel_size=9,
        conv_pos_depth=2,
        num_conv_pos_embedding_groups=2,
        num_codebooks=1,
        codebook_size=8,
        tdnn_dim=[8, 8],
        tdnn_kernel=[3, 1],
        tdnn_dilation=[1, 1],
    )
    SpidrForPretraining(config).save_pretrained(folder / "pretrained")
    SpidrFeatureExtractor(norm_eps=1e-4).save_pretrained(folder / "pretrained")
    SpidrForCTC(config).save_pretrained(folder / "ctc")
    return folder


def check_folder(folder: Path) -> None:
    """The code files and the full map are there, whichever class was saved."""
    assert {path.name for path in folder.glob("*.py")} == set(HUB_FILES)
    for name in HUB_FILES:
        assert (folder / name).read_text() == (PACKAGE / name).read_text()
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_loads_computes_and_saves_without_the_package(saved, tmp_path):
    results = visit(saved, tmp_path / "first")
    again = visit(tmp_path / "first", tmp_path / "second")
    assert results.keys() == again.keys()
    extractor = SpidrFeatureExtractor.from_pretrained(saved / "pretrained")
    assert extractor.norm_eps == 1e-4
    audio = np.sin(np.arange(6000, dtype=np.float32) / np.arange(9000, 3000, -1, dtype=np.float32))
    batch = extractor([audio, audio[:4000]], sampling_rate=16_000, padding=True, return_tensors="pt")
    torch.testing.assert_close(results["input_values"], batch["input_values"], atol=1e-4, rtol=1e-4)
    batch["input_values"] = results["input_values"]
    with torch.no_grad():
        expected = {
            "AutoModel": SpidrModel.from_pretrained(saved / "pretrained")(**batch)[0],
            "AutoModelForPreTraining": SpidrForPretraining.from_pretrained(saved / "pretrained").eval()(**batch)[0],
            "AutoModelForAudioTokenization": SpidrForAudioTokenization.from_pretrained(saved / "pretrained")(**batch)[
                0
            ],
            "ctc": SpidrForCTC.from_pretrained(saved / "ctc")(**batch).logits,
        }
    for name, value in expected.items():
        for result in (results, again):
            torch.testing.assert_close(result[name], value, msg=lambda message, name=name: f"{name}: {message}")
    for folder in (saved, tmp_path / "first", tmp_path / "second"):
        check_folder(folder / "pretrained")
        check_folder(folder / "ctc")
        fields = json.loads((folder / "pretrained" / "preprocessor_config.json").read_text())
        assert fields["auto_map"] == {"AutoFeatureExtractor": AUTO_MAP["AutoFeatureExtractor"]}


def test_saved_again_by_the_package_the_code_comes_along(saved, tmp_path):
    for model_class, name in ((SpidrForPretraining, "pretrained"), (SpidrForCTC, "ctc"), (SpidrModel, "pretrained")):
        folder = tmp_path / model_class.__name__
        model_class.from_pretrained(saved / name).save_pretrained(folder)
        check_folder(folder)


def test_the_code_imports_nothing_of_the_package_but_what_travels():
    """Code files import torch, numpy, transformers, the standard library, and each other by flat relative imports."""
    allowed = {"torch", "numpy", "transformers", *sys.stdlib_module_names}
    siblings = {name.removesuffix(".py") for name in HUB_FILES}
    for name in HUB_FILES:
        for line in (PACKAGE / name).read_text().splitlines():
            words = line.split()
            if line.strip().startswith("from ."):
                assert words[1].removeprefix(".") in siblings and words[2] == "import", f"{name}: {line}"
            elif line.startswith(("import ", "from ")):
                assert words[1].partition(".")[0] in allowed, f"{name}: {line}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["français", "日本語", "a b.c-d"])
def test_folders_of_any_name_hold_remote_code(name, tmp_path):
    SpidrModel(tiny_config()).save_pretrained(tmp_path / name)
    script = """if True:
        import sys
        sys.modules["spidr_hf"] = None
        from transformers import AutoModel
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert type(model).__module__.startswith("transformers_modules.")
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / name], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
