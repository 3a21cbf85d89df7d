"""Curves in TensorBoard, wandb and the like, beside `metrics.jsonl`."""

import importlib.util
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate.tracking
from accelerate import Accelerator

from ..system.errors import ConfigError
from ..system.files import write_text
from .planning import Line


def start_trackers(
    accelerator: Accelerator,
    tracker: str,
    output_dir: str | Path,
    *,
    project: str | None = None,
    name: str | None = None,
    mode: str | None = None,
    config: dict[str, Any] | None = None,
    step: int = 0,
    reached: int = 0,
) -> int:
    """Begin the curves of a tracker, or continue those of a run that is resumed.

    Args:
        accelerator: made with `log_with`; nothing happens where that names none.
        tracker: as `run.tracker` has it.
        output_dir: the run's folder.
        project, name, mode: for trackers that have such things; by default "spidr" and the folder's name.
        config: what they show as the run's configuration.
        step: where the run resumes. Of what an earlier start sent about later steps, TensorBoard shows nothing any
            more.
        reached: the last step that the earlier start has a row of.

    Returns the last step that the tracker has and keeps. Rows up to it are not to be sent twice; later ones are, those
    included that an earlier start was killed with (wandb and trackio send what they were given some time later).
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return step
    if tracker in ("auto", "tensorboard"):
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        return step
    folder = Path(output_dir)
    name = name or folder.resolve().name
    identifier, sent = _tracked_run(folder, reached)
    wandb = {"name": name, "dir": str(folder), "id": identifier, "resume": "allow"}
    if mode is not None:
        wandb["mode"] = mode
    # trackio knows a run by its name alone; folders of other runs may have the same.
    init = {"wandb": wandb, "trackio": {"name": f"{name}-{identifier}", "resume": "allow"}}
    accelerator.init_trackers(project or "spidr", config=config, init_kwargs=init)
    if tracker not in init:
        return step
    known = _last_step(tracker, accelerator.get_tracker(tracker, unwrap=True))
    return max(step, sent) if known is None else known


def check_tracker(tracker: str) -> None:
    """Raises `ConfigError` where a tracker that is asked for is not installed."""
    available = {str(known.value) for known in accelerate.tracking.get_available_trackers()}
    if tracker in accelerate.tracking.LOGGER_TYPE_TO_CLASS and tracker not in available:
        raise ConfigError(f"`run.tracker` is {tracker}, which is not installed: pip install {tracker}.")


def plan(tracker: str) -> Iterator[Line]:
    """Where curves will go. Raises `ConfigError` where they cannot."""
    if tracker == "auto":
        found = importlib.util.find_spec("tensorboard") is not None
        tracker = "tensorboard" if found else "metrics.jsonl alone (pip install tensorboard for more)"
    yield Line("curves", tracker)
    check_tracker(tracker)


def end_trackers() -> None:
    """Let a tracker end that has threads and processes of its own (wandb), once its run is finished.

    Left to the end of the interpreter, its threads could be caught in the middle of something.
    """
    if (wandb := sys.modules.get("wandb")) is not None:
        with suppress(SystemExit):  # it would end this process where its own did not end well
            wandb.teardown()


def _last_step(tracker: str, run: Any) -> int | None:
    """The last step that a tracker has of its run, -1 where there is none; None where it does not say."""
    if tracker == "trackio":
        # `trackio.init` asks for it where there is the run already, and keeps it under this name alone.
        known = getattr(run, "_initial_last_step", ...)
        return None if known is ... else -1 if known is None else known
    # Offline, it knows only what this process has sent.
    return None if getattr(run, "offline", True) else run.starting_step - 1


def _tracked_run(folder: Path, reached: int) -> tuple[str, int]:
    """A name for the run of this folder that no other run has, and the last step that any start of it has sent."""
    path = folder / ".tracker_id"
    identifier, sent = uuid.uuid4().hex[:12], 0
    if path.exists():
        identifier, *others = path.read_text(encoding="utf-8").split()
        sent = max(reached, *map(int, others), 0)
    write_text(path, f"{identifier} {sent}")
    return identifier, sent


__all__ = ["check_tracker", "end_trackers", "plan", "start_trackers"]
