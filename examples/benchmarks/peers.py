"""Other models that a benchmark runs beside ours: SpidR's own package, and transformers' models of the same shape.

Only what is installed takes part. Weights are the same as far as the architectures are: in `spidr` and Data2VecAudio
all of the encoder, in HuBERT and Wav2Vec2 all but the positional convolution, which they do in another way.
`features` of equal models must agree before anything is timed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from spidr_hf.modeling_spidr import SpidrForPretraining, SpidrModel

from .parity import whole_float32

TOLERANCE = 2e-3
_TRANSFORMERS = {
    "data2vec": (Data2VecAudioConfig, Data2VecAudioModel),
    "hubert": (HubertConfig, HubertModel),
    "wav2vec2": (Wav2Vec2Config, Wav2Vec2Model),
}
PEERS = ("spidr", *_TRANSFORMERS)


@dataclass
class Peer:
    """A model beside ours.

    Attributes:
        model: in eval mode.
        features: waveforms B x S and attention mask (or None) to the last layer's features B x T x H.
        ours: the same of a `SpidrModel`.
        equal: whether both have the same weights throughout, so that `features` and `ours` must agree.
    """

    model: nn.Module
    features: Callable[[Tensor, Tensor | None], Tensor]
    ours: Callable[[SpidrModel, Tensor, Tensor | None], Tensor]
    equal: bool


def installed_peers() -> list[str]:
    """Names of the peers that are there."""
    return [name for name in PEERS if name != "spidr" or importlib.util.find_spec("spidr") is not None]


def make_peer(name: str, model: SpidrForPretraining, to_spidr: Callable[[dict], dict] | None = None) -> Peer:
    """The peer of that name with the weights of `model`. `to_spidr` names weights as the `spidr` package does."""
    if name == "spidr":
        return _spidr(model, to_spidr)
    config_class, model_class = _TRANSFORMERS[name]
    config = model.config
    shared = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "conv_dim": tuple(config.conv_dim),
        "conv_kernel": tuple(config.conv_kernel),
        "conv_stride": tuple(config.conv_stride),
        "conv_bias": config.conv_bias,
        "num_conv_pos_embedding_groups": config.num_conv_pos_embedding_groups,
        "layer_norm_eps": config.layer_norm_eps,
        "attn_implementation": "sdpa",
    }
    if name == "data2vec":
        shared |= {
            "num_conv_pos_embeddings": config.conv_pos_depth,
            "conv_pos_kernel_size": config.pos_conv_kernel,
        }
    else:
        shared |= {"feat_extract_norm": "layer", "do_stable_layer_norm": config.do_stable_layer_norm}
    peer = model_class(config_class(**shared))
    missing = _copy_weights(model, peer)
    peer.eval().requires_grad_(False)

    def features(x: Tensor, mask: Tensor | None) -> Tensor:
        return peer(x, attention_mask=mask).last_hidden_state

    def ours(spidr: SpidrModel, x: Tensor, mask: Tensor | None) -> Tensor:
        return spidr(x, attention_mask=mask).last_hidden_state

    return Peer(peer, features, ours, equal=not missing)


def _copy_weights(model: SpidrForPretraining, peer: nn.Module) -> list[str]:
    """Copies our encoder's weights; returns the names for which we have none of the same shape."""
    state = {}
    for name, tensor in model.spidr.state_dict().items():
        if ".attention.qkv." in name:
            for part, letter in zip(tensor.chunk(3), "qkv", strict=True):
                state[name.replace("qkv", f"{letter}_proj")] = part
                state[name.replace("qkv.weight", f"{letter}_proj.bias")] = part.new_zeros(part.shape[0])
        elif "pos_conv_embed.convs." in name:
            state[
                name.replace("convs.", "layers.").replace(".weight", ".conv.weight").replace(".bias", ".conv.bias")
            ] = tensor
        else:
            state[name.replace("attention.proj.", "attention.out_proj.")] = tensor
    theirs = peer.state_dict()
    fitting = {name: x for name, x in state.items() if name in theirs and theirs[name].shape == x.shape}
    peer.load_state_dict(fitting, strict=False)
    return [name for name in theirs if name not in fitting and name != "masked_spec_embed"]


def _spidr(model: SpidrForPretraining, to_spidr: Callable[[dict], dict] | None) -> Peer:
    from spidr.config import SpidRConfig
    from spidr.models import SpidR

    config = model.config
    peer = SpidR(
        SpidRConfig(
            extractor_conv_layer_config=list(zip(config.conv_dim, config.conv_kernel, config.conv_stride, strict=True)),
            encoder_embed_dim=config.hidden_size,
            encoder_pos_conv_groups=config.num_conv_pos_embedding_groups,
            encoder_num_layers=config.num_hidden_layers,
            encoder_num_heads=config.num_attention_heads,
            encoder_ff_interm_features=config.intermediate_size,
            encoder_dropout=config.hidden_dropout,
            encoder_attention_dropout=config.attention_dropout,
            codebook_size=config.codebook_size,
            num_codebooks=config.num_codebooks,
        )
    )
    if to_spidr is not None:
        peer.load_state_dict(to_spidr(model.state_dict()), strict=False)
    peer.eval()

    def features(x: Tensor, mask: Tensor | None) -> Tensor:
        return peer.get_intermediate_outputs(x, attention_mask=mask)[-1]

    def ours(spidr: SpidrModel, x: Tensor, mask: Tensor | None) -> Tensor:
        return spidr.get_intermediate_outputs(x, mask)[-1]

    return Peer(peer, features, ours, equal=to_spidr is not None)


@torch.inference_mode()
def difference(peer: Peer, model: SpidrForPretraining, waveforms: Tensor) -> float:
    """Largest difference of the features of both, relative to their standard deviation, without TF32: that of a GPU's
    convolutions alone makes 0.003.

    Raises `ValueError` where models of the same weights disagree: then there is nothing to compare.
    """
    with whole_float32():
        expected, got = peer.features(waveforms, None), peer.ours(model.spidr, waveforms, None)
    largest = float((expected - got).abs().max() / expected.std())
    if peer.equal and not largest < TOLERANCE:
        raise ValueError(f"The models disagree by {largest:.2g} standard deviations, so their times mean nothing.")
    return largest


class _Anything(ModuleType):
    """A module that has every name but those that Python itself asks for."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def _spidr_data(name: str) -> ModuleType:
    """`spidr.data.NAME`. Its audio loader wants a torchcodec that fits the newest torch only, its manifests polars;
    no audio is read here, and no manifest."""
    names = ["torchcodec.decoders"] + (["polars"] if importlib.util.find_spec("polars") is None else [])
    before = {module: sys.modules[module] for module in names if module in sys.modules}
    sys.modules.update({module: _Anything(module) for module in names})
    try:
        return importlib.import_module(f"spidr.data.{name}")
    finally:
        for module in names:
            del sys.modules[module]
        sys.modules.update(before)


def spidr_span_masks() -> Callable[..., Tensor] | None:
    """`compute_mask_indices` of the `spidr` package, which draws one row after the other; None without the package."""
    if importlib.util.find_spec("spidr") is None:
        return None
    try:
        return _spidr_data("masks").compute_mask_indices
    except ImportError:
        return None


def spidr_batch(model: nn.Module, waveforms: Tensor) -> dict[str, Tensor]:
    """What the `spidr` package's collator makes of B x S waveforms, by the names that its model's forward takes.

    As it trains by default: rows of one length, no attention mask, the recipe's span masks.
    """
    from spidr.config import MaskingConfig

    data = _spidr_data("dataset")
    collator = data.SpeechCollatorWithMasking(
        data.MaskGenerator(MaskingConfig()),
        max_sample_size=waveforms.shape[1],
        conv_layer_config=[
            (layer.conv.out_channels, layer.conv.kernel_size[0], layer.conv.stride[0])
            for layer in model.feature_extractor.conv_layers
        ],
        enable_padding=False,
        rand_crop=True,
    )
    rows, attention_mask, mask_indices = collator(list(waveforms))
    batch = {"waveforms": rows, "mask_indices": mask_indices, "attention_mask": attention_mask}
    return {name: tensor for name, tensor in batch.items() if tensor is not None}


__all__ = [
    "PEERS",
    "TOLERANCE",
    "Peer",
    "difference",
    "installed_peers",
    "make_peer",
    "spidr_batch",
    "spidr_span_masks",
]
