#!/usr/bin/env python
"""The .item file of an ABX test on triphones, from alignments.

    python examples/write_items.py examples/data/alignments.jsonl triphones.item

ALIGNMENTS is JSON lines with `id`, `phones` and `speaker`; with `num_samples`, triphones at the very end, of which the
model has no frame, are left out. For TextGrids or CTM give the speakers with --speakers, a file of lines
"<fileid> <speaker>". Triphones with silence are left out.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf.configuration_spidr import frame_lengths
from spidr_hf.data.alignments import SILENCES, read_alignments, write_items
from spidr_hf.modeling_spidr import SpidrConfig
from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path, user_path
from spidr_hf.system.messages import counted
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
            lines = text_lines(args.speakers, lambda line: line.split(maxsplit=2)[:2], "fileid speaker")
            speakers = dict(words for _, words in lines if len(words) == 2)
        # A token takes the frames whose middle it holds: the last may begin half a frame before the features end.
        ends = {
            fileid: (frame_lengths(SpidrConfig(), samples) + 0.49) / 50
            for fileid, (_, samples) in rows.items()
            if samples is not None
        }
        count = write_items(args.out, alignments, speakers, silences=args.silence, durations=ends)
        print(f"{args.out}: {counted(count, 'triphone')} of {counted(len(set(speakers.values())), 'speaker')}")


def facts(row: dict[str, Any]) -> tuple[str, tuple[str | None, int | None]]:
    """File id, and speaker and number of samples where they are known."""
    speaker, samples = row.get("speaker"), row.get("num_samples")
    known = None if speaker is None else str(speaker), None if samples is None else int(samples)
    return str(row["id"] if "id" in row else row["file"]), known


if __name__ == "__main__":
    main()
