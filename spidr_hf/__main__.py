"""Every command by its name, without a clone: `spidr-hf COMMAND ...`, or `python -m spidr_hf COMMAND ...`.

`spidr-hf COMMAND` is `python examples/COMMAND.py` of the repository; several processes start it as
`accelerate launch ... -m spidr_hf pretrain ...`.
"""

import ast
import importlib
import importlib.util
import os
import sys
from difflib import get_close_matches
from pathlib import Path

from . import __version__

# By what one wants to do. A command's name is its file's, with dashes; the exceptions are in `_FILES`.
COMMANDS = {
    "Use a model": ("convert", "export", "info", "demo-app"),
    "Units and features": ("write-manifest", "extract-units", "extract-features", "train-kmeans", "plot-units"),
    "Scores": ("evaluate-units", "evaluate-abx", "write-items"),
    "Language models on units": ("train-unit-lm", "score-pairs"),
    "Pretrain": ("pretrain", "validate", "compare-runs", "submit"),
    "Fine-tune": ("finetune-ctc", "finetune-classification"),
    "Measure": ("benchmark", "benchmark-cuda", "benchmark-data", "check-parity", "reference-run"),
}
_FILES = {
    "convert": "conversion.convert_checkpoint",
    "export": "conversion.export_checkpoint",
    "submit": "examples.slurm.submit",
}
# These have threads that must not spin while they wait, which counts only before torch is imported: see pretrain.py.
_TRAINS = ("pretrain", "finetune-ctc", "finetune-classification")


def main() -> None:
    """Run the command that `sys.argv` names, or list them all."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if name in ("-h", "--help"):
        print(overview())
        return
    if name == "--version":
        print(__version__)
        return
    known = [command for commands in COMMANDS.values() for command in commands]
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"Did you mean {near[0]}?" if near else "`spidr-hf` alone lists them."
        sys.exit(f"error: there is no command {name!r}. {hint}")
    if name in _TRAINS and "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # as it was started: `-m` finds other modules
    sys.argv = [f"spidr-hf {name}", *arguments]
    sys.exit(importlib.import_module(module_of(name)).main())


def module_of(command: str) -> str:
    """The module that holds a command."""
    return "spidr_hf." + _FILES.get(command, f"examples.{command.replace('-', '_')}")


def overview() -> str:
    """All commands, each with the first line of its own description."""
    lines = ["usage: spidr-hf COMMAND ...      (spidr-hf COMMAND --help says all about one)"]
    for group, commands in COMMANDS.items():
        lines += ["", group]
        lines += [f"  {command:24}{summary(command)}" for command in commands]
    return "\n".join(lines)


def summary(command: str) -> str:
    """The first sentence of a command's description, without importing it."""
    spec = importlib.util.find_spec(module_of(command))
    if spec is None or spec.origin is None:
        return ""
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


if __name__ == "__main__":
    main()
