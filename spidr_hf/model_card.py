"""The card of a model that was trained here: how to use it, and how it was trained."""

from .configuration_spidr import SpidrConfig
from .layers_spidr import receptive_field

_OBJECTIVES = {"spidr": ("SpidR", "2512.20308"), "dinosr": ("DinoSR", "2305.10005")}


def model_card(model: SpidrConfig, summary: str, training_toml: str) -> str:
    """README.md of a model folder. What only its maker knows is left for them to say.

    Args:
        model: the model's config.
        summary: a sentence on how it came about.
        training_toml: the run's whole configuration.
    """
    objective, paper = _OBJECTIVES[model.objective]
    layer, first = min(6, model.num_hidden_layers), model.first_codebook_layer
    frame_ms = 1000 * model.inputs_to_logits_ratio / 16_000
    return f"""---
library_name: transformers
pipeline_tag: feature-extraction
tags: [speech, audio, self-supervised, speech-units, {model.objective}]
---

# A {objective} model

{summary} It maps 16 kHz speech to {frame_ms:g} ms frames, without text: {model.num_hidden_layers} transformer layers of
width {model.hidden_size}, and {model.num_codebooks} codebooks of {model.codebook_size} codewords, one for each of the
layers {first} to {model.num_hidden_layers}. Method: [arXiv {paper}](https://arxiv.org/abs/{paper}).

Say here what it was trained on, for which languages, and under which licence it may be used.

## Use

```python
import spidr_hf  # registers the models with the Auto classes; or pass trust_remote_code=True below
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioTokenization

feature_extractor = AutoFeatureExtractor.from_pretrained("this-repository")
inputs = feature_extractor(waveform, sampling_rate=16000, return_tensors="pt")

model = AutoModel.from_pretrained("this-repository")
features = model.get_intermediate_outputs(**inputs)[{layer} - 1]  # layer {layer}: batch x frames x {model.hidden_size}

tokenizer = AutoModelForAudioTokenization.from_pretrained("this-repository")
units = tokenizer.encode(**inputs).audio_codes  # batch x codebooks x frames; codebook 0: layer {first}
```

Layers count from 1; a layer's representation is the output of its feed-forward network before the residual connection.
Audio shorter than {receptive_field(model)} samples gives no frame. The folder holds the whole pretraining model
(student, prediction heads, codebooks, teacher), which can be trained further with `AutoModelForPreTraining`.

## Training configuration

```toml
{training_toml}```
"""


__all__ = ["model_card"]
