"""`SpidrForPretraining`, the objective of SpidR and DinoSR, and `SpidrForAudioTokenization`, its units."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple

from .codebooks_spidr import (
    SpidrCodebooks,
    SpidrPredictionHeads,
    SpidrTeacher,
    SpidrTrainingStatistics,
    StatisticsBuffer,
    instance_norm_rows,
    label_distributions,
    perplexity,
)
from .configuration_spidr import SpidrConfig
from .kernels_spidr import NAMESPACE
from .layers_spidr import SpidrEncoderOutput, gather_frames
from .modeling_spidr_base import SpidrModel, SpidrPreTrainedModel, frame_mask
from .objectives_spidr import get_objective

logger = logging.get_logger(__name__)

# Far more than anyone accumulates gradients over.
FORWARDS_WITHOUT_UPDATE = 500


@dataclass
class SpidrForPretrainingOutput(ModelOutput):
    """
    Attributes:
        loss: cross-entropy, mean over this process's masked frames and all codebooks.
        target_ppl: perplexity of the teacher's labels over the masked frames, averaged over codebooks. It falls
            towards 1 when training collapses.
        pred_ppl: perplexity of the mean predicted distribution, averaged over codebooks.
        layer_losses: K scalars, one per codebook.
        num_masked_frames: masked frames of this batch (float32 scalar).
        labels: K x N, the codewords that teacher and codebooks assign to the N masked frames, row after row of the
            batch; with `output_predictions`, and so is the next.
        log_probs: K x N x V, what the student predicts there (float32).
    """

    loss: Tensor | None = None
    target_ppl: Tensor | None = None
    pred_ppl: Tensor | None = None
    layer_losses: tuple[Tensor, ...] | None = None
    num_masked_frames: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    labels: Tensor | None = None
    log_probs: Tensor | None = None


@dataclass
class SpidrAudioTokenizationOutput(ModelOutput):
    """
    Attributes:
        audio_codes: B x K x T (int64), the predicted codeword of every codebook and frame, -1 on padding. Codebook
            `k` belongs to layer `config.first_codebook_layer + k`, layers counted from 1.
    """

    audio_codes: Tensor | None = None


class _CodebookPredictions:
    """How predictions are read, in training and after: what head k sees is the one difference of the objectives."""

    config: SpidrConfig
    spidr: SpidrModel
    heads: SpidrPredictionHeads

    def _encode(
        self,
        hidden_states: Tensor,
        lengths: Tensor | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> SpidrEncoderOutput:
        """Student encoder, with what the heads read at the frames `rows` and nothing that no one reads."""
        own_layer = get_objective(self.config.objective).reads_own_layer
        return self.spidr(
            None,
            projected=hidden_states,
            mask_time_indices=mask,
            frame_mask=frame_mask(lengths, hidden_states.shape[1]),
            first_representation=self.config.first_codebook_layer if own_layer else None,
            output_layers=output_hidden_states,
            output_attentions=output_attentions,
            representation_only=own_layer and not output_hidden_states,
            last_rows=rows,
        )

    def _logits(self, output: SpidrEncoderOutput, rows: Tensor | None = None) -> Tensor:
        """Logits K x N x V, float32, of the frames `rows` (indices into B * T; all by default)."""
        if get_objective(self.config.objective).reads_own_layer:
            inputs = gather_frames(output.representations, rows)
        else:
            inputs = gather_frames([output.last_hidden_state], rows).flatten(0, 1)
        return self.heads(inputs).float()

    def _frame_logits(self, input_values: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits K x B x T x V of all frames, and the bool mask of valid frames (None: all)."""
        features, lengths = self.spidr.extract_features(input_values, attention_mask)
        batch, length, _ = features.shape
        logits = self._logits(self._encode(self.spidr.project(features), lengths))
        return logits.view(len(logits), batch, length, -1), frame_mask(lengths, length)

    def get_codebooks(
        self, input_values: Tensor, attention_mask: Tensor | None = None, *, onehot: bool = False
    ) -> list[Tensor | None]:
        """Predicted codeword probabilities of each layer: L entries, B x T x V, None for layers without a codebook.

        Entry `i` belongs to layer `i + 1`. With `onehot` the most likely codeword has 1 and the others 0. The units
        of spoken language models are the argmax of layer 5 or 6 (arXiv 2512.20308).
        """
        logits, _ = self._frame_logits(input_values, attention_mask)
        codewords = logits.shape[-1]
        predictions = F.one_hot(logits.argmax(-1), codewords).to(logits.dtype) if onehot else logits.softmax(-1)
        return [None] * (self.config.first_codebook_layer - 1) + list(predictions.unbind(0))


class SpidrForPretraining(_CodebookPredictions, SpidrPreTrainedModel):
    """Student, prediction heads, codebooks and teacher (SpidR: arXiv 2512.20308, DinoSR: arXiv 2305.10005).

    Training:

    ```python
    for step, batch in enumerate(batches, start=1):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        decay = model.update_teacher(step)
    ```

    Several forwards before `update_teacher` count as one large batch for the codebooks, and so do the forwards of all
    processes. `forward` itself never communicates.

    Quantisation takes every Linear, the teacher's too, and a quantised teacher gives other targets:
    `TorchAoConfig(..., modules_to_not_convert=["teacher"])` keeps it in float32.
    """

    _keys_to_ignore_on_load_unexpected = None  # type: ignore[assignment]  # all of the file is this model's
    _keep_in_fp32_modules_strict = ["codebooks", "teacher"]

    def __init__(self, config: SpidrConfig):
        super().__init__(config)
        if config.num_codebooks == 0:
            raise ValueError("`num_codebooks` is 0: pretraining needs at least one codebook.")
        self.spidr = SpidrModel(config)
        self.heads = SpidrPredictionHeads(config)
        self.codebooks = SpidrCodebooks(config)
        self.teacher = SpidrTeacher(config)
        self.register_buffer("current_step", torch.zeros(1, dtype=torch.int64))
        self.statistics: StatisticsBuffer | None = None
        # Forwards with gradients since the last update.
        self._forwards = torch.zeros((), dtype=torch.int64, device="cpu")
        self.post_init()
        self.teacher.eval()
        self._set_trainable()

    def _init_weights(self, module) -> None:
        super()._init_weights(module)
        if module is self:
            init.zeros_(self.current_step)
            # The teacher begins as the student's copy with freshly drawn Linear layers.
            for copy, module in zip(self.teacher.modules(), self.spidr.encoder.modules(), strict=True):
                if not isinstance(copy, nn.Linear):
                    for name, parameter in copy.named_parameters(recurse=False):
                        init.copy_(parameter, module.get_parameter(name))

    def _set_trainable(self) -> None:
        self.teacher.requires_grad_(False)
        if get_objective(self.config.objective).reads_own_layer:
            # Nothing reads the last layer's output, so its last norm would never see a gradient.
            encoder = self.spidr.encoder
            unread = encoder.layer_norm if self.config.do_stable_layer_norm else encoder.layers[-1].final_layer_norm
            unread.requires_grad_(False)

    def freeze_feature_encoder(self) -> None:
        """Stops training the feature extractor and the feature projection, and drops their gradients."""
        for module in (self.spidr.feature_extractor, self.spidr.feature_projection):
            for parameter in module.parameters():
                parameter.requires_grad_(False)
                parameter.grad = None

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_predictions: bool = False,
        **kwargs,
    ) -> SpidrForPretrainingOutput:
        """
        Args:
            input_values: B x S, standardised waveforms.
            attention_mask: B x S, 1 on audio; leave it out when nothing is padded.
            mask_time_indices: the masked frames, as B x T (bool) or as B x M frame numbers (int64; M masked frames in
                every row, which never waits for the device). Without it every frame counts as masked and none is
                replaced.
            output_predictions: also return `labels` and `log_probs` of every masked frame, for validation.

        In train mode the labels also enter the statistics that `update_teacher` applies to the codebooks.
        """
        config = self.config
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        features, lengths = self.spidr.extract_features(input_values, attention_mask)
        projected = self.spidr.project(features)
        batch, length, _ = projected.shape
        mask, rows = _masked_frames(mask_time_indices, lengths, batch, length, projected.device)
        if rows.numel() == 0:
            raise ValueError("`mask_time_indices` masks no frame, so there is nothing to predict.")

        targets = get_objective(config.objective).targets(self, projected, lengths, rows)
        labels = self.codebooks(targets)

        student = F.dropout(projected, config.feat_proj_dropout, self.training)
        output = self._encode(
            student,
            lengths,
            output_hidden_states=bool(output_hidden_states),
            output_attentions=bool(output_attentions),
            mask=mask,
            rows=None if mask is None else rows,
        )
        logits = self._logits(output, rows)
        with torch.autocast(logits.device.type, enabled=False):
            log_probs = logits.log_softmax(-1)
            losses = F.nll_loss(log_probs.flatten(0, 1), labels.flatten(), reduction="none")
            layer_losses = losses.view(labels.shape).mean(-1)
            with torch.no_grad():
                predictions = log_probs.exp().mean(1)
        if self.training:
            if torch.is_grad_enabled():
                _count_forward(self._forwards)
            self._accumulate(labels, targets, layer_losses, predictions)
        return SpidrForPretrainingOutput(
            loss=layer_losses.mean(),
            target_ppl=perplexity(label_distributions(labels, config.codebook_size)),
            pred_ppl=perplexity(predictions),
            layer_losses=layer_losses.unbind(0),
            num_masked_frames=torch.full((), rows.numel(), dtype=torch.float32, device=logits.device),
            hidden_states=output.hidden_states if output_hidden_states else None,
            attentions=tuple(output.attentions) if output_attentions else None,
            labels=labels if output_predictions else None,
            log_probs=log_probs if output_predictions else None,
        )

    @torch.no_grad()
    def teacher_targets(self, projected: Tensor, lengths: Tensor | None, rows: Tensor) -> Tensor:
        """Normalised teacher representations of the frames `rows`: K x N x H, float32 (arXiv 2305.10005, eq. 2)."""
        output = self.teacher(
            projected.detach().to(self.teacher.layer_norm.weight.dtype),
            frame_mask(lengths, projected.shape[1]),
            first_representation=self.config.first_codebook_layer,
            representation_only=True,
        )
        with torch.autocast(projected.device.type, enabled=False):
            return instance_norm_rows(output.representations, rows, lengths)

    @torch.no_grad()
    def get_teacher_labels(self, input_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Codewords that teacher and codebooks assign to unmasked audio: B x K x T (int64), -1 on padding."""
        features, lengths = self.spidr.extract_features(input_values, attention_mask)
        batch, length, _ = features.shape
        rows = torch.arange(batch * length, device=features.device)
        labels = self.codebooks(
            get_objective(self.config.objective).targets(self, self.spidr.project(features), lengths, rows)
        )
        return _fill_padding(labels.view(-1, batch, length).transpose(0, 1), frame_mask(lengths, length))

    def _accumulate(self, labels: Tensor, targets: Tensor, layer_losses: Tensor, predictions: Tensor) -> None:
        if self.statistics is None or self.statistics.flat.device != labels.device:
            self.statistics = StatisticsBuffer(self.config, labels.device)
        with torch.no_grad():
            self.statistics.add(labels, targets, layer_losses, predictions)

    def reduce_statistics(self) -> SpidrTrainingStatistics:
        """What all processes saw since the last `update_teacher`, summed in the update's one collective.

        Every process must call it; `update_teacher` does so itself where it was not called.
        """
        if self.statistics is None or self.statistics.empty:
            raise RuntimeError("No forward in train mode since the last update: there are no statistics to reduce.")
        return self.statistics.reduce()

    def discard_statistics(self) -> None:
        """Forgets what was seen since the last update, for an update that is skipped."""
        self._forwards.zero_()
        if self.statistics is not None:
            self.statistics.clear()

    def teacher_decay(self, step: int) -> float:
        """Decay of the teacher after optimizer step `step`, counted from 1; at 1 the teacher stands still."""
        return get_objective(self.config.objective).teacher_decay(self.config, step)

    @torch.no_grad()
    def update_teacher(self, step: int, where: Tensor | None = None) -> float:
        """Moves codebooks and teacher after optimizer step `step`, counted from 1; returns the teacher's decay.

        All processes must call it. At `config.freeze_step` it also freezes feature extractor and projection. `where`
        (a bool on the device): False leaves codebooks and teacher as they are, as after a skipped update, without
        Python having to know.
        """
        if step < 1:
            raise ValueError(f"Steps are counted from 1, got {step}.")
        self._forwards.zero_()
        self.missing_weights = frozenset()
        if self.statistics is not None and not self.statistics.empty:
            self.statistics.share()
            self.codebooks.update(self.statistics.counts, self.statistics.sums, where)
            self.statistics.clear()
        decay = self.teacher_decay(step)
        if decay < 1:
            averaged, copied = self._teacher_pairs()
            if averaged:
                _move_towards(averaged, 1 - decay, where)
            if copied:
                weights = 1.0 if where is None else [where.float()] * len(copied)
                torch._foreach_lerp_([teacher for teacher, _ in copied], [student for _, student in copied], weights)
        if where is None:
            self.current_step.fill_(step)
        else:
            self.current_step.copy_(torch.where(where, step, self.current_step))
        if step >= self.config.freeze_step:
            self.freeze_feature_encoder()
        return decay

    def _teacher_pairs(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """(teacher, student) parameters that are averaged, and those that are copied (`ema_exclude_layers`)."""
        student = dict(self.spidr.encoder.named_parameters())
        averaged: list[tuple[Tensor, Tensor]] = []
        copied: list[tuple[Tensor, Tensor]] = []
        for name, teacher in self.teacher.named_parameters():
            pairs = copied if name.startswith(tuple(self.config.ema_exclude_layers)) else averaged
            pairs.append((_local(teacher), _local(student[name]).to(teacher.dtype)))
        return averaged, copied


class SpidrForAudioTokenization(_CodebookPredictions, SpidrPreTrainedModel):
    """Speech to units: the encoder and the prediction heads of a pretraining checkpoint, without the teacher."""

    _keys_to_ignore_on_load_unexpected = [r"^teacher\.", r"^codebooks\.", r"^current_step$"]

    def __init__(self, config: SpidrConfig):
        super().__init__(config)
        if config.num_codebooks == 0:
            raise ValueError("`num_codebooks` is 0: there are no units to predict.")
        self.spidr = SpidrModel(config)
        self.heads = SpidrPredictionHeads(config)
        self.post_init()

    @can_return_tuple
    def encode(
        self, input_values: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> SpidrAudioTokenizationOutput:
        """Waveforms B x S -> `audio_codes` B x K x T: the most likely codeword of each codebook, one per 20 ms."""
        logits, valid = self._frame_logits(input_values, attention_mask)
        return SpidrAudioTokenizationOutput(audio_codes=_fill_padding(logits.argmax(-1).transpose(0, 1), valid))

    def forward(
        self, input_values: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> SpidrAudioTokenizationOutput:
        """The same as `encode`."""
        return self.encode(input_values, attention_mask, **kwargs)


# A compiled graph runs no Python but its operators, so this is one. On the CPU nothing waits for the device.
@torch.library.custom_op(f"{NAMESPACE}::count_forward", mutates_args=("count",))
def _count_forward(count: Tensor) -> None:
    count.add_(1)
    if int(count) == FORWARDS_WITHOUT_UPDATE:
        logger.warning_once(
            f"{FORWARDS_WITHOUT_UPDATE} forwards in training without `update_teacher`: the teacher, the codebooks and "
            "the step stand still. With a Trainer, pass `callbacks=[SpidrTrainerCallback()]` (from spidr_hf); in a "
            "loop of your own call `model.update_teacher(step)` after every `optimizer.step()`."
        )


@_count_forward.register_fake
def _(count):
    pass


def _move_towards(pairs: list[tuple[Tensor, Tensor]], weight: float, where: Tensor | None) -> None:
    """Moves the first of each pair towards the second by the share `weight`; not at all where `where` is False."""
    moved, towards = [first for first, _ in pairs], [second for _, second in pairs]
    if where is None:
        torch._foreach_lerp_(moved, towards, weight)
        return
    # Weights that lie on the device cost lerp a launch per tensor. A step of gradient descent along `towards - moved`
    # is the same, in one launch for all, and knows an update that is to be left out.
    recipe = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}
    torch._fused_sgd_(moved, towards, [], lr=-weight, weight_decay=-1.0, found_inf=(~where).float(), **recipe)


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that FSDP2 shards (teacher and student alike), any other as it is."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _fill_padding(labels: Tensor, valid: Tensor | None) -> Tensor:
    """Labels B x K x T with -1 where the frame (B x T) is padding."""
    return labels.contiguous() if valid is None else labels.masked_fill(~valid.unsqueeze(1), -1)


def _masked_frames(
    mask: Tensor | None, lengths: Tensor | None, batch: int, length: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Masked frames as a bool mask B x T (None: replace nothing) and as N indices into B * T."""
    valid = frame_mask(lengths, length)
    if mask is None:
        if valid is None:
            return None, torch.arange(batch * length, device=device)
        return None, valid.flatten().nonzero().squeeze(1)
    if mask.dim() != 2 or len(mask) != batch or mask.is_floating_point():
        raise ValueError(
            f"`mask_time_indices` must be {batch} x {length} (bool) or {batch} x M frame numbers (int64), got "
            f"{mask.dtype} of shape {tuple(mask.shape)}."
        )
    mask = mask.to(device)
    if mask.shape[1] == length or mask.dtype == torch.bool:
        # Integers of the full length are the 0 / 1 masks that transformers' own scripts make.
        if mask.shape[1] != length:
            raise ValueError(f"`mask_time_indices` covers {mask.shape[1]} frames, the audio has {length}.")
        mask = mask.bool() if valid is None else mask.bool() & valid
        return mask, mask.flatten().nonzero().squeeze(1)
    rows = mask + torch.arange(batch, device=device).unsqueeze(1) * length
    return torch.zeros(batch, length, dtype=torch.bool, device=device).scatter_(1, mask, True), rows.flatten()


__all__ = [
    "SpidrAudioTokenizationOutput",
    "SpidrForAudioTokenization",
    "SpidrForPretraining",
    "SpidrForPretrainingOutput",
]
