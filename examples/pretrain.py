"""Pretrain SpidR or DinoSR.

On a laptop (CPU or one GPU):

    python examples/pretrain.py --config examples/configs/demo.toml --output-dir runs/demo

On one node with 8 GPUs:

    accelerate launch --multi_gpu --num_processes 8 examples/pretrain.py \\
        --config examples/configs/spidr-base-librispeech.toml --output-dir runs/spidr-base \\
        --data.manifest /data/librispeech/train.csv

On two nodes with 8 GPUs each, the same command on both (RANK 0 and 1, IP of the first):

    accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank RANK \\
        --main_process_ip IP --main_process_port 29500 examples/pretrain.py --config ... --output-dir ...

examples/accelerate/ has all of this as files for --config_file, which also leaves the launcher nothing to warn about,
examples/slurm/ as SLURM jobs. For one process, `accelerate launch --quiet` leaves an error at its one line.

Several processes on CPUs (accelerate's --cpu starts one only):

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 examples/pretrain.py ...

With the model in shards, one per process (FSDP2), instead of whole on each:

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 examples/pretrain.py ...

Before that, with --dry-run: the config, the data and the folder are checked, the plan is printed (updates, memory, time
on this machine, disk), and nothing is written.

Any field of the config can be set on the command line, as in `--optimizer.max_steps 1000`. Started again, the same
command continues from the newest complete checkpoint, at the very next batch. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C save
and stop; a second Ctrl-C stops at once.

The run's folder gets config.toml (everything resolved), data.arrow (which utterances there are), metrics.jsonl and
its picture curves.png, checkpoints/step_N/, skipped.jsonl (audio that cannot be used) and, at the end, final/: a model
folder for `from_pretrained` and the Hub.
"""

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)
    # On CPUs, threads that spin while they wait stall each other once any other process wants a core (seen: a step
    # takes 16 times as long). It counts only before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from spidr_hf.pretraining.config import PretrainingConfig, describe_fields, load_config
from spidr_hf.pretraining.dry_run import dry_run
from spidr_hf.pretraining.loaders import make_data_loader
from spidr_hf.pretraining.observers import start_observers
from spidr_hf.pretraining.reporter import Reporter
from spidr_hf.pretraining.setup import Learner
from spidr_hf.pretraining.start import open_run
from spidr_hf.pretraining.updates import Updates
from spidr_hf.system.commands import HelpFormatter, folder_path, training_command, user_path
from spidr_hf.training.schedules import learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Fields of the config, for --section.field VALUE:\n{describe_fields()}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=user_path, required=True, metavar="FILE", help="TOML or JSON, SpidR's own included"
    )
    parser.add_argument("--output-dir", type=folder_path, required=True, metavar="DIR", help="the run's folder")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew; what DIR has of an earlier run goes to DIR/earlier-1"
    )
    args, overrides = parser.parse_known_args()
    with training_command():
        config = load_config(args.config, overrides)
        if args.dry_run:
            dry_run(config, args.output_dir, args.fresh)
        else:
            pretrain(config, args.output_dir, args.fresh)


def pretrain(config: PretrainingConfig, output_dir: Path, fresh: bool = False) -> None:
    """The whole run: begin or resume, train, leave a model folder."""
    run = open_run(config, output_dir, fresh)
    if run is None:  # it is complete
        return
    model, state, checkpoints = run.model, run.state, run.checkpoints
    world_size, accumulation = run.layout["world_size"], run.layout["accumulation"]
    max_steps = config.optimizer.max_steps

    # ---- who learns, from what, and who watches
    learner = Learner(model, config, run.accelerator, run.checkpoint, compiled=output_dir / "compiled")
    device, loss_scale = run.accelerator.device, learner.loss_scale
    loader = make_data_loader(run.source, config, model.config, state, pin_memory=device.type == "cuda", **run.layout)
    processes = f"{world_size} x {device.type}"
    run.settle()
    notes = [*run.notes, *learner.notes, *loader.notes, f"{loader}; {processes}"]
    reporter = Reporter(output_dir, config, run.accelerator, state, notes, run.source)
    reporter.skipped.add(*loader.scanned)
    updates = Updates(model, learner.optimizer, state, loss_scale, reporter, config.run.max_nonfinite_steps)
    stop = run.stop_signal()
    observers = start_observers(run, reporter, stop)
    checkpoints.on_written = observers.saved

    def save() -> None:
        updates.settle()
        reporter.save_into(state)
        state.stream, state.loss_scale = loader.state(), loss_scale.state()
        state.world_size, state.accumulation = world_size, accumulation
        checkpoints.save(state, model, learner.optimizer)

    # ---- the updates
    batches = iter(loader) if state.step < max_steps else iter(())
    if config.run.active_forgetting and state.step == 0:
        batches = learner.forgetting(batches, accumulation)
    saved = state.step if run.checkpoint else None
    observers.after_step(state.step)  # what an earlier start did not get to
    for step in range(state.step + 1, max_steps + 1):
        if stop.agreed():
            break
        observers.before_step(step)
        lr = learning_rate(config.optimizer, step)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr

        micro_batches = []
        for number in range(accumulation):
            batch = next(batches)
            micro_batches.append(batch)
            with learner.gradient_sync(number == accumulation - 1):
                output = learner(batch)
                # A sum over frames: how many there are, only the whole update knows.
                (output.loss * output.num_masked_frames * loss_scale.value).backward()

        statistics = model.reduce_statistics()
        gradient_scale = world_size / (statistics.num_masked_frames * loss_scale.value)
        grad_norm = learner.clip_gradients(gradient_scale, config.optimizer.max_norm)
        updates.make(step, micro_batches, lr, statistics, grad_norm)
        if step == model.config.freeze_step:
            learner.freeze()

        state.step, (state.epoch, state.batch) = step, batch.key.following
        observers.after_step(step)
        if step % config.run.save_interval == 0 or step == max_steps:
            save()
            saved = step
        checkpoints.check()

    # ---- the end: a model folder, or a checkpoint to resume from
    if state.step != saved:
        save()
    stop.finish()
    del batches
    final = run.end(learner, loader.amount)
    continues = f"{stop.received}: saved step {state.step}. The same command continues from there."
    reporter.say(f"Done: {final}" if final else continues)
    observers.finish(final)
    run.close()


if __name__ == "__main__":
    main()
