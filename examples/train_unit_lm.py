#!/usr/bin/env python
"""A language model of units, with transformers' own models, Trainer and tokenizers.

    python examples/train_unit_lm.py train/6/units.jsonl OUT_DIR --valid dev/6/units.jsonl --deduplicate

    OUT_DIR/final           the model and its tokenizer: AutoModelForCausalLM and AutoTokenizer load it
    OUT_DIR/metrics.json    on the held-out units, in nats per unit: the model, unigrams and bigrams of the training
                            units; and how often the model prefers a held-out sequence to the same units shuffled
    OUT_DIR/checkpoints     to resume from after an interruption: start the same command again
    OUT_DIR/settings.json   what it was made with; other units or options are refused there, unless --fresh

Units are text to it ("17 203 5"). --deduplicate collapses repeats (usual for language models). The defaults train a
Llama of 4.7 M parameters, in minutes on 2 CPU cores for a few hours of speech; on GPUs give more layers, and start it
with accelerate launch.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

if not __package__:  # run as a command: the repository, not this folder, is where imports start
    sys.path[0] = str(next(up for up in Path(__file__).resolve().parents if (up / "spidr_hf").is_dir()))
    __package__ = "spidr_hf.examples"  # what relative imports start from (PEP 366)

import numpy as np
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from spidr_hf import __version__
from spidr_hf.system.commands import HelpFormatter, clear_errors, folder_path, user_path
from spidr_hf.system.files import file_hash, naming, replaced_folder, write_text
from spidr_hf.system.processes import RunLock, from_first, start_processes
from spidr_hf.training.checkpoints import begins_anew, set_aside
from spidr_hf.training.folder_settings import keep_settings
from spidr_hf.units.language_model import (
    ARCHITECTURES,
    NGrams,
    UnitSequences,
    lm_config,
    log_probabilities,
    text_to_units,
    unit_tokenizer,
    units_to_text,
)
from spidr_hf.units.unit_files import check_same_units, known_units, made_by, read_units


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("units", type=user_path, metavar="UNITS_JSONL", help="units to train on")
    parser.add_argument("out_dir", type=folder_path, metavar="OUT_DIR")
    parser.add_argument("--valid", type=user_path, required=True, metavar="UNITS_JSONL", help="held-out units")
    parser.add_argument("--deduplicate", action="store_true", help="collapse repeats")
    parser.add_argument("--num-units", type=int, help="units there can be (default: as their provenance says)")
    group = parser.add_argument_group("model")
    group.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    group.add_argument("--num-layers", type=int, default=4)
    group.add_argument("--hidden-size", type=int, default=256)
    group.add_argument("--num-heads", type=int, default=4)
    group.add_argument("--max-length", type=int, default=1024, help="units of context")
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=2000)
    group.add_argument("--batch-size", type=int, default=16, help="sequences per process")
    group.add_argument("--lr", type=float, default=1e-3, help="default: %(default)s, falling by a cosine")
    group.add_argument("--warmup-steps", type=int, default=100)
    group.add_argument("--save-steps", type=int, default=500)
    group.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew; what OUT_DIR has of an earlier run goes to OUT_DIR/earlier-1"
    )
    args = parser.parse_args()
    with clear_errors(), one_at_a_time(args.out_dir):
        for path in (args.units, args.valid):
            if not path.is_file():
                raise ValueError(f"{path}: no such file of units (`examples/extract_units.py` makes one).")
        train, valid = (list(read_units(path).values()) for path in (args.units, args.valid))
        check_same_units(args.valid, made_by(args.units), str(args.units))
        if not train or not valid:
            raise ValueError(f"{args.valid if train else args.units} holds no units.")
        largest = max(int(units.max()) for units in (*train, *valid))
        num_units = args.num_units or known_units(args.units) or largest + 1
        if largest >= num_units:
            raise ValueError(f"The unit {largest} is among the data, but there are {num_units} units.")
        tokenizer = unit_tokenizer(num_units, args.max_length)
        dataset = UnitSequences(train, tokenizer, args.max_length, collapse=args.deduplicate)
        set_seed(args.seed)
        config = lm_config(
            args.arch,
            tokenizer,
            num_layers=args.num_layers,
            hidden_size=args.hidden_size,
            num_heads=args.num_heads,
            max_length=args.max_length,
        )
        checkpoints = args.out_dir / "checkpoints"
        if from_first(lambda: settle(args, num_units)):
            print(f"{args.out_dir / 'final'} is there already, made with the same units and options.")
            return
        trainer = Trainer(
            AutoModelForCausalLM.from_config(config),
            TrainingArguments(
                output_dir=str(checkpoints),
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.lr,
                lr_scheduler_type="cosine",
                warmup_steps=args.warmup_steps,
                weight_decay=0.01,
                adam_beta2=0.98,
                save_steps=args.save_steps,
                save_total_limit=2,
                logging_steps=50,
                seed=args.seed,
                data_seed=args.seed,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=dataset,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        newest = newest_checkpoint(checkpoints)
        if newest is not None and step_of(newest) >= args.steps:  # Trainer would make one step more
            trainer.model = AutoModelForCausalLM.from_pretrained(newest).to(trainer.args.device)
        else:
            with naming(checkpoints):
                trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        if trainer.is_world_process_zero():
            finish(args, trainer.accelerator.unwrap_model(trainer.model), tokenizer, train, valid, num_units)


# What changes nothing in the model.
_NOT_SETTINGS = ("units", "valid", "out_dir", "save_steps", "fresh")


@contextmanager
def one_at_a_time(out_dir: Path) -> Iterator[None]:
    """Keeps a second start out of the folder; of several processes of one launch the first does."""
    start_processes()
    held: list[RunLock] = []
    from_first(lambda: held.append(RunLock(out_dir)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def settle(args: argparse.Namespace, num_units: int) -> bool:
    """Keep what the model depends on in settings.json, and refuse another's folder; whether the model is there already.

    Raises `RunFolderError` where the folder was begun with other units or options.
    """
    final, checkpoints = args.out_dir / "final", args.out_dir / "checkpoints"
    if begins_anew(args.out_dir, args.fresh):
        set_aside(args.out_dir, [final.name, checkpoints.name])
    options = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
    data = {f"{name}_sha256": file_hash(getattr(args, name)) for name in ("units", "valid")}
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {**options, "num_units": num_units, **data, "processes": processes}
    begun = final.exists() or newest_checkpoint(checkpoints) is not None
    keep_settings(args.out_dir / "settings.json", settings, resuming=begun)
    checkpoints.mkdir(parents=True, exist_ok=True)
    return final.exists() and (args.out_dir / "metrics.json").exists()


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is complete: its state is written last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").exists()]
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(checkpoint.name.split("-")[1])


def finish(
    args: argparse.Namespace,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[np.ndarray],
    valid: list[np.ndarray],
    num_units: int,
) -> None:
    """Measures the model on the held-out units and saves it."""
    metrics = measure(model, tokenizer, train, valid, num_units, collapse=args.deduplicate, seed=args.seed)
    description = {
        "units": str(args.units.resolve()),
        "deduplicated": args.deduplicate,
        "num_units": num_units,
        "made_by": made_by(args.units),
        "steps": args.steps,
        "seed": args.seed,
        "spidr_hf": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(args.out_dir / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    with replaced_folder(args.out_dir / "final") as folder:  # last, as the sign that all is done
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(Path(folder) / "unit_lm.json", json.dumps(description, indent=2) + "\n")
    print(
        f"Held-out units, nats per unit: model {metrics['model']:.3f}, bigrams {metrics['bigram']:.3f}, unigrams "
        f"{metrics['unigram']:.3f}. Prefers the real sequence to a shuffled one in "
        f"{100 * metrics['real_over_shuffled']:.1f} %.\n{args.out_dir / 'final'}"
    )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[np.ndarray],
    valid: list[np.ndarray],
    num_units: int,
    *,
    collapse: bool,
    seed: int,
) -> dict[str, float]:
    """Nats per held-out unit by the model and by n-grams, and how often real sequences are preferred to shuffled."""
    texts = [units_to_text(units, collapse=collapse) for units in valid]
    rng = np.random.default_rng(seed)
    shuffled = [" ".join(rng.permutation(text.split())) for text in texts]
    values = log_probabilities(model, tokenizer, texts, with_end=True)
    ngrams = NGrams.count((text_to_units(units_to_text(units, collapse=collapse)) for units in train), num_units)
    unigram, bigram = ngrams.score(map(text_to_units, texts))
    mixed = log_probabilities(model, tokenizer, shuffled, with_end=True)
    return {
        "model": -float(sum(v.sum() for v in values)) / sum(len(v) for v in values),
        "bigram": float(bigram),
        "unigram": float(unigram),
        "real_over_shuffled": float(np.mean([float(a.mean() > b.mean()) for a, b in zip(values, mixed, strict=True)])),
        "sequences": len(texts),
    }


if __name__ == "__main__":
    main()
