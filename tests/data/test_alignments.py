"""Alignments in every format they come in, and the item files made of them."""

import numpy as np
import pytest

from spidr_hf.data.alignments import phones_of_steps, read_alignments, read_ctm, read_textgrid, write_items

EXPECTED = [("SIL", 0.0, 0.25), ("K", 0.25, 0.4), ('"1]', 0.4, 1.0)]

LONG = '''File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 1.0
tiers? <exists>
size = 3
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 1.0
        intervals: size = 1
        intervals [1]:
            xmin = 0
            xmax = 1.0
            text = "word 3"
    item [2]:
        class = "TextTier"
        name = "points"
        xmin = 0
        xmax = 1.0
        points: size = 1
        points [1]:
            number = 0.5
            mark = "x"
    item [3]:
        class = "IntervalTier"
        name = "phones"
        xmin = 0
        xmax = 1.0
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.25
            text = ""
        intervals [2]:
            xmin = 0.25
            xmax = 0.4
            text = "K"
        intervals [3]:
            xmin = 0.4
            xmax = 1.0
            text = """1]"
'''
SHORT = '''File type = "ooTextFile"
Object class = "TextGrid"

0
1.0
<exists>
1
"IntervalTier"
"any name"
0
1.0
3
0
0.25
"sil"
0.25
0.4
"K"
0.4
1.0
"""1]"
'''


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig"])
def test_textgrids(tmp_path, encoding):
    path = tmp_path / "a.TextGrid"
    path.write_text(LONG, encoding=encoding)
    assert read_textgrid(path) == EXPECTED
    assert read_textgrid(path, "words") == [("word 3", 0.0, 1.0)]
    path.write_text(SHORT, encoding=encoding)
    assert read_textgrid(path) == [("sil", 0.0, 0.25), *EXPECTED[1:]]


def test_a_folder_of_textgrids(tmp_path):
    (tmp_path / "s1").mkdir()
    (tmp_path / "s1" / "a.TextGrid").write_text(LONG)
    (tmp_path / "b.textgrid").write_text(SHORT)
    assert list(read_alignments(tmp_path)) == ["b", "s1/a"]
    assert read_alignments(tmp_path / "s1" / "a.TextGrid") == {"a": EXPECTED}
    (tmp_path / "s1" / "._a.TextGrid").write_bytes(b"\0\5\x16\7")  # macOS's, of a zip
    assert list(read_alignments(tmp_path)) == ["b", "s1/a"]


def test_textgrids_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.TextGrid"
    path.write_text(LONG.replace('"phones"', '"other"'))
    with pytest.raises(ValueError, match=r"a.TextGrid has the tiers words, other: choose one with --tier"):
        read_textgrid(path)
    with pytest.raises(ValueError, match=r"no interval tier 'points', only words, other"):
        read_textgrid(path, "points")
    path.write_text(LONG.replace('"words"', '"phones"'))
    for tier, message in ((None, "has the tiers phones, phones"), ("phones", "2 interval tiers 'phones': rename")):
        with pytest.raises(ValueError, match=message):
            read_textgrid(path, tier)
    for broken in (LONG[:300], "text", LONG.replace("0.25", '"x"')):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"a.TextGrid, line \d+ cannot be read as a TextGrid"):
            read_textgrid(path)
    with pytest.raises(ValueError, match="no TextGrid files"):
        read_alignments(tmp_path.joinpath("empty").mkdir() or tmp_path / "empty")
    with pytest.raises(ValueError, match="nowhere: no such file"):
        read_alignments(tmp_path / "nowhere")


def test_ctm(tmp_path):
    path = tmp_path / "a.ctm"
    path.write_text(";; comment\nu 1 0.10 0.10 AH\nu 1 0.0 0.1 K 0.9\nv A 0.05 0.2 T\n\nu 1 0.3 0.1 S\n")
    alignments = read_ctm(path)
    assert [phone for phone, _, _ in alignments["u"]] == ["K", "AH", "SIL", "S"]
    np.testing.assert_allclose([end for _, _, end in alignments["u"]], [0.1, 0.2, 0.3, 0.4])
    assert alignments["v"][0] == ("SIL", 0.0, 0.05)
    path.write_text("u A 0.0 0.1 K\nu B 0.0 0.1 AH\n")
    with pytest.raises(ValueError, match=r"a.ctm, line 2 .*u has the channel A above"):
        read_ctm(path)
    path.write_text("u 1 0.10 AH\n")
    with pytest.raises(ValueError, match=r"a.ctm, line 1 is not of the form"):
        read_alignments(path)


def test_rows_of_discophon(tmp_path):
    path = tmp_path / "alignment-deu-test.txt"
    path.write_text("#file onset offset #phone\nu 0.0000 0.1000 SIL\nu 0.1 0.25 a\nv 0.0 0.5 b\n")
    assert read_alignments(path) == {"u": [("SIL", 0.0, 0.1), ("a", 0.1, 0.25)], "v": [("b", 0.0, 0.5)]}
    path.write_text("u 0.0 0.1 SIL\n")
    with pytest.raises(ValueError, match="no column #file"):
        read_alignments(path)
    path.write_text("#file onset offset #phone\nu 0.0 SIL\n")
    with pytest.raises(ValueError, match=r"alignment-deu-test.txt, line 2 is not of the form"):
        read_alignments(path)


def test_labels_per_step(tmp_path):
    assert phones_of_steps(["A", "A", "B"], 0.02) == [("A", 0.0, 0.04), ("B", 0.04, 0.06)]
    path = tmp_path / "a.jsonl"
    path.write_text('{"file": "x", "phones": ["A", "A", "B"]}\n')
    assert read_alignments(path, step=0.005)["x"] == [("A", 0.0, 0.01), ("B", 0.01, 0.015)]
    path.write_text('{"id": "x", "phones": [null, "", "A"]}\n{"id": "y", "phones": [[null, 0, 1], [" ", 1, 2]]}\n')
    assert read_alignments(path)["x"] == [("SIL", 0.0, 0.02), ("A", 0.02, 0.03)]
    assert read_alignments(path)["y"] == [("SIL", 0.0, 1.0), ("SIL", 1.0, 2.0)]


def test_items_are_triphones_without_silence(tmp_path):
    phones = [("SIL", 0, 0.1), ("A", 0.1, 0.2), ("B", 0.2, 0.3), ("C", 0.3, 0.4), ("D", 0.4, 0.5), ("sil", 0.5, 0.6)]
    path = tmp_path / "out" / "a.item"
    assert write_items(path, {"x/1": phones}, {"x/1": "s"}) == 2
    assert path.read_text().splitlines() == [
        "#file onset offset #phone prev-phone next-phone speaker",
        "x/1 0.1000 0.4000 B A C s",
        "x/1 0.2000 0.5000 C B D s",
    ]
    assert write_items(path, {"x/1": phones}, {"x/1": "s"}, durations={"x/1": 0.45}) == 1
    with pytest.raises(ValueError, match="no speaker for 'x/1'"):
        write_items(path, {"x/1": phones}, {})
    # Nothing that a pause lies between, in whatever order the phones are.
    apart = [("C", 0.9, 1.0), ("A", 0.0, 0.1), ("B", 0.1, 0.2), ("D", 1.0, 1.1), ("E", 1.1, 1.2)]
    assert write_items(path, {"x/1": apart}, {"x/1": "s"}) == 1
    assert path.read_text().splitlines()[1:] == ["x/1 0.9000 1.2000 D C E s"]
    for names, speaker in (("x/1", "A B"), ("my x", "s")):
        with pytest.raises(ValueError, match=r"'(A B|my x)' has a blank in it"):
            write_items(path, {names: phones}, {names: speaker})
