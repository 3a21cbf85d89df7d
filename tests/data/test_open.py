"""The tables of sources: a kind that nobody knew is a class and a line."""

import zipfile
from pathlib import Path

import pytest
from runs import assert_same_run, pretrain_here, rows, write_audio, write_config

from spidr_hf.data import open as door
from spidr_hf.data.sources import StreamedSource
from spidr_hf.pretraining.config import describe_fields, load_config, make_config
from spidr_hf.system.errors import AudioError, ConfigError, ManifestError


class ZipShards:
    """Zip archives in a folder, each a shard of audio files, as WebDataset has its tars."""

    def __init__(self, data: str, *, resample: bool = False):
        self.name, self.resample = str(data), resample
        self.paths = sorted(Path(data).glob("*.zip"))
        self.num_shards = len(self.paths)

    @property
    def fingerprint(self) -> str:
        return f"zips-{self.num_shards}"

    def rows(self, shard, state=None):
        with zipfile.ZipFile(self.paths[shard]) as archive:
            names = sorted(archive.namelist())
            for number in range(state["next"] if state else 0, len(names)):
                yield (names[number], archive.read(names[number])), lambda after=number + 1: {"next": after}

    def row_name(self, row) -> str:
        return Path(row[0]).stem

    def stored(self, row, name) -> bytes:
        if not row[1]:
            raise AudioError(f"{name}: the file is empty.")
        return row[1]


@pytest.fixture
def zips(tmp_path, monkeypatch) -> Path:
    """The twenty utterances of a tiny run, and an empty one, in four archives."""
    folder = tmp_path / "shards.zips"
    folder.mkdir()
    paths = sorted(write_audio(tmp_path / "audio").iterdir())
    for shard in range(4):
        with zipfile.ZipFile(folder / f"{shard}.zip", "w") as archive:
            for path in paths[shard::4]:
                archive.write(path, path.name)
            if shard == 2:
                archive.writestr("empty.flac", b"")
    monkeypatch.setattr(door, "STREAMED", [door.Kind(lambda data: Path(data).suffix == ".zips", ZipShards)])
    return folder


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_streamed_source_is_a_class_and_a_line(zips, tmp_path, workers):
    """It is trained on, and resumed bit for bit."""
    assert isinstance(ZipShards(zips), StreamedSource)
    config = write_config(tmp_path / "tiny.toml", zips)
    options = ["--data.streaming", "true", "--data.shuffle_buffer", "3", "--data.num_workers", str(workers)]
    whole = pretrain_here(config, tmp_path / "whole", *options)
    assert len(rows(whole)) == 12
    pretrain_here(config, tmp_path / "cut", *options, "--optimizer.max_steps", "5")
    assert_same_run(pretrain_here(config, tmp_path / "cut", *options), whole)
    assert "empty: the file is empty." in (whole / "skipped.jsonl").read_text()


def test_what_no_kind_takes_is_refused(zips, tmp_path):
    config = write_config(tmp_path / "tiny.toml", tmp_path / "audio")
    with pytest.raises(ConfigError, match=r"`data\.streaming` takes one data set"):
        load_config(config, ["--data.streaming", "true"])


def test_all_that_data_can_be_is_named():
    """Where there is none, where none is given, and in the help."""
    with pytest.raises(ManifestError) as absent:
        door.open_data("nowhere")
    with pytest.raises(ConfigError) as missing:
        make_config({})
    for text in (str(absent.value), str(missing.value), describe_fields()):
        assert all(
            kind in text for kind in (".csv", ".jsonl", ".parquet", ".tsv", "folder", "tar", "name:config:split")
        )


def test_a_stored_source_is_a_line_too(tmp_path, monkeypatch):
    """The first kind that takes DATA opens it."""
    monkeypatch.setattr(door, "STORED", [door.Kind(lambda data: data == "mine", lambda data, **_: (data, "opened"))])
    assert door.open_data("mine") == ("mine", "opened")
    assert isinstance(door.STREAMED[0], door.Kind) and door.is_streamable("name:config:split")
    assert not door.is_streamable("a.csv") and not door.is_streamable(["a", "b"])
