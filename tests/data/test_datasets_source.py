"""The `datasets` library: its data sets as DATA, and its idioms with these models."""

import io
import json
import pickle
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import soundfile
import torch
from commands import fails, run_command
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor, SpidrForAudioTokenization
from spidr_hf.data.audio import read_info
from spidr_hf.data.datasets_source import DatasetSource, is_dataset, open_dataset
from spidr_hf.data.labels import Labels
from spidr_hf.data.open import open_data
from spidr_hf.system.errors import ManifestError
from spidr_hf.units.unit_files import predict_units


def wav(seconds: float, seed: int = 0, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    samples = np.random.default_rng(seed).normal(0, 0.1, int(seconds * rate)).astype(np.float32)
    soundfile.write(file, samples, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    SpidrFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data():
    """Four utterances whose bytes lie in the data set, the third broken."""
    contents = [wav(0.7, 0), wav(0.3, 1), b"nothing", wav(0.5, 3)]
    rows = {
        "id": ["a-1", "a-2", "bad", "b-1"],
        "audio": [{"bytes": content, "path": f"{i}.wav"} for i, content in enumerate(contents)],
        "text": ["x"] * 4,
    }
    return datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(16_000))


def test_a_data_set_is_a_source(data):
    source = DatasetSource(data, progress=False)
    assert len(source) == 3 and [source.fileid(i) for i in range(3)] == ["a-1", "a-2", "b-1"]
    assert source.num_samples.tolist() == [11_200, 4_800, 8_000]
    assert [entry.fileid for entry in source.skipped] == ["bad"]
    expected = np.random.default_rng(3).normal(0, 0.1, 8_000).astype(np.float32)
    np.testing.assert_array_equal(source.read(2), expected)
    assert source.fingerprint != DatasetSource(data.select([0, 1]), progress=False).fingerprint


def test_names_without_an_id_column(data):
    assert DatasetSource(data.remove_columns("id"), progress=False).fileid(2) == "3"
    same = data.remove_columns("id").map(lambda row: row, num_proc=None)
    chosen = same.select([3, 0])
    assert [DatasetSource(chosen, progress=False).fileid(i) for i in range(2)] in (["3", "0"], ["0", "1"])


def test_names_of_files_keep_what_tells_them_apart(data):
    named = data.remove_columns("id").add_column("file", ["rec.1", "rec.2", "rec.3", "rec.4"])
    assert [DatasetSource(named, progress=False).fileid(i) for i in range(3)] == ["0", "1", "3"]


def test_rows_without_a_label_have_none(data):
    """`None`, and -1 in a column of classes, which would be the last one's name."""
    moods = data.add_column("mood", [1, -1, 0, None]).cast_column("mood", datasets.ClassLabel(names=["glad", "sad"]))
    moods = moods.remove_columns("text").add_column("text", ["x", None, "y", ""])
    source = DatasetSource(moods, progress=False)
    labels = Labels([], "data", source)
    assert labels.column("mood") == {"a-1": "sad"} and labels.column("text") == {"a-1": "x"}
    with pytest.raises(ValueError, match="no row has a value in the column 'note'"):
        Labels([], "data", DatasetSource(moods.add_column("note", [None] * 4), progress=False)).column("note")


def test_in_pieces_and_in_workers(data, tmp_path):
    """More pieces than one, rows chosen out of them, rows without audio; the same after pickling."""
    rows = data.remove_columns("id").cast_column("audio", datasets.Audio(decode=False))
    parts = datasets.concatenate_datasets([rows.select([0, 1]), rows.select([3]), rows.select([1, 0])])
    stored = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"audio": stored, "text": datasets.Value("string")})
    empty = {"audio": [None, {"bytes": None, "path": None}], "text": ["", ""]}
    empty = datasets.Dataset.from_dict(empty, features).cast(rows.features)
    whole = datasets.concatenate_datasets([parts, empty, rows.select([3])])
    for chosen, order in ((whole, [0, 1, 3, 1, 0, 3]), (whole.select([6, 5, 2, 0, 7]), [3, 0, 3])):
        source = DatasetSource(chosen, progress=False)
        for opened in (source, pickle.loads(pickle.dumps(source))):
            for index, row in enumerate(order):
                expected = soundfile.read(io.BytesIO(rows[row]["audio"]["bytes"]), dtype="float32")[0]
                np.testing.assert_array_equal(opened.read(index), expected)
        assert all("there is no audio in this row" in entry.reason for entry in source.skipped)
    large = rows.data.table.cast(rows.features.arrow_schema)  # as other writers store it
    kind = pa.struct({"bytes": pa.large_binary(), "path": pa.string()})
    large = large.set_column(0, "audio", large["audio"].cast(kind))
    pyarrow.parquet.write_table(large.replace_schema_metadata(None), tmp_path / "large.parquet")
    assert len(open_data(tmp_path, progress=False)) == 3


def test_a_format_hides_nothing(data, caplog):
    plain = DatasetSource(data, progress=False)
    shown = [data.with_format("numpy", columns=["text"]), data.with_format("torch")]
    for dataset in (*shown, data.with_transform(lambda batch: {"text": batch["text"]})):
        source = DatasetSource(dataset, progress=False)
        assert source.fingerprint == plain.fingerprint and source.values("text") == ["x"] * 3
        np.testing.assert_array_equal(source.read(2), plain.read(2))
    assert caplog.text.count("its transform is left out") == 1


def test_a_folder_of_parquet_files_is_a_data_set(data, tmp_path):
    """As the Hub keeps them, with or without a word that the column is audio."""
    plain = data.cast_column("audio", datasets.Audio(decode=False))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    plain.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    assert is_dataset(tmp_path / "hub")
    source = open_data(tmp_path / "hub", progress=False)
    assert [source.fileid(i) for i in range(3)] == ["a-1", "a-2", "b-1"]


@pytest.mark.slow
def test_more_than_two_gigabytes_open_without_being_copied(tmp_path):
    """72 rows of 32 MB and no id column, in a process whose own memory is looked at."""
    content = wav(524)
    schema = pa.schema({"audio": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
    (tmp_path / "data").mkdir()
    for part in range(8):
        rows = {"audio": [{"bytes": content, "path": f"{9 * part + i}.wav"} for i in range(9)]}
        pyarrow.parquet.write_table(pa.table(rows, schema), tmp_path / "data" / f"train-{part}-of-8.parquet")
    datasets.load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"))["train"].save_to_disk(tmp_path / "saved")
    code = (
        "import sys; from spidr_hf.data.open import open_data\n"
        "def held():\n"
        "    return next(int(l.split()[1]) // 1024 for l in open('/proc/self/status') if l.startswith('VmRSS'))\n"
        "import datasets; before = held(); source = open_data(sys.argv[1], progress=False)\n"
        "print(len(source), source.fileid(5), held() - before, len(source.read(71)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True)
    count, name, grown, samples = done.stdout.split()
    assert (count, name, samples) == ("72", "5", str(524 * 16_000)) and int(grown) < 350, done.stdout + done.stderr


def test_other_rates(data):
    other = datasets.Dataset.from_dict({"audio": [{"bytes": wav(0.5, rate=8_000), "path": "x.wav"}]})
    other = other.cast_column("audio", datasets.Audio())
    with pytest.raises(ManifestError, match="8000 Hz"):
        DatasetSource(other, progress=False)
    assert len(DatasetSource(other, resample=True, progress=False).read(0)) == 8_000


def test_what_is_no_audio(data, tmp_path):
    with pytest.raises(ManifestError, match="no column of the type Audio, only id, text"):
        DatasetSource(data.remove_columns("audio"), progress=False)
    with pytest.raises(ManifestError, match="0 of 1 row hold audio"):
        DatasetSource(data.select([2]), progress=False)
    with pytest.raises(ManifestError, match="name:config:split"):
        open_dataset("a:b:c:d")
    with pytest.raises(ManifestError, match="cannot be loaded as a data set"):
        open_dataset("nobody/nothing:clean:test")


@pytest.fixture
def headers(monkeypatch) -> list[str]:
    """The names of what was read the header of."""
    names = []

    def counted(source, *, name, **options):
        names.append(name)
        return read_info(source, name=name, **options)

    monkeypatch.setattr("spidr_hf.data.datasets_source.read_info", counted)
    return names


def test_headers_are_read_once(data, tmp_path, headers):
    """The cache answers until the data set changes; from it, everything is as from the headers."""
    data.save_to_disk(tmp_path / "saved")
    cache = tmp_path / "run" / "data.arrow"

    def opened(**options) -> DatasetSource:
        headers.clear()
        source = open_data(tmp_path / "saved", cache=cache, progress=False, **options)
        assert [path.name for path in cache.parent.iterdir()] == ["data.arrow"]
        return source

    plain = open_data(tmp_path / "saved", progress=False)
    first = opened()
    assert len(headers) == 4
    for source in (first, opened(), pickle.loads(pickle.dumps(opened()))):
        assert source.num_samples.tolist() == plain.num_samples.tolist() and source.skipped == plain.skipped
        assert source.fingerprint == plain.fingerprint and source.values("id") == plain.values("id")
        for index in range(len(plain)):
            assert source.fileid(index) == plain.fileid(index)
            np.testing.assert_array_equal(source.read(index), plain.read(index))
    assert headers == []

    opened(resample=True)
    assert len(headers) == 4
    shutil.rmtree(tmp_path / "saved")
    data.select([3, 0]).save_to_disk(tmp_path / "saved")
    changed = opened()
    assert [changed.fileid(i) for i in range(len(changed))] == ["b-1", "a-1"] and len(headers) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: b"garbage", lambda content: content[: len(content) // 2]],
    ids=["empty", "garbage", "cut off"],
)
def test_a_damaged_cache_is_made_anew(data, tmp_path, headers, damage):
    cache = tmp_path / "data.arrow"
    DatasetSource(data, cache=cache, progress=False)
    whole = cache.read_bytes()
    cache.unlink()  # mapped into memory, it must not be written to
    cache.write_bytes(damage(whole))
    headers.clear()
    assert len(DatasetSource(data, cache=cache, progress=False)) == 3 and len(headers) == 4
    assert cache.read_bytes() == whole


def test_a_scan_that_is_interrupted_leaves_no_cache(data, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyarrow.ipc.new_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DatasetSource(data, cache=tmp_path / "data.arrow", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_which_data_is_a_data_set(data, tmp_path):
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "audio").mkdir()
    assert is_dataset(tmp_path / "saved") and is_dataset("name/of:config:split") and is_dataset("name/of")
    for path in (tmp_path / "audio", tmp_path / "nothing", "nothing.csv", "folder/nothing.csv", "./folder"):
        assert not is_dataset(path)


def test_units_of_a_data_set(model, data, tmp_path):
    splits = datasets.DatasetDict({"train": data, "test": data.select([0, 1])})
    splits.save_to_disk(tmp_path / "saved")
    fails(
        run_command("extract_units", model, tmp_path / "saved", tmp_path / "out"), "splits train, test", "saved::train"
    )
    done = run_command("extract_units", model, f"{tmp_path / 'saved'}::train", tmp_path / "out", "--layers", 4)
    assert done.status == 0 and "1 file skipped" in done.err, done.err
    lines = (tmp_path / "out" / "4" / "units.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["a-1", "a-2", "b-1"]


# What users write: three idioms, each the same units.


def read(audio: dict) -> np.ndarray:
    return soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32")[0]


@pytest.fixture(scope="module")
def expected(model, data):
    tokenizer = SpidrForAudioTokenization.from_pretrained(model)
    plain = data.select([0, 1, 3]).cast_column("audio", datasets.Audio(decode=False))
    return predict_units(tokenizer, SpidrFeatureExtractor(), [read(row["audio"]) for row in plain], [4])[4]


def encode(model, batch) -> list[list[int]]:
    codes = SpidrForAudioTokenization.from_pretrained(model).encode(**batch).audio_codes[:, -1]
    return [row[row >= 0].tolist() for row in codes]


def test_with_transform(model, data, expected):
    """Nothing is stored: waveforms are standardised and padded when a batch is asked for."""
    extractor = SpidrFeatureExtractor.from_pretrained(model)

    def prepare(batch):
        waveforms = [read(audio) for audio in batch["audio"]]
        return dict(extractor(waveforms, sampling_rate=16_000, padding=True, return_tensors="pt"))

    plain = data.select([0, 1, 3]).cast_column("audio", datasets.Audio(decode=False))
    batch = plain.with_transform(prepare)[0:3]
    assert encode(model, batch) == [units.tolist() for units in expected]


def test_streaming(model, data, expected):
    extractor = SpidrFeatureExtractor.from_pretrained(model)
    stream = data.select([0, 1, 3]).cast_column("audio", datasets.Audio(decode=False)).to_iterable_dataset()
    units = []
    for batch in stream.batch(2):
        waveforms = [read(audio) for audio in batch["audio"]]
        units += encode(model, extractor(waveforms, sampling_rate=16_000, padding=True, return_tensors="pt"))
    assert units == [u.tolist() for u in expected]


def test_cast_column(model, data, expected):
    """`Audio(16_000)` decodes by torchcodec where there is one."""
    pytest.importorskip("torchcodec", reason="decoding by `datasets` needs torchcodec")
    extractor = SpidrFeatureExtractor.from_pretrained(model)
    decoded = data.select([0, 1, 3]).cast_column("audio", datasets.Audio(16_000))
    waveforms = [row["audio"]["array"] for row in decoded]
    batch = extractor(waveforms, sampling_rate=16_000, padding=True, return_tensors="pt")
    units = encode(model, batch)
    agree = [np.mean(np.array(a) == b) for a, b in zip(units, expected, strict=True)]
    assert min(agree) > 0.95
    assert torch.is_tensor(batch["input_values"])
