"""Configuration of the SpidR and DinoSR model family."""

import math
from difflib import get_close_matches

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .objectives_spidr import objective_names

_CHOICES = {
    "feat_extract_norm": ("layer", "group"),
    "ctc_loss_reduction": ("mean", "sum"),
    "hidden_act": tuple(ACT2FN),
    "feat_extract_activation": tuple(ACT2FN),
}
# (fields, type, what is allowed, check)
_RANGES = (
    (
        "hidden_size num_hidden_layers num_attention_heads intermediate_size conv_pos_kernel_size conv_pos_depth "
        "num_conv_pos_embedding_groups codebook_size mask_time_length mask_feature_length classifier_proj_size "
        "xvector_output_dim",
        int,
        "a positive integer",
        lambda value: value > 0,
    ),
    (
        "num_codebooks ema_final_step freeze_step mask_time_min_masks mask_feature_min_masks",
        int,
        "an integer of at least 0",
        lambda value: value >= 0,
    ),
    ("layer_norm_eps ema_timescale", (int, float), "a positive number", lambda value: 0 < value < math.inf),
    (
        "initializer_range codebook_decay ema_threshold",
        (int, float),
        "a number of at least 0",
        lambda value: value >= 0,
    ),
    (
        "hidden_dropout attention_dropout activation_dropout feat_proj_dropout final_dropout layerdrop "
        "ema_start_decay ema_final_decay mask_time_prob mask_feature_prob",
        (int, float),
        "a number in [0, 1]",
        lambda value: 0 <= value <= 1,
    ),
)
_FLAGS = (
    "conv_bias",
    "conv_pos_norm",
    "do_stable_layer_norm",
    "attention_bias",
    "apply_spec_augment",
    "ctc_zero_infinity",
    "use_weighted_layer_sum",
)


class SpidrConfig(PreTrainedConfig):
    r"""
    Configuration of every Spidr model. `SpidrConfig()` is spidr-base: 12 layers of 768 units, 8 codebooks of 256
    codewords, with the dropout rates of the pretraining recipe.

    One family holds two objectives. SpidR (arXiv 2512.20308) and DinoSR (arXiv 2305.10005) share the encoder; they
    differ in which hidden states the prediction heads read and in how the teacher's decay moves (`objective`).

    Fields shared with `Wav2Vec2Config` carry its names. Lengths are in samples or frames, never in seconds.

    Args:
        vocab_size (`int`, *optional*, defaults to 32):
            Number of labels of [`SpidrForCTC`].
        hidden_size (`int`, *optional*, defaults to 768):
            Width H of the encoder.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number L of transformer layers. They are counted from 1 wherever a user names one.
        num_attention_heads (`int`, *optional*, defaults to 12):
            Attention heads per layer; divides `hidden_size`.
        intermediate_size (`int`, *optional*, defaults to 3072):
            Width of the feed-forward network.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feed-forward network ("gelu" is the exact, erf form).
        hidden_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the embeddings and of both residual branches.
        attention_dropout (`float`, *optional*, defaults to 0.1):
            Dropout of the attention weights.
        activation_dropout (`float`, *optional*, defaults to 0.0):
            Dropout inside the feed-forward network.
        feat_proj_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the projected features; in pretraining on the student's branch only.
        final_dropout (`float`, *optional*, defaults to 0.1):
            Dropout before the output layer of [`SpidrForCTC`].
        layerdrop (`float`, *optional*, defaults to 0.0):
            Probability that a layer leaves the residual stream as it was during training (0.05 in DinoSR). A dropped
            layer still runs, so that its representation reaches the objective and every parameter has a gradient.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of every norm.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the feed-forward weights at initialisation.
        feat_extract_norm (`str`, *optional*, defaults to `"layer"`):
            `"layer"`: LayerNorm over channels after every convolution. `"group"`: one GroupNorm with a group per
            channel (normalising over time) after the first convolution only.
        feat_extract_activation (`str`, *optional*, defaults to `"gelu"`):
            Activation of the feature extractor and of the positional convolutions.
        conv_dim, conv_kernel, conv_stride (`tuple[int, ...]`, *optional*):
            Channels, kernels and strides of the feature extractor; equally long. The defaults make one frame of
            400 samples every 320 samples (20 ms at 16 kHz).
        conv_bias (`bool`, *optional*, defaults to `False`):
            Whether the feature extractor's convolutions have a bias.
        conv_pos_kernel_size (`int`, *optional*, defaults to 95):
            Kernel of the whole positional stack; each of its `conv_pos_depth` convolutions has
            `max(3, conv_pos_kernel_size // conv_pos_depth)` frames.
        conv_pos_depth (`int`, *optional*, defaults to 5):
            Number of positional convolutions.
        conv_pos_norm (`bool`, *optional*, defaults to `True`):
            Whether each positional convolution is followed by a norm (not in original DinoSR models of depth 1).
        num_conv_pos_embedding_groups (`int`, *optional*, defaults to 16):
            Groups of each positional convolution; divides `hidden_size`.
        do_stable_layer_norm (`bool`, *optional*, defaults to `False`):
            Pre-norm layers with one LayerNorm after the last, instead of post-norm layers.
        attention_bias (`bool`, *optional*, defaults to `False`):
            Whether the fused query-key-value projection has a bias (original DinoSR: yes).
        objective (`str`, *optional*, defaults to `"spidr"`):
            `"spidr"`: head k predicts from the representation of its own layer, teacher decay approaches 1
            exponentially. `"dinosr"`: every head predicts from the final output, teacher decay grows linearly.
        codebook_size (`int`, *optional*, defaults to 256):
            Codewords V per codebook.
        num_codebooks (`int`, *optional*, defaults to 8):
            Codebooks K, one for each of the last K layers.
        codebook_decay (`float`, *optional*, defaults to 0.9):
            Decay d of the codebooks' moving averages; 1 or more turns their updates off.
        ema_start_decay (`float`, *optional*, defaults to 0.999):
            Teacher decay at the start.
        ema_final_decay (`float`, *optional*, defaults to 0.9999):
            Teacher decay at the end of the linear schedule (`objective="dinosr"`).
        ema_final_step (`int`, *optional*, defaults to 30000):
            Last step of the linear schedule (`objective="dinosr"`).
        ema_timescale (`int`, *optional*, defaults to 20000):
            Time constant, in steps, of the exponential schedule (`objective="spidr"`).
        ema_threshold (`float`, *optional*, defaults to 1e-7):
            Below this value of `1 - decay` the teacher stands still (`objective="spidr"`).
        ema_exclude_layers (`list[str]`, *optional*, defaults to `["pos_conv_embed"]`):
            Prefixes of teacher parameter names that are copied from the student instead of averaged.
        freeze_step (`int`, *optional*, defaults to 200000):
            Update after which the feature extractor and the feature projection no longer train (and, for
            `objective="dinosr"`, the teacher stands still).
        apply_spec_augment (`bool`, *optional*, defaults to `True`):
            Whether fine-tuning masks spans of frames and channels during training (SpecAugment). Pretraining has its
            own masks and ignores this.
        mask_time_prob, mask_time_length, mask_time_min_masks (*optional*, default to 0.05, 10, 2):
            SpecAugment over frames, as in `Wav2Vec2Config`.
        mask_feature_prob, mask_feature_length, mask_feature_min_masks (*optional*, default to 0.0, 10, 0):
            SpecAugment over channels, as in `Wav2Vec2Config`.
        ctc_loss_reduction (`str`, *optional*, defaults to `"mean"`):
            Reduction of the CTC loss: `"mean"` or `"sum"`.
        ctc_zero_infinity (`bool`, *optional*, defaults to `False`):
            Whether infinite CTC losses count as zero.
        use_weighted_layer_sum (`bool`, *optional*, defaults to `False`):
            Whether the classification heads read a learned weighted sum of all hidden states.
        classifier_proj_size (`int`, *optional*, defaults to 256):
            Width of the projection before pooling in [`SpidrForSequenceClassification`].
        tdnn_dim, tdnn_kernel, tdnn_dilation, xvector_output_dim (*optional*):
            The x-vector head of [`SpidrForXVector`], as in `Wav2Vec2Config`.

    Raises `ValueError`, naming the field, on impossible values.
    """

    model_type = "spidr"

    vocab_size: int | None = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    activation_dropout: float | int = 0.0
    feat_proj_dropout: float | int = 0.0
    final_dropout: float | int = 0.1
    layerdrop: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    feat_extract_norm: str = "layer"
    feat_extract_activation: str = "gelu"
    conv_dim: list[int] | tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_kernel: list[int] | tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_stride: list[int] | tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_pos_kernel_size: int = 95
    conv_pos_depth: int = 5
    conv_pos_norm: bool = True
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    attention_bias: bool = False
    objective: str = "spidr"
    codebook_size: int = 256
    num_codebooks: int = 8
    codebook_decay: float | int = 0.9
    ema_start_decay: float | int = 0.999
    ema_final_decay: float | int = 0.9999
    ema_final_step: int = 30_000
    ema_timescale: float | int = 20_000
    ema_threshold: float | int = 1e-7
    ema_exclude_layers: list[str] | tuple[str, ...] = ("pos_conv_embed",)
    freeze_step: int = 200_000
    apply_spec_augment: bool = True
    mask_time_prob: float | int = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float | int = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    tdnn_dim: list[int] | tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: list[int] | tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: list[int] | tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        self._validate()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # Fields that the caller changes are set after construction.
        loaded = super().from_dict(config_dict, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._validate()
        return loaded

    def _validate(self) -> None:
        for names, kind, allowed, condition in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if isinstance(value, bool) or not isinstance(value, kind) or not condition(value):
                    raise ValueError(f"`{name}` must be {allowed}, got {value!r}.")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        if self.vocab_size is not None and not _is_positive_integer(self.vocab_size):
            raise ValueError(f"`vocab_size` must be a positive integer or None, got {self.vocab_size!r}.")
        for name, choices in {"objective": objective_names(), **_CHOICES}.items():
            value = getattr(self, name)
            if value not in choices:
                nearest = get_close_matches(str(value), choices, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.{hint}")
        for name in ("num_attention_heads", "num_conv_pos_embedding_groups"):
            if self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"`hidden_size` ({self.hidden_size}) must be divisible by `{name}` ({getattr(self, name)})."
                )
        if self.num_codebooks > self.num_hidden_layers:
            raise ValueError(
                f"`num_codebooks` ({self.num_codebooks}) exceeds `num_hidden_layers` ({self.num_hidden_layers}): each "
                "codebook belongs to one layer."
            )
        for group in (("conv_dim", "conv_kernel", "conv_stride"), ("tdnn_dim", "tdnn_kernel", "tdnn_dilation")):
            values = {name: getattr(self, name) for name in group}
            for name, value in values.items():
                if not isinstance(value, (list, tuple)) or not all(map(_is_positive_integer, value)):
                    raise ValueError(f"`{name}` must be a list of positive integers, got {value!r}.")
            if len({len(value) for value in values.values()}) != 1 or not values[group[0]]:
                raise ValueError(f"`{'`, `'.join(group)}` must be equally long and not empty, got {values}.")
        prefixes = self.ema_exclude_layers
        if not isinstance(prefixes, (list, tuple)) or not all(isinstance(prefix, str) for prefix in prefixes):
            raise ValueError(f"`ema_exclude_layers` must be a list of prefixes, got {self.ema_exclude_layers!r}.")

    @property
    def num_feat_extract_layers(self) -> int:
        """Number of convolutions in the feature extractor."""
        return len(self.conv_dim)

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples per frame (320: 20 ms at 16 kHz)."""
        return math.prod(self.conv_stride)

    @property
    def pos_conv_kernel(self) -> int:
        """Kernel, in frames, of each positional convolution."""
        return max(3, self.conv_pos_kernel_size // self.conv_pos_depth)

    @property
    def first_codebook_layer(self) -> int:
        """Number, counted from 1, of the first layer with a codebook."""
        return self.num_hidden_layers - self.num_codebooks + 1


def _is_positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def conv_output_length(length, kernel: int, stride: int):
    """Number of outputs of a convolution without padding over `length` inputs (an int or an integer tensor)."""
    if isinstance(length, Tensor):
        return torch.div(length - kernel, stride, rounding_mode="floor") + 1
    return (length - kernel) // stride + 1


def frame_lengths(config: SpidrConfig, lengths):
    """Frames T of `lengths` samples (an int or an integer tensor), at least 0."""
    # Floors of floors are one, and compilers get on much better with it.
    lengths = conv_output_length(lengths, receptive_field(config), config.inputs_to_logits_ratio)
    return lengths.clamp(min=0) if isinstance(lengths, Tensor) else max(lengths, 0)


def receptive_field(config: SpidrConfig) -> int:
    """Samples that one frame sees (400 for the base model); shorter audio has no frame."""
    field = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        field = (field - 1) * stride + kernel
    return field


SAMPLING_RATE = 16_000


__all__ = ["SAMPLING_RATE", "SpidrConfig", "conv_output_length", "frame_lengths", "receptive_field"]
