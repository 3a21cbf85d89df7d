"""Colours hold for every kind of colour vision, text can be read on them, and labels are what they stand for."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from spidr_hf.data.alignments import SILENCES
from spidr_hf.evaluation.phones import without_silence
from spidr_hf.plots.curves import SERIES, layer_colours
from spidr_hf.plots.palette import (
    COLOURS,
    DARK,
    HATCHED,
    SHADES,
    contrast,
    ink_on,
    manners,
    merge_phones,
    phone_name,
    unit_colour,
    unit_colours,
)

# What dichromats see of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
VISIONS = {
    "trichromat": np.eye(3),
    "protanope": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranope": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanope": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]


def lab(colour, vision: str) -> np.ndarray:
    """CIE Lab (D65) of a colour as that vision has it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.array(VISIONS[vision]) @ linear, 0, 1) / (0.95047, 1, 1.08883)
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(first, second) -> float:
    """The least of all visions."""
    return min(float(np.linalg.norm(lab(first, vision) - lab(second, vision))) for vision in VISIONS)


def shades(colour) -> list:
    base = np.array(to_rgb(colour))
    return [tuple(base + (1 - base) * shade) for shade in (0, SHADES / 2, SHADES)]


def test_the_measure():
    np.testing.assert_allclose(lab("#ff0000", "trichromat"), [53.24, 80.09, 67.20], atol=0.05)
    # The palette before this one: fricatives and affricates, for a protanope.
    assert np.linalg.norm(lab("#4f86c6", "protanope") - lab("#9a6fb8", "protanope")) < 5


def test_manners_differ_in_every_shade_for_every_vision():
    assert COLOURS[HATCHED] == COLOURS["silence"]  # hatching tells them apart
    for first, second in itertools.combinations([name for name in COLOURS if name != HATCHED], 2):
        for a, b in itertools.product(shades(COLOURS[first]), shades(COLOURS[second])):
            assert distance(a, b) > 20, (first, second)


def test_curves_differ_for_every_vision():
    for first, second in itertools.combinations(SERIES, 2):
        assert distance(first, second) > 12  # and they have markers
    colours = layer_colours(8)
    lightness = [lab(colour, "deuteranope")[0] for colour in colours]
    assert lightness == sorted(lightness)
    assert min(distance(a, b) for a, b in itertools.pairwise(colours)) > 7


def test_units_differ_from_their_neighbours_in_number():
    near = [distance(unit_colour(unit), unit_colour(unit + step)) for unit in range(256) for step in (1, 2)]
    assert min(near) > 10


def test_text_can_be_read():
    assert contrast("white", "black") == pytest.approx(21)
    for colour in COLOURS.values():
        assert min(contrast(ink_on(shade), shade) for shade in shades(colour)) >= 4.5  # WCAG 2, level AA
    assert min(contrast(DARK, unit_colour(unit)) for unit in range(1024)) >= 4.5


@pytest.mark.parametrize(
    ("manner", "labels"),
    [
        ("silence", "SIL sil sp spn <eps> SPN h# pau SIL_S <p:>"),
        ("vowel", "AH0 ah1 IY2_E AX-H ux axr aj ɑː ɝ ow ə̃ ã ɛ a˥˩ yː"),
        ("approximant", "L r W Y y_B el dx ɹ j ʎ ɾ ɫ̩ wʷ"),
        ("nasal", "M n NG ENG em ɲ ŋ m̩ ɱ"),
        ("fricative", "DH s HH hv ZH ʃ ð ç vʲ sː ʁ"),
        ("affricate", "CH jh tʃ d͡ʒ dz ʧ tɕ"),
        ("stop", "B T_I tcl BCL q p t̪ kʰ ɟ ʔ ɡb ⁿd"),
        ("other", "? 17"),
    ],
)
def test_labels_of_aligners(manner, labels):
    ascii_only = [label for label in labels.split() if label.isascii() and "ː" not in label]
    assert set(manners(ascii_only).values()) <= {manner}
    for label in set(labels.split()) - set(ascii_only):
        assert manners([label]) == {label: manner}


def test_what_is_not_ascii_decides():
    assert manners(["y", "t", "ɛ"])["y"] == "vowel" and manners(["y", "t", "eh"])["y"] == "approximant"


def test_labels_of_one_phone_count_as_one():
    # On unit 0 lie vowels of three stresses, 2 steps each, and 3 steps of S.
    labels = ["AH0", "AH1", "AH2_B", "S", "sil", "sp"]
    counts = np.array([[2, 0], [2, 0], [2, 0], [3, 0], [0, 4], [1, 5]])
    merged, phones = merge_phones(counts, labels)
    assert phones == ["AH", "S", "SIL"] and merged.tolist() == [[6, 0], [3, 0], [1, 9]]
    assert {unit: manner for unit, (_, manner) in unit_colours(counts, labels).items()} == {0: "vowel", 1: "silence"}


def test_pictures_and_scores_have_one_table_of_silence():
    for label in SILENCES:
        for written in (label, label.lower()):
            assert phone_name(written) == "SIL" and without_silence(np.ones((1, 1)), [written])[1] == []
