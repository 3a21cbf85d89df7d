"""All Spidr classes in one module: what `auto_map` points to, and what brings every code file along."""

from .configuration_spidr import SpidrConfig
from .feature_extraction_spidr import SpidrFeatureExtractor
from .modeling_spidr_base import SpidrModel, SpidrPreTrainedModel
from .modeling_spidr_heads import (
    SpidrForAudioFrameClassification,
    SpidrForCTC,
    SpidrForSequenceClassification,
    SpidrForXVector,
)
from .modeling_spidr_pretraining import SpidrForAudioTokenization, SpidrForPretraining

__all__ = [
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
]
