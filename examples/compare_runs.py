#!/usr/bin/env python
"""Two training curves side by side, step by step: a run against another one, or against SpidR's own.

    python examples/compare_runs.py runs/mine/metrics.jsonl runs/other/metrics.jsonl --steps 200 400 600

Both are JSON lines with `step`, `loss`, `target_ppl`, `pred_ppl`, `lr` and `ema_decay`, which SpidR's own logs share.
"""

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

from spidr_hf.system.commands import HelpFormatter, clear_errors, user_path
from spidr_hf.system.tables import finite, json_lines

FIELDS = ("loss", "target_ppl", "pred_ppl", "lr", "ema_decay")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", type=user_path, metavar="METRICS", help="a run's metrics.jsonl, or its folder")
    parser.add_argument("reference", type=user_path, metavar="REFERENCE", help="what to compare with, likewise")
    parser.add_argument("--steps", type=int, nargs="+", metavar="STEP", help="default: every step that both logged")
    args = parser.parse_args()
    with clear_errors():
        compare(args.run, args.reference, args.steps)


def compare(run_path: Path, reference_path: Path, wanted: list[int] | None) -> None:
    """Print both curves. Raises `ValueError` where one cannot be read, or no step is in both."""
    run, reference = read_curve(run_path), read_curve(reference_path)
    steps = [step for step in sorted(run.keys() & reference.keys()) if wanted is None or step in wanted]
    if not steps:
        raise ValueError(f"{run_path} and {reference_path} have no step in common (log_interval differs?).")
    print(f"{'step':>6}" + "".join(f"{field:>26}" for field in FIELDS))
    for step in steps:
        ours, theirs = run[step], reference[step]
        pairs = (f"{ours[field]:12.6g} {theirs[field]:12.6g}" for field in FIELDS)
        print(f"{step:6d}" + "".join(f"{pair:>26}" for pair in pairs))
    print("\nlargest difference")
    for field in FIELDS:
        absolute = max(abs(run[step][field] - reference[step][field]) for step in steps)
        relative = max(_change(run[step][field], reference[step][field]) for step in steps)
        print(f"  {field:10} {absolute:10.3g}   {relative:8.1%}")


def _change(value: float, reference: float) -> float:
    if value == reference:
        return 0.0
    return abs(value / reference - 1) if reference else math.inf


def read_curve(path: Path) -> dict[int, Mapping[str, float]]:
    """Rows by step, of a file or of a run's folder. Raises `ValueError` naming the line that is no row of a curve."""
    path = path / "metrics.jsonl" if path.is_dir() else path
    form = f"{{step, {', '.join(FIELDS)}}}"
    return dict(row for _, row in json_lines(path, _row, form))


def _row(row: Mapping[str, object]) -> tuple[int, Mapping[str, float]]:
    if type(row["step"]) is not int:
        raise ValueError("its step is no whole number")
    return row["step"], {field: finite(row[field]) for field in FIELDS}


if __name__ == "__main__":
    main()
