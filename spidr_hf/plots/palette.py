"""The colours of phones and units, in every picture and on the page, and which sounds aligners' labels stand for.

A phone has the colour of its manner of articulation. These colours and their shades keep apart for the colour-blind,
too, and text can be read on them: `tests/plots/test_palette.py` measures both.
"""

import colorsys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import to_hex, to_rgb

from ..data.alignments import POSITION, SILENCE, is_silence

COLOURS = {
    "silence": "#eceff1",
    "vowel": "#c6af40",
    "approximant": "#aeffb2",
    "nasal": "#2eb790",
    "fricative": "#95a5e9",
    "affricate": "#755286",
    "stop": "#9e4f12",
    "other": "#eceff1",  # told from silence by its hatching
}
HATCHED = "other"
SHADES = 0.25  # how far towards white the shades of a colour go
DARK = "#17202a"
_LUMINANCE = (0.2126, 0.7152, 0.0722)  # of linear red, green and blue
# CMU's and TIMIT's symbols, with TIMIT's closures; taps and trills count as approximants.
_ARPABET = {
    "vowel": "AA AE AH AO AW AX AX-H AXR AY EH ER EY IH IX IY OW OY UH UW UX",
    "approximant": "L R W Y WH EL DX",
    "nasal": "M N NG EM EN ENG NX",
    "fricative": "DH F HH HV S SH TH V Z ZH",
    "affricate": "CH JH",
    "stop": "B D G K P T Q BCL DCL GCL KCL PCL TCL",
}
# IPA by the first letter; letters with marks, tones and length are those without.
_IPA = {
    "vowel": "aeiouyæœøɐɑɒɔəɘɚɛɜɝɞɤɨɪɯɵɶʉʊʌʏᵻ",
    "approximant": "jlrwɥɫɭɰɹɺɻɽɾʀʋʎʙʟ",
    "nasal": "mnŋɱɲɳɴ",
    "fricative": "fhsvxzçðħɕɣɦɧɬɮɸʁʂʃʐʑʒʕʜʝʢβθχ",
    "affricate": "ʣʤʥʦʧʨ",
    "stop": "bcdgkpqtɖɗɟɠɡɢɓʄʈʔʛʘǀǁǂǃ",
}
_ARPABET_MANNER = {symbol: manner for manner, symbols in _ARPABET.items() for symbol in symbols.split()}
_IPA_MANNER = {letter: manner for manner, letters in _IPA.items() for letter in letters}


def phone_name(label: str) -> str:
    """The phone of an aligner's label: "AH" of "AH0" and "AH1_B", "SIL" of every label of silence."""
    label = POSITION.sub("", label.strip())
    if is_silence(label):
        return SILENCE
    if label[-1:] in ("0", "1", "2") and _ARPABET_MANNER.get(label[:-1].upper()) == "vowel":
        return label[:-1]
    return label


def manners(labels: Iterable[str]) -> dict[str, str]:
    """
    Manner of articulation of each label of an alignment: silence, vowel, approximant, nasal, fricative, affricate,
    stop, or other for what is not known.

    Labels are ARPAbet (CMU's or TIMIT's, of either case, with or without stress) or IPA. As IPA are read those that are
    no ARPAbet, and all where any is not ASCII ("y" is a vowel there).
    """
    labels = list(labels)
    ipa_first = not all(label.isascii() for label in labels)
    return {label: _manner(phone_name(label), ipa_first) for label in labels}


def _manner(phone: str, ipa_first: bool) -> str:
    if phone == SILENCE:
        return "silence"
    letters = unicodedata.normalize("NFC", phone)  # "ç" is a letter, "ã" one with a mark
    bare = [c if c in _IPA_MANNER else unicodedata.normalize("NFD", c)[0] for c in letters]
    sounds = [_IPA_MANNER[c] for c in bare if c in _IPA_MANNER][:2]
    ipa = "affricate" if sounds == ["stop", "fricative"] else sounds[0] if sounds else "other"
    arpabet = _ARPABET_MANNER.get(phone.upper(), "other")
    first, second = (ipa, arpabet) if ipa_first else (arpabet, ipa)
    return second if first == "other" else first


def merge_phones(counts: np.ndarray, labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Counts (phones x units) with the rows of labels of one phone added up, and the phones' names, sorted."""
    names = [phone_name(label) for label in labels]
    phones = sorted(set(names))
    merged = np.zeros((len(phones), counts.shape[1]), dtype=counts.dtype)
    np.add.at(merged, [phones.index(name) for name in names], counts)
    return merged, phones


def unit_colours(counts: np.ndarray, labels: Sequence[str]) -> dict[int, tuple[Any, str]]:
    """
    A colour and a manner for each unit: those of the phone it most often lies on, in a shade of its own. Where units
    know phones, their tiers look like the phones' tier.

    Args:
        counts: Phones x units, from `evaluation.count_pairs`.
        labels: The phones' labels.
    """
    counts, phones = merge_phones(counts, labels)
    kinds, colours = manners(phones), {}
    for unit in np.flatnonzero(counts.sum(axis=0)):
        manner = kinds[phones[int(counts[:, unit].argmax())]]
        base = np.array(to_rgb(COLOURS[manner]))
        shade = SHADES * ((unit * 0.618034) % 1)  # neighbours in number are far apart in shade
        colours[int(unit)] = tuple(base + (1 - base) * shade), manner
    return colours


def unit_colour(unit: int) -> str:
    """A light colour of the unit's own, on which dark text can be read; neighbours in number differ."""
    linear = _linear(colorsys.hls_to_rgb((unit * 0.618034) % 1, 0.5, 0.6))
    luminance, wanted = float(linear @ _LUMINANCE), (0.27, 0.78, 0.48)[unit % 3]
    if luminance < wanted:
        linear += (1 - linear) * (wanted - luminance) / (1 - luminance)
    else:
        linear *= wanted / luminance
    return to_hex(np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def contrast(first: Any, second: Any) -> float:
    """Contrast of two colours by WCAG 2: 1 to 21."""
    darker, lighter = sorted(_luminance(colour) for colour in (first, second))
    return (lighter + 0.05) / (darker + 0.05)


def ink_on(colour: Any) -> str:
    """Dark or white, whichever is easier to read on that colour."""
    return max((DARK, "white"), key=lambda ink: contrast(ink, colour))


def _luminance(colour: Any) -> float:
    return float(_linear(to_rgb(colour)) @ _LUMINANCE)


def _linear(rgb: Sequence[float]) -> np.ndarray:
    values = np.array(rgb)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


__all__ = [
    "COLOURS",
    "DARK",
    "HATCHED",
    "SHADES",
    "contrast",
    "ink_on",
    "manners",
    "merge_phones",
    "phone_name",
    "unit_colour",
    "unit_colours",
]
