"""Batches: what is in them, that nothing but seed and names decides it, and what happens to audio that fails."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile
import torch
from tiny import tiny_config

from spidr_hf import SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.data.batches import (
    PretrainingBatches,
    SkippedFiles,
    dropout_seed,
    make_loader,
    make_sampler,
    min_samples,
    padded,
)
from spidr_hf.data.batching import BatchKey, Position
from spidr_hf.data.manifests import Manifest, scan_folder, scan_tar
from spidr_hf.data.masking import frame_mask
from spidr_hf.data.mixture import MixedSource
from spidr_hf.data.sections import DataSection, MaskingSection
from spidr_hf.data.sources import Skipped
from spidr_hf.system.errors import AudioError

MODEL = tiny_config()
MASKING = MaskingSection(mask_length=5)


def section(**options) -> DataSection:
    defaults = {"num_buckets": 5, "max_batch_length": 40_000, "max_sample_size": 12_000, "num_workers": 0}
    return DataSection(**{**defaults, **options})


def batches(source, data=None, **options) -> PretrainingBatches:
    return PretrainingBatches(source, data or section(**options), MASKING, MODEL, mask_seed=1)


def key(*utterances, epoch=0, index=0) -> BatchKey:
    return BatchKey(epoch, index, np.array(utterances), Position(0, 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    for index in range(12):
        soundfile.write(
            folder / f"u{index:02d}.wav", 0.1 + 0.2 * rng.standard_normal(4_000 + 900 * index), 16_000, "FLOAT"
        )
    return folder


@pytest.fixture(scope="module")
def source(folder) -> Manifest:
    return scan_folder(folder, progress=False)


def test_utterances_are_standardised_whole_then_cropped_to_the_shortest(source):
    batch = batches(source)[key(0, 3, 5)]
    assert batch.input_values.shape == (3, 4_000) and batch.input_values.dtype == torch.float32
    assert batch.attention_mask is None and batch.audio_samples == 12_000 and batch.skipped == []
    standardize = SpidrFeatureExtractor().standardize
    for row, index in zip(batch.input_values.numpy(), (0, 3, 5), strict=True):
        whole = standardize(source.read(index))
        starts = [start for start in range(len(whole) - 3_999) if whole[start] == row[0]]
        assert any(np.array_equal(whole[start : start + 4_000], row) for start in starts)


def test_crops_move_with_the_epoch_and_nothing_else(source):
    first = batches(source)[key(0, 3, 5)].input_values
    assert torch.equal(first, batches(source)[key(0, 3, 5, index=7)].input_values)
    assert not torch.equal(first, batches(source)[key(0, 3, 5, epoch=1)].input_values)
    assert not torch.equal(first, batches(source, random_seed=1)[key(0, 3, 5)].input_values)
    fixed = batches(source, rand_crop=False, normalize=False)
    for epoch in range(2):
        row = fixed[key(0, 5, epoch=epoch)].input_values[1]
        np.testing.assert_array_equal(row, source.read(5)[:4_000])


def test_long_utterances_are_cropped(source):
    assert batches(source)[key(10, 11)].input_values.shape == (2, 12_000)


def test_padding(source):
    batch = batches(source, enable_padding=True)[key(0, 2, 11)]
    assert batch.input_values.shape == (3, 12_000) and batch.attention_mask.dtype == torch.bool
    assert batch.attention_mask.sum(1).tolist() == [4_000, 5_800, 12_000] and batch.audio_samples == 21_800
    assert (batch.input_values[~batch.attention_mask] == 0).all()
    frames = SpidrForPretraining._get_feat_extract_output_lengths(
        type("Model", (), {"config": MODEL})(), batch.attention_mask.sum(1)
    )
    assert (batch.mask_time_indices.max(1).values < frames).all()
    assert batches(source, enable_padding=True)[key(11, 10)].attention_mask is None


def test_masks_belong_to_the_batch(source):
    first = batches(source)[key(0, 1)].mask_time_indices
    assert first.dtype == torch.int64
    assert torch.equal(first, batches(source)[key(0, 1)].mask_time_indices)
    others = [key(0, 1, index=1), key(0, 1, epoch=1)]
    for other in [batches(source)[k] for k in others] + [
        PretrainingBatches(source, section(), MASKING, MODEL, 2)[key(0, 1)]
    ]:
        mask = other.mask_time_indices
        assert mask.shape != first.shape or not torch.equal(mask, first)
    unmasked = PretrainingBatches(source, section(), MaskingSection(mask_prob=0.0), MODEL)[key(0, 1)]
    assert unmasked.mask_time_indices is None and set(unmasked.inputs) == {"input_values"}


def test_the_model_takes_the_batches(source):
    """Masks as frame numbers give what the same masks give as bool, in padded and in short batches."""
    torch.manual_seed(0)
    model = SpidrForPretraining(MODEL).eval()
    every = PretrainingBatches(source, section(), MaskingSection(mask_prob=1.0, mask_length=50), MODEL)
    for batch in (batches(source)[key(0, 3)], batches(source, enable_padding=True)[key(0, 3)], every[key(0, 1)]):
        output = model(**batch.inputs)
        mask = batch.mask_time_indices
        if mask.dtype != torch.bool:
            frames = int(model._get_feat_extract_output_lengths(batch.input_values.shape[1]))
            mask = torch.from_numpy(frame_mask(mask.numpy(), frames))
        expected = model(**{**batch.inputs, "mask_time_indices": mask})
        assert output.num_masked_frames == mask.sum()
        torch.testing.assert_close(output.loss, expected.loss)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("padding", [False, True])
def test_the_number_of_workers_changes_nothing(source, num_workers, padding):
    def run(workers):
        data = section(enable_padding=padding, num_workers=workers)
        sampler = make_sampler(source, data, MODEL, world_size=2, rank=1)
        loader = make_loader(batches(source, data), sampler, data)
        return list(islice(loader, 2 * sampler.updates_per_epoch() + 1))

    for ours, alone in zip(run(num_workers), run(0), strict=True):
        assert (ours.key.epoch, ours.key.index, ours.key.following) == (
            alone.key.epoch,
            alone.key.index,
            alone.key.following,
        )
        assert ours.inputs.keys() == alone.inputs.keys()
        for name, tensor in alone.inputs.items():
            assert torch.equal(ours.inputs[name], tensor)


def test_utterances_too_short_for_two_frames_are_dropped(tmp_path):
    table = pa.table({"fileid": list("abc"), "path": list("abc"), "num_samples": [700, 720, 5_000]})
    assert min_samples(MODEL) == 720
    sampler = make_sampler(Manifest(table, tmp_path), section(min_sample_size=0), MODEL)
    assert sampler.utterances.tolist() == [1, 2]


@pytest.fixture
def damaged(tmp_path, folder) -> Manifest:
    """A manifest of three good files and each kind of bad one."""
    names, lengths = ["u05.wav", "u06.wav", "u07.wav"], [8_500, 9_400, 10_300]
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).standard_normal(30_000) * 0.1, 16_000)
    content = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.wav").write_text("not audio " * 500)
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "stereo.wav", np.zeros((9_000, 2)), 16_000)
    soundfile.write(tmp_path / "8k.wav", np.zeros(9_000), 8_000)
    soundfile.write(tmp_path / "shorter.wav", np.zeros(3_000), 16_000)
    names += ["cut.flac", "text.wav", "empty.wav", "stereo.wav", "8k.wav", "shorter.wav", "missing.wav"]
    lengths += [30_000] + [9_000] * 6
    return Manifest(pa.table({"fileid": names, "path": names, "num_samples": lengths}), tmp_path)


def test_unusable_files_are_skipped_and_named(damaged):
    batch = batches(damaged)[key(*range(len(damaged)))]
    assert batch.input_values.shape == (3, 8_500) and batch.failure is None
    reasons = {entry.fileid: entry.reason for entry in batch.skipped}
    assert len(reasons) == 7
    for name, part in {
        "stereo.wav": "2 channels",
        "8k.wav": "8000 Hz",
        "shorter.wav": "has 3000 samples at 16 kHz, 9000 were expected",
        "missing.wav": "no such file",
        "text.wav": "cannot be read as audio",
    }.items():
        assert part in reasons[name]


def test_a_batch_without_usable_audio_is_replaced(damaged):
    batch = batches(damaged)[key(4, 5)]
    assert batch.failure is None and len(batch.input_values) == 1 and len(batch.skipped) >= 2
    again = batches(damaged)[key(4, 5)]
    assert torch.equal(batch.input_values, again.input_values)


def test_audio_of_which_nothing_can_be_used_is_a_failure(tmp_path):
    table = pa.table({"fileid": ["a", "b"], "path": ["a.wav", "b.wav"], "num_samples": [9_000, 9_000]})
    batch = batches(Manifest(table, tmp_path))[key(0, 1)]
    assert "100 utterances in a row cannot be used. The last:" in batch.failure and "no such file" in batch.failure


def test_longer_files_than_the_manifest_says_do_not_grow_a_batch(folder):
    table = pa.table({"fileid": ["a", "b"], "path": ["u05.wav", "u11.wav"], "num_samples": [6_000, 6_000]})
    assert batches(Manifest(table, folder))[key(0, 1)].input_values.shape == (2, 6_000)


def test_skipped_files_are_listed_once(tmp_path):
    path = tmp_path / "skipped.jsonl"
    listed = SkippedFiles(path, max_share=0.5)
    listed.add([Skipped("a", "why"), Skipped("a", "why")], tried=10)
    listed.add([], tried=5)
    with path.open("a") as file:
        file.write('{"file": "torn')  # the run was killed here
    again = SkippedFiles(path, max_share=0.5)
    again.add([Skipped("a", "why"), Skipped("b", "why not")], tried=10)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["file"] for line in (lines[0], lines[2])] == ["a", "b"] and len(lines) == 3


def test_what_is_used_again_goes_from_the_list(tmp_path):
    """What an earlier start could not use; not what this one cannot use now and then."""
    path, source = (
        tmp_path / "skipped.jsonl",
        Manifest(pa.table({"path": ["a.wav", "b.wav", "c.wav"], "num_samples": [1, 1, 1]}), tmp_path),
    )
    SkippedFiles(path, 0.9).add([Skipped(name, "why") for name in ("a", "b")], tried=10)
    rest, again = (SkippedFiles(path, 0.9, writes=writes) for writes in (False, True))
    assert again.used_again([0, 1, 2], [Skipped("b", "why")], source) == ["a"] == rest.used_again([0], [], source)
    assert again.used_again([0], [], object()) == []
    before = path.read_bytes()
    rest.add([Skipped("c", "why")], 1, ["a"])
    assert path.read_bytes() == before
    again.add([Skipped("b", "why"), Skipped("c", "why")], 3, ["a"])
    again.add([], 2, again.used_again([1, 2], [], source))
    assert [json.loads(line)["file"] for line in path.read_text().splitlines()] == ["b", "c"]
    again.add([Skipped("a", "once more")], 1)
    assert [json.loads(line)["file"] for line in path.read_text().splitlines()] == ["b", "c", "a"]


def test_too_many_skipped_files_stop_the_run(tmp_path):
    files = SkippedFiles(tmp_path / "skipped.jsonl", max_share=0.1)
    files.add([Skipped("a", "x"), Skipped("b", "x")], tried=2)  # two of the first twenty may fail
    files.add([], tried=38)
    with pytest.raises(
        AudioError, match=r"5 of 48 utterances cannot be used, more than `data.max_skipped_share` \(0\.1\).*why"
    ):
        files.add([Skipped(str(i), "why") for i in range(3)], tried=8)


def test_dropout_seeds_name_the_batch():
    seeds = {dropout_seed(*arguments) for arguments in ((0, key()), (1, key()), (0, key(index=1)), (0, key(epoch=1)))}
    assert len(seeds) == 4 and dropout_seed(0, key()) == dropout_seed(0, key(3))


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory) -> Path:
    """Five minutes in every way that is decoded differently: with and without seeking, packed, resampled, stereo."""
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    noise = np.float32(0.05) + np.repeat(0.1 * rng.standard_normal(1_600), 3_000).astype(np.float32)
    noise *= np.linspace(0.1, 1, len(noise), dtype=np.float32)
    for name, kind in {"a.wav": "FLOAT", "b.flac": "PCM_16", "c.wav": "GSM610"}.items():
        soundfile.write(folder / name, noise, 16_000, kind)
    soundfile.write(folder / "e.flac", np.stack([noise[::2], 0.5 * noise[::2]], axis=1), 8_000)
    with tarfile.open(folder / "all.tar", "w") as archive:
        archive.add(folder, "all", filter=lambda entry: None if entry.name.endswith(".tar") else entry)
    return folder


@pytest.mark.parametrize(
    ("kind", "normalize"),
    [("folder", True)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("folder", False), ("tar", True), ("mixture", True))],
)
def test_crops_of_long_recordings_are_those_of_the_whole(long_folder, kind, normalize):
    if kind == "tar":
        source = scan_tar(long_folder / "all.tar", resample=True, progress=False)
    else:
        source = scan_folder(long_folder, resample=True, progress=False)
    source = MixedSource([source], ["a"]) if kind == "mixture" else source
    assert len(source) == 4 and source.num_samples.min() >= 4_800_000
    made = batches(source, normalize=normalize)
    standardize = SpidrFeatureExtractor().standardize
    wholes = [standardize(source.read(index)) if normalize else source.read(index) for index in range(4)]
    for epoch in range(2):
        batch = made[key(*range(4), epoch=epoch)]
        assert batch.input_values.shape == (4, 12_000) and not batch.skipped
        for index, row in enumerate(batch.input_values):
            expected = made.builder.crop(wholes[index], 12_000, epoch, (index,))
            np.testing.assert_allclose(row, expected, atol=3e-6 if normalize else 0)


def test_a_crop_costs_no_more_than_a_crop(tmp_path):
    """Half an hour is 115 MB as float32, and thrice that while it is standardised whole."""
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 16_000, 1, "PCM_16") as file:
        for seed in range(30):
            file.write(np.random.default_rng(seed).integers(-9_000, 9_000, 960_000, dtype=np.int16))
    source = scan_folder(tmp_path, progress=False)
    made = batches(source)
    tracemalloc.start()
    batch = made[key(0)]
    assert tracemalloc.get_traced_memory()[1] < 40e6
    tracemalloc.reset_peak()
    made[key(0, epoch=1)]
    assert tracemalloc.get_traced_memory()[1] < 2e6  # the second time, the crop is all that is decoded
    tracemalloc.stop()
    assert abs(float(batch.input_values.std()) - 1) < 0.05


@pytest.mark.parametrize("normalize", [True, False])
def test_long_recordings_that_fail_are_skipped_like_others(long_folder, tmp_path, normalize):
    content = (long_folder / "b.flac").read_bytes()
    (tmp_path / "bad.flac").write_bytes(content[:4_000] + bytes(len(content) - 4_000))
    soundfile.write(tmp_path / "good.wav", 0.1 * np.random.default_rng(0).standard_normal(9_000), 16_000)
    source = scan_folder(tmp_path, progress=False)
    made = batches(source, normalize=normalize)
    batch = made[key(0, 1)]
    assert [entry.fileid for entry in batch.skipped] == ["bad"] and batch.input_values.shape == (1, 9_000)
    alone = made[key(0)]
    assert len(alone.input_values) == 1 and alone.skipped[0].fileid == "bad" and alone.failure is None


# A command whose workers are busy, or stuck on a disk that does not answer, when something ends it.
WITH_WORKERS = """
import os, signal, sys, time
from torch.utils.data import Dataset
from spidr_hf.data.batches import make_loader
from spidr_hf.data.sections import DataSection
from spidr_hf.system.commands import clear_errors

class Batches(Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0 if index < 2 else 600)
        return index

with clear_errors():
    batches = iter(make_loader(Batches(), None, DataSection(num_workers=2)))
    next(batches)
    print("working", flush=True)
    {what}
"""


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("raise ValueError('bad input')", 1, "error: bad input"),
        ("raise OSError(28, 'No space left on device', 'x')", 1, "error: the disk is full: x"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 1, "Interrupted"),
        ("raise KeyError('a defect')", 1, "KeyError: 'a defect'"),
        ("sys.exit(3)", 3, ""),
    ],
)
def test_workers_end_with_their_command(what, status, message):
    """Within seconds, with the command's own status; no process is left."""
    process = subprocess.Popen(
        [sys.executable, "-c", WITH_WORKERS.format(what=what)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        errors = process.communicate(timeout=60)[1]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == status and message in errors, errors


def test_too_many_skipped_files_name_the_commonest_reason():
    skipped = SkippedFiles(None, 0.1)
    short = [Skipped(f"a/{i}", f"a/{i}: has {i} samples at 16 kHz, at least 400 are needed.") for i in range(9)]
    with pytest.raises(AudioError, match=r"The commonest of the reasons \(9 times\), for one: a/0: has 0 samples"):
        skipped.add([Skipped("x", "x: no such file."), *short, Skipped("y", "y: is cut off.")], 40)


def test_rows_are_padded_into_one_tensor():
    rows = [np.array([1, 2], dtype=np.float32), np.array([3], dtype=np.float32)]
    tensor, valid = padded(rows)
    assert torch.equal(tensor, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert torch.equal(valid, torch.tensor([[True, True], [True, False]]))
    assert padded(rows[:1])[1] is None and padded(rows[:1], 3)[1].tolist() == [[True, True, False]]
    labels, _ = padded([np.array([7]), np.array([], dtype=np.int64)], 2, -100)
    assert labels.dtype == torch.int64 and labels.tolist() == [[7, -100], [-100, -100]]


def test_the_message_names_what_limits_the_share():
    named = SkippedFiles(None, 0.5, "the share that may be left out")
    with pytest.raises(AudioError, match=r"more than the share that may be left out \(0\.5\)"):
        named.add([Skipped(str(i), "broken") for i in range(30)], 40)
