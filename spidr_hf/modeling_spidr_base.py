"""`SpidrPreTrainedModel` and the encoder `SpidrModel`."""

import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import Wav2Vec2BaseModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .codebooks_spidr import SpidrCodebooks, SpidrPredictionHeads
from .configuration_spidr import SpidrConfig, frame_lengths, receptive_field
from .hub_spidr import AUTO_MAP, save_code_files
from .layers_spidr import (
    SpidrAttention,
    SpidrConvLayer,
    SpidrEncoder,
    SpidrEncoderOutput,
    SpidrFeatureEncoder,
    SpidrFeatureProjection,
    SpidrFeedForward,
    SpidrPositionalConvEmbedding,
)

logger = logging.get_logger(__name__)


class SpidrPreTrainedModel(PreTrainedModel):
    """Initialisation, loading and saving common to all Spidr models."""

    config_class = SpidrConfig
    base_model_prefix = "spidr"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SpidrEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    # Names of weights that the checkpoint lacked, which are random.
    missing_weights: frozenset[str] = frozenset()
    # A pretraining checkpoint opened as another class leaves these behind without a warning.
    _keys_to_ignore_on_load_unexpected = [r"^teacher\.", r"^heads\.", r"^codebooks\.", r"^current_step$"]

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code from outside its tree transformers passes over modules without parameters of their own, in case
        # their initialisation overwrote what was loaded. Ours is per layer and leaves loaded parameters alone.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialisation as in SpidR; the feature projection, heads and positional convolutions are PyTorch's."""
        std = self.config.initializer_range
        if isinstance(module, SpidrConvLayer):
            init.kaiming_normal_(module.conv.weight)
            if module.conv.bias is not None:
                _uniform_fan_in(module.conv.bias, module.conv.weight)
        elif isinstance(module, SpidrPositionalConvEmbedding):
            for conv in module.convs:
                _default_init(conv)
        elif isinstance(module, SpidrFeatureProjection):
            _default_init(module.projection)
        elif isinstance(module, SpidrPredictionHeads):
            _uniform_fan_in(module.weight, module.weight[0])
            _uniform_fan_in(module.bias, module.weight[0])
        elif isinstance(module, SpidrAttention):
            init.xavier_uniform_(module.qkv.weight, gain=1 / math.sqrt(2))
            init.xavier_uniform_(module.proj.weight)
            for linear in (module.qkv, module.proj):
                if linear.bias is not None:
                    init.zeros_(linear.bias)
        elif isinstance(module, SpidrFeedForward):
            for linear in (module.intermediate_dense, module.output_dense):
                init.normal_(linear.weight, std=std)
                init.zeros_(linear.bias)
        elif isinstance(module, SpidrCodebooks):
            module.reset()
        elif isinstance(module, SpidrModel):
            init.uniform_(module.masked_spec_embed)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def get_input_embeddings(self) -> None:
        """None: audio has no embeddings of tokens. Asked for by peft and by quantisation."""

    def get_output_embeddings(self) -> None:
        """None, as there are no input embeddings: a CTC head is a layer like any other."""

    def enable_input_require_grads(self) -> None:
        """Nothing to do: the encoder sees to it that adapters in checkpointed layers get gradients."""

    def _set_trainable(self) -> None:
        """Hook: `requires_grad` of parameters that never train. Loading sets all of them to True."""

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to register: `save_pretrained` writes the whole `auto_map`, and every code file, by itself.

        transformers calls this when it loads remote code; saving would then map the class to the file that defines it,
        from which the other classes of the map cannot be reached.
        """

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model._set_trainable()
        model.missing_weights = frozenset(info["missing_keys"])
        return (model, info) if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *args, is_main_process: bool = True, **kwargs):
        """Saves weights and config as always, and beside them the code files that let the folder load anywhere."""
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; give the folder to save into.")
        self.config.auto_map = dict(AUTO_MAP)
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            save_code_files(save_directory)
        super().save_pretrained(save_directory, *args, is_main_process=is_main_process, **kwargs)

    def _get_feat_extract_output_lengths(self, input_lengths):
        """Frames of `input_lengths` samples (int or integer tensor)."""
        return frame_lengths(self.config, input_lengths)

    def _get_feature_vector_attention_mask(self, feature_vector_length: int, attention_mask: Tensor) -> Tensor:
        """Attention mask over samples (B x S) -> bool mask over frames (B x `feature_vector_length`)."""
        lengths = self._get_feat_extract_output_lengths(valid_samples(attention_mask))
        return torch.arange(feature_vector_length, device=attention_mask.device) < lengths[:, None]


class SpidrModel(SpidrPreTrainedModel):
    """The encoder: waveforms in, hidden states out."""

    def __init__(self, config: SpidrConfig):
        super().__init__(config)
        self.feature_extractor = SpidrFeatureEncoder(config)
        self.feature_projection = SpidrFeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size))
        self.encoder = SpidrEncoder(config)
        self.post_init()

    def freeze_feature_encoder(self) -> None:
        """Stops training the convolutional feature extractor."""
        self.feature_extractor.requires_grad_(False)

    def extract_features(
        self, input_values: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Waveforms B x S -> (features B x T x conv_dim[-1], valid frames per row B or None when no row is padded).

        Raises `ValueError` when the shapes disagree, a row is too short for one frame or begins with padding.
        """
        if input_values.dim() != 2:
            raise ValueError(
                f"`input_values` must be batch x samples, got shape {tuple(input_values.shape)}. Audio of several "
                "channels has to be mixed down to one; a single utterance needs `input_values[None]`."
            )
        samples, needed = input_values.shape[1], receptive_field(self.config)
        if samples < needed:
            raise ValueError(
                f"Audio of {samples} samples is too short: one frame needs {needed} samples. Pad it or leave it out."
            )
        lengths = None
        if attention_mask is not None:
            if attention_mask.shape != input_values.shape:
                raise ValueError(
                    f"`attention_mask` is over samples: expected shape {tuple(input_values.shape)}, got "
                    f"{tuple(attention_mask.shape)}."
                )
            lengths = valid_samples(attention_mask)
            # Looking at the mask waits for the device. In training on one the collator knows, and leaves masks of
            # full batches out.
            if not torch.compiler.is_compiling() and (lengths.device.type == "cpu" or not self.training):
                shortest = int(lengths.min())
                if shortest < needed:
                    raise ValueError(
                        f"A row of the batch holds {shortest} samples: one frame needs {needed}. Leave it out."
                    )
                if shortest == samples:
                    lengths = None
                else:
                    _check_padding(attention_mask, self.config.inputs_to_logits_ratio)
        features = self.feature_extractor(input_values.to(self._input_dtype()), lengths)
        return features, None if lengths is None else frame_lengths(self.config, lengths)

    def _input_dtype(self) -> torch.dtype:
        parameters = self.feature_extractor.conv_layers[0].parameters()
        return next((parameter.dtype for parameter in parameters if parameter.is_floating_point()), self.dtype)

    def project(self, features: Tensor) -> Tensor:
        """Features B x T x conv_dim[-1] -> B x T x H, without dropout."""
        return self.feature_projection(features)

    def mask_frames(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Puts the mask embedding in place of the masked frames (B x T, bool) of B x T x H."""
        return torch.where(mask.unsqueeze(-1), self.masked_spec_embed.to(hidden_states.dtype), hidden_states)

    def spec_augment(self, hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        config, (batch, length, width) = self.config, hidden_states.shape
        if not (self.training and config.apply_spec_augment):
            return hidden_states
        device = hidden_states.device
        if config.mask_time_prob > 0:
            valid = torch.full((batch,), length, device=device) if lengths is None else lengths
            mask = span_mask(valid, length, config.mask_time_prob, config.mask_time_length, config.mask_time_min_masks)
            hidden_states = self.mask_frames(hidden_states, mask)
        if config.mask_feature_prob > 0:
            valid = torch.full((batch,), width, device=device)
            mask = span_mask(
                valid, width, config.mask_feature_prob, config.mask_feature_length, config.mask_feature_min_masks
            )
            hidden_states = hidden_states.masked_fill(mask.unsqueeze(1), 0)
        return hidden_states

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        *,
        projected: Tensor | None = None,
        **kwargs,
    ) -> Wav2Vec2BaseModelOutput | SpidrEncoderOutput:
        """
        Args:
            input_values: B x S, standardised waveforms (16 kHz) as [`SpidrFeatureExtractor`] makes them.
            attention_mask: B x S of any dtype, 1 on audio and 0 on the padding at the end of a row.
            mask_time_indices: B x T (bool), frames to replace by the mask embedding. Without it SpecAugment masks
                frames during training (`apply_spec_augment`).
            output_hidden_states: also return the L + 1 hidden states: the encoder's input and every layer's output.
            output_attentions: also return the attention weights (computed by the eager form).
            projected: for objectives, which look at the projection first: B x T x H, `project`ed, in place of
                `input_values`. The other arguments are then the encoder's, and its output is returned.

        Returns `last_hidden_state` (B x T x H), `extract_features` (B x T x conv_dim[-1]: the last convolution's
        output before the projection's norm), `hidden_states`, `attentions`.
        """
        config = self.config
        if projected is not None:
            hidden_states = projected if mask_time_indices is None else self.mask_frames(projected, mask_time_indices)
            return self.encoder(hidden_states, output_attentions=output_attentions, **kwargs)
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        features, lengths = self.extract_features(input_values, attention_mask)
        hidden_states = F.dropout(self.project(features), config.feat_proj_dropout, self.training)
        if mask_time_indices is not None:
            hidden_states = self.mask_frames(hidden_states, mask_time_indices.bool())
        else:
            hidden_states = self.spec_augment(hidden_states, lengths)
        output = self.encoder(
            hidden_states,
            frame_mask(lengths, features.shape[1]),
            output_layers=bool(output_hidden_states),
            output_attentions=bool(output_attentions),
        )
        return Wav2Vec2BaseModelOutput(
            last_hidden_state=output.last_hidden_state,
            extract_features=features,
            hidden_states=output.hidden_states if output_hidden_states else None,
            attentions=tuple(output.attentions) if output_attentions else None,
        )

    def get_intermediate_outputs(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        before_residual: bool = True,
        num_layers: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Representations of the layers, B x T x H each: entry `i` belongs to layer `i + 1`.

        Args:
            before_residual: the feed-forward output before the residual connection (SpidR's features, which units,
                targets and ABX use); False: the layer's full output. In SpidR the two differ by about 100 %.
            num_layers: compute only the first layers (all L by default).
        """
        total = self.config.num_hidden_layers
        if num_layers is not None and not 1 <= num_layers <= total:
            raise ValueError(f"`num_layers` must lie between 1 and {total}, got {num_layers}.")
        features, lengths = self.extract_features(input_values, attention_mask)
        output = self.encoder(
            self.project(features),
            frame_mask(lengths, features.shape[1]),
            num_layers=num_layers,
            first_representation=1 if before_residual else None,
            output_layers=not before_residual,
            representation_only=before_residual,
        )
        return tuple(output.representations if before_residual else output.layer_outputs)


def valid_samples(attention_mask: Tensor) -> Tensor:
    """Samples of each row that are audio: B (int64), from a mask B x S of any dtype."""
    return (attention_mask != 0).sum(-1)


def _check_padding(attention_mask: Tensor, stride: int) -> None:
    """Refuses rows that begin with padding (a frame's step or more), and warns of other padding before audio."""
    is_audio = attention_mask != 0
    if not (is_audio[:, 1:] & ~is_audio[:, :-1]).any():
        return
    if is_audio.to(torch.uint8).argmax(-1).max() >= stride:
        raise ValueError(
            "A row of the batch begins with padding, and models read a row's first samples: pad on the right "
            "(`padding_side='right'`)."
        )
    logger.warning_once(
        "`attention_mask` has padding before samples of audio: a row is read as its first samples, as many as the mask "
        "has ones. Cut the audio itself."
    )


def frame_mask(lengths: Tensor | None, length: int) -> Tensor | None:
    """Valid frames per row (B) -> bool mask B x `length`; None stays None."""
    return None if lengths is None else torch.arange(length, device=lengths.device) < lengths[:, None]


def span_mask(lengths: Tensor, size: int, prob: float, span: int, min_spans: int) -> Tensor:
    """Random spans for SpecAugment: bool mask B x `size`, inside the first `lengths` (B) positions of each row.

    As in Wav2Vec2: `prob * length / span` spans per row on average, at least `min_spans`, starts drawn without
    replacement, overlaps allowed. Runs on the device of `lengths` without waiting for it.
    """
    device = lengths.device
    fit = (lengths - span + 1).clamp(min=0)
    spans = (prob * lengths / span + torch.rand(len(lengths), device=device)).long().clamp(min=min_spans)
    spans = torch.minimum(torch.minimum(spans, fit), lengths // span)
    scores = torch.rand(len(lengths), size, device=device)
    scores = scores.masked_fill(torch.arange(size, device=device) >= fit[:, None], -1.0)
    ranks = scores.argsort(dim=1, descending=True).argsort(dim=1)
    starts = (ranks < spans[:, None]).float()
    return F.max_pool1d(F.pad(starts, (span - 1, 0)).unsqueeze(1), span, stride=1).squeeze(1) > 0


def _uniform_fan_in(tensor: Tensor, weight: Tensor) -> None:
    """PyTorch's default for weights and biases: uniform within 1 / sqrt(fan_in of `weight`)."""
    bound = 1 / math.sqrt(weight[0].numel())
    init.uniform_(tensor, -bound, bound)


def _default_init(module: nn.Linear | nn.Conv1d) -> None:
    """PyTorch's default initialisation, written so that already loaded parameters are left alone."""
    _uniform_fan_in(module.weight, module.weight)
    _uniform_fan_in(module.bias, module.weight)


__all__ = ["SpidrModel", "SpidrPreTrainedModel", "frame_mask", "span_mask", "valid_samples"]
