#!/usr/bin/env python
"""Two training curves side by side, step by step: a run against another one, or against SpidR's own.

    python examples/compare_runs.py runs/mine/metrics.jsonl runs/other/metrics.jsonl --steps 200 400 600

Both are JSON lines with `step`, `loss`, `target_ppl`, `pred_ppl`, `lr` and `ema_decay`, which SpidR's own logs share.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

FIELDS = ("loss", "target_ppl", "pred_ppl", "lr", "ema_decay")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="METRICS", help="a run's metrics.jsonl, or its folder")
    parser.add_argument("reference", type=Path, metavar="REFERENCE", help="what to compare with, likewise")
    parser.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="default: every step that both logged")
    args = parser.parse_args()
    try:
        run, reference = read_curve(args.run), read_curve(args.reference)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    steps = [step for step in sorted(run.keys() & reference.keys()) if args.steps is None or step in args.steps]
    if not steps:
        sys.exit(f"error: {args.run} and {args.reference} have no step in common (log_interval differs?).")
    print(f"{'step':>6}" + "".join(f"{field:>26}" for field in FIELDS))
    for step in steps:
        ours, theirs = run[step], reference[step]
        pairs = (f"{ours[field]:12.6g} {theirs[field]:12.6g}" for field in FIELDS)
        print(f"{step:6d}" + "".join(f"{pair:>26}" for pair in pairs))
    print("\nlargest difference")
    for field in FIELDS:
        absolute = max(abs(run[step][field] - reference[step][field]) for step in steps)
        relative = max(abs(run[step][field] / reference[step][field] - 1) for step in steps)
        print(f"  {field:10} {absolute:10.3g}   {relative:8.1%}")


def read_curve(path: Path) -> dict[int, Mapping[str, float]]:
    """Rows by step, of a file or of a run's folder. Raises `ValueError` naming the line that is no row of a curve."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    rows = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["step"]] = {field: float(row[field]) for field in FIELDS}
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path}, line {number}: not a row with step, {', '.join(FIELDS)}.") from None
    return rows


if __name__ == "__main__":
    main()
