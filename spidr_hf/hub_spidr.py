"""What a saved folder carries so that it loads without this package installed (`trust_remote_code=True`)."""

import os
import shutil
from pathlib import Path

# Every file that the classes below need. They import each other flatly, so transformers finds them all.
HUB_FILES = (
    "hub_spidr.py",
    "objectives_spidr.py",
    "configuration_spidr.py",
    "feature_extraction_spidr.py",
    "triton_spidr.py",
    "kernels_spidr.py",
    "plain_spidr.py",
    "cpu_spidr.py",
    "layers_spidr.py",
    "codebooks_spidr.py",
    "modeling_spidr_base.py",
    "modeling_spidr_pretraining.py",
    "modeling_spidr_heads.py",
    "modeling_spidr.py",
)

AUTO_MAP = {
    "AutoConfig": "configuration_spidr.SpidrConfig",
    "AutoFeatureExtractor": "feature_extraction_spidr.SpidrFeatureExtractor",
    "AutoModel": "modeling_spidr.SpidrModel",
    "AutoModelForPreTraining": "modeling_spidr.SpidrForPretraining",
    "AutoModelForAudioTokenization": "modeling_spidr.SpidrForAudioTokenization",
    "AutoModelForCTC": "modeling_spidr.SpidrForCTC",
    "AutoModelForAudioClassification": "modeling_spidr.SpidrForSequenceClassification",
    "AutoModelForAudioFrameClassification": "modeling_spidr.SpidrForAudioFrameClassification",
    "AutoModelForAudioXVector": "modeling_spidr.SpidrForXVector",
}


def save_code_files(folder: str | os.PathLike) -> None:
    """Copies the code files into `folder`, from wherever this module itself was loaded (package or Hub cache)."""
    for name in HUB_FILES:
        source, target = Path(__file__).parent / name, Path(folder) / name
        if source.exists() and not (target.exists() and target.samefile(source)):
            shutil.copyfile(source, target)


__all__ = ["AUTO_MAP", "HUB_FILES", "save_code_files"]
