#!/usr/bin/env python
"""The main job, end to end, on the speech that ships with this repository: what `make demo` runs.

    python examples/demo.py [--fresh]

It pretrains a small SpidR, turns speech it has never seen into units, scores them against the phones, and draws a
picture. Everything goes to runs/demo. Started again, it continues an interrupted training and, when training is done,
only draws anew; --fresh begins from nothing.

It fails when the loss has not fallen by 0.8 or when the codebooks have collapsed.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import numpy as np

from spidr_hf import SpidrConfig, SpidrFeatureExtractor, SpidrForPretraining
from spidr_hf.data.alignments import read_alignments
from spidr_hf.data.manifests import Manifest, read_manifest
from spidr_hf.evaluation.phones import count_pairs, pnmi
from spidr_hf.pretraining.start import initial_model
from spidr_hf.system.commands import HelpFormatter, clear_errors, folder_path, user_path
from spidr_hf.system.messages import counted, duration
from spidr_hf.units.unit_files import describe_model, predict_units, write_units

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples" / "data"
HELD_OUT_PER_VOICE = 2
LEAST_FALL = 0.8  # of the loss, in nats
LEAST_SHARE = 0.25  # of the codewords in use at the start, for the target perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output-dir", type=folder_path, default=ROOT / "runs" / "demo", help="default: runs/demo")
    parser.add_argument(
        "--config", type=user_path, default=ROOT / "examples" / "configs" / "demo.toml", help="training config"
    )
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier demo left and begin anew")
    args = parser.parse_args()
    with clear_errors("train", needs=["matplotlib"]):
        demo(args.output_dir.resolve(), args.config.resolve(), args.fresh)


def demo(run: Path, config: Path, fresh: bool) -> None:
    """Everything, in the folder `run`."""
    if fresh and (run / "metrics.jsonl").exists():
        shutil.rmtree(run)

    start, finished_before = time.time(), (run / "final").exists()
    train, held_out = split(read_manifest(DATA / "manifest.csv"))
    train.write(run / "data" / "train.csv")
    held_out.write(run / "data" / "held_out.csv")
    pretrain(run, config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if finished_before:
        print("\nThis run was trained before, so it is only drawn anew (make demo ARGS=--fresh begins from nothing).")
    else:
        print(f"\nTraining took {minutes(time.time() - start)}.")
    print(f"Now the units of {counted(len(held_out), 'held-out utterance')}.", flush=True)

    waveforms = [held_out.read(i) for i in range(len(held_out))]
    fileids = [held_out.fileid(i) for i in range(len(held_out))]
    alignments = read_alignments(DATA / "alignments.jsonl")
    model = SpidrForPretraining.from_pretrained(run / "final")
    extractor = SpidrFeatureExtractor.from_pretrained(run / "final")
    units = by_layer(fileids, predict_units(model, extractor, waveforms))
    untrained = initial_model(model.config, seed=0)
    baseline = by_layer(fileids, predict_units(untrained, extractor, waveforms))
    for layer, sequences in units.items():
        write_units(run / "units" / str(layer) / "units.jsonl", sequences, {**describe_model(model), "layer": layer})
    scores = {"random weights": score(baseline, alignments), "after training": score(units, alignments)}
    audio = duration(train.num_samples.sum() / 16_000)
    title = f"A small SpidR after {counted(rows[-1]['step'], 'step')} on {audio} of speech"
    draw(run / "demo.png", title, held_out, waveforms, units, alignments, rows, model.config, scores)
    report(run, rows, scores)
    check(rows)


def split(manifest: Manifest) -> tuple[Manifest, Manifest]:
    """The last utterances of each voice are held out; the others train. Voices never share a sentence."""
    fileids = [manifest.fileid(i) for i in range(len(manifest))]
    voices = [fileid.rsplit("-", 1)[0] for fileid in fileids]
    held = [sum(v == voice for v in voices[i:]) <= HELD_OUT_PER_VOICE for i, voice in enumerate(voices)]
    parts = [np.flatnonzero(np.array(held) == wanted) for wanted in (False, True)]
    train, held_out = (Manifest(manifest.table.take(part), manifest.root) for part in parts)
    return train, held_out


def pretrain(run: Path, config: Path) -> None:
    """`python examples/pretrain.py`, as one would type it: one process needs no launcher."""
    arguments = ["examples/pretrain.py", "--config", str(config), "--output-dir", str(run)]
    arguments += ["--data.manifest", str(run / "data" / "train.csv")]
    print("python", *arguments, flush=True)
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT)
    if result.returncode:
        sys.exit("Pretraining stopped early (see above). The same command continues it; --fresh begins anew.")


def by_layer(fileids: Sequence[str], units: Mapping[int, list[np.ndarray]]) -> dict[int, dict[str, np.ndarray]]:
    """Units by layer and file id."""
    return {layer: dict(zip(fileids, sequences, strict=True)) for layer, sequences in units.items()}


def score(units: Mapping[int, Mapping[str, np.ndarray]], alignments: Mapping[str, Any]) -> dict[int, float]:
    """PNMI of each layer's units."""
    return {layer: pnmi(count_pairs(sequences, alignments)[0]) for layer, sequences in units.items()}


def draw(
    path: Path,
    title: str,
    held_out: Manifest,
    waveforms: Sequence[np.ndarray],
    units: Mapping[int, Mapping[str, np.ndarray]],
    alignments: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    config: SpidrConfig,
    scores: Mapping[str, Mapping[int, float]],
) -> None:
    """The page of this run, with the held-out utterance whose length suits a page best."""
    from spidr_hf.plots.figures import run_figure
    from spidr_hf.plots.palette import unit_colours

    i = int(np.abs(held_out.num_samples - 3.6 * 16_000).argmin())
    fileid = held_out.fileid(i)
    texts = {row["id"]: row["text"] for row in map(json.loads, (DATA / "alignments.jsonl").open(encoding="utf-8"))}
    figure = run_figure(
        waveform=waveforms[i],
        phones=alignments[fileid],
        units={layer: sequences[fileid] for layer, sequences in units.items()},
        colours={layer: unit_colours(*count_pairs(sequences, alignments)) for layer, sequences in units.items()},
        rows=rows,
        codebook_size=config.codebook_size,
        scores=scores,
        title=title,
        subtitle=f"{fileid}, held out: “{texts[fileid]}”",
        floor=floor(rows),
    )
    figure.savefig(path, dpi=110)


def floor(rows: Sequence[Mapping[str, Any]]) -> float:
    """Target perplexity under which the run counts as collapsed."""
    return LEAST_SHARE * float(np.mean(rows[0]["active_codewords"]))


def report(run: Path, rows: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[int, float]]) -> None:
    """What came out, and where it is."""
    print(f"\nPNMI of held-out units   {'  '.join(f'layer {layer}' for layer in scores['after training'])}")
    for name, values in scores.items():
        print(f"  {name:22} {'  '.join(f'{value:7.3f}' for value in values.values())}")
    for what, place in (
        ("picture", "demo.png"),
        ("model", "final"),
        ("units", "units"),
        ("curves", "metrics.jsonl"),
        ("held-out list", "data/held_out.csv"),
    ):
        print(f"  {what:22} {run / place}")


def check(rows: Sequence[Mapping[str, Any]]) -> None:
    """Exits with an error unless the model has learnt and not collapsed."""
    end = rows[-max(1, len(rows) // 20) :]  # one step's loss is noisy
    first, last = rows[0]["loss"], float(np.mean([row["loss"] for row in end]))
    lowest, start, bound = min(row["target_ppl"] for row in rows), rows[0]["target_ppl"], floor(rows)
    print(f"\nLoss {first:.2f} -> {last:.2f}. Target perplexity {start:.1f} at the start, {lowest:.1f} at the lowest.")
    if first - last < LEAST_FALL:
        sys.exit(f"The demo failed: the loss fell by {first - last:.2f} instead of {LEAST_FALL} or more.")
    if lowest <= bound:
        sys.exit(
            f"The demo failed: target perplexity fell to {lowest:.1f}. At {bound:.1f} the codebooks have collapsed."
        )


def minutes(seconds: float) -> str:
    """12 s, or 3 min 5 s."""
    return f"{seconds:.0f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


if __name__ == "__main__":
    main()
