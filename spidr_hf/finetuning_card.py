"""The card of a fine-tuned model: how to use it, what it was trained on, and how good it is."""

import json
from collections.abc import Mapping
from typing import Any

_PIPELINES = {"ctc": "automatic-speech-recognition", "utterance": "audio-classification"}
_CLASSES = {"speaker": "AutoModelForAudioXVector", "frame": "AutoModelForAudioFrameClassification"}
_TITLES = {
    "ctc": "Speech recognition ({units}, CTC)",
    "utterance": "Classification of utterances",
    "speaker": "Speaker embeddings (x-vectors)",
    "frame": "Phones of frames",
}


def finetuned_card(description: Mapping[str, Any], results: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """README.md of a fine-tuned model's folder. What only its maker knows is left for them to say.

    Args:
        description: what the run was about (`Task.description`).
        results: what `finetuning.finetune` returns.
        settings: how it was trained.
    """
    task = description["task"]
    tag = f"pipeline_tag: {_PIPELINES[task]}\n" if task in _PIPELINES else ""
    names = sorted({name for scores in results["scores"].values() for name in scores} - {"utterances"})
    rows = "\n".join(
        f"| {part} | {scores['utterances']} | " + " | ".join(_value(name, scores.get(name)) for name in names) + " |"
        for part, scores in results["scores"].items()
    )
    header = " | ".join(name if name == "loss" else f"{name} (%)" for name in names)
    start = "random weights" if description["random_encoder"] else f"`{description['model']}`"
    return f"""---
library_name: transformers
{tag}tags: [speech, audio, spidr]
---

# {_TITLES[task].format(**description)}

Fine-tuned from {start}. Say here which audio and labels it was trained on, and under which licence it may be used; that
of the weights it began with goes on to hold.

```python
{_usage(task)}```

| utterances of | number | {header} |
|---|---|{"---|" * len(names)}
{rows}

Step {results["best_step"]} of {results["steps"]}, the best on the validation audio. Settings:

```json
{json.dumps({**description, **settings}, indent=1, ensure_ascii=False)}
```
"""


def _value(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if name == "loss" else f"{100 * value:.2f}"


def _usage(task: str) -> str:
    begin = "import spidr_hf  # registers the models with the Auto classes; or pass trust_remote_code=True below\n"
    if task in _PIPELINES:
        return f"""{begin}from transformers import pipeline

pipe = pipeline("{_PIPELINES[task]}", model="this-repository")
pipe("speech.wav")
"""
    output = "embeddings  # batch x size; compare them by their cosine" if task == "speaker" else "logits"
    return f"""{begin}from transformers import AutoFeatureExtractor, {_CLASSES[task]}

model = {_CLASSES[task]}.from_pretrained("this-repository")
feature_extractor = AutoFeatureExtractor.from_pretrained("this-repository")
inputs = feature_extractor(waveform, sampling_rate=16000, return_tensors="pt")
result = model(**inputs).{output}
"""


__all__ = ["finetuned_card"]
