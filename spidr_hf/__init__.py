"""SpidR and DinoSR for Transformers. Importing this package registers its models with the Auto classes."""

__version__ = "0.2.0"

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioTokenization,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    AutoModelForPreTraining,
    AutoProcessor,
)

from .modeling_spidr import (
    SpidrConfig,
    SpidrFeatureExtractor,
    SpidrForAudioFrameClassification,
    SpidrForAudioTokenization,
    SpidrForCTC,
    SpidrForPretraining,
    SpidrForSequenceClassification,
    SpidrForXVector,
    SpidrModel,
    SpidrPreTrainedModel,
)
from .units.pipeline import SpeechToUnitsPipeline

# In a clone `conversion`, `examples` and `model_cards` lie beside the package, in the wheel inside it. Either way they
# are `spidr_hf.conversion` and so on.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "conversion" / "convert_checkpoint.py").exists():
    __path__.append(str(_ROOT))

AutoConfig.register(SpidrConfig.model_type, SpidrConfig)
AutoFeatureExtractor.register(SpidrConfig, SpidrFeatureExtractor)
# Of folders without a tokenizer: AutoProcessor would go through all kinds, and ask whether to run their code.
AutoProcessor.register(SpidrConfig, SpidrFeatureExtractor)
for _auto_class, _model_class in (
    (AutoModel, SpidrModel),
    (AutoModelForPreTraining, SpidrForPretraining),
    (AutoModelForAudioTokenization, SpidrForAudioTokenization),
    (AutoModelForCTC, SpidrForCTC),
    (AutoModelForAudioClassification, SpidrForSequenceClassification),
    (AutoModelForAudioFrameClassification, SpidrForAudioFrameClassification),
    (AutoModelForAudioXVector, SpidrForXVector),
):
    _auto_class.register(SpidrConfig, _model_class)


def __getattr__(name: str) -> Any:
    if name == "SpidrTrainerCallback":  # what only training needs is imported when it is asked for
        from .pretraining.hf_trainer import SpidrTrainerCallback

        return SpidrTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "SpeechToUnitsPipeline",
    "SpidrConfig",
    "SpidrFeatureExtractor",
    "SpidrForAudioFrameClassification",
    "SpidrForAudioTokenization",
    "SpidrForCTC",
    "SpidrForPretraining",
    "SpidrForSequenceClassification",
    "SpidrForXVector",
    "SpidrModel",
    "SpidrPreTrainedModel",
    "SpidrTrainerCallback",
]
