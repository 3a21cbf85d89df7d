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
import os
import sys
from itertools import chain, islice
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)
    # On CPUs, threads that spin while they wait stall each other once any other process wants a core (seen: a step
    # takes 16 times as long). It counts only before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers.utils import logging as transformers_logging

from spidr_hf.conversion.errors import ConversionError
from spidr_hf.data.batches import dropout_seed
from spidr_hf.data.open import open_source
from spidr_hf.kernels_spidr import use_kernels
from spidr_hf.pretraining.config import PretrainingConfig, describe_fields, load_config
from spidr_hf.pretraining.dry_run import dry_run
from spidr_hf.pretraining.forgetting import forget
from spidr_hf.pretraining.hub_push import HubPush
from spidr_hf.pretraining.loaders import make_data_loader
from spidr_hf.pretraining.reporter import Reporter
from spidr_hf.pretraining.setup import (
    autocast,
    compile_layers,
    exclude_parameters,
    keep_compiled,
    make_accelerator,
    make_optimizer,
    save_final,
    small_batch_note,
    whole_model,
)
from spidr_hf.pretraining.start import make_model, resume_notes, settle_config
from spidr_hf.pretraining.updates import Updates
from spidr_hf.pretraining.validation_run import start_validation
from spidr_hf.system.allocation import prepare_training_process
from spidr_hf.system.commands import describe, end
from spidr_hf.system.errors import AudioError, BatchingError, ConfigError, ManifestError, RunFolderError
from spidr_hf.system.messages import log_above_bars
from spidr_hf.system.processes import RunLock, contact_lost, die_with_launcher, gather_all, kill_workers_at_exit
from spidr_hf.training.checkpoints import Checkpoints, TrainerState
from spidr_hf.training.optimizing import LossScale, drop_frozen, scale_and_clip
from spidr_hf.training.profiling import StepProfiler
from spidr_hf.training.schedules import learning_rate
from spidr_hf.training.sharding import distribute, gradient_sync, shard, sharding_plugin
from spidr_hf.training.stopping import StopSignal
from spidr_hf.training.trackers import end_trackers
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
    log_above_bars()
    transformers_logging.disable_progress_bar()
    try:
        config = load_config(args.config, overrides)
        if args.dry_run:
            dry_run(config, args.output_dir)
        else:
            pretrain(config, args.output_dir)
    except USER_ERRORS as error:
        # One line from one process; the launcher takes the others down.
        if os.environ.get("RANK", "0") != "0":
            sys.exit(1)
        end(f"error: {describe(error)}")
    except RuntimeError as error:
        if (message := contact_lost(error)) is None:
            raise
        end(f"error: {message}")


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
    loader = make_data_loader(source, config, model.config, state, pin_memory=device.type == "cuda", **layout)
    notes += [origin, *loader.notes, f"{loader}; {world_size} process{'es' * (world_size > 1)} on {device.type}"]
    reporter = Reporter(output_dir, config, accelerator, state, notes)
    reporter.skipped.add(*loader.scanned)
    loss_scale = LossScale(config.optimizer.dtype == "float16", state.loss_scale)
    precision, move = autocast(config, device), BatchMover(device)
    updates = Updates(model, optimizer, state, loss_scale, reporter, config.run.max_nonfinite_steps)
    stop = StopSignal(device, folders=[checkpoints.folder, output_dir])
    profiler = StepProfiler(output_dir, config.run.profile_steps if is_main else None)
    if is_main and config.run.push_to_hub:
        hub = HubPush(config.run.push_to_hub, config, output_dir)
        checkpoints.on_written = hub.checkpoint
    validation = start_validation(config, output_dir, accelerator, state.step)
    batches = iter(loader) if state.step < max_steps else None

    if validation is not None:
        reporter.pause(validation(state.step, model, reporter.say))
    if config.run.active_forgetting and state.step == 0 and batches is not None:
        first = list(islice(batches, accumulation))
        seeds = [dropout_seed(config.run.random_seed, batch.key) for batch in first]
        looked_at = ((seed, move(batch).inputs) for seed, batch in zip(seeds, first, strict=True))
        forget(model, looked_at, precision, config.run.random_seed)
        batches = chain(first, batches)
    for step in range(state.step + 1, max_steps + 1):
        profiler.before(step)
        lr = learning_rate(config.optimizer, step)
        for group in optimizer.param_groups:
            group["lr"] = lr

        micro_batches = []
        for number in range(accumulation):
            batch = next(batches)
            micro_batches.append(batch)
            # Named after the batch, the random numbers of dropout need not be saved and belong to no process.
            torch.manual_seed(dropout_seed(config.run.random_seed, batch.key))
            with gradient_sync(distributed, number == accumulation - 1):
                with precision:
                    output = distributed(**move(batch).inputs)
                # A sum over frames: how many there are, only the whole update knows.
                (output.loss * output.num_masked_frames * loss_scale.value).backward()

        statistics = model.reduce_statistics()
        gradient_scale = world_size / (statistics.num_masked_frames * loss_scale.value)
        grad_norm = scale_and_clip(parameters, gradient_scale, config.optimizer.max_norm)
        updates.make(step, micro_batches, lr, statistics, grad_norm)
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
            state.stream = loader.state()
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
            summary = f"Pretrained for {state.step} updates on {loader.amount}."
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


if __name__ == "__main__":
    main()
