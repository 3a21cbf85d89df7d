#!/usr/bin/env python
"""The .item file of an ABX test on triphones, from alignments.

    python examples/write_items.py examples/data/alignments.jsonl triphones.item

ALIGNMENTS is JSON lines with `id`, `phones` and `speaker`; with `num_samples`, triphones at the very end, of which the
model has no frame, are left out. For TextGrids or CTM give the speakers with --speakers, a file of lines
"<fileid> <speaker>". Triphones with silence are left out.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf.configuration_spidr import frame_lengths
from spidr_hf.data.alignments import SILENCES, read_alignments, write_items
from spidr_hf.modeling_spidr import SpidrConfig
from spidr_hf.system.commands import clear_errors, user_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("alignments", type=user_path, metavar="ALIGNMENTS", help="JSON lines, TextGrids or CTM")
    parser.add_argument("out", type=user_path, metavar="OUT", help="the .item file")
    parser.add_argument("--speakers", type=user_path, metavar="FILE", help="lines of fileid and speaker")
    parser.add_argument("--tier", help="tier of the TextGrids that holds the phones")
    parser.add_argument("--silence", nargs="+", default=SILENCES, metavar="PHONE", help="labels of silence")
    args = parser.parse_args()
    with clear_errors():
        alignments = read_alignments(args.alignments, tier=args.tier)
        rows = {}
        if args.alignments.suffix == ".jsonl":
            rows = {
                row.get("id", row.get("file")): row for row in map(json.loads, args.alignments.open(encoding="utf-8"))
            }
        speakers = {fileid: str(row["speaker"]) for fileid, row in rows.items() if "speaker" in row}
        if args.speakers:
            lines = args.speakers.read_text(encoding="utf-8").splitlines()
            speakers = dict(line.split()[:2] for line in lines if len(line.split()) > 1)
        # A token takes the frames whose middle it holds: the last may begin half a frame before the features end.
        ends = {
            fileid: (frame_lengths(SpidrConfig(), int(row["num_samples"])) + 0.49) / 50
            for fileid, row in rows.items()
            if "num_samples" in row
        }
        count = write_items(args.out, alignments, speakers, silences=args.silence, durations=ends)
        print(f"{args.out}: {count} triphones of {len(set(speakers.values()))} speakers")


if __name__ == "__main__":
    main()
