"""`examples/accelerate/`: accelerate reads every file, and `examples/pretrain.py` runs with it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from runs import SCRIPT, rows
from small_run import write_run

from spidr_hf import SpidrModel
from spidr_hf.layers_spidr import SpidrEncoderLayer

FOLDER = SCRIPT.parent / "accelerate"
# File -> (kind, processes, machines)
FILES = {
    "cpu": (DistributedType.NO, 1, 1),
    "one_gpu": (DistributedType.NO, 1, 1),
    "one_node": (DistributedType.MULTI_GPU, 8, 1),
    "multi_node": (DistributedType.MULTI_GPU, 16, 2),
    "fsdp": (DistributedType.FSDP, 8, 1),
}


def test_these_are_all():
    assert {path.stem for path in FOLDER.iterdir()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_it(name):
    kind, processes, machines = FILES[name]
    file = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, processes, machines)
    assert config.use_cpu == (name == "cpu")
    args = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    args, *_ = _validate_launch_command(args)
    assert (args.num_processes, args.num_machines, args.machine_rank) == (processes, machines, 0)
    assert args.mixed_precision == "no"  # `optimizer.dtype` decides; a launcher that says otherwise is contradicted


def test_fsdp():
    parser = launch_command_parser()
    args, *_ = _validate_launch_command(parser.parse_args(["--config_file", str(FOLDER / "fsdp.yaml"), "train.py"]))
    assert args.use_fsdp and args.fsdp_version == 2 and args.fsdp_reshard_after_forward is True
    assert args.fsdp_auto_wrap_policy == "TRANSFORMER_BASED_WRAP"
    assert args.fsdp_transformer_layer_cls_to_wrap == SpidrEncoderLayer.__name__
    assert SpidrModel._no_split_modules is None or SpidrEncoderLayer.__name__ in SpidrModel._no_split_modules
    # Keys of the file are keys of the launcher: accelerate passes over others without a word.
    known = set(vars(args))
    assert set(load_config_from_file(str(FOLDER / "fsdp.yaml")).fsdp_config) <= known


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(config: Path, folder: Path, *options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, SCRIPT]
    command += ["--config", config, "--output-dir", folder, "--optimizer.max_steps", "2"]
    return subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launches", "world_size"),
    [
        ("cpu", [[]], 1),
        ("one_gpu", [[]], 1),
        ("one_node", [["--num_processes", 2]], 2),
        ("fsdp", [["--num_processes", 2]], 2),
        ("multi_node", [["--num_processes", 2, "--machine_rank", rank, "--main_process_port"] for rank in (0, 1)], 2),
    ],
)
def test_two_steps(name, launches, world_size, tmp_path):
    """On CPUs, with fewer processes than the file has."""
    config, port = write_run(tmp_path / "files"), free_port()
    file = ["--config_file", FOLDER / f"{name}.yaml"]
    processes = [
        launch(config, tmp_path / "run", *file, *options, *([port] if name == "multi_node" else []))
        for options in launches
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert not any(process.returncode for process in processes), printed
    assert [row["world_size"] for row in rows(tmp_path / "run")] == [world_size] * 2
    assert (tmp_path / "run" / "final").is_dir()
    assert ("FSDP2" in printed[0]) == (name == "fsdp")
