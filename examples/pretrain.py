"""Pretrain SpidR or DinoSR.

On a laptop (CPU or one GPU):

    accelerate launch examples/pretrain.py --config examples/configs/demo.toml --output-dir runs/demo

On one node with 8 GPUs:

    accelerate launch --multi_gpu --num_processes 8 examples/pretrain.py \\
        --config examples/configs/spidr-base-librispeech.toml --output-dir runs/spidr-base \\
        --data.manifest /data/librispeech/train.csv

On two nodes with 8 GPUs each, the same command on both (RANK 0 and 1, IP of the first):

    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK \\
        --main_process_ip IP --main_process_port 29500 examples/pretrain.py --config ... --output-dir ...

examples/accelerate/ has all of this as files for --config_file, examples/slurm/ as SLURM jobs.

Several processes on CPUs (accelerate's --cpu starts one only):

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/pretrain.py ...

With the model in shards, one per process (FSDP2), instead of whole on each:

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 examples/pretrain.py ...

Before that, with --dry-run: the config, the data and the folder are checked, the plan is printed (updates, memory, time
on this machine, disk), and nothing is written.

Any field of the config can be set on the command line, as in `--optimizer.max_steps 1000`. Started again, the same
command continues from the newest complete checkpoint, at the very next batch. SIGTERM and SIGUSR1 save and stop.

The run's folder gets config.toml (everything resolved), data.arrow (which utterances there are), metrics.jsonl and
its picture curves.png, checkpoints/step_N/, skipped.jsonl (audio that cannot be used) and, at the end, final/: a model
folder for `from_pretrained` and the Hub.
"""

import argparse
import gc
import logging
import os
import sys
import tomllib
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)
    # On CPUs, threads that spin while they wait stall each other once any other process wants a core (seen: a step
    # takes 16 times as long). It counts only before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from spidr_hf.conversion.checkpoints import read_config, read_pretraining_checkpoint
from spidr_hf.conversion.errors import ConversionError
from spidr_hf.conversion.model_folder import load_folder
from spidr_hf.conversion.sources import find_source
from spidr_hf.conversion.spidr_format import objective_of
from spidr_hf.conversion.tensors import check_tensors
from torch import Tensor
from transformers.utils import logging as transformers_logging

from spidr_hf import SpidrConfig, SpidrForPretraining
from spidr_hf.data.audio import AudioError
from spidr_hf.data.batches import dropout_seed
from spidr_hf.data.batching import BatchingError
from spidr_hf.data.manifests import ManifestError
from spidr_hf.kernels_spidr import use_kernels
from spidr_hf.pretraining.config import (
    ConfigError,
    PretrainingConfig,
    describe_fields,
    differences,
    load_config,
    make_config,
)
from spidr_hf.pretraining.dry_run import dry_run
from spidr_hf.pretraining.feeds import make_feed, open_source
from spidr_hf.pretraining.hub_push import HubPush
from spidr_hf.pretraining.reporter import Reporter
from spidr_hf.pretraining.setup import (
    LossScale,
    autocast,
    compile_layers,
    distribute,
    drop_frozen,
    end_trackers,
    exclude_parameters,
    gather_all,
    initial_model,
    keep_compiled,
    make_accelerator,
    make_optimizer,
    save_final,
    scale_and_clip,
    small_batch_note,
    whole_model,
)
from spidr_hf.pretraining.spidr_names import architecture_differences, to_model_section
from spidr_hf.pretraining.updates import Updates
from spidr_hf.pretraining.validation_run import start_validation
from spidr_hf.system.allocation import prepare_training_process
from spidr_hf.system.files import write_text
from spidr_hf.training.profiling import StepProfiler
from spidr_hf.training.run_state import (
    Checkpoint,
    Checkpoints,
    RunFolderError,
    RunLock,
    StopSignal,
    TrainerState,
    contact_lost,
    die_with_launcher,
    kill_workers_at_exit,
)
from spidr_hf.training.schedules import learning_rate
from spidr_hf.training.sharding import gradient_sync, shard, sharding_plugin
from spidr_hf.training.transfers import BatchMover

USER_ERRORS = (AudioError, BatchingError, ConfigError, ConversionError, ManifestError, RunFolderError, OSError)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Fields of the config, for --section.field VALUE:\n{describe_fields()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="TOML or JSON, SpidR's own included")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    args, overrides = parser.parse_known_args()
    die_with_launcher()
    kill_workers_at_exit()
    prepare_training_process()
    logging.basicConfig(format="%(message)s")
    transformers_logging.disable_progress_bar()
    try:
        config = load_config(args.config, overrides)
        if args.dry_run:
            dry_run(config, args.output_dir, make_model, config_changes)
        else:
            pretrain(config, args.output_dir)
    except USER_ERRORS as error:
        # One line from one process; the launcher takes the others down.
        sys.exit(f"error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
    except RuntimeError as error:
        if (message := contact_lost(error)) is None:
            raise
        sys.exit(f"error: {message}")


def pretrain(config: PretrainingConfig, output_dir: Path) -> None:
    """The whole run: set up or resume, train, leave a model folder."""
    accelerator, notes = make_accelerator(config, output_dir)
    world_size, device, is_main = accelerator.num_processes, accelerator.device, accelerator.is_main_process
    accumulation, max_steps = config.optimizer.gradient_accumulation_steps, config.optimizer.max_steps
    notes += [*config.notes, small_batch_note(config, world_size)]
    if config.run.use_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # ---- the folder, the audio, the checkpoint: the first process takes them, the others then find them there
    checkpoints = Checkpoints(output_dir / "checkpoints", config.run.keep_latest, writes=is_main)
    with accelerator.main_process_first():
        if is_main:
            lock = RunLock(output_dir)
            checkpoints.remove_partial()
        checkpoint = checkpoints.newest()
        if is_main:
            notes += settle_config(output_dir, config, checkpoint)
        source = open_source(config.data, cache=output_dir / "data.arrow", progress=is_main)
        model, origin = make_model(config, checkpoint)
    found = gather_all([checkpoint.state.step if checkpoint else 0])
    if len(set(found)) > 1:
        raise RunFolderError(f"The processes find different checkpoints in {output_dir}: {found}. Do they share it?")

    # ---- model and optimizer
    state = checkpoint.state if checkpoint else TrainerState(data=source.fingerprint)
    model.to(device).train()
    exclude_parameters(model, config)
    if state.step >= model.config.freeze_step:
        model.freeze_feature_encoder()
    use_kernels(config.run.kernels)
    if config.run.compile and device.type == "cuda":
        keep_compiled(output_dir / "compiled")
        compile_layers(model, convolutions=config.run.compile_convolutions)
    elif config.run.compile:
        notes.append("`run.compile` has no effect on this device.")
    if sharding := sharding_plugin(accelerator):
        shard(model, sharding)
        notes.append(f"The model lies in shards on {world_size} processes (FSDP2).")
    optimizer = make_optimizer(model, config.optimizer)
    if checkpoint:
        checkpoint.load_optimizer(optimizer, {parameter: name for name, parameter in model.named_parameters()})
        notes += resume_notes(state, source.fingerprint, world_size, accumulation)
        state.data = source.fingerprint
    distributed = distribute(model, accelerator)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    # ---- batches, and what is reported
    layout = {"rank": accelerator.process_index, "world_size": world_size, "accumulation": accumulation}
    feed = make_feed(source, config, model.config, state, pin_memory=device.type == "cuda", **layout)
    notes += [origin, *feed.notes, f"{feed}; {world_size} process{'es' * (world_size > 1)} on {device.type}"]
    reporter = Reporter(output_dir, config, accelerator, state, notes)
    reporter.skipped.add(*feed.scanned)
    loss_scale = LossScale(config.optimizer.dtype == "float16", state.loss_scale)
    precision, move = autocast(config, device), BatchMover(device)
    updates = Updates(model, optimizer, state, loss_scale, reporter, config.run.max_nonfinite_steps)
    stop = StopSignal(device, folders=[checkpoints.folder, output_dir])
    profiler = StepProfiler(output_dir, config.run.profile_steps if is_main else None)
    if is_main and config.run.push_to_hub:
        hub = HubPush(config.run.push_to_hub, config, output_dir)
        checkpoints.on_written = hub.checkpoint
    validation = start_validation(config, output_dir, accelerator, state.step)
    batches = iter(feed) if state.step < max_steps else None

    if validation is not None:
        reporter.pause(validation(state.step, model, reporter.say))
    for step in range(state.step + 1, max_steps + 1):
        profiler.before(step)
        lr = learning_rate(config.optimizer, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        turns = []
        for turn in range(accumulation):
            batch = next(batches)
            turns.append(batch)
            if batch.failure:
                raise AudioError(batch.failure)
            # Named after the batch, the random numbers of dropout need not be saved and belong to no process.
            torch.manual_seed(dropout_seed(config.run.random_seed, batch.key))
            with gradient_sync(distributed, turn == accumulation - 1):
                with precision:
                    output = distributed(**move(batch).inputs)
                # A sum over frames: how many there are, only the whole update knows.
                (output.loss * output.num_masked_frames * loss_scale.value).backward()

        statistics = model.reduce_statistics()
        gradient_scale = world_size / (statistics.num_masked_frames * loss_scale.value)
        grad_norm = scale_and_clip(parameters, gradient_scale, config.optimizer.max_norm)
        updates.make(step, turns, lr, statistics, grad_norm)
        if step == model.config.freeze_step:
            model.freeze_feature_encoder()
            drop_frozen(optimizer)
            parameters = [parameter for parameter in parameters if parameter.requires_grad]
            distributed = None
            distributed = distribute(model, accelerator)

        state.step, (state.epoch, state.batch) = step, batch.key.following
        if validation is not None:
            reporter.pause(validation(step, model, reporter.say, stop.agreed))
        stopping = stop.agreed() and step < max_steps
        if step % config.run.save_interval == 0 or step == max_steps or stopping:
            updates.settle()
            reporter.save_into(state)
            state.stream = feed.state()
            state.loss_scale, state.world_size, state.accumulation = loss_scale.state(), world_size, accumulation
            checkpoints.save(state, model, optimizer)
        checkpoints.check()
        if stopping:
            break

    # ---- the end
    stop.finish()
    profiler.finish()
    reporter.close()
    del batches
    trained = whole_model(model, keep=is_main) if state.step >= max_steps else None
    if is_main:
        checkpoints.wait()
        if trained is not None:
            summary = f"Pretrained for {state.step} updates on {feed.amount}."
            save_final(trained, output_dir / "final", config, summary)
            reporter.say(f"Done: {output_dir / 'final'}")
        else:
            reporter.say(f"{stop.received}: saved step {state.step}. The same command continues from there.")
        lock.release()
    accelerator.wait_for_everyone()
    # DDP must not be the last to let go of the process group: it would wait, Python's lock in hand, for a thread of the
    # group that wants this lock.
    distributed = None
    gc.collect()
    accelerator.end_training()
    end_trackers()
    # The other processes need not wait for a network.
    if is_main and config.run.push_to_hub and trained is not None and hub.final(output_dir / "final"):
        reporter.say(f"Pushed to https://huggingface.co/{hub.repo}")


def make_model(config: PretrainingConfig, checkpoint: Checkpoint | None) -> tuple[SpidrForPretraining, str]:
    """The model to begin (or go on) with, and where it comes from."""
    model = initial_model(config.model, config.run.random_seed)
    if checkpoint is not None:
        checkpoint.load_model(model)
        return model, f"Continuing from {checkpoint.folder}."
    start = config.run.init_ckpt
    if start is None:
        return model, "Beginning with random weights."
    if (Path(start) / "config.json").exists() and (Path(start) / "model.safetensors").exists():
        stored, tensors = load_folder(start)
    else:
        stored, tensors = read_original(start, config)
    if differing := architecture_differences(stored, config.model):
        values = ", ".join(
            f"{name} is {theirs!r} there and {ours!r} here" for name, (theirs, ours) in differing.items()
        )
        raise ConfigError(f"`run.init_ckpt` {start} is another model than [model] says: {values}.")
    check_tensors(tensors, {name: tensor.shape for name, tensor in model.state_dict().items()}, what=start)
    model.load_state_dict(tensors)
    # Weights, codebooks and teacher are taken over; steps, and with them every schedule and the freeze, begin anew.
    model.current_step.zero_()
    return model, f"Beginning with the weights, codebooks and teacher of {start}."


def read_original(start: str, config: PretrainingConfig) -> tuple[SpidrConfig, dict[str, Tensor]]:
    """Config and tensors of a checkpoint in an original format. One that comes without config has that of [model]."""
    found = find_source(start)
    beside = found.config or (read_config(path) if (path := found.path.with_name("config.json")).is_file() else None)
    given = to_model_section(config.model) if beside is None else None
    objective = found.objective or (None if beside and objective_of(beside) else config.model.objective)
    converted = read_pretraining_checkpoint(found.path, given, objective, config_beside=beside)
    return converted.config, converted.tensors


def settle_config(output_dir: Path, config: PretrainingConfig, checkpoint: Checkpoint | None) -> list[str]:
    """Write config.toml; when resuming, say what is not as it was, and refuse another model."""
    notes = config_changes(output_dir, config, checkpoint)
    write_text(
        output_dir / "config.toml",
        f"# The whole configuration of this run. The command that began it continues it.\n\n{config.to_toml()}",
    )
    return notes


def config_changes(output_dir: Path, config: PretrainingConfig, checkpoint: Checkpoint | None) -> list[str]:
    """What is not as it was when the run in this folder began. Another model is refused."""
    path = output_dir / "config.toml"
    if checkpoint is None or not path.exists():
        return []
    before = make_config(tomllib.loads(path.read_text(encoding="utf-8"))).to_dict()
    changed = differences(before, config.to_dict())
    if model := [name for name in changed if name.startswith("model.") or name == "run.model_type"]:
        raise ConfigError(
            f"{output_dir} holds a run of another model ({', '.join(model)} differ). Choose another --output-dir; "
            "its checkpoint can be that run's `run.init_ckpt`."
        )
    return [f"Changed since this run began: {name} {old!r} -> {new!r}" for name, (old, new) in changed.items()]


def resume_notes(state: TrainerState, data: str, world_size: int, accumulation: int) -> list[str]:
    """What will not be as it would have been without the interruption."""
    notes = []
    if (state.world_size, state.accumulation) != (world_size, accumulation):
        notes.append(
            f"Updates were made of {state.world_size} x {state.accumulation} batches (processes x accumulation) and "
            f"now are of {world_size} x {accumulation}. The order of the utterances goes on as it was."
        )
    if state.data != data:
        notes.append("The audio is not what it was when the run began, so this epoch's order is another.")
    return notes


if __name__ == "__main__":
    main()
