# ruff: noqa: RUF009 (`option` is `dataclasses.field` with documentation)
"""`[data]` and `[masking]` of a configuration: what is heard, and what the student does not see."""

from dataclasses import dataclass

from ..system.fields import NOT_NEGATIVE, POSITIVE, SHARE, one_of, option
from .batching import BUCKET_METHODS
from .masking import SpanMask


@dataclass
class DataSection:
    """`[data]`: the audio and how it becomes batches."""

    manifest: str | list[str] | None = option(
        None,
        "manifest (.csv, .jsonl, .parquet, .tsv), folder of audio files, uncompressed tar, or data set "
        "(name:config:split); "
        'ours: several of these as a list, for example \'["a.csv", "b.csv"]\'',
        check=lambda value: len(value) > 0,
        allowed="a source, or a list of at least one",
    )
    weights: list[float] | None = option(
        None,
        "ours: with a list, how many times an epoch has each utterance of each source, for example '[2, 0.5]': the "
        "first twice (other crops), the second in every other epoch. A source's share of the audio is in proportion to "
        "weight x hours. Default: 1 each",
        check=lambda value: all(weight > 0 for weight in value),
        allowed="a list of positive numbers (leave out a source that is not wanted)",
    )
    enable_padding: bool = option(False, "pad batches to their longest utterance instead of cropping to the shortest")
    rand_crop: bool = option(True, "crop at a random place; otherwise utterances keep their beginning")
    normalize: bool = option(True, "standardise every utterance over its own samples, before cropping")
    num_buckets: int = option(1000, "buckets that group utterances by length", **POSITIVE)
    bucket_method: str = option(
        "uniform", "'uniform' (equal width) or 'percentile' (equal count)", **one_of(BUCKET_METHODS)
    )
    min_sample_size: int = option(2000, "shorter utterances are dropped, in samples", **NOT_NEGATIVE)
    max_sample_size: int = option(320_000, "longer utterances are cropped, in samples", **POSITIVE)
    max_batch_length: int = option(3_800_000, "most samples in a batch of one process", **POSITIVE)
    drop_last: bool = option(False, "leave out the end of an epoch that does not fill an update")
    random_seed: int = option(0, "seed of the order of utterances and of crops", **NOT_NEGATIVE)
    num_workers: int = option(10, "processes that decode audio, per training process", **NOT_NEGATIVE)
    prefetch_factor: int = option(2, "batches that each of them prepares ahead", **POSITIVE)
    pin_memory: bool = option(True, "batches in page-locked memory, for faster copies to the GPU")
    resample: bool = option(False, "ours: take audio of any rate and number of channels, instead of refusing it")
    streaming: bool = option(
        False,
        "ours: read the data set (name:config:split) as it comes instead of downloading it; order and batches then "
        "depend on the numbers of processes and workers, which must stay the same when a run is resumed",
    )
    shuffle_buffer: int = option(
        1000,
        "ours, with `streaming`: utterances that each worker holds, as they are stored, to make batches of similar "
        "length from (256 MiB of them at most)",
        **POSITIVE,
    )
    max_skipped_share: float = option(
        0.5,
        "ours: stop when more than this share of the audio cannot be read (it is listed in skipped.jsonl)",
        **SHARE,
    )
    persistent_workers: bool = option(True, "no meaning here: workers always persist")
    alignments_path: str | None = option(None, "phones, in [validation.<name>]; no meaning in [data]")


@dataclass
class MaskingSection:
    """`[masking]`: what the student does not see (see `masking.SpanMask`)."""

    mask_prob: float = option(
        0.8, "share of the frames in spans, if they did not overlap; 0: no mask, every frame is predicted", **SHARE
    )
    mask_selection: str = option("static", "span lengths: 'static', 'uniform', 'normal' or 'poisson'")
    mask_other: float = option(0.0, "second parameter of 'uniform' and 'normal'")
    mask_length: int = option(10, "span length in frames", **POSITIVE)
    no_mask_overlap: bool = option(False, "spans do not overlap")
    mask_min_space: int = option(1, "frames between spans that do not overlap", **NOT_NEGATIVE)
    mask_channel_prob: float = option(0.0, "no meaning here: SpidR offers channel masks and never applies them")
    mask_channel_selection: str = option("static", "see mask_channel_prob")
    mask_channel_other: float = option(0.0, "see mask_channel_prob")
    mask_channel_length: int = option(10, "see mask_channel_prob")
    no_mask_channel_overlap: bool = option(False, "see mask_channel_prob")
    mask_channel_min_space: int = option(1, "see mask_channel_prob")

    def spans(self) -> SpanMask | None:
        """How masks are drawn; None for no mask."""
        if self.mask_prob == 0:
            return None
        return SpanMask(
            prob=self.mask_prob,
            length=self.mask_length,
            selection=self.mask_selection,
            other=self.mask_other,
            no_overlap=self.no_mask_overlap,
            min_space=self.mask_min_space,
        )


__all__ = ["DataSection", "MaskingSection"]
