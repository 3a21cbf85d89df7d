"""Manifests in every format, and that each bad one says what is wrong with it."""

import json
import os
import pickle
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import soundfile

from spidr_hf.data.audio import read_audio
from spidr_hf.data.manifests import Manifest, open_manifest, read_manifest, scan_folder, scan_tar
from spidr_hf.data.sources import Skipped, commonest
from spidr_hf.system.errors import AudioError, ManifestError

LENGTHS = {"one/a": 5000, "one/b": 7000, "two/c": 3000}


@pytest.fixture
def audio(tmp_path) -> Path:
    """A folder of three FLAC files, and `all.tar` beside it with the same."""
    rng = np.random.default_rng(0)
    for name, length in LENGTHS.items():
        path = tmp_path / "audio" / f"{name}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(length), 16_000)
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        archive.add(tmp_path / "audio", ".")
    return tmp_path / "audio"


def contents(manifest: Manifest) -> dict[str, np.ndarray]:
    assert [len(manifest.read(i)) for i in range(len(manifest))] == manifest.num_samples.tolist()
    return {manifest.fileid(i): manifest.read(i) for i in range(len(manifest))}


def same(a: Manifest, b: Manifest) -> None:
    left, right = contents(a), contents(b)
    assert left.keys() == right.keys()
    for name, waveform in left.items():
        np.testing.assert_array_equal(waveform, right[name])


def test_folder_tar_and_files_hold_the_same(audio, tmp_path):
    folder = scan_folder(audio)
    assert dict(zip(map(folder.fileid, range(3)), folder.num_samples.tolist(), strict=True)) == LENGTHS
    tar = scan_tar(tmp_path / "all.tar")
    same(folder, tar)
    for manifest, names in ((folder, ("f.csv", "f.jsonl", "f.tsv", "audio/in.csv")), (tar, ("t.csv", "t.jsonl"))):
        for name in names:
            manifest.write(tmp_path / name)
            again = read_manifest(tmp_path / name)
            same(manifest, again)
            assert again.fingerprint == manifest.fingerprint
    assert (tmp_path / "f.csv").read_text().splitlines()[:2] == [
        "fileid,path,num_samples",
        "one/a,audio/one/a.flac,5000",
    ]
    assert (tmp_path / "f.tsv").read_text().splitlines()[:2] == [str(audio), "one/a.flac\t5000"]
    row = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    assert row["archive"] == "all.tar" and row["byte_size"] > 0
    assert "one/a,one/a.flac,5000" in (tmp_path / "audio" / "in.csv").read_text()


def test_paths_are_looked_for_beside_the_manifest_then_in_the_working_folder(audio, tmp_path, monkeypatch):
    text = "fileid,path,num_samples\nx,one/a.flac,5000\n"
    (audio / "beside.csv").write_text(text)
    (tmp_path / "elsewhere.csv").write_text(text)
    assert len(read_manifest(audio / "beside.csv").read(0)) == 5000
    monkeypatch.chdir(audio)
    assert len(read_manifest(tmp_path / "elsewhere.csv").read(0)) == 5000
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AudioError, match="looked for beside it"):
        read_manifest(tmp_path / "elsewhere.csv").read(0)


def test_columns_are_read_as_they_are_named(tmp_path):
    """Further columns are ignored, fileids stay text, JSON lines may mix tars and files."""
    (tmp_path / "m.csv").write_text('speaker,num_samples,path,fileid\n7,30,"a, b.wav",0001\n8,40,NA,null\n')
    manifest = read_manifest(tmp_path / "m.csv")
    assert [manifest.fileid(i) for i in range(2)] == ["0001", "null"]
    assert manifest.describe(0).endswith("a, b.wav")
    (tmp_path / "m.jsonl").write_text(
        '{"fileid": "a", "path": "a.wav", "num_samples": 3, "text": "hello"}\n'
        '{"fileid": "b", "path": "b.wav", "num_samples": 4, "archive": "x.tar", "byte_offset": 512, "byte_size": 9}\n'
    )
    manifest = read_manifest(tmp_path / "m.jsonl")
    assert manifest.describe(0).endswith("/a.wav") and manifest.describe(1).endswith("x.tar:b.wav")


@pytest.mark.parametrize(
    ("paths", "fileids"),
    [
        (["a/b.x.flac", "a/c"], ["a/b.x", "a/c"]),
        (["./a/b.flac", "../c.flac"], ["a/b", "c"]),
        (["/data/x/a/b.flac", "/data/x/c.wav"], ["a/b", "c"]),
        (["/data/x/b.flac"], ["b"]),
    ],
)
def test_fileids_are_paths_below_the_root(tmp_path, paths, fileids):
    rows = "".join(f"{path},100\n" for path in paths)
    (tmp_path / "m.csv").write_text(f"path,num_samples\n{rows}")
    manifest = read_manifest(tmp_path / "m.csv")
    assert [manifest.fileid(i) for i in range(len(manifest))] == fileids


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "fileid,path\na,a.wav\n", "no column num_samples"),
        ("m.csv", "fileid,num_samples\na,7\n", "no column path"),
        ("m.csv", "a.wav,7\n", "no column path, num_samples"),
        ("m.csv", "", r"line 1: has no column path, num_samples, only \(none\)"),
        ("m.csv", "fileid,path,num_samples\n", "holds no utterances"),
        ("m.csv", "fileid,path,num_samples\na,a.wav,many\n", "line 2: its num_samples is many"),
        ("m.csv", "fileid,path,num_samples\na,a.wav,\n", "line 2: has no num_samples"),
        ("m.csv", "fileid,path,num_samples\na,a.wav,5\nb,,5\n", "line 3: has no path"),
        ("m.csv", "fileid,path,num_samples\na,a.wav,-5\n", "line 2: its num_samples is -5"),
        ("m.csv", "fileid,path,num_samples\na,a.wav,5\na,b.wav,5\n", "fileid 'a' stands for 2 utterances"),
        ("m.csv", "path,num_samples\na.wav,5\na.flac,5\n", "fileid 'a' stands for 2 utterances"),
        ("m.csv", "fileid,path,num_samples,archive\na,a.wav,5,x.tar\n", "line 2: has no byte_offset"),
        (
            "m.csv",
            "fileid,path,num_samples,archive,byte_offset,byte_size\na,a.wav,5,x.tar,,7\n",
            "line 2: has no byte_offset",
        ),
        ("m.jsonl", '{"fileid": "a", "path": "a.wav"}\n', "line 1.*has no num_samples"),
        ("m.jsonl", '{"fileid": "a", "path": \n', r"line 1 is not of the form.*Expecting value at character"),
        ("m.jsonl", '{"fileid": [7], "path": "a.wav", "num_samples": 5}\n', r"line 1.*its fileid is \[7\]"),
        ("m.jsonl", "null\n", "line 1.*None is no object"),
        ("m.jsonl", '\n{"path": "a.wav", "num_samples": 1e400}\n', "line 2.*1e400 is no finite number"),
        ("m.jsonl", '{"path": "a.wav", "num_samples": true}\n', "line 1.*its num_samples is True"),
        ("m.jsonl", '{"path": "\\ud800", "num_samples": 5}\n', "line 1.*half a character"),
        ("m.jsonl", "[" * 100_000, "line 1.*nested too deeply"),
        ("m.csv", "ID,Audio,Path\n1,a.wav,5\n", "line 1: has no column num_samples, only ID, Audio, path"),
        ("m.csv", "path;samples\na.wav;5\n", "line 1: has no column num_samples, only path, samples"),
        ("m.csv", "path,Path,num_samples\na,b,5\n", "line 1: the column 'path' is there more than once"),
        ("m.csv", "fileid,path,num_samples\n\na,a.wav,5\nb,b.wav\n", "line 4 has 2 cells, the first line 3 columns"),
        ("m.csv", "fileid,path,num_samples\na,a.wav,5\n,b.wav,5\n", "line 3: has no fileid, unlike those before it"),
        ("m.csv", "path,num_samples\n\n\na.wav,5.0\n", "line 4: its num_samples is 5.0; expected a whole number"),
        ("m.csv", "path,num_samples\na.wav,99999999999999999999\n", "line 2: its num_samples is 9999"),
        ("m.csv", "path,num_samples\na.wav,NA\n", "line 2: its num_samples is NA"),
        ("m.csv", b"path,num_samples\n\xe9.wav,5\n", "is no UTF-8 text"),
        ("m.csv", "path,num_samples\na.wav,5\n".encode("utf-16"), "is no UTF-8 text"),
        ("m.tsv", "/data\na.wav,5\n", "line 2: 'a.wav,5', with 0 tabs behind it"),
        ("m.tsv", "/data\na.wav\t5\nb.wav\tx\n", "line 3: its num_samples is x"),
        ("m.tsv", "", "line 1: is empty; the first line of a fairseq TSV is the folder"),
        ("m.tsv", "a.wav\t5\n", "the first line of a fairseq TSV is the folder"),
        ("m.xlsx", "", "unknown kind of data"),
        ("m.tar.gz", "", "unknown kind of data"),
    ],
)
def test_bad_manifests_say_what_is_wrong(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ManifestError, match=message) as raised:
        open_manifest(tmp_path / name)
    assert str(raised.value).startswith(str(tmp_path / name)) and str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", "fileid,path,num_samples\r\n001,a b.wav,5\r\n"),
        ("m.csv", "\ufeffFileID, Path ,NUM_SAMPLES, note\n001,a b.wav,5,\n\n"),
        ("m.csv", "fileid;path;num_samples\n001;a b.wav;5\n"),
        ("m.csv", "fileid\tpath\tnum_samples\n001\ta b.wav\t5\n"),
        ("m.csv", '"path","fileid","num_samples"\n"a b.wav","001","5"\n'),
        ("m.tsv", "fileid\tpath\tnum_samples\n001\ta b.wav\t5\n"),
        ("m.jsonl", '\ufeff\n{"fileid": "001", "path": "a b.wav", "num_samples": 5, "note": null}\r\n\n'),
    ],
)
def test_manifests_as_people_have_them(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_manifest(tmp_path / name).table.to_pylist() == [{"fileid": "001", "path": "a b.wav", "num_samples": 5}]


def test_numbers_are_names_too(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"fileid": 7, "path": "a.wav", "num_samples": 5}\n')
    assert read_manifest(tmp_path / "m.jsonl").fileid(0) == "7"


def test_bad_folders_and_tars_say_what_is_wrong(tmp_path):
    with pytest.raises(ManifestError, match="no such file or folder"):
        open_manifest(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="no audio files"):
        open_manifest(tmp_path / "empty")
    (tmp_path / "empty" / "a.wav").write_text("no audio")
    alike = [Skipped(n, f"{n}.wav: has {rate} Hz") for n, rate in (("b", 8000), ("c", 44100))]
    assert commonest([Skipped("a", "a.wav: is empty"), *alike]) == ("2 for one reason, ", alike[0])
    assert commonest(alike) == ("", alike[0]) and commonest([Skipped("a", "x"), alike[0]]) == ("", Skipped("a", "x"))
    with pytest.raises(ManifestError, match=r"0 of 1 audio file can be used; the first: .*a\.wav"):
        open_manifest(tmp_path / "empty", progress=False)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as archive:
        archive.add(tmp_path / "empty" / "a.wav")
    with pytest.raises(ManifestError, match=r"without compression.*Decompress it first"):
        open_manifest(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "empty", "empty", recursive=False)
    with pytest.raises(ManifestError, match="no audio files"):
        open_manifest(tmp_path / "other.tar")


def test_what_is_left_out_has_a_name_of_its_own(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(4000), 16_000)
    for name in ("a.mp3", "b.wav", "c.wav", "c.ogg"):
        (tmp_path / name).write_text("no audio")
    manifest = scan_folder(tmp_path, progress=False)
    assert manifest.fileid(0) == "a" and [entry.fileid for entry in manifest.skipped] == [
        "a.mp3",
        "b",
        "c.ogg",
        "c.wav",
    ]


def test_scans_leave_out_what_cannot_be_used(audio):
    (audio / "bad.wav").write_text("no audio")
    soundfile.write(audio / "8k.wav", np.zeros(4000), 8_000)
    (audio / "notes.txt").write_text("not even named like audio")
    manifest = scan_folder(audio, progress=False)
    assert len(manifest) == 3
    assert [entry.fileid for entry in manifest.skipped] == ["8k", "bad"]
    assert "8000 Hz" in manifest.skipped[0].reason
    manifest = scan_folder(audio, progress=False, resample=True)
    assert len(manifest) == 4 and 8000 in manifest.num_samples
    assert len(scan_folder(audio, suffixes=["flac"], progress=False).skipped) == 0


def test_a_scan_is_kept(audio, tmp_path):
    """The cache answers until the file behind it changes, and is mapped, not read."""
    cache = tmp_path / "cache.arrow"
    (audio / "bad.wav").write_text("no audio")
    first = open_manifest(audio, cache=cache, progress=False)
    (audio / "one" / "a.flac").unlink()
    again = open_manifest(audio, cache=cache, progress=False)
    assert again.fingerprint == first.fingerprint and again.skipped == first.skipped and again.root == first.root
    first.write(tmp_path / "m.csv")
    open_manifest(tmp_path / "m.csv", cache=cache)
    (tmp_path / "m.csv").write_text("fileid,path,num_samples\na,a.wav,5\n")
    assert len(open_manifest(tmp_path / "m.csv", cache=cache)) == 1
    cache.write_bytes(b"garbage")
    assert len(open_manifest(tmp_path / "m.csv", cache=cache)) == 1


def test_rows_are_no_python_objects(tmp_path):
    """A hundred thousand utterances are a few megabytes and travel to workers as such."""
    count = 100_000
    names = [f"speaker/utterance-{i:06d}" for i in range(count)]
    table = pa.table({"fileid": names, "path": names, "num_samples": np.full(count, 7)})
    manifest = Manifest(table, tmp_path)
    assert manifest.table.nbytes < 100 * count
    copy = pickle.loads(pickle.dumps(manifest))
    assert copy.fileid(count - 1) == names[-1] and copy.fingerprint == manifest.fingerprint
    assert manifest.num_samples.base is not None  # a view of Arrow's memory


def test_fingerprints_tell_manifests_apart(tmp_path):
    def fingerprint(names, lengths):
        return Manifest(pa.table({"fileid": names, "path": names, "num_samples": lengths}), tmp_path).fingerprint

    base = fingerprint(["a", "b"], [1, 2])
    assert base == fingerprint(["a", "b"], [1, 2])
    others = [fingerprint(["b", "a"], [1, 2]), fingerprint(["a", "b"], [1, 3]), fingerprint(["a", "bc"], [1, 2])]
    assert len({base, *others}) == 4


@pytest.fixture
def write_manifest(monkeypatch):
    """`examples/write_manifest.py` with arguments, in this process."""
    script = Path(__file__).parents[2] / "examples" / "write_manifest.py"

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")

    return run


def test_the_command(audio, tmp_path, write_manifest, capsys):
    (audio / "bad.wav").write_text("no audio")
    write_manifest(audio, tmp_path / "out.csv")
    printed = capsys.readouterr()
    assert "3 utterances" in printed.out and "left out bad" in printed.err
    assert len(read_manifest(tmp_path / "out.csv")) == 3
    write_manifest(tmp_path / "all.tar", tmp_path / "out.jsonl", "--ext", ".flac")
    assert len(read_manifest(tmp_path / "out.jsonl")) == 3


@pytest.mark.parametrize(
    ("source", "output", "message"),
    [
        ("nothing", "out.csv", "error: .*no such folder or tar"),
        ("audio", "out.xml", "error: .*written as .csv, .jsonl or .tsv"),
        ("all.tar", "out.tsv", "error: .*no place for byte offsets"),
    ],
)
def test_the_command_on_bad_input(audio, tmp_path, write_manifest, source, output, message):
    with pytest.raises(SystemExit, match=message):
        write_manifest(tmp_path / source, tmp_path / output)
    assert not (tmp_path / output).exists()


def test_other_processes_map_the_cache_instead_of_getting_a_copy(audio, tmp_path):
    cached = open_manifest(audio, cache=tmp_path / "data.arrow", progress=False)
    pickled = pickle.dumps(cached)
    assert len(pickled) < 500
    same(pickle.loads(pickled), cached)
    same(pickle.loads(pickle.dumps(scan_folder(audio, progress=False))), cached)
    (tmp_path / "data.arrow").unlink()
    with pytest.raises(ManifestError, match="was changed while it was in use"):
        pickle.loads(pickled)


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".tsv"])
@pytest.mark.parametrize("again", ["{}", "./{}", ".//{}"])
def test_a_recording_that_comes_twice_is_refused(audio, tmp_path, kind, again):
    """Under another fileid it would be heard twice as often as the others."""
    manifest = scan_folder(audio, progress=False)
    table = manifest.table
    path = table["path"][0].as_py()
    row = {name: table[name][0].as_py() for name in table.column_names}
    row |= {"fileid": "other", "path": again.format(path)}
    more = pa.concat_tables([table, pa.Table.from_pylist([row], table.schema)])
    twice = tmp_path / f"twice{kind}"
    if kind == ".csv":
        pyarrow.csv.write_csv(more, twice)
    elif kind == ".jsonl":
        twice.write_text("".join(json.dumps(row) + "\n" for row in more.to_pylist()))
    else:
        lines = [f"{row['path']}\t{row['num_samples']}\n" for row in more.to_pylist()]
        twice.write_text("".join([f"{audio}\n", *lines]))
    with pytest.raises(ManifestError, match=r"(comes|is there 2 times|stands for 2)"):
        read_manifest(twice)


def test_folders_with_links_in_circles_are_listed_once(audio, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    soundfile.write(outside / "far.wav", np.zeros(4_000), 16_000)
    expected = scan_folder(audio, progress=False).table["fileid"].to_pylist()
    for name, target in {"up": "..", "here": ".", "also_here": ".", "aa": outside, "ab": outside}.items():
        (audio / name).symlink_to(target)
    (outside / "back").symlink_to(audio)
    assert scan_folder(audio, progress=False).table["fileid"].to_pylist() == sorted([*expected, "aa/far"])


def test_folders_that_may_not_be_read_are_named(audio, monkeypatch):
    (audio / "secret").mkdir()
    (audio / "secret" / "a.wav").write_bytes(b"")
    look = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    manifest = scan_folder(audio, progress=False)
    ((fileid, reason),) = manifest.skipped
    assert fileid == "secret" and "cannot be looked into (Permission denied)" in reason


NAMES = [
    b"caf\xe9",
    b"a\nb",
    b"$HOME",
    b'quote"',
    b"comma,",
    "ü".encode(),
    b"x" * 250,
    b"%s",
    b"  blank  ",
    b"\x1b[31m",
]


def test_odd_names_are_read_or_named(tmp_path):
    for name in NAMES:
        with open(os.fsencode(tmp_path) + b"/" + name + b".wav", "wb") as file:
            soundfile.write(file, np.zeros(4_000), 16_000, format="WAV")
    manifest = scan_folder(tmp_path, progress=False)
    assert len(manifest) == len(NAMES) - 1
    ((fileid, reason),) = manifest.skipped
    assert fileid.isprintable() and reason.isprintable() and "no UTF-8" in reason
    for kind in (".csv", ".jsonl"):
        manifest.write(tmp_path / f"all{kind}")
        again = read_manifest(tmp_path / f"all{kind}")
        assert again.table["fileid"].to_pylist() == manifest.table["fileid"].to_pylist()
        assert all(len(again.read(i)) == 4_000 for i in range(len(again)))


@pytest.mark.parametrize("name", ["x" * 300 + ".wav", "a\0b.wav", "y/" * 3000 + ".wav"])
def test_names_that_no_disk_takes_are_named_when_they_are_read(tmp_path, name):
    table = pa.table({"fileid": ["a"], "path": [name], "num_samples": [4_000]})
    with pytest.raises(AudioError) as caught:
        Manifest(table, tmp_path).read(0)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2_000


def test_audio_that_is_not_read_here_is_named(audio, monkeypatch):
    """And what macOS leaves beside it is nothing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("a.m4a", "b.WEBM", "c.wv", "._d.wav", "__MACOSX/e.wav", "notes.txt"):
        (audio / name).parent.mkdir(exist_ok=True)
        (audio / name).write_bytes(b"x")
    with tarfile.open(audio.parent / "all.tar", "w") as archive:
        archive.add(audio, "audio")
    for manifest in (scan_folder(audio, progress=False), scan_tar(audio.parent / "all.tar", progress=False)):
        assert len(manifest) == 3
        reasons = {os.path.basename(entry.fileid): entry.reason for entry in manifest.skipped}
        assert reasons.keys() == {"a.m4a", "b.WEBM", "c.wv"}
        assert "install torchcodec and FFmpeg" in reasons["a.m4a"] and "convert it" in reasons["c.wv"]
    assert not scan_folder(audio, suffixes=[".flac"], progress=False).skipped


@pytest.fixture
def two(tmp_path):
    """Two recordings: noise, and silence in the middle of noise that a disk keeps as a hole."""
    noise = (8_000 * np.random.default_rng(0).standard_normal(4_000)).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", noise, 16_000)
    soundfile.write(tmp_path / "b.wav", np.concatenate([noise, np.zeros(200_000, np.int16), noise]), 16_000)
    return tmp_path


def tar(folder, name, *arguments):
    subprocess.run(["tar", "-C", folder, "-cf", folder / name, *arguments], check=True)
    return folder / name


@pytest.mark.parametrize("format", ["gnu", "oldgnu", "pax"])
def test_sparse_members_are_named(two, format):
    (two / "holes").mkdir()
    subprocess.run(["cp", "--sparse=always", two / "b.wav", two / "holes" / "b.wav"], check=True)
    path = tar(two, "s.tar", "-S", f"--format={format}", "a.wav", "-C", two / "holes", "b.wav")
    manifest = scan_tar(path, progress=False)
    expected = {"a": read_audio(two / "a.wav"), "b": read_audio(two / "b.wav")}
    for i in range(len(manifest)):
        np.testing.assert_array_equal(manifest.read(i), expected.pop(manifest.fileid(i)))
    assert [entry.fileid for entry in manifest.skipped] == [f"{name}.wav" for name in expected]
    assert all("stored with holes" in entry.reason for entry in manifest.skipped)
    assert "a" not in expected


def test_tars_behind_one_another(two):
    content = tar(two, "1.tar", "a.wav").read_bytes() + tar(two, "2.tar", "b.wav").read_bytes()
    (two / "all.TAR").write_bytes(content)
    manifest = open_manifest(two / "all.TAR", progress=False)
    assert [manifest.fileid(i) for i in range(2)] == ["a", "b"]
    for i, name in enumerate("ab"):
        np.testing.assert_array_equal(manifest.read(i), read_audio(two / f"{name}.wav"))
    (two / "damaged.tar").write_bytes(content[:20_480] + b"no tar" * 200 + content[20_480:])
    (two / "short.tar").write_bytes(content[: len(content) // 2])
    for name in ("damaged.tar", "short.tar"):
        with pytest.raises(ManifestError, match=r"cut off or damaged behind \d+ files?"):
            scan_tar(two / name, progress=False)


@pytest.mark.parametrize("link", [os.link, lambda target, name: os.symlink(target.name, name)])
def test_links_in_tars(two, link):
    """A link to audio that is used is named; one to audio of another name is that audio."""
    (two / "blob").write_bytes((two / "b.wav").read_bytes())
    link(two / "a.wav", two / "again.wav")
    link(two / "blob", two / "c.wav")
    os.symlink("nowhere.wav", two / "d.wav")
    manifest = scan_tar(tar(two, "l.tar", "a.wav", "again.wav", "blob", "c.wav", "d.wav"), progress=False)
    assert manifest.table["path"].to_pylist() == ["a.wav", "c.wav"]
    np.testing.assert_array_equal(manifest.read(1), read_audio(two / "b.wav"))
    reasons = {entry.fileid: entry.reason for entry in manifest.skipped}
    assert "is a link to a.wav, which is used itself" in reasons.pop("again.wav")
    assert "is a link to nowhere.wav, which is not in the tar" in reasons.pop("d.wav") and not reasons


def test_every_cut_of_a_tar_is_told(two):
    whole = tar(two, "w.tar", "a.wav", "b.wav").read_bytes()
    for length in np.random.default_rng(0).integers(1, len(whole) - 11_000, 30):
        (two / "cut.tar").write_bytes(whole[:length])
        try:
            found = scan_tar(two / "cut.tar", progress=False)
        except ManifestError as error:
            assert "cut off" in str(error)
        else:  # between two members nothing shows that there was more
            assert length % 512 == 0 and len(found) == 1


def test_parquet(audio, tmp_path):
    for name, manifest in {"a": scan_folder(audio, progress=False), "b": scan_tar(audio.parent / "all.tar")}.items():
        manifest.write(tmp_path / f"{name}.parquet")
        same(open_manifest(tmp_path / f"{name}.parquet"), manifest)
    more = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(more.append_column("speaker", pa.array(["x"] * 3)), tmp_path / "c.parquet")
    assert len(open_manifest(tmp_path / "c.parquet")) == 3
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing")
    pyarrow.parquet.write_table(pa.table({"audio": ["x"]}), tmp_path / "e.parquet")
    for name, message in (("d", "cannot be read as a manifest"), ("e", "has no column path, num_samples")):
        with pytest.raises(ManifestError, match=message):
            open_manifest(tmp_path / f"{name}.parquet")
