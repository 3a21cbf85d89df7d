#!/usr/bin/env python
"""The run of a config by the `spidr` package itself: its loader, model and optimizer, on a CPU.

    pip install spidr "torchcodec>=0.14"
    python examples/reference_run.py --config CONFIG --init-ckpt WEIGHTS.pt --output spidr.jsonl --max-steps 600
    python examples/compare_runs.py runs/ours/metrics.jsonl spidr.jsonl --steps 200 400 600

CONFIG is a SpidR TOML, WEIGHTS.pt a checkpoint in its format. The package's own training command wants CUDA, SLURM and
wandb; this is the same step through its public functions, with `log_interval` and the names of `metrics.jsonl`. Weights
are not saved: it answers what its curve looks like, beside which ours is to be judged.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import torch
from tqdm.auto import tqdm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, metavar="TOML")
    parser.add_argument("--init-ckpt", type=Path, required=True, metavar="PT")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL")
    parser.add_argument("--max-steps", type=int, metavar="N", help="the config's otherwise")
    parser.add_argument("--seed", type=int, help="of batches, masks and crops; the config's otherwise")
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
    dtype = getattr(torch, config.optimizer.dtype)

    means: dict[str, float] = {}
    with args.output.open("w", encoding="utf-8") as file:
        for step, (waveforms, attention_mask, mask) in zip(
            tqdm(range(1, steps + 1), "spidr", unit="step"), batches(loader), strict=False
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
            for name, value in seen.items():
                means[name] = means.get(name, 0.0) + value.item() / config.run.log_interval
            if step % config.run.log_interval == 0:
                file.write(json.dumps({"step": step, **means, "lr": lr, "ema_decay": float(decay)}) + "\n")
                file.flush()
                means = {}


def batches(loader):
    """Epoch after epoch, counted from 1."""
    epoch = 0
    while True:
        epoch += 1
        loader.batch_sampler.set_epoch(epoch)
        yield from loader


if __name__ == "__main__":
    main()
