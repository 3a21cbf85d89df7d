#!/usr/bin/env python
"""How well units and phones agree.

    python examples/evaluate_units.py UNITS_JSONL ALIGNMENTS --json scores.json --plot matrix.png

UNITS_JSONL is what extract_units.py wrote, one unit per 20 ms (deduplicated units need their durations); or its
OUT_DIR with a folder per layer: then every layer is scored. ALIGNMENTS is one of

    alignments.jsonl    {"id": "<fileid>", "phones": [["SIL", 0.0, 0.23], ["K", 0.23, 0.33], ...]} with seconds, or
                        {"id": "<fileid>", "phones": ["SIL", "SIL", ...]} with a label every --alignment-step
    alignments.ctm      <fileid> <channel> <start> <duration> <phone>; gaps count as silence
    alignments.txt      lines of #file onset offset #phone, as DiscoPhon's
    a TextGrid, or a folder of them named like the audio; empty labels count as silence

Scores are those of HuBERT's paper over steps of 10 ms: phone_purity, cluster_purity, pnmi (silence counts as a phone),
pnmi_without_silence; and without phones codebook_perplexity, active_units and bitrate (bits per second; with
--deduplicate that of units without repeats). Lengths may differ by the two steps that the convolutions drop, no more.
Labels are scored as they are written: AH0 and AH1 are two phones (the pictures take them for one). Silence is what
--silence lists; "sil", "sp", "spn", TIMIT's "h#" and the others that aligners write are known.

per, f1 and r_val are DiscoPhon's: every unit is read as the phone that it occurs with most (--assignment one-to-one: a
unit for each phone, of which there must be as many), and the phones' errors and boundaries (within 20 ms) are counted.

--agreement OTHER_UNITS adds the share of equal units, of student and teacher (extract_units.py --teacher) for example.
--plot draws the phone-by-unit matrix, or for several layers the scores' curves. --card writes the scores into the card
of a model folder, where the Hub shows them.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf.data.alignments import SILENCES, read_alignments
from spidr_hf.evaluation.discovery import ASSIGNMENTS, discovery_scores
from spidr_hf.evaluation.phones import agreement, all_scores, count_pairs
from spidr_hf.hub.card import add_results, evaluation_results, read_card
from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path, picture_path, user_path
from spidr_hf.system.files import write_text
from spidr_hf.system.messages import counted
from spidr_hf.system.names import match_names
from spidr_hf.units.unit_files import known_units, read_units, unit_files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "units", type=user_path, metavar="UNITS_JSONL", help="file of units, or folder with one per layer"
    )
    parser.add_argument("alignments", type=user_path, metavar="ALIGNMENTS", help="see above")
    parser.add_argument("--json", type=output_path, metavar="OUT", help="write the scores there")
    parser.add_argument("--plot", type=picture_path, metavar="PICTURE", help="draw a picture (.png, .pdf, .svg)")
    parser.add_argument(
        "--card", nargs=2, metavar=("MODEL", "NAME"), help="tell MODEL's card the scores, as of data NAME"
    )
    parser.add_argument("--agreement", type=user_path, metavar="OTHER_UNITS", help="other units of the same utterances")
    parser.add_argument("--deduplicate", action="store_true", help="bitrate of units without repeats")
    parser.add_argument("--alignment-step", type=float, default=10, metavar="MS", help="milliseconds per step")
    parser.add_argument(
        "--tier",
        help="tier of the TextGrids that holds the phones (default: the one with phones in its name, or the only one)",
    )
    silences = f"labels of silence, in either case (default: {' '.join(filter(None, SILENCES))}, and empty ones)"
    parser.add_argument("--silence", nargs="+", default=SILENCES, metavar="PHONE", help=silences)
    parser.add_argument("--num-units", type=int, help="units there can be (default: as their provenance says)")
    parser.add_argument(
        "--assignment",
        choices=ASSIGNMENTS,
        default=ASSIGNMENTS[0],
        help="how units become phones",
    )
    parser.add_argument(
        "--phones",
        nargs="+",
        metavar="PHONE",
        help="phones there can be; others are an error (default: those of the alignments)",
    )
    args = parser.parse_args()
    with clear_errors(needs=["scipy", "rapidfuzz"] if args.assignment == "one-to-one" else ["rapidfuzz"]):
        if args.plot:  # what is missing is told before anything is computed
            from spidr_hf.plots.figures import layer_figure, matrix_figure, save_figure
        if args.card:
            read_card(user_path(args.card[0]))
        step = args.alignment_step / 1000
        alignments = read_alignments(args.alignments, step=step, tier=args.tier)
        files = unit_files(args.units)
        others = unit_files(args.agreement) if args.agreement else {}
        scores, counts, names, told = {}, None, [], None
        for layer, path in files.items():
            units = read_units(path)
            try:
                matches, without = match_names(units, alignments)
                if without and without != told:  # once, where layers are alike
                    told = without
                    print(
                        f"{path}: {counted(len(without), 'utterance', 'has', 'have', of=len(units))} no alignment: "
                        f"left out, {without[0]!r} for one.",
                        file=sys.stderr,
                    )
                units = {name: units[name] for name in matches}
                phones = {name: alignments[known] for name, known in matches.items()}
                options = {"step": step, "num_units": args.num_units or known_units(path), "phones": args.phones}
                scores[layer] = all_scores(units, phones, silences=args.silence, collapse=args.deduplicate, **options)
                scores[layer] |= discovery_scores(units, phones, assignment=args.assignment, **options)
                if args.agreement:
                    if layer not in others:
                        what = "several layers: give one's file" if layer is None else f"no units of layer {layer}"
                        raise ValueError(f"{args.agreement} has {what}.")
                    scores[layer]["agreement"] = agreement(units, read_units(others[layer]))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            counts, names = count_pairs(units, phones, **options)
        single = next(iter(scores)) is None
        result = scores[None] if single else {"layers": {str(layer): values for layer, values in scores.items()}}
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(args.json, json.dumps(result, indent=2) + "\n")
        if args.card:
            model, name = args.card
            for layer, values in scores.items():
                add_results(user_path(model), evaluation_results(values, name, layer=layer))
        if args.plot:
            figure = matrix_figure(counts, names) if single else layer_figure(scores)
            save_figure(figure, args.plot)
        columns = list(next(iter(scores.values())))
        width = max(map(len, columns))
        if not single:
            print(" " * width, *(f"{f'layer {layer}':>9}" for layer in scores))
        for column in columns:
            values = (scores[layer][column] for layer in scores)
            print(f"{column:{width}}", *(f"{v:9d}" if isinstance(v, int) else f"{v:9.4f}" for v in values))


if __name__ == "__main__":
    main()
