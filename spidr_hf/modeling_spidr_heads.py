"""Fine-tuning heads on the encoder: speech recognition (CTC), utterance and frame labels, speaker embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import (
    CausalLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
    XVectorOutput,
)
from transformers.utils.generic import can_return_tuple

from .configuration_spidr import SpidrConfig
from .layers_spidr import masked_var_mean
from .modeling_spidr_base import SpidrModel, SpidrPreTrainedModel, valid_samples

IGNORED_LABEL = -100


class SpidrHeadModel(SpidrPreTrainedModel):
    """What the heads share: the encoder, its freezing, the learned sum over layers and the initialisation."""

    # The losses are means over what a batch holds: the Trainer has to divide by its accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: SpidrConfig, weighted_layer_sum: bool = False):
        super().__init__(config)
        self.spidr = SpidrModel(config)
        if weighted_layer_sum:
            self.layer_weights = nn.Parameter(torch.empty(config.num_hidden_layers + 1))

    def _finish_init(self) -> None:
        self.post_init()
        self._set_trainable()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self and hasattr(self, "layer_weights"):
            init.zeros_(self.layer_weights)
        elif isinstance(module, nn.Linear):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")
            init.zeros_(module.bias)
        elif isinstance(module, AMSoftmaxLoss):
            init.normal_(module.weight)

    def _set_trainable(self) -> None:
        # Without masked frames the mask embedding would be a parameter without a gradient.
        masks_frames = self.config.apply_spec_augment and self.config.mask_time_prob > 0
        self.spidr.masked_spec_embed.requires_grad_(masks_frames)

    def freeze_feature_encoder(self) -> None:
        """Stops training the convolutional feature extractor."""
        self.spidr.freeze_feature_encoder()

    def freeze_base_model(self) -> None:
        """Stops training the whole encoder: only the head learns."""
        self.spidr.requires_grad_(False)

    def _encode(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
    ) -> tuple[Tensor, dict[str, tuple[Tensor, ...] | None]]:
        """Waveforms B x S -> hidden states B x T x H for the head, and the outputs that were asked for by name."""
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        weighted = hasattr(self, "layer_weights")
        outputs = self.spidr(
            input_values,
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states or weighted,
            output_attentions=output_attentions,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state
        if weighted:
            weights = self.layer_weights.softmax(-1).to(hidden_states.dtype)
            # One layer at a time: a stack of all layers would take their memory once more.
            hidden_states = sum(
                weight * layer for weight, layer in zip(weights.unbind(), outputs.hidden_states, strict=True)
            )
        others = {
            "hidden_states": outputs.hidden_states if output_hidden_states else None,
            "attentions": outputs.attentions,
        }
        return hidden_states, others


class SpidrForCTC(SpidrHeadModel):
    """Connectionist temporal classification: text or phones from speech. The blank is `config.pad_token_id`."""

    def __init__(self, config: SpidrConfig):
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError(
                "`vocab_size` is None: set it to the size of the tokenizer's vocabulary, for example "
                "`SpidrForCTC.from_pretrained(..., vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)`."
            )
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self._finish_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> CausalLMOutput:
        """
        Args:
            input_values: B x S, standardised waveforms.
            attention_mask: B x S, 1 on audio.
            labels: B x U, token numbers below `config.vocab_size`; -100 (or the blank) pads.

        Returns `loss` (a scalar, float32, with `labels`) and `logits` (B x T x vocab_size). Padded frames predict the
        blank, so that a batch decodes to the texts of its utterances alone.
        """
        hidden_states, others = self._encode(input_values, attention_mask, output_hidden_states, output_attentions)
        logits = self.lm_head(self.dropout(hidden_states))
        loss = None if labels is None else self._loss(logits, labels, attention_mask)
        if attention_mask is not None and self.config.pad_token_id is not None:
            valid = self._get_feature_vector_attention_mask(logits.shape[1], attention_mask)
            is_blank = torch.arange(logits.shape[2], device=logits.device) == self.config.pad_token_id
            padding = torch.zeros_like(logits[0, 0]).masked_fill(~is_blank, torch.finfo(logits.dtype).min)
            logits = torch.where(valid.unsqueeze(-1), logits, padding)
        return CausalLMOutput(loss=loss, logits=logits, **others)

    def _loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        config, blank = self.config, self.config.pad_token_id
        if blank is None or not 0 <= blank < config.vocab_size:
            raise ValueError(
                f"`pad_token_id` is the blank of CTC and must lie in [0, {config.vocab_size}), got {blank}: set it to "
                "the tokenizer's."
            )
        _check_labels(labels, config.vocab_size, "vocab_size")
        if attention_mask is None:
            logit_lengths = torch.full(logits.shape[:1], logits.shape[1], device=logits.device)
        else:
            logit_lengths = self._get_feat_extract_output_lengths(valid_samples(attention_mask)).clamp(min=0)
        # Tokenizers pad with the blank, and a target never contains it.
        targets = (labels != IGNORED_LABEL) & (labels != blank)
        with torch.autocast(logits.device.type, enabled=False):
            log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32).transpose(0, 1)
            # cuDNN's CTC is not deterministic.
            with torch.backends.cudnn.flags(enabled=False):
                return F.ctc_loss(
                    log_probs,
                    labels[targets],
                    logit_lengths,
                    targets.sum(-1),
                    blank=blank,
                    reduction=config.ctc_loss_reduction,
                    zero_infinity=config.ctc_zero_infinity,
                )


class SpidrForSequenceClassification(SpidrHeadModel):
    """One label per utterance (keywords, speakers, emotions, languages) from the mean over its frames."""

    def __init__(self, config: SpidrConfig):
        super().__init__(config, weighted_layer_sum=config.use_weighted_layer_sum)
        self.projector = nn.Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self._finish_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_values: B x S, standardised waveforms.
            attention_mask: B x S, 1 on audio.
            labels: B, label numbers below `config.num_labels`.

        Returns `loss` (a scalar, with `labels`) and `logits` (B x num_labels).
        """
        hidden_states, others = self._encode(input_values, attention_mask, output_hidden_states, output_attentions)
        hidden_states = self.projector(hidden_states)
        if attention_mask is None:
            pooled = hidden_states.mean(1)
        else:
            valid = self._get_feature_vector_attention_mask(hidden_states.shape[1], attention_mask)
            frames = valid.sum(1, keepdim=True).clamp(min=1)
            pooled = hidden_states.masked_fill(~valid.unsqueeze(-1), 0).sum(1) / frames.to(hidden_states.dtype)
        logits = self.classifier(pooled)
        loss = None
        if labels is not None:
            _check_labels(labels, self.config.num_labels, "num_labels")
            loss = F.cross_entropy(logits.float(), labels.flatten(), ignore_index=IGNORED_LABEL)
        return SequenceClassifierOutput(loss=loss, logits=logits, **others)


class SpidrForAudioFrameClassification(SpidrHeadModel):
    """One label per frame of 20 ms (phones, speakers, voice activity)."""

    def __init__(self, config: SpidrConfig):
        super().__init__(config, weighted_layer_sum=config.use_weighted_layer_sum)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._finish_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """
        Args:
            input_values: B x S, standardised waveforms.
            attention_mask: B x S, 1 on audio. Padded frames do not count in the loss.
            labels: B x T, label numbers below `config.num_labels`, -100 where a frame has none; or one-hot, B x T x
                num_labels.

        Returns `loss` (a scalar, mean over the frames with a label, with `labels`) and `logits` (B x T x num_labels).
        """
        hidden_states, others = self._encode(input_values, attention_mask, output_hidden_states, output_attentions)
        logits = self.classifier(hidden_states)
        loss = None if labels is None else self._loss(logits, labels, attention_mask)
        return TokenClassifierOutput(loss=loss, logits=logits, **others)

    def _loss(self, logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
        if labels.shape not in (logits.shape, logits.shape[:2]):
            raise ValueError(
                f"`labels` must have one entry per frame, shape {tuple(logits.shape[:2])} (label numbers) or "
                f"{tuple(logits.shape)} (one-hot), got {tuple(labels.shape)}: crop or pad (-100) them to the frames of "
                "the batch, `model._get_feat_extract_output_lengths(samples)`."
            )
        if labels.dim() == 3:
            labels = labels.argmax(-1)
        _check_labels(labels, self.config.num_labels, "num_labels")
        if attention_mask is not None:
            valid = self._get_feature_vector_attention_mask(logits.shape[1], attention_mask)
            labels = labels.masked_fill(~valid, IGNORED_LABEL)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)


class AMSoftmaxLoss(nn.Module):
    """Additive margin softmax (arXiv 1801.05599): cosine similarities to one learned direction per speaker."""

    def __init__(self, width: int, num_labels: int, scale: float = 30.0, margin: float = 0.4):
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.empty(width, num_labels))

    def forward(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """Hidden states B x D and labels B -> scalar, in float32."""
        # Scaled thirtyfold, cosines rounded to bfloat16 would be off by a tenth.
        with torch.autocast(hidden_states.device.type, enabled=False):
            cosines = F.normalize(hidden_states.float(), dim=1) @ F.normalize(self.weight.float(), dim=0)
            target = torch.arange(cosines.shape[1], device=labels.device) == labels.unsqueeze(1)
            return F.cross_entropy(self.scale * (cosines - self.margin * target), labels, ignore_index=IGNORED_LABEL)


class SpidrForXVector(SpidrHeadModel):
    """Speaker embeddings (x-vectors): dilated convolutions over frames, then their mean and deviation over time."""

    def __init__(self, config: SpidrConfig):
        super().__init__(config, weighted_layer_sum=config.use_weighted_layer_sum)
        self.projector = nn.Linear(config.hidden_size, config.tdnn_dim[0])
        in_channels = (config.tdnn_dim[0], *config.tdnn_dim[:-1])
        self.tdnn = nn.ModuleList(
            nn.Conv1d(i, o, kernel)
            for i, o, kernel in zip(in_channels, config.tdnn_dim, config.tdnn_kernel, strict=True)
        )
        self.embedding = nn.Linear(2 * config.tdnn_dim[-1], config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = AMSoftmaxLoss(config.xvector_output_dim, config.num_labels)
        self._finish_init()

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> XVectorOutput:
        """
        Args:
            input_values: B x S, standardised waveforms.
            attention_mask: B x S, 1 on audio.
            labels: B, speaker numbers below `config.num_labels`.

        Returns `loss` (a scalar, float32, with `labels`), `logits` and `embeddings` (B x xvector_output_dim; the
        embeddings are what speakers are compared by).
        """
        hidden_states, others = self._encode(input_values, attention_mask, output_hidden_states, output_attentions)
        lengths = self._tdnn_lengths(hidden_states.shape[1], attention_mask)
        hidden_states = self.projector(hidden_states).transpose(1, 2)
        for conv, kernel, dilation in zip(self.tdnn, self.config.tdnn_kernel, self.config.tdnn_dilation, strict=True):
            hidden_states = F.relu(_dilated(conv, hidden_states, kernel, dilation))
        embeddings = self.embedding(self.pool_statistics(hidden_states.transpose(1, 2), lengths))
        logits = self.classifier(embeddings)
        loss = None
        if labels is not None:
            _check_labels(labels, self.config.num_labels, "num_labels")
            loss = self.objective(logits, labels.flatten())
        return XVectorOutput(loss=loss, logits=logits, embeddings=embeddings, **others)

    def _tdnn_lengths(self, length: int, attention_mask: Tensor | None) -> Tensor | None:
        """Outputs of the convolutions that saw no padding, per row (B); None when nothing is padded."""
        config = self.config
        span = sum((k - 1) * d for k, d in zip(config.tdnn_kernel, config.tdnn_dilation, strict=True))
        shortest, lengths = length, None
        if attention_mask is not None:
            lengths = self._get_feat_extract_output_lengths(valid_samples(attention_mask))
            # As in the encoder: a look at the mask waits for the device.
            if not torch.compiler.is_compiling() and (lengths.device.type == "cpu" or not self.training):
                shortest = int(lengths.min())
            lengths = (lengths - span).clamp(min=1)
        if shortest <= span:
            needed = span + 1
            for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
                needed = (needed - 1) * stride + kernel
            raise ValueError(
                f"An utterance of {shortest} frames is too short for a speaker embedding, which needs {span + 1} "
                f"frames ({needed} samples): leave it out, or pad the audio itself."
            )
        return lengths

    @staticmethod
    def pool_statistics(hidden_states: Tensor, lengths: Tensor | None) -> Tensor:
        """Mean and standard deviation (unbiased) over the valid frames of B x T x C: B x 2C."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            mean, var = masked_var_mean(hidden_states.float(), lengths)
            frames = hidden_states.shape[1] if lengths is None else lengths.view(-1, 1, 1)
            frames = torch.as_tensor(frames, device=hidden_states.device)
            unbiased = var * (frames / (frames - 1).clamp(min=1))
            # Channels that the ReLU silenced are constant, and sqrt has no gradient at 0.
            pooled = torch.cat([mean, unbiased.clamp(min=1e-10).sqrt()], dim=-1)
        return pooled.squeeze(1).to(hidden_states.dtype)


def _dilated(conv: nn.Module, x: Tensor, kernel: int, dilation: int) -> Tensor:
    """`conv` over every `dilation`-th frame of B x C x T -> B x O x T - (kernel - 1) * dilation.

    It knows no dilation itself, so that peft's adapters, which have none either, fit beside it.
    """
    batch, _, length = x.shape
    if dilation == 1:
        return conv(x)
    rows = F.pad(x, (0, -length % dilation)).unflatten(2, (-1, dilation)).permute(0, 3, 1, 2)
    out = conv(rows.flatten(0, 1)).unflatten(0, (batch, dilation)).permute(0, 2, 3, 1).flatten(2)
    return out[:, :, : length - (kernel - 1) * dilation]


def _check_labels(labels: Tensor, size: int, field: str) -> None:
    """Labels outside of [0, size) would end in a device-side assertion that names nothing."""
    if labels.is_floating_point():
        raise ValueError(f"`labels` must be integers, got {labels.dtype}.")
    if torch.compiler.is_compiling() or labels.numel() == 0:
        return
    wrong = labels[(labels != IGNORED_LABEL) & ((labels < 0) | (labels >= size))]
    if wrong.numel() > 0:
        raise ValueError(
            f"`labels` holds {wrong[0].item()}, and `config.{field}` allows 0 to {size - 1} (or -100, which is "
            f"ignored): set `{field}` to the number of labels when loading the model."
        )


__all__ = [
    "SpidrForAudioFrameClassification",
    "SpidrForCTC",
    "SpidrForSequenceClassification",
    "SpidrForXVector",
]
