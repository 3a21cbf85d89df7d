"""Submit pretraining runs to SLURM: one job per config.

    python examples/slurm/submit.py examples/configs/spidr-base-librispeech.toml -A ACCOUNT -N 2 -G 8 -C h100
    python examples/slurm/submit.py a.toml b.toml -A ACCOUNT -N 1 -G 8 --optimizer.lr 3e-4

A run's folder is OUTPUT_ROOT/<name of the config file without .toml>, where OUTPUT_ROOT is `--output-root`, else the
config's `run.workdir`, else `runs`. Fields of the config can be set as for `pretrain.py`, then for all of them. The
configs are read here first, so that a mistake in one is found before anything is submitted.

The job is examples/slurm/pretrain.sbatch: it saves before the time limit, goes back into the queue, and resumes until
the run is complete. Its output is in the run's folder (slurm-JOB.out). Submitting the same again continues a run; while
it runs, the folder is locked.

A table `slurm_validation` in a config's [run] makes a second job, which runs `examples/validate.py --watch` on the run.
Its entries are options of sbatch (`slurm_validation = { partition = "short", gpus-per-node = 1 }`); account, time, qos,
partition and constraint are otherwise those of the training job. It has one GPU unless -G is 0.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))

from spidr_hf.pretraining.config import PretrainingConfig, load_config
from spidr_hf.system.commands import HelpFormatter, user_path
from spidr_hf.system.errors import ConfigError

HERE = Path(__file__).resolve().parent
# What the jobs find in their environment: this interpreter, this repository.
ENVIRONMENT = {"PYTHON": sys.executable, "SPIDR_HF": str(HERE.parent.parent)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("configs", type=user_path, nargs="+", metavar="CONFIG", help="TOML or JSON; one job each")
    parser.add_argument("-A", "--account", required=True, help="who pays")
    parser.add_argument("-N", "--nodes", type=int, required=True, help="nodes per job")
    parser.add_argument(
        "-G", "--gpus-per-node", type=int, required=True, help="GPUs per node, one process each; 0: CPUs"
    )
    parser.add_argument("-c", "--cpus", type=int, default=10, help="cores per process")
    parser.add_argument("-t", "--time", help="time limit of a job, as sbatch takes it (default: 24:00:00)")
    parser.add_argument("-C", "--constraint", help="features that the nodes must have (default: none)")
    parser.add_argument("-q", "--qos", help="quality of service (default: the account's)")
    parser.add_argument("-p", "--partition", help="partition (default: the cluster's)")
    parser.add_argument("--mem-per-gpu", help="main memory per GPU, for example 60G (default: the cluster's)")
    parser.add_argument(
        "--output-root",
        type=user_path,
        metavar="DIR",
        help="where the runs' folders are (default: the config's run.workdir, else runs)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands and submit nothing")
    args, overrides = parser.parse_known_args()
    try:
        submit(args, overrides)
    except (ConfigError, OSError) as error:
        sys.exit(f"error: {error}")


def submit(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Check everything, then submit a job per config, and one more where it asks for validation."""
    if args.nodes < 1 or args.gpus_per_node < 0 or args.cpus < 1:
        raise ConfigError("--nodes and --cpus must be at least 1, --gpus-per-node at least 0.")
    if args.mem_per_gpu and not args.gpus_per_node:
        raise ConfigError("--mem-per-gpu needs GPUs: without them (-G 0) leave it out.")
    configs = {path: load_config(path, overrides) for path in args.configs}
    folders = {path: run_folder(path, config, args.output_root) for path, config in configs.items()}
    twice = [str(folder) for folder, count in Counter(folders.values()).items() if count > 1]
    if twice or len(configs) < len(args.configs):
        raise ConfigError(f"Two configs have the same run folder ({', '.join(twice) or args.configs[0]}): rename one.")
    for path, config in configs.items():
        job = sbatch(training_command(args, path, folders[path], overrides), folders[path], args.dry_run)
        print(f"{path}: job {job}, {folders[path]}")
        if config.run.slurm_validation is not None:
            command = validation_command(args, config.run.slurm_validation, folders[path], job)
            job = sbatch(command, folders[path], args.dry_run, {"TRAINING_JOB": job})
            print(f"{path}: validation is job {job}")


def run_folder(path: Path, config: PretrainingConfig, output_root: Path | None) -> Path:
    """Where a config's run goes."""
    return Path(output_root or config.run.workdir or "runs", path.stem)


def training_command(args: argparse.Namespace, path: Path, folder: Path, overrides: Sequence[str]) -> list[str]:
    """`sbatch ... pretrain.sbatch ...`"""
    options = shared_options(args) | {
        "job-name": folder.name,
        "nodes": args.nodes,
        "gpus-per-node": args.gpus_per_node or None,
        "cpus-per-task": args.cpus * max(1, args.gpus_per_node),
        "mem-per-gpu": args.mem_per_gpu,
        "output": folder / "slurm-%j.out",
    }
    script = [str(HERE / "pretrain.sbatch"), "--config", str(path), "--output-dir", str(folder)]
    return ["sbatch", *as_options(options), *script, *overrides]


def validation_command(args: argparse.Namespace, table: Mapping[str, Any], folder: Path, training: str) -> list[str]:
    """`sbatch ... validate.sbatch ...`; it begins when the training job has begun."""
    options = shared_options(args) | {
        "job-name": f"{folder.name}-validation",
        "dependency": f"after:{training}",
        "gpus-per-node": 1 if args.gpus_per_node else None,
        "cpus-per-task": args.cpus,
        "output": folder / "slurm-%j.out",
    }
    options |= {name.replace("_", "-"): value for name, value in table.items()}
    return ["sbatch", *as_options(options), str(HERE / "validate.sbatch"), "--run-dir", str(folder)]


def shared_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of sbatch that training and validation have in common."""
    return {name: getattr(args, name) for name in ("account", "time", "constraint", "qos", "partition")}


def as_options(options: Mapping[str, Any]) -> list[str]:
    """`--name=value` of each; a value of None or false is left out, true is a flag."""
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def sbatch(command: list[str], folder: Path, dry_run: bool, environment: Mapping[str, str] | None = None) -> str:
    """The number of the job, or JOB if it is only to be printed. Raises `ConfigError` with what sbatch objects to."""
    variables = ENVIRONMENT | dict(environment or {})
    if dry_run:
        print(shlex.join([*(f"{name}={value}" for name, value in variables.items()), *command]))
        return "JOB"
    folder.mkdir(parents=True, exist_ok=True)  # SLURM does not make it, and the output goes there
    try:
        done = subprocess.run(
            [command[0], "--parsable", *command[1:]], env={**os.environ, **variables}, capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise ConfigError("There is no `sbatch` here. Submit from a login node, or print with --dry-run.") from error
    if done.returncode:
        raise ConfigError(" ".join(done.stderr.split()).removeprefix("sbatch: error: "))
    return done.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    main()
