"""The upstream itself: a list of waveforms in, hidden states out."""

import torch
from torch import Tensor, nn

from spidr_hf import SpidrFeatureExtractor, SpidrModel
from spidr_hf.hub.published import model_folder


class UpstreamExpert(nn.Module):
    """
    Args:
        ckpt: model folder, name on the Hub, or published checkpoint (s3prl's -k).
        before_residual: the layers' representations before the residual connection instead of their outputs.
    """

    def __init__(self, ckpt: str, before_residual: bool = False, **kwargs):
        super().__init__()
        ckpt = model_folder(ckpt)
        self.feature_extractor = SpidrFeatureExtractor.from_pretrained(ckpt)
        # SUPERB's weights are float32, and SpecAugment would mask what the downstream model is to learn from.
        self.model = SpidrModel.from_pretrained(ckpt, dtype=torch.float32, apply_spec_augment=False, layerdrop=0.0)
        self.before_residual = before_residual

    def get_downsample_rates(self, key: str | None = None) -> int:
        """Samples from frame to frame."""
        return self.model.config.inputs_to_logits_ratio

    def forward(self, wavs: list[Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """Waveforms (S each, 16 kHz) -> `hidden_states`, B x T x H each, padded as the longest."""
        device = wavs[0].device
        inputs = self.feature_extractor(
            [wav.detach().cpu().numpy() for wav in wavs],
            sampling_rate=self.feature_extractor.sampling_rate,
            padding=True,
            return_tensors="pt",
        ).to(device)
        if self.before_residual:
            return {"hidden_states": self.model.get_intermediate_outputs(**inputs)}
        return {"hidden_states": self.model(**inputs, output_hidden_states=True).hidden_states}
