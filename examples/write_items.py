#!/usr/bin/env python
"""The .item file of an ABX test on triphones, from alignments.

    python examples/write_items.py examples/data/alignments.jsonl triphones.item

ALIGNMENTS is JSON lines with `id`, `phones` and `speaker`; for TextGrids or CTM give the speakers with --speakers, a
file of lines "<fileid> <speaker>", with a tab between them where one has blanks. Utterances without a speaker are left
out, and triphones with silence or a gap in them, or at the very end (of `num_samples`, where they are given, else of
the alignment), of which the model has no frame.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf.configuration_spidr import SAMPLING_RATE, frame_lengths
from spidr_hf.data.alignments import SILENCES, Phones, read_alignments, write_items
from spidr_hf.modeling_spidr import SpidrConfig
from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path, user_path
from spidr_hf.system.messages import counted
from spidr_hf.system.names import match_names
from spidr_hf.system.tables import json_lines, text_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("alignments", type=user_path, metavar="ALIGNMENTS", help="JSON lines, TextGrids or CTM")
    parser.add_argument("out", type=output_path, metavar="OUT", help="the .item file")
    parser.add_argument(
        "--speakers",
        type=user_path,
        metavar="FILE",
        help="lines of fileid and speaker (default: the speakers of ALIGNMENTS)",
    )
    parser.add_argument(
        "--tier",
        help="tier of the TextGrids that holds the phones (default: the one with phones in its name, or the only one)",
    )
    silences = f"labels of silence, in either case (default: {' '.join(filter(None, SILENCES))}, and empty ones)"
    parser.add_argument("--silence", nargs="+", default=SILENCES, metavar="PHONE", help=silences)
    args = parser.parse_args()
    with clear_errors():
        alignments = read_alignments(args.alignments, tier=args.tier)
        rows = {}
        if args.alignments.suffix == ".jsonl":
            rows = dict(row for _, row in json_lines(args.alignments, facts, '{"id": "...", "phones": [...], ...}'))
        speakers = {fileid: speaker for fileid, (speaker, _) in rows.items() if speaker is not None}
        if args.speakers:
            speakers = dict(pair for _, pair in text_lines(args.speakers, named_speaker, "fileid speaker"))
        if not speakers:
            raise ValueError(
                f"There is no speaker for {next(iter(alignments), '')!r}: give --speakers FILE, lines of fileid and "
                "speaker."
            )
        matches, without = match_names(alignments, speakers, "speaker")
        if without:
            print(
                f"{counted(len(without), 'utterance', 'has', 'have', of=len(alignments))} no speaker: left out, "
                f"{without[0]!r} for one.",
                file=sys.stderr,
            )
        alignments = {name: alignments[name] for name in matches}
        # A word of an item file has no blanks.
        speakers = {name: "_".join(speakers[known].split()) for name, known in matches.items()}
        # A token takes the frames whose middle it holds: the last may begin half a frame before the features end.
        samples = {fileid: known for fileid, (_, known) in rows.items() if known is not None}
        ends = {
            fileid: (frame_lengths(SpidrConfig(), samples.get(fileid) or end_of(phones)) + 0.49) / 50
            for fileid, phones in alignments.items()
        }
        count = write_items(args.out, alignments, speakers, silences=args.silence, durations=ends)
        print(f"{args.out}: {counted(count, 'triphone')} of {counted(len(set(speakers.values())), 'speaker')}")


def end_of(phones: Phones) -> int:
    """Samples of a recording that ends with its alignment."""
    return round(SAMPLING_RATE * max((end for _, _, end in phones), default=0))


def named_speaker(line: str) -> tuple[str, str]:
    """File id and speaker of a line: two words, or what lies before and behind a tab."""
    words = [word.strip() for word in (line.strip().split("\t") if "\t" in line.strip() else line.split())]
    if len(words) != 2 or not all(words):
        raise ValueError("names with blanks need a tab between them")
    return words[0], words[1]


def facts(row: dict[str, Any]) -> tuple[str, tuple[str | None, int | None]]:
    """File id, and speaker and number of samples where they are known."""
    speaker, samples = row.get("speaker"), row.get("num_samples")
    known = None if speaker is None else str(speaker), None if samples is None else int(samples)
    return str(row["id"] if "id" in row else row["file"]), known


if __name__ == "__main__":
    main()
