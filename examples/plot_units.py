#!/usr/bin/env python
"""A picture of one utterance: spectrogram, phones, and the units of one or several layers.

    python examples/plot_units.py DATA UNITS PICTURE --alignments ALIGNMENTS --file FILEID

DATA and UNITS are those of extract_units.py: its data, and its OUT_DIR or one of its units.jsonl. With alignments,
units have the colour of the phone that they most often lie on, over all of the file; without, one of their own. Phones
are known by ARPAbet (stress marks and case make no difference), TIMIT's symbols and IPA.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf.configuration_spidr import SAMPLING_RATE
from spidr_hf.data.alignments import read_alignments
from spidr_hf.data.open import open_data
from spidr_hf.data.sources import AudioSource
from spidr_hf.evaluation.phones import UNIT, count_pairs
from spidr_hf.system.commands import HelpFormatter, clear_errors, picture_path, user_path
from spidr_hf.system.messages import counted
from spidr_hf.system.names import find_names, match_names
from spidr_hf.units.unit_files import read_units, unit_files

_LEGIBLE = 20  # seconds
_DIFFERENCE = 0.045  # seconds: a frame, and what the convolutions drop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("data", metavar="DATA", help="manifest, folder of audio files, .tar, or data set")
    parser.add_argument("units", type=user_path, metavar="UNITS", help="file of units, or folder with one per layer")
    parser.add_argument("picture", type=picture_path, metavar="PICTURE", help="what to write: .png, .pdf, .svg")
    parser.add_argument("--file", metavar="FILEID", help="which utterance (default: the first that has units)")
    parser.add_argument("--alignments", type=user_path, help="phones, as for evaluate_units.py")
    parser.add_argument(
        "--tier",
        help="tier of the TextGrids that holds the phones (default: the one with phones in its name, or the only one)",
    )
    parser.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="of a folder (default: all)")
    parser.add_argument("--start", type=float, default=0.0, metavar="SECONDS", help="from where")
    parser.add_argument("--end", type=float, metavar="SECONDS", help="to where (default: the end)")
    parser.add_argument("--resample", action="store_true", help="take audio of any rate and number of channels")
    args = parser.parse_args()
    with clear_errors():
        from spidr_hf.plots.figures import save_figure, utterance_figure
        from spidr_hf.plots.palette import unit_colours

        source = open_data(args.data, resample=args.resample)
        files = unit_files(args.units)
        if missing := sorted(set(args.layers or ()) - set(files)):
            raise ValueError(f"There are no units of layer {missing[0]} in {args.units}.")
        units = {layer: read_units(path) for layer, path in files.items() if not args.layers or layer in args.layers}
        index, name = find(source, next(iter(units.values())), args.file)
        phones, colours = [], {}
        if args.alignments:
            alignments = read_alignments(args.alignments, tier=args.tier)
            for layer, sequences in units.items():
                known, without = match_names(sequences, alignments)
                aligned = {n: sequences[n] for n in known}
                counts, names = count_pairs(aligned, {n: alignments[other] for n, other in known.items()})
                colours[layer] = unit_colours(counts, names)
            if without:
                print(
                    f"{counted(len(without), 'utterance', 'has', 'have', of=len(sequences))} no alignment.",
                    file=sys.stderr,
                )
            phones = alignments[known[name]] if name in known else []
        shown = {layer: sequences[name] for layer, sequences in units.items() if name in sequences}
        waveform, part = source.read(index), (args.start, args.end)
        for sequence in shown.values():
            if abs(len(sequence) * UNIT - len(waveform) / SAMPLING_RATE) > _DIFFERENCE:
                raise ValueError(
                    f"The units of {name!r} are those of {len(sequence) * UNIT:.2f} s, the recording has "
                    f"{len(waveform) / SAMPLING_RATE:.2f} s: give the data that they are of."
                )
        save_figure(utterance_figure(waveform, phones, shown, colours, title=name, part=part), args.picture)
        if (args.end or len(waveform) / SAMPLING_RATE) - args.start > _LEGIBLE:
            print(f"Single units can be told apart in up to {_LEGIBLE} s: see --start and --end.", file=sys.stderr)
        print(args.picture)


def find(source: AudioSource, units: Mapping[str, Any], wanted: str | None) -> tuple[int, str]:
    """An utterance that has units: its index in the data, and what its units are called."""
    matches = find_names([source.fileid(index) for index in range(len(source))], units)
    known = {fileid: (index, names[0]) for index, (fileid, names) in enumerate(matches.items()) if len(names) == 1}
    if not known:
        raise ValueError(
            f"No utterance of the data has units: it has {source.fileid(0)!r}, for example, and there are units of "
            f"{next(iter(units), 'none')!r}."
        )
    if wanted is None:
        return next(iter(known.values()))
    for name in (wanted, os.path.splitext(wanted)[0]):
        if len(found := find_names([name], known)[name]) == 1:
            return known[found[0]]
    raise ValueError(
        f"There is no utterance {wanted!r} that is in the data and has units, as {next(iter(known))!r} is."
    )


if __name__ == "__main__":
    main()
