"""SpidR and DinoSR for Transformers. Importing this package registers its models with the Auto classes."""

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
from .pipelines import SpeechToUnitsPipeline

__version__ = "0.1.0"

AutoConfig.register(SpidrConfig.model_type, SpidrConfig)
AutoFeatureExtractor.register(SpidrConfig, SpidrFeatureExtractor)
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
        from .trainer import SpidrTrainerCallback

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
