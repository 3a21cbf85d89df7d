"""Labels of utterances and frames, what is held out, and equal error rates."""

import numpy as np
import pytest

from spidr_hf.data.labels import (
    Labels,
    frame_phones,
    held_out,
    parse_hold_out,
    plain_label,
    read_phones,
    read_table,
    spoken_phones,
    without_silence,
)
from spidr_hf.data.manifests import Manifest
from spidr_hf.finetuning.batches import Split, evaluation_keys
from spidr_hf.finetuning.classification import equal_error_rate


@pytest.mark.parametrize(
    "name, content",
    [
        ("labels.csv", "fileid,speaker\na,1\nb,2\n"),
        ("labels.tsv", "speaker\tid\n1\ta\n2\tb\n"),
        ("labels.jsonl", '{"id": "a", "speaker": 1}\n\n{"file": "b", "speaker": "2"}\n'),
    ],
)
def test_tables(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    assert {key: str(row["speaker"]) for key, row in read_table(path).items()} == {"a": "1", "b": "2"}
    labels = Labels([path], "unused", None)
    assert held_out(labels, *parse_hold_out("speaker=2")) == {"b"}
    with pytest.raises(ValueError, match=r"no column 'mood', only (fileid|file|id|speaker)"):
        labels.column("mood")
    with pytest.raises(ValueError, match="no utterance has speaker '3', only 1, 2"):
        held_out(labels, "speaker", "3")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("labels.csv", "speaker\n1\n", "line 2: has no file id"),
        ("labels.jsonl", "no json\n", "line 1 is not of the form"),
        ("labels.jsonl", "[1]\n", r"line 1 is not of the form.*\[1\] is no object"),
        ("labels.csv", "id,speaker\na,1\na,2\n", "'a' was there before"),
        ("labels.wav", "", "no table of labels"),
        (None, "", "no such file of labels"),
    ],
)
def test_tables_that_are_none(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / (name or "nothing.csv"))


def test_tables_as_people_have_them(tmp_path):
    """From Excel in Europe, with paths of audio, and in several files."""
    path = tmp_path / "labels.csv"
    path.write_bytes("\ufeffPath;text\r\ncards/001.wav;eins, zwei\r\ncards/two.b.FLAC;drei\r\n".encode())
    assert Labels([path], "unused", None).column("text") == {"cards/001": "eins, zwei", "cards/two.b": "drei"}
    (tmp_path / "more.csv").write_text("fileid,text\ncards/001,vier\n")
    with pytest.raises(ValueError, match=r"more.csv has other text for 'cards/001' than a file before it"):
        Labels([path, tmp_path / "more.csv"], "unused", None)
    (tmp_path / "more.csv").write_text("fileid,speaker\ncards/001,S\n")
    both = Labels([path, tmp_path / "more.csv"], "unused", None)
    assert both.column("speaker") == {"cards/001": "S"} and len(both.column("text")) == 2
    for name, phone in (("a", "A"), ("same", "A"), ("b", "B")):
        (tmp_path / f"{name}.ctm").write_text(f"u 1 0 0.1 {phone}\n")
    assert read_phones([tmp_path / "a.ctm", tmp_path / "same.ctm"]) == {"u": [("A", 0.0, 0.1)]}
    assert read_phones([tmp_path / "a.ctm", tmp_path / "more.csv"]) == {"u": [("A", 0.0, 0.1)]}
    assert Labels([tmp_path / "a.ctm", tmp_path / "more.csv"], "unused", None).column("speaker") == {"cards/001": "S"}
    with pytest.raises(ValueError, match=r"a.ctm: no table of labels"):
        Labels([tmp_path / "a.ctm"], "unused", None)
    with pytest.raises(ValueError, match=r"b.ctm has other phones for 'u'"):
        read_phones([tmp_path / "a.ctm", tmp_path / "b.ctm"])


def test_phones_of_frames():
    phones = [("A", 0.0, 0.03), ("B", 0.03, 0.05), ("C", 0.06, 0.08)]
    # Windows of 25 ms every 20 ms: their middles are at 12.5, 32.5, 52.5 (in the gap), 72.5 and 92.5 ms.
    assert frame_phones(phones, 5, 320, 400) == ["A", "B", "", "C", ""]
    assert frame_phones(list(reversed(phones)), 2, 320, 400) == ["A", "B"]
    assert without_silence([("SIL", 0, 1), ("A", 1, 2), ("sp", 2, 3), ("SPN_S", 3, 4), ("S_S", 4, 5)]) == ["A", "S_S"]


def test_phones_of_whatever_a_column_holds():
    alignment = [["SIL", 0.0, 0.1], ["K", 0.1, 0.2], ["AE1", 0.2, 0.3]]
    for value in ("K  AE1", ["sil", "K", "AE1"], alignment):
        assert spoken_phones(value) == "K AE1"
    assert plain_label(3) == "3"
    for value in (["a"], {"a": 1}):
        with pytest.raises(ValueError, match="is no label: a text or a number is"):
            plain_label(value)


def test_equal_error_rate():
    assert equal_error_rate(np.array([0.9, 0.8, 0.2, 0.1]), np.array([True, True, False, False])) == 0
    assert equal_error_rate(np.array([0.1, 0.2, 0.8, 0.9]), np.array([True, True, False, False])) == 1
    assert equal_error_rate(np.array([0.5, 0.5, 0.5, 0.5]), np.array([True, False, True, False])) == 0.5
    scores, same = np.array([0.9, 0.7, 0.6, 0.5, 0.4, 0.3]), np.array([True, True, False, True, False, False])
    assert equal_error_rate(scores, same) == pytest.approx(1 / 3)
    # Against the definition, on a dense grid of thresholds.
    rng = np.random.default_rng(0)
    same = rng.random(4000) < 0.3
    scores = rng.standard_normal(4000) + 1.5 * same
    grid = np.linspace(-3, 5, 4001)
    gaps = [(abs((scores[same] < t).mean() - (scores[~same] >= t).mean()), t) for t in grid]
    threshold = min(gaps)[1]
    assert equal_error_rate(scores, same) == pytest.approx((scores[same] < threshold).mean(), abs=2e-3)
    with pytest.raises(ValueError, match="pairs of one speaker"):
        equal_error_rate(scores, np.ones(4000, dtype=bool))


def test_evaluation_takes_each_utterance_once_on_any_number_of_processes():
    import pyarrow as pa

    lengths = np.random.default_rng(0).integers(1000, 9000, 37)
    table = pa.table({"path": [f"{i}.wav" for i in range(37)], "num_samples": lengths})
    split = Split("dev", Manifest(table, "."), np.arange(3, 37), lambda index: np.array(0))
    for processes in (1, 3):
        keys = [list(evaluation_keys(split, 20_000, rank, processes)) for rank in range(processes)]
        batches = [key.utterances for own in keys for key in own]
        assert sorted(np.concatenate(batches).tolist()) == list(range(3, 37))
        assert all(len(batch) * lengths[batch].max() <= 20_000 or len(batch) == 1 for batch in batches)
