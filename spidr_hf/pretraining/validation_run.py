"""Validation of a run: its results in `validation.jsonl`, by the training processes or by one that follows them.

`validation.jsonl` lies beside `metrics.jsonl`, which belongs to training alone, and has one row per step and data set.
A row says which weights it is about (`checkpoint`, a checksum; null when the training processes validated) and with
which data and masks (`data`), so that nothing is computed twice and what is outdated is replaced.
"""

import importlib.util
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, filter_trackers
from safetensors import SafetensorError
from safetensors.torch import load

from ..data.sections import DataSection
from ..hub.card import add_results, evaluation_results
from ..modeling_spidr import SpidrForPretraining
from ..system.errors import ConfigError
from ..system.files import write_text
from ..system.messages import counted
from ..system.processes import gather_all, lock
from ..system.tables import json_lines, known_table
from ..training.checkpoints import MODEL_FILE, STATE_FILE, Checkpoints
from ..training.metrics import curves
from ..training.observers import Observer
from ..training.trackers import end_trackers
from .config import INHERITED, PretrainingConfig, load_config
from .reporter import Reporter
from .setup import autocast, save_final
from .start import Run, final_step
from .validation import ValidationSet, open_sets

logger = logging.getLogger(__name__)

FILE_NAME, PLOT_NAME = "validation.jsonl", "validation.png"
BEST_NAME, CHOICE_NAME = "best", "selection.json"
# Scores of a row of which less is better; of all others more is.
_LESS_IS_BETTER = ("loss", "layer_losses", "per", "skipped")
_PLOT_INTERVAL = 60.0  # seconds, while there are further checkpoints to validate
_HOW_TO_ADD = (
    "there is nothing to validate on: add a section to the run's config, for example\n"
    '[validation.dev]\nmanifest = "dev.csv"\nalignments_path = "dev-alignments.jsonl"  # if phones are known\n'
    "or pass --data DATA [--alignments FILE]."
)


class ValidationFile:
    """`validation.jsonl` of a run's folder. Several processes may write to it."""

    def __init__(self, run_dir: str | Path):
        self.path = Path(run_dir) / FILE_NAME

    def rows(self) -> list[dict[str, Any]]:
        """All rows, by step and name. A line that was cut off when its process was killed is passed over."""
        try:
            keyed = json_lines(self.path, lambda row: ((int(row["step"]), str(row["name"])), row))
            rows = dict(entry for _, entry in keyed)
        except FileNotFoundError:
            return []
        return [rows[key] for key in sorted(rows)]

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row, in place of one of the same step and name; it is on disk on return."""
        key = (row["step"], row["name"])
        with self._locked():
            self._replace([old for old in self.rows() if (old["step"], old["name"]) != key] + [dict(row)])

    def forget_after(self, step: int) -> None:
        """Remove what training itself validated after `step`, from where it resumes."""
        with self._locked():
            rows = self.rows()
            kept = [row for row in rows if row["step"] <= step or row["checkpoint"] is not None]
            if len(kept) < len(rows):
                self._replace(kept)

    def has(self, step: int, validation: ValidationSet, checkpoint: str | None = None) -> bool:
        """Whether there is a row of this step and data; of that checkpoint, where its checksum is given and known."""
        return any(
            row["step"] == step
            and row["name"] == validation.name
            and row["data"] == validation.fingerprint
            and (checkpoint is None or row["checkpoint"] in (None, checkpoint))
            for row in self.rows()
        )

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        ordered = sorted(rows, key=lambda row: (row["step"], row["name"]))
        write_text(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in ordered))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # The file itself is replaced, so that a lock on it would hold nobody off.
        with open(self.path.with_name(".validation.lock"), "w") as file:
            lock(file, wait=True)
            yield


class InlineValidation(Observer):
    """Validation by the training processes, every `run.validate_interval` updates, the first before any.

    All of them make one and call it alike.

    Args:
        config, output_dir, accelerator, model: of the run.
        reporter: takes lines for the user, and the seconds that were not spent on training.
        interrupted: whether the run is told to stop (asked after every batch).
    """

    def __init__(
        self,
        config: PretrainingConfig,
        output_dir: Path,
        accelerator: Accelerator,
        model: SpidrForPretraining,
        reporter: Reporter,
        interrupted: Callable[[], bool],
    ):
        if not config.validation:
            raise ConfigError(f"`run.validate_interval` is {config.run.validate_interval}, and {_HOW_TO_ADD}")
        self._interval, self._last = config.run.validate_interval, config.optimizer.max_steps
        self._accelerator, self._first_layer = accelerator, config.model.first_codebook_layer
        self._model, self._reporter, self._interrupted = model, reporter, interrupted
        with accelerator.main_process_first():
            self.sets = open_sets(config, output_dir, progress=accelerator.is_main_process)
        self._file = ValidationFile(output_dir)
        self._precision = autocast(config, accelerator.device)

    def due(self, step: int) -> list[ValidationSet]:
        """The data sets that this step is still to be validated on: after an interruption, those that are missing."""
        if step % self._interval and step != self._last:
            return []
        # What the first process sees counts: another may see a shared folder with a delay.
        missing = [validation.name for validation in self.sets if not self._file.has(step, validation)]
        missing = gather_all([missing])[0]
        return [validation for validation in self.sets if validation.name in missing]

    def after_step(self, step: int) -> None:
        """Validate where it is due."""
        start, accelerator, say = time.perf_counter(), self._accelerator, self._reporter.say
        for validation in self.due(step):
            scores = validation.evaluate(
                self._model,
                self._precision,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                interrupted=self._interrupted,
            )
            if scores is None:  # the run is told to stop, and makes up for this when it resumes
                break
            row = _row(step, validation, scores, None)
            self._reporter.send(_curves(row), step)
            if accelerator.is_main_process:
                self._file.write(row)
                say(describe(row, self._first_layer))
                for note in validation.new_notes():
                    say(f"[validation.{validation.name}]: {note}.")
        self._reporter.pause(time.perf_counter() - start)

    def finish(self, final: Path | None) -> None:
        """The finished model's card gets its scores."""
        if final is not None and self._accelerator.is_main_process:
            write_scores(final, self._file, self._last, self.sets, self._first_layer)


class RunFollower:
    """Validates the checkpoints of a run's folder, in a process of its own; training does not notice.

    Args:
        run_dir: the run's folder.
        data: validate on this instead of the config's `[validation.<name>]` (DATA, alignments or None).
        device: where to compute.
        dtype: precision instead of the run's.
        select: the score that decides which checkpoint `best/` is of, as `loss` or `dev/pnmi` (with the name of a data
            set, by default the first); of a score with a value for every layer the best layer's counts.
        wait: seconds between looks for a run that has not begun yet; None: it must have.
        say: takes a line for the user.

    Raises `ConfigError` or `ManifestError` for what cannot be validated on.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        data: tuple[str, str | None] | None = None,
        device: torch.device | str = "cpu",
        dtype: str | None = None,
        select: str = "loss",
        wait: float | None = None,
        say: Callable[[str], None] = print,
    ):
        self.run_dir, self.device, self.say = Path(run_dir), torch.device(device), say
        self._data, self._dtype, self._select = data, dtype, select
        self.file = ValidationFile(run_dir)
        self._checkpoints = Checkpoints(self.run_dir / "checkpoints")
        self._passed_over: set[tuple[int, str | None]] = set()
        self._model: SpidrForPretraining | None = None
        self._tracker: GeneralTracker | None = None
        self._tracks, self._completed = True, False
        self._plotted = time.monotonic()
        self._config_text: str | None = None
        while wait is not None and not (self.run_dir / "config.toml").exists():
            time.sleep(wait)
        self.config, self.sets = self._reload()
        self._selection()

    def catch_up(self) -> int:
        """Validate every checkpoint that there is and was not validated; returns how many there were."""
        count = 0
        while self.validate_next():
            count += 1
        if self.file.rows() and (count or self._picture_is_behind()):
            self._plot()
        self._keep_best()
        if not self._completed:
            self._complete_cards()
        return count

    def follow(self, poll: float) -> None:
        """Validate checkpoints as they appear, until the run has finished and its last weights are validated.

        A run that is interrupted is waited for: it may resume at any time.
        """
        while True:
            self.catch_up()
            if self.finished():
                return
            time.sleep(poll)
            self.config, self.sets = self._reload()
            self._selection()

    def state(self) -> str:
        """What there is, for a message."""
        names = ", ".join(validation.name for validation in self.sets)
        if not (folders := self.folders()):
            return f"{self.run_dir} has no checkpoint yet."
        return f"of {counted(len(folders), 'checkpoint')} in {self.run_dir}, none is left to validate on {names}."

    def finished(self) -> bool:
        """Whether training has reached the last step of its (present) config and left its model."""
        final = final_step(self.run_dir)
        return final is not None and final >= self.config.optimizer.max_steps

    def validate_next(self) -> bool:
        """Validate the earliest checkpoint for which there is anything to do; False where there is none."""
        for step, folder, checksum in self.folders():
            due = [validation for validation in self.sets if not self.file.has(step, validation, checksum)]
            if due and (step, checksum) not in self._passed_over:
                self._validate(step, folder, checksum, due)
                return True
        return False

    def _validate(self, step: int, folder: Path, checksum: str | None, due: Sequence[ValidationSet]) -> None:
        try:
            self.load(folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = f"is damaged ({error})" if folder.exists() else "was deleted while it was read (run.keep_latest)"
            self.say(f"{folder} {reason} and is passed over.")
            self._passed_over.add((step, checksum))
            return
        logged: dict[str, float] = {}
        for validation in due:
            scores: Any = validation.evaluate(self._model, self.precision())  # type: ignore[arg-type]  # it is loaded
            row = _row(step, validation, scores, checksum or "final")
            self.file.write(row)
            logged |= _curves(row)
            self.say(describe(row, self.config.model.first_codebook_layer))
            for note in validation.new_notes():
                self.say(f"[validation.{validation.name}]: {note}.")
        if step == final_step(self.run_dir):
            self._write_scores(self.run_dir / "final", step)
        self._log(logged, step)
        self._keep_best()
        if time.monotonic() - self._plotted > _PLOT_INTERVAL:
            self._plot()

    def _keep_best(self) -> None:
        """See to it that `best/` is a model folder of the best checkpoint by the chosen score, of those there are now
        and the one that it is of already."""
        validation, score = self._selection()
        folders = {step: folder for step, folder, _ in self.folders()}
        rows = [row for row in self.file.rows() if row["name"] == validation.name and row["step"] in folders]
        rows = [row for row in rows if row["data"] == validation.fingerprint]
        # Rows of earlier versions may lack the score.
        values = {row["step"]: value for row in rows if (value := best_value(score, row.get(score))) is not None}
        if not values:
            return
        sign = 1 if score in _LESS_IS_BETTER else -1
        step = min(values, key=lambda step: (sign * values[step], step))
        choice = {"select": f"{validation.name}/{score}", "data": validation.fingerprint}
        path = self.run_dir / BEST_NAME / CHOICE_NAME
        kept = known_table(path)
        value = kept.get("value")
        if kept | choice == kept and isinstance(value, float) and sign * value <= sign * values[step]:
            return
        try:
            self.load(folders[step])
        except (OSError, SafetensorError, RuntimeError):
            return  # it was deleted meanwhile
        summary = f"Step {step} of a run, the best by {score} ({values[step]:.3f}) on {validation.name}."
        content = json.dumps({**choice, "step": step, "value": values[step]}, indent=1) + "\n"
        save_final(self._model, path.parent, self.config, summary, {CHOICE_NAME: content})  # type: ignore[arg-type]
        self._write_scores(path.parent, step)
        self.say(f"best/ is step {step}: {score} {values[step]:.3f} on {validation.name}.")

    def _selection(self) -> tuple[ValidationSet, str]:
        """The data set and the score that `best/` is chosen by. Raises `ConfigError` where there is no such."""
        set_name, _, score = self._select.rpartition("/")
        sets = {validation.name: validation for validation in self.sets}
        if set_name and set_name not in sets:
            raise ConfigError(f"--select {self._select}: there is no data set {set_name!r}, only {', '.join(sets)}.")
        validation = sets[set_name] if set_name else self.sets[0]
        if score not in validation.score_names:
            known = ", ".join(validation.score_names)
            without = (
                "" if "pnmi" in validation.score_names else " (phones are not known: alignments_path, --alignments)"
            )
            raise ConfigError(f"--select {self._select}: there is no score {score!r}, only {known}{without}.")
        return validation, score

    def _write_scores(self, folder: Path, step: int) -> None:
        write_scores(folder, self.file, step, self.sets, self.config.model.first_codebook_layer)

    def _complete_cards(self) -> None:
        """Scores that a start which was killed has left in `validation.jsonl` alone."""
        self._completed = True
        best = self.run_dir / BEST_NAME
        steps = {best: known_table(best / CHOICE_NAME).get("step"), self.run_dir / "final": final_step(self.run_dir)}
        for folder, step in steps.items():
            if step is not None:
                self._write_scores(folder, step)

    def _plot(self) -> None:
        """The curves as a picture, where matplotlib is installed."""
        self._plotted = time.monotonic()
        if importlib.util.find_spec("matplotlib"):
            from ..plots.figures import save_figure, validation_figure

            rows = self.file.rows()
            save_figure(validation_figure(rows, self.config.model.first_codebook_layer), self.run_dir / PLOT_NAME)

    def _picture_is_behind(self) -> bool:
        """Whether a start that was killed has left rows that are not drawn."""
        picture = self.run_dir / PLOT_NAME
        return not picture.exists() or picture.stat().st_mtime_ns < self.file.path.stat().st_mtime_ns

    def folders(self) -> list[tuple[int, Path, str | None]]:
        """Step, folder and checksum of the weights of every checkpoint; and of `final` (checksum None) where its step
        has no checkpoint."""
        steps = self._checkpoints.steps()
        folders: list[tuple[int, Path, str | None]] = []
        for step in steps:
            folder = self._checkpoints.folder / f"step_{step}"
            # A checkpoint without a state is being deleted.
            if (checksum := _checksum(folder)) is not None:
                folders.append((step, folder, checksum))
        final = final_step(self.run_dir)
        return folders if final is None or final in steps else [*folders, (final, self.run_dir / "final", None)]

    def load(self, folder: Path) -> None:
        # Not mapped into memory: reading on in a mapped file that is deleted on a network file system kills a process.
        tensors = load((folder / MODEL_FILE).read_bytes())
        if self._model is None:
            self._model = SpidrForPretraining(self.config.model).to(self.device).eval()
        self._model.load_state_dict(tensors)

    def precision(self) -> torch.autocast:
        dtype = self._dtype or self.config.optimizer.dtype
        if dtype == "float32" or (dtype == "float16" and self.device.type == "cpu"):
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=getattr(torch, dtype))

    def _reload(self) -> tuple[PretrainingConfig, list[ValidationSet]]:
        """The run's config and data sets; a run that resumes may have changed them."""
        path = self.run_dir / "config.toml"
        if not path.exists():
            raise ConfigError(f"{self.run_dir} is no run's folder: there is no config.toml in it.")
        text = path.read_text(encoding="utf-8")
        if text == self._config_text:
            return self.config, self.sets
        config = load_config(path)
        if self._data is not None:
            name, section = _section(config, *self._data)
            config.validation = {name: section}
        if not config.validation:
            raise ConfigError(f"{path}: {_HOW_TO_ADD}")
        same = self._config_text is not None and config.validation == self.config.validation
        self._config_text = text
        return config, self.sets if same else open_sets(config, self.run_dir)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        """Curves for the run's tracker, in a run of their own beside training's."""
        if self._tracker is None and self._tracks:
            self._tracker = _start_tracker(self.config, self.run_dir)
            self._tracks = self._tracker is not None
        if self._tracker is not None:
            self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        """End the tracker's run."""
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None
            end_trackers()


def best_value(score: str, value: Any) -> float | None:
    """A score as one number: of a list, an entry per layer, the best; None where it is not finite."""
    values = [item for item in (value if isinstance(value, list) else [value]) if item is not None]
    if not values:
        return None
    return float(min(values) if score in _LESS_IS_BETTER else max(values))


def describe(row: Mapping[str, Any], first_layer: int) -> str:
    """A row of validation.jsonl as one line."""

    def shown(name: str, digits: int) -> str:
        return "not finite" if row[name] is None else f"{row[name]:.{digits}f}"

    text = (
        f"step {row['step']}, {row['name']}: loss {shown('loss', 3)}, perplexity of targets {shown('target_ppl', 1)}, "
        f"of predictions {shown('pred_ppl', 1)}"
    )
    if "pnmi" in row:
        best = max(range(len(row["pnmi"])), key=row["pnmi"].__getitem__)
        text += f", PNMI {row['pnmi'][best]:.3f} (layer {first_layer + best})"
    return text


def _section(config: PretrainingConfig, data: str, alignments: str | None) -> tuple[str, DataSection]:
    """Name and section of a data set that is given on the command line; for the rest it is as the run's."""
    name = re.sub(r"[^\w-]+", "-", Path(data).stem).strip("-") or "data"
    changes = {"manifest": data, "alignments_path": alignments}
    return name, DataSection(**{field: getattr(config.data, field) for field in INHERITED} | changes)


def write_scores(
    folder: Path, file: ValidationFile, step: int, sets: Sequence[ValidationSet], first_layer: int
) -> None:
    """Scores of a step into the card of a model folder that holds its weights, for the Hub to show."""
    known = {validation.name: validation.fingerprint for validation in sets}
    rows = [row for row in file.rows() if row["step"] == step and row["data"] == known.get(row["name"])]
    results = [result for row in rows for result in evaluation_results(row, row["name"], layer=first_layer)]
    try:
        add_results(folder, results)
    except (OSError, ValueError) as error:  # people edit their cards
        logger.warning("The scores of step %s are not written into a card: %s", step, error)


def _row(step: int, validation: ValidationSet, scores: Mapping[str, Any], checkpoint: str | None) -> dict[str, Any]:
    identity = {"checkpoint": checkpoint, "data": validation.fingerprint}
    return {"step": step, "name": validation.name, **{n: _finite(value) for n, value in scores.items()}, **identity}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _curves(row: Mapping[str, Any]) -> dict[str, float]:
    """A row as single numbers, for trackers."""
    values = {name: value for name, value in row.items() if name not in ("name", "checkpoint", "data")}
    prefix = f"validation/{row['name']}"
    return {f"{prefix}/{name}": value for name, value in curves(values).items() if value is not None}


def _checksum(folder: Path) -> str | None:
    """Checksum of a checkpoint's weights, as it was written with them."""
    try:
        return json.loads((folder / STATE_FILE).read_bytes())["files"][MODEL_FILE]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _start_tracker(config: PretrainingConfig, run_dir: Path) -> GeneralTracker | None:
    """The tracker that `run.tracker` names, if it is installed."""
    name = "tensorboard" if config.run.tracker == "auto" else config.run.tracker
    PartialState()  # trackers ask it whether they may write
    folder = run_dir / "tensorboard"
    if name == "none" or not filter_trackers([name], folder):
        return None
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if tracker_class.requires_logging_directory:
        tracker = tracker_class("validation", folder)
    else:
        run = {"name": f"{config.run.wandb_name or run_dir.name}-validation", "mode": config.run.wandb_mode}
        options = {field: value for field, value in run.items() if value is not None} if name == "wandb" else {}
        tracker = tracker_class(config.run.wandb_project or "spidr", **options)
    tracker.start()
    return tracker


def start_validation(run: Run, reporter: Reporter, interrupted: Callable[[], bool]) -> Observer:
    """Inline validation of a run that begins or resumes, where its config asks for it."""
    if run.accelerator.is_main_process:
        ValidationFile(run.output_dir).forget_after(run.state.step)
    if not run.config.run.validate_interval:
        return Observer()
    return InlineValidation(run.config, run.output_dir, run.accelerator, run.model, reporter, interrupted)


__all__ = [
    "FILE_NAME",
    "InlineValidation",
    "RunFollower",
    "ValidationFile",
    "best_value",
    "describe",
    "start_validation",
]
