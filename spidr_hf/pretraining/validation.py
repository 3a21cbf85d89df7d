"""How well a model in training does on data that it does not train on: loss, perplexities, and what its units know.

The numbers are those of training (the loss of the masked frames, per codebook; perplexities over all of them together)
in eval mode, where nothing moves: no dropout, codebooks and teacher untouched. Which frames are masked, and which part
of a long utterance is looked at, depends on the seed and the utterance alone, so that checkpoints can be compared. An
utterance gives the same whatever shares its batch: batches are padded, and no row's mask is thinned for its neighbours.

Where phones are known, the units that every codebook's layer predicts of whole, unmasked utterances are held against
them: purity and PNMI (arXiv 2106.07447).
"""

import hashlib
import importlib.util
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..configuration_spidr import SAMPLING_RATE, frame_lengths
from ..data.alignments import alignment_files, read_alignments
from ..data.batches import min_samples, padded
from ..data.batching import batches_by_length, read_ahead
from ..data.masking import masked_frames
from ..data.open import open_data
from ..data.sections import DataSection
from ..data.sources import Skipped
from ..evaluation.discovery import discovery_scores
from ..evaluation.phones import cluster_purity, count_pairs, phone_purity, phone_steps, pnmi, without_silence
from ..feature_extraction_spidr import SpidrFeatureExtractor
from ..modeling_spidr import SpidrForPretraining
from ..system.errors import AudioError, ConfigError
from ..system.messages import counted
from ..system.names import find_names
from ..system.processes import gather_all
from ..training.planning import NOTE, PROBLEM, Line
from ..training.sharding import is_sharded
from ..units.extractor import Extractor, Outputs
from .config import PretrainingConfig
from .loaders import decoding_plan

# What a random number is drawn for; part of its seed.
_CROP, _MASK = range(2)
_MAX_THREADS = 8


class Utterance(NamedTuple):
    """An utterance as validation needs it: standardised, `waveform` whole (None where no one asks for its units) and
    `crop`, of which frames are masked."""

    index: int  # type: ignore[assignment]  # not a tuple's `index`
    crop: np.ndarray
    waveform: np.ndarray | None


@dataclass
class Totals:
    """Sums over the masked frames of some utterances. `counts` and `predictions` are K x V, `phones` has for every
    phone K x V steps of 10 ms."""

    frames: int
    losses: np.ndarray
    counts: np.ndarray
    predictions: np.ndarray
    phones: dict[str, np.ndarray] = field(default_factory=dict)
    units: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)  # of aligned utterances, by layer and fileid
    samples: int = 0
    utterances: int = 0
    aligned: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    @classmethod
    def empty(cls, codebooks: int, codewords: int) -> "Totals":
        """Of no utterance."""
        return cls(0, np.zeros(codebooks), np.zeros((codebooks, codewords)), np.zeros((codebooks, codewords)))

    def add(self, other: "Totals") -> None:
        """Those of further utterances."""
        self.frames += other.frames
        self.losses = self.losses + other.losses
        self.counts = self.counts + other.counts
        self.predictions = self.predictions + other.predictions
        for phone, counts in other.phones.items():
            self.phones[phone] = self.phones[phone] + counts if phone in self.phones else counts
        for layer, units in other.units.items():
            self.units.setdefault(layer, {}).update(units)
        self.samples += other.samples
        self.utterances += other.utterances
        self.aligned += other.aligned
        self.skipped += other.skipped

    def scores(self) -> dict[str, Any]:
        """The numbers of a row of validation.jsonl; lists have an entry per codebook."""
        layer_losses = self.losses / self.frames
        target_ppl, pred_ppl = _perplexities(self.counts), _perplexities(self.predictions)
        scores = {
            "loss": float(layer_losses.mean()),
            "layer_losses": layer_losses.tolist(),
            "target_ppl": float(target_ppl.mean()),
            "pred_ppl": float(pred_ppl.mean()),
            "layer_target_ppl": target_ppl.tolist(),
            "layer_pred_ppl": pred_ppl.tolist(),
            "active_codewords": (self.counts > 0).sum(axis=1).tolist(),
            "num_masked_frames": self.frames,
            "audio_seconds": self.samples / SAMPLING_RATE,
            "utterances": self.utterances,
            "skipped": len(self.skipped),
        }
        if not self.phones:
            return scores
        names = sorted(self.phones)
        layers = np.stack([self.phones[name] for name in names], axis=1)
        spoken = [without_silence(counts, names)[0] for counts in layers]
        return scores | {
            "phone_purity": [phone_purity(counts) for counts in layers],
            "cluster_purity": [cluster_purity(counts) for counts in layers],
            "pnmi": [pnmi(counts) for counts in layers],
            "pnmi_without_silence": [pnmi(counts) if counts.sum() else 0.0 for counts in spoken],
            "aligned_utterances": self.aligned,
        }


class ValidationSet:
    """One data set to validate on.

    Args:
        name: `<name>` of `[validation.<name>]`.
        data: its fields.
        config: the run's configuration: model, masks, seed.
        cache_folder: where the scan of a folder or tar is kept; None: nowhere.
        progress: show bars.

    Raises `ManifestError` or `ConfigError` for audio or alignments that cannot be used.

    Attributes:
        fingerprint: changes with everything but the model that the numbers depend on.
    """

    def __init__(
        self,
        name: str,
        data: DataSection,
        config: PretrainingConfig,
        *,
        cache_folder: str | Path | None = None,
        progress: bool = True,
    ):
        self.name, self.data, self.model_config, self.progress = name, data, config.model, progress
        self.spans, self.seed = config.masking.spans(), config.run.random_seed
        self.min_samples = max(data.min_sample_size, min_samples(config.model))
        self._notes: dict[str, bool] = {}  # and whether it was told
        cache = None if cache_folder is None else Path(cache_folder) / f"validation-{quote(name, safe='')}.arrow"
        self.source = open_data(
            data.manifest,  # type: ignore[arg-type]  # the config has seen to it that there is one
            resample=data.resample,
            cache=cache,
            progress=progress,
        )
        lengths = np.asarray(self.source.num_samples)
        kept = np.flatnonzero(lengths >= self.min_samples)
        if not len(kept):
            raise ConfigError(
                f"[validation.{name}]: {counted(0, 'utterance', of=len(lengths))} of {data.manifest} have the "
                f"{self.min_samples} samples of `min_sample_size`."
            )
        if len(kept) < len(lengths):
            short = len(lengths) - len(kept)
            self._note(f"{counted(short, 'utterance', 'is', 'are', of=len(lengths))} too short and left out")
        crops = np.minimum(lengths[kept], data.max_sample_size)
        self.batches = [kept[batch] for batch in batches_by_length(crops, data.max_batch_length)]
        self.num_utterances = len(kept)
        self._standardize = SpidrFeatureExtractor().standardize if data.normalize else None
        if data.alignments_path and importlib.util.find_spec("rapidfuzz") is None:  # which counts phones' errors
            raise ConfigError(
                f"`validation.{name}.alignments_path` needs the package rapidfuzz: pip install 'spidr_hf[train]'."
            )
        self._phones = self._align(kept) if data.alignments_path else {}
        self._extractor: Extractor | None = None
        self.fingerprint = self._fingerprint()

    def evaluate(
        self,
        model: SpidrForPretraining,
        precision: AbstractContextManager | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """The scores of a model (`Totals.scores`); None when `interrupted`, which is asked after every batch, says so.

        All processes call it alike and get the same; they share the work. (Where the model is sharded each does all of
        it, since a forward takes every process.) The model is as it was afterwards: mode, codebooks, statistics and
        random numbers.
        """
        shared = world_size > 1 and not is_sharded(model)
        if not shared:
            rank, world_size = (rank if world_size > 1 else 0), 1
        batches = self.batches[rank::world_size] if shared else self.batches
        rounds = -(-len(self.batches) // world_size)
        totals = Totals.empty(self.model_config.num_codebooks, self.model_config.codebook_size)
        was_training = model.training
        model.eval()
        bar = tqdm(
            total=sum(map(len, batches)),
            desc=f"Validating on {self.name}",
            unit="file",
            leave=False,
            disable=not self.progress or rank > 0,
        )
        try:
            with torch.no_grad(), _eager(model), bar:
                loaded = read_ahead(batches, self.read, self._threads)
                for _ in range(rounds):
                    if (batch := next(loaded, None)) is not None:
                        with precision or nullcontext():
                            totals.add(self.totals_of(model, batch))
                        bar.update(len(batch))
                    if interrupted():
                        return None
        finally:
            model.train(was_training)
        if shared:
            parts = gather_all([totals])
            totals = Totals.empty(self.model_config.num_codebooks, self.model_config.codebook_size)
            for part in parts:
                totals.add(part)
        self._check_skipped(totals.skipped)
        return totals.scores() | self._discovery(totals.units)

    @property
    def score_names(self) -> list[str]:
        """Of what `evaluate` gives, what tells a better model from a worse."""
        one = Totals(1, np.ones(1), np.ones((1, 1)), np.ones((1, 1)))
        if self._phones:
            one.phones["SIL"] = np.ones((1, 1), dtype=np.int64)
        names = [name for name, value in one.scores().items() if isinstance(value, (float, list))]
        return [name for name in names if name != "audio_seconds"] + (["per", "f1", "r_val"] if self._phones else [])

    def new_notes(self) -> list[str]:
        """What the user should know and was not told yet, one line each."""
        new = [note for note, told in self._notes.items() if not told]
        self._notes |= dict.fromkeys(new, True)
        return new

    def masked_frames(self, fileid: str, frames: int) -> np.ndarray | None:
        """Masked frames of an utterance of `frames` frames: M frame numbers, ascending; None where none is masked."""
        if self.spans is None:
            return None
        return masked_frames(np.array([frames]), self.spans, self._rng(_MASK, self.seed, fileid))[0]

    def totals_of(self, model: SpidrForPretraining, batch: Sequence[Utterance | Skipped]) -> Totals:
        utterances = [entry for entry in batch if isinstance(entry, Utterance)]
        totals = Totals.empty(model.config.num_codebooks, model.config.codebook_size)
        totals.skipped = [entry for entry in batch if isinstance(entry, Skipped)]
        totals.utterances = len(utterances)
        totals.samples = sum(len(utterance.crop) for utterance in utterances)
        if not utterances:
            return totals
        output = model(**self._inputs(utterances, model.device), output_predictions=True)
        losses = -output.log_probs.gather(-1, output.labels.unsqueeze(-1)).squeeze(-1)
        codewords = model.config.codebook_size
        totals.frames = output.labels.shape[1]
        totals.losses = losses.sum(-1, dtype=torch.float64).cpu().numpy()
        totals.predictions = output.log_probs.exp().sum(1, dtype=torch.float64).cpu().numpy()
        labels = output.labels.cpu().numpy()
        totals.counts = np.stack([np.bincount(row, minlength=codewords) for row in labels]).astype(float)
        self._count_phones(model, utterances, totals)
        return totals

    def _discovery(self, units: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, list[float]]:
        """`per`, `f1` and `r_val` of every codebook's layer; nothing where no utterance is aligned."""
        if not units:
            return {}
        by_name = {self.source.fileid(index): phones for index, phones in self._phones.items()}
        codewords = self.model_config.codebook_size
        layers = [discovery_scores(units[layer], by_name, num_units=codewords) for layer in sorted(units)]
        return {name: [scores[name] for scores in layers] for name in layers[0]}

    def _inputs(self, utterances: Sequence[Utterance], device: torch.device) -> dict[str, Tensor]:
        rows, valid = padded([utterance.crop for utterance in utterances])
        inputs = {"input_values": rows} | ({} if valid is None else {"attention_mask": valid})
        if self.spans is not None:
            frames = frame_lengths(self.model_config, torch.tensor([len(utterance.crop) for utterance in utterances]))
            mask = torch.zeros(len(utterances), int(frames.max()), dtype=torch.bool)
            for row, utterance, count in zip(mask.numpy(), utterances, frames.tolist(), strict=True):
                row[self.masked_frames(self.source.fileid(utterance.index), count)] = True
            inputs["mask_time_indices"] = mask
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def _count_phones(self, model: SpidrForPretraining, utterances: Sequence[Utterance], totals: Totals) -> None:
        whole = [utterance for utterance in utterances if utterance.waveform is not None]
        if not whole:
            return
        if self._extractor is None or self._extractor.model is not model:
            seconds = self.data.max_batch_length / SAMPLING_RATE
            self._extractor = Extractor(
                model, SpidrFeatureExtractor(), _predicted_units(model), max_batch_seconds=seconds
            )
        results = self._extractor([utterance.waveform for utterance in whole if utterance.waveform is not None])
        codewords, first = model.config.codebook_size, model.config.first_codebook_layer
        for utterance, units in zip(whole, results, strict=True):
            fileid = self.source.fileid(utterance.index)
            phones = {fileid: self._phones[utterance.index]}
            for layer, sequence in units.items():
                try:
                    counts, names = count_pairs({fileid: sequence.numpy()}, phones, num_units=codewords)
                except ValueError as error:  # the file is not as long as its manifest says
                    totals.skipped.append(Skipped(fileid, str(error)))
                    break
                for name, row in zip(names, counts, strict=True):
                    if name not in totals.phones:
                        totals.phones[name] = np.zeros((len(units), codewords), dtype=np.int64)
                    totals.phones[name][layer - first] += row
            else:
                totals.aligned += 1
                for layer, sequence in units.items():
                    totals.units.setdefault(layer, {})[fileid] = sequence.numpy().astype(np.int32)

    def read(self, index: int) -> Utterance | Skipped:
        fileid = self.source.fileid(index)
        try:
            waveform = self.source.read(index)
            if len(waveform) < self.min_samples:
                raise AudioError(f"{fileid}: has {len(waveform)} samples, {self.source.num_samples[index]} expected.")
        except AudioError as error:
            return Skipped(fileid, str(error))
        if self._standardize is not None:
            waveform = self._standardize(waveform)
        length = min(len(waveform), self.data.max_sample_size)
        start = 0
        if self.data.rand_crop and length < len(waveform):
            rng = self._rng(_CROP, self.data.random_seed, fileid)
            start = int(rng.integers(len(waveform) - length, endpoint=True))
        # A copy where the rest is not needed, so that it can be freed.
        crop = waveform[start : start + length]
        return Utterance(index, crop, waveform) if index in self._phones else Utterance(index, crop.copy(), None)

    def _align(self, indices: np.ndarray) -> dict[int, Any]:
        """Phones by utterance, of those whose alignment there is and can be used."""
        path = self.data.alignments_path
        try:
            alignments = read_alignments(str(path))
        except (ValueError, OSError) as error:
            raise ConfigError(f"`validation.{self.name}.alignments_path`: {error}") from error
        names = {self.source.fileid(int(index)): int(index) for index in indices}
        phones, missing, unusable = {}, [], []
        for fileid, candidates in find_names(names, alignments).items():
            if len(candidates) != 1:
                missing.append(fileid)
                continue
            try:
                phone_steps(alignments[candidates[0]])
            except ValueError as error:
                unusable.append(f"{fileid}: {error}")
                continue
            phones[names[fileid]] = alignments[candidates[0]]
        if not phones:
            raise ConfigError(
                f"`validation.{self.name}.alignments_path` {path} fits no utterance of {self.data.manifest}: its ids "
                f"({next(iter(alignments), 'there are none')!r}, for example) must be their names "
                f"({next(iter(names))!r})." + (f" {unusable[0]}" if unusable else "")
            )
        if missing:
            self._note(
                f"{counted(len(missing), 'utterance', 'has', 'have', of=len(names))} no alignment: {missing[0]}, for "
                "example"
            )
        if unusable:
            self._note(f"{counted(len(unusable), 'alignment')} cannot be used; {unusable[0]}")
        return phones

    def _check_skipped(self, skipped: Sequence[Skipped]) -> None:
        if len(skipped) == self.num_utterances or len(skipped) > self.data.max_skipped_share * self.num_utterances:
            raise AudioError(
                f"[validation.{self.name}]: {counted(len(skipped), 'utterance', of=self.num_utterances)} cannot be "
                f"used. The last: {skipped[-1].reason}"
            )
        if skipped:
            self._note(f"{counted(len(skipped), 'utterance')} cannot be used; the last: {skipped[-1].reason}")

    def _note(self, text: str) -> None:
        self._notes.setdefault(text, False)

    def _rng(self, purpose: int, seed: int, fileid: str) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(fileid.encode()), purpose])

    def _fingerprint(self) -> str:
        data = self.data
        status = [path.stat() for path in alignment_files(Path(data.alignments_path))] if data.alignments_path else []
        content = [
            self.source.fingerprint,
            [data.normalize, data.resample, data.rand_crop, data.random_seed, self.min_samples, data.max_sample_size],
            [self.seed, self.spans],
            [(entry.st_size, entry.st_mtime_ns) for entry in status],
        ]
        return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:12]

    @property
    def _threads(self) -> int:
        return max(1, min(self.data.num_workers, _MAX_THREADS))


def open_sets(
    config: PretrainingConfig, cache_folder: str | Path | None = None, *, progress: bool = True
) -> list[ValidationSet]:
    """Every `[validation.<name>]` of a configuration."""
    return [
        ValidationSet(name, data, config, cache_folder=cache_folder, progress=progress)
        for name, data in config.validation.items()
    ]


def plan(config: PretrainingConfig) -> Iterator[Line]:
    """What a run validates on, and when."""
    for name, section in config.validation.items():
        try:
            validation = ValidationSet(name, section, config)
        except (ValueError, OSError) as error:  # the others are looked at all the same
            yield Line(PROBLEM, " ".join(str(error).split()))
            continue
        yield from decoding_plan(validation.source, section.max_skipped_share, "validation")
        phones = "phones known" if section.alignments_path else "phones not known"
        yield Line("validation", f"{name}: {counted(validation.num_utterances, 'utterance')}, {phones}")
        for note in validation.new_notes():
            yield Line(NOTE, f"[validation.{name}]: {note}.")
    interval = config.run.validate_interval
    if config.validation and not interval:
        yield Line("validation", "by `examples/validate.py --run-dir DIR --watch`, beside the run")
    elif config.validation:
        yield Line("validation", f"by the training processes, every {counted(interval, 'update')}")
    elif interval:
        yield Line(PROBLEM, f"`run.validate_interval` is {interval}, and there is no section [validation.<name>].")


def _perplexities(counts: np.ndarray) -> np.ndarray:
    """Perplexity of each row of counts (or sums of probabilities)."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    logs = np.log(np.where(shares > 0, shares, 1.0))
    return np.exp(-(shares * logs).sum(axis=1))


def _predicted_units(model: SpidrForPretraining) -> Outputs:
    """Units of every codebook's layer, B x T each. Unlike `extraction.unit_outputs` it runs the model's own forward,
    which is what a sharded model needs."""
    first = model.config.first_codebook_layer

    def outputs(input_values: Tensor, attention_mask: Tensor | None) -> dict[int, Tensor]:
        # Sharded parameters are gathered here, and training continues with them.
        with torch.inference_mode(False), torch.no_grad():
            mask = None if attention_mask is None else attention_mask.clone()
            units = model(input_values.clone(), mask, output_predictions=True).log_probs.argmax(-1)
        lengths = torch.full((len(input_values),), input_values.shape[1])
        if mask is not None:
            lengths = mask.sum(-1).cpu()
        frames = frame_lengths(model.config, lengths)
        valid = (torch.arange(int(frames.max())) < frames[:, None]).to(units.device)
        rows = torch.zeros(len(units), *valid.shape, dtype=units.dtype, device=units.device)
        rows[:, valid] = units
        return {first + k: row for k, row in enumerate(rows)}

    return outputs


def _eager(model: nn.Module) -> AbstractContextManager:
    """Compiled layers run as they are written: compiling them anew for every length would take long, and would use up
    the compilations that training may have."""
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


__all__ = ["Totals", "Utterance", "ValidationSet", "open_sets", "plan"]
