#!/usr/bin/env python
"""Whether this machine computes what the reference implementation does: recorded tensors beside ours.

    python examples/check_parity.py                                      # the recordings of the repository
    python examples/check_parity.py FOLDER... --forms plain kernels      # others, in some forms

A table per folder and precision: the largest error of every recorded tensor (of labels, the share that differs) in each
form. Features, representations, targets, labels, losses in eval mode; then twelve training steps, with what they leave.
float32 is without TF32 and must be within 1e-4 with identical labels; bfloat16 is autocast, for which the second number
counts: the error's root mean square in shares of the recorded values' (`spidr_hf.parity` has the bounds). What is not
within has a mark, and then the exit status is 1.

Forms: plain, compiled (the transformer layers), kernels (own Triton kernels), both (as pretraining runs on a GPU).
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import torch
from safetensors.torch import load_file

from spidr_hf import SpidrForPretraining
from spidr_hf.conversion.checkpoints import read_pretraining_checkpoint
from spidr_hf.conversion.errors import ConversionError
from spidr_hf.conversion.spidr_format import from_spidr
from spidr_hf.kernels_spidr import kernels_run, use_kernels
from spidr_hf.pretraining.setup import compile_layers
from spidr_hf.system.commands import HelpFormatter, clear_errors, output_path, user_path
from spidr_hf.system.files import write_text
from spidr_hf.system.processes import device_of

from .benchmarks.parity import (
    Difference,
    compare_fairseq,
    compare_outputs,
    compare_representations,
    compare_training,
    judge,
    precision,
    whole_float32,
)
from .benchmarks.timing import describe_machine

RECORDINGS = Path(__file__).resolve().parent.parent / "tests" / "fixtures" / "parity"
# Layers compiled, own kernels.
FORMS = {"plain": (False, False), "compiled": (True, False), "kernels": (False, True), "both": (True, True)}
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folders", nargs="*", type=user_path, metavar="FOLDER", help="default: those of the repository")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    parser.add_argument("--forms", nargs="+", choices=FORMS, help="default: all on a GPU, plain on a CPU")
    parser.add_argument(
        "--objective", choices=("spidr", "dinosr"), help="of the folders (default: what checkpoint or name tell)"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU where there is one"
    )
    parser.add_argument("--json", type=output_path, metavar="OUT", help="write the numbers there, too")
    args = parser.parse_args()
    with clear_errors():
        device = device_of(args.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no CUDA GPU here (leave --device out for the CPU).")
        own_kernels = kernels_run(torch.empty(0, device=device))
        possible = [name for name, (_, own) in FORMS.items() if own_kernels or not own]
        forms = args.forms or (possible if device.type == "cuda" else ["plain"])
        if impossible := [name for name in forms if name not in possible]:
            raise ValueError(f"--forms {' '.join(impossible)}: own kernels need a CUDA GPU and `pip install triton`.")
        folders = args.folders or sorted(path.parent for path in RECORDINGS.glob("*/expected.safetensors"))
        if not folders:
            raise ValueError(f"{RECORDINGS} holds no recordings: name folders with expected.safetensors.")
        machine = describe_machine(device)
        print("  ".join(f"{key} {value}" for key, value in machine.items()))
        rows = []
        for folder in folders:
            for dtype in args.dtypes:
                table = {form: differences(folder, dtype, form, device, args.objective) for form in forms}
                print_table(f"{folder.name}, {dtype}", table, dtype)
                rows += [
                    {"folder": folder.name, "dtype": dtype, "form": form, "tensor": name, **vars(difference)}
                    for form, column in table.items()
                    for name, difference in column.items()
                ]
                if args.json:  # now, so that what was compared is there where the command is cut off
                    content = {"command": sys.argv, "machine": machine, "rows": rows}
                    write_text(args.json, json.dumps(content, indent=1, default=str) + "\n")
        failed = [row for row in rows if not row["passed"]]
        print(f"\n{'FAIL' if failed else 'PASS'}: {len(rows) - len(failed)} of {len(rows)} within tolerance")
        if failed:
            sys.exit(1)


def differences(
    folder: Path, dtype: str, form: str, device: torch.device, objective: str | None
) -> dict[str, Difference]:
    """Every recorded tensor of a folder in one form."""
    recorded = load_file(folder / "expected.safetensors")
    names = ("checkpoint.pt", "checkpoint.ckpt", "step_*.pt")
    file = next((path for name in names for path in folder.glob(name)), None)
    if file is None:
        raise ValueError(f"{folder} holds no {', no '.join(names)}.")
    if objective is None and folder.name.startswith(("spidr", "dinosr")):
        objective = folder.name.partition("-")[0]
    compiled, own = FORMS[form]

    def fresh() -> SpidrForPretraining:
        model = load(file, objective).to(device)
        if compiled:
            torch._dynamo.reset()  # or the graphs of other models count against the limit, past which none is made
            compile_layers(model)
        return model

    before = use_kernels(own)
    try:
        with whole_float32():
            with precision(device, dtype):
                if "mask" not in recorded and "waveform" in recorded:
                    pairs = compare_representations(fresh(), recorded)
                elif "waveform" in recorded:
                    pairs = compare_outputs(fresh(), recorded)
                else:
                    model, pairs = fresh(), {}
                    for case in sorted({name.partition(".")[0] for name in recorded}):
                        pairs |= compare_fairseq(model, recorded, case)
            if (folder / "trajectory.safetensors").exists():
                tensors = load_file(folder / "trajectory.safetensors")
                log = json.loads((folder / "trajectory.json").read_text(encoding="utf-8"))
                trained = compare_training(fresh(), tensors, log, from_spidr, dtype)
                pairs |= {f"training {name}": pair for name, pair in trained.items()}
    finally:
        use_kernels(before)
    return {name: judge(name, *pair, dtype) for name, pair in pairs.items()}


def load(path: Path, objective: str | None) -> SpidrForPretraining:
    """The model of a checkpoint in its original format, without dropout, in eval mode."""
    try:
        converted = read_pretraining_checkpoint(path, objective=objective)
    except ConversionError as error:
        raise ValueError(str(error)) from error
    for name in ("hidden_dropout", "attention_dropout", "layerdrop"):
        setattr(converted.config, name, 0.0)
    model = SpidrForPretraining(converted.config)
    model.load_state_dict(converted.tensors)
    return model.eval()


def print_table(title: str, table: dict[str, dict[str, Difference]], dtype: str) -> None:
    """A row per tensor, a column per form; what is not within tolerance has a mark."""
    width = 12 if dtype == "float32" else 20
    print(f"\n{title:26}" + "".join(f"{form:>{width}}" for form in table))
    for name in next(iter(table.values())):
        cells = []
        for column in table.values():
            difference = column[name]
            noise = "" if dtype == "float32" else f" {difference.noise:8.2%}"
            cells.append(f"{difference.largest:.1e}{noise}{' ' if difference.passed else '!'}")
        print(f"{name:26}" + "".join(f"{cell:>{width}}" for cell in cells))
    passed = all(difference.passed for column in table.values() for difference in column.values())
    print("PASS" if passed else "FAIL")


if __name__ == "__main__":
    main()
