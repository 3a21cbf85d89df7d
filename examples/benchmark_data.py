#!/usr/bin/env python
"""What the data of a pretraining run cost on this machine: start-up, memory, decoding.

    python examples/benchmark_data.py                        # a manifest of 1 M rows; a minute or two
    python examples/benchmark_data.py --rows 10000000 --json out.json
    python examples/benchmark_data.py --rows 281241 --batches 0

Manifests are made on the fly. Decoding is of the speech in examples/data, put together to utterances of 12 s; its speed
is that of one core, whatever else the machine does. The simulated run is by default three days of one GPU at 60 ms an
update. Linux only, since memory is read from /proc.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import numpy as np

from spidr_hf.data.manifests import scan_tar
from spidr_hf.system.commands import HelpFormatter, output_path
from spidr_hf.system.messages import counted

from .benchmarks.data_costs import (
    decoding_speed,
    manifest_cost,
    simulated_run,
    write_made_manifest,
)

SPEECH = Path(__file__).resolve().parent / "data" / "small.tar"
NEEDED = 4_000  # audio seconds per second that a GPU takes, at 60 ms an update of the recipe's batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000], help="sizes of manifests")
    parser.add_argument("--workers", type=int, default=2, help="decoding workers whose memory is looked at")
    parser.add_argument("--batches", type=int, default=4_320_000, help="length of the simulated run; 0: none")
    parser.add_argument("--utterances", type=int, default=40, help="utterances of 12 s to decode")
    parser.add_argument("--json", type=output_path, help="write the numbers here, too")
    args = parser.parse_args()
    if min(args.rows) < 1 or args.workers < 1 or args.batches < 0 or args.utterances < 1:
        parser.error("--rows, --workers and --utterances must be at least 1, --batches at least 0")
    result: dict[str, object] = {"manifests": []}

    with tempfile.TemporaryDirectory() as folder:
        print(
            f"{'manifest':>12}{'first start':>13}{'next start':>12}{'an epoch':>10}{'main process':>14}{'a worker':>10}"
        )
        for rows in args.rows:
            path = Path(folder, f"{rows}.csv")
            write_made_manifest(path, rows)
            cost = manifest_cost(path, args.workers)
            result["manifests"].append(asdict(cost))
            print(
                f"{rows:>7} rows{cost.first_start:>11.1f} s{cost.next_start:>10.1f} s{cost.epoch:>8.2f} s"
                f"{cost.main_memory:>10.0f} MiB{cost.worker_memory:>6.1f} MiB",
                flush=True,
            )
            path.unlink()
            path.with_suffix(".arrow").unlink()

    if args.batches:
        run = simulated_run(batches=args.batches)
        result["run"] = asdict(run)
        print(
            f"\n{counted(run.batches, 'batch')} of 281241 utterances ({counted(run.epochs, 'epoch')}): "
            f"{run.seconds:.0f} s, memory grew by {run.growth:.1f} MiB",
            flush=True,
        )

    source = scan_tar(SPEECH, progress=False)
    speech = np.concatenate([source.read(index) for index in range(len(source))])
    # Different pieces of it: none begins where another does.
    starts = np.linspace(0, len(speech) - 12 * 16_000, args.utterances).astype(int)
    with tempfile.TemporaryDirectory() as folder:
        speed = decoding_speed(folder, [speech[start : start + 12 * 16_000] for start in starts])
    result["decoding"] = asdict(speed)
    print("\naudio seconds per second and core")
    for name, value in (("FLAC files", speed.flac), ("tar by offset", speed.tar), ("whole batches", speed.batches)):
        print(f"  {name:14}{value:7.0f}   {NEEDED / value:4.1f} cores for the {NEEDED} of a GPU")

    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
        print(f"\nwritten to {args.json}")


if __name__ == "__main__":
    main()
