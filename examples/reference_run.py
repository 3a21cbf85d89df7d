#!/usr/bin/env python
"""The run of a config by the `spidr` package itself: its loader, model and optimizer, on a CPU.

    pip install "spidr[train]"
    python examples/reference_run.py --config CONFIG --init-ckpt WEIGHTS.pt --output spidr.jsonl --max-steps 600
    python examples/compare_runs.py runs/ours/metrics.jsonl spidr.jsonl --steps 200 400 600

CONFIG is a SpidR TOML, WEIGHTS.pt a checkpoint in its format. The package's own training command wants CUDA, SLURM and
wandb; this is the same step through its public functions, with `log_interval` and the names of `metrics.jsonl`: what
its curve looks like, beside which ours is to be judged.

--save PT keeps the run there every `save_interval` updates and at the end: the weights under "model" as its own
checkpoints have them (convert_checkpoint.py reads the file), and all that the run resumes from when the same command is
given again.
"""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import numpy as np
import torch
from tqdm.auto import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="TOML")
    parser.add_argument("--init-ckpt", type=Path, required=True, metavar="PT")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--max-steps", type=int, metavar="N", help="default: the config's")
    parser.add_argument("--seed", type=int, help="of batches, masks and crops (default: the config's)")
    parser.add_argument(
        "--save", type=Path, metavar="PT", help="keep weights and run there, and resume from there (default: nowhere)"
    )
    args = parser.parse_args()
    try:
        from spidr.config import read_config
        from spidr.data import build_dataloader
        from spidr.environment import set_seed
        from spidr.models import SpidR
        from spidr.optimizer import build_optimizer
    except ImportError as error:
        sys.exit(f"error: {error}. This needs the `spidr` package and a torchcodec that fits it.")
    config = read_config(args.config)
    seed = config.run.random_seed if args.seed is None else args.seed
    # It cannot load without a worker.
    data = replace(config.data, random_seed=seed, num_workers=max(1, config.data.num_workers))
    steps = args.max_steps or config.optimizer.max_steps

    os.environ.update(RANK="0", WORLD_SIZE="1")
    set_seed(seed)
    loader = build_dataloader(data, config.masking, conv_layer_config=config.model.extractor_conv_layer_config)
    model = SpidR(config.model).train()
    weights = torch.load(args.init_ckpt, map_location="cpu", weights_only=True)
    model.load_state_dict(weights.get("model", weights))
    optimizer, _, scheduler = build_optimizer(model, config.optimizer)
    run = Run(model, optimizer, scheduler, Batches(loader), seed)
    if args.save and args.save.exists():
        run.load(args.save)
        keep_rows(args.output, run.step)
        if run.step >= steps:
            sys.exit(f"Nothing to do: {args.save} is at update {run.step}.")
    else:
        args.output.write_text("", encoding="utf-8")
    dtype = getattr(torch, config.optimizer.dtype)

    with args.output.open("a", encoding="utf-8") as file:
        for step, (waveforms, attention_mask, mask) in zip(
            tqdm(range(run.step + 1, steps + 1), "spidr", unit="step"), run.batches, strict=False
        ):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses, seen = model(waveforms, mask_indices=mask, attention_mask=attention_mask)
            loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            parameters = [p for p in model.parameters() if p.grad is not None]
            seen |= {"loss": loss, "grad_norm": torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.max_norm)}
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            decay = model.update_ema(step)
            run.step = step
            for name, value in seen.items():
                run.means[name] = run.means.get(name, 0.0) + value.item() / config.run.log_interval
            if step % config.run.log_interval == 0:
                file.write(json.dumps({"step": step, **run.means, "lr": lr, "ema_decay": float(decay)}) + "\n")
                file.flush()
                run.means = {}
            if args.save and (step % config.run.save_interval == 0 or step == steps):
                run.save(args.save)


class Batches:
    """Epoch after epoch, counted from 1. What a worker draws follows from the random state at its epoch's start."""

    def __init__(self, loader):
        self.loader = loader
        self.epoch, self.taken, self.random = 0, 0, random_state()

    def __iter__(self) -> Iterator[Any]:
        # An epoch that was begun is drawn again up to where it was, and the state then is as it was there.
        here, known = random_state(), self.taken
        while True:
            if known:
                set_random_state(self.random)
            else:
                self.epoch, self.taken, self.random = self.epoch + 1, 0, random_state()
            self.loader.batch_sampler.set_epoch(self.epoch)
            batches = iter(self.loader)
            for _ in range(known):
                next(batches)
            if known:
                set_random_state(here)
            known = 0
            for batch in batches:
                self.taken += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "taken": self.taken, "random": self.random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.taken, self.random = state["epoch"], state["taken"], state["random"]


class Run:
    """What a run resumes from."""

    def __init__(self, model, optimizer, scheduler, batches: Batches, seed: int):
        self.parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "batches": batches}
        self.batches, self.seed = batches, seed
        self.step, self.means = 0, dict[str, float]()

    def save(self, path: Path) -> None:
        """Complete or not there."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "seed": self.seed, "means": self.means, "random": random_state()}
        # The extractor is frozen in one update alone; who comes later must be told.
        state["frozen"] = [name for name, p in self.parts["model"].named_parameters() if not p.requires_grad]
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + ".part")
        torch.save(state, half)
        half.replace(path)

    def load(self, path: Path) -> None:
        """Resumes from a file of `save`. Exits with a line if it is another run's or no run's."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "batches" not in state:
            sys.exit(f"error: {path} has weights but no run to resume: give --save another file.")
        if state["seed"] != self.seed:
            sys.exit(f"error: {path} is of a run with seed {state['seed']}, not {self.seed}: give --save another file.")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, parameter in self.parts["model"].named_parameters():
            parameter.requires_grad_(name not in state["frozen"])
        self.step, self.means = state["step"], state["means"]
        set_random_state(state["random"])


def keep_rows(path: Path, last: int) -> None:
    """Drops the rows of updates that are made again."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= last), "utf-8")


def random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


if __name__ == "__main__":
    main()
