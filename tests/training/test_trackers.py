"""Curves of a run that was killed and resumed."""

import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from runs import forget_processes

from spidr_hf.training.trackers import start_trackers

event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_no_step_is_there_twice(tmp_path):
    """It got to step 13, and resumes from its checkpoint of step 10."""
    forget_processes()
    for start, stop, value in ((0, 13, 1.0), (10, 20, 2.0)):
        project = ProjectConfiguration(project_dir=str(tmp_path), logging_dir=str(tmp_path))
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_config=project)
        start_trackers(accelerator, "tensorboard", tmp_path, step=start)
        for step in range(start + 1, stop + 1):
            accelerator.log({"loss": value}, step=step)
        accelerator.end_training()
    forget_processes()
    curves = event_accumulator.EventAccumulator(str(next(tmp_path.iterdir())))
    curves.Reload()
    points = [(event.step, event.value) for event in curves.Scalars("loss")]
    assert points == [(step, 1.0 if step <= 10 else 2.0) for step in range(1, 21)]


class TrackedRun:
    """What wandb and trackio say of a run; `kept` is the last step that arrived, None where nobody can tell."""

    def __init__(self, kept: int | None):
        self.offline = kept is None
        if kept is not None:
            self.starting_step = kept + 1
            self._initial_last_step = kept if kept >= 0 else None


@pytest.mark.parametrize("told", [True, False], ids=["it tells", "it does not tell"])
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_what_keeps_its_steps_is_sent_them_once(tmp_path, tracker, told, monkeypatch):
    """Killed at 7 without a checkpoint, then at 13, 12 and 11, each time resumed from 10: the later starts do not know
    of 13. What each start sent last has not arrived; where the tracker tells so, it is sent again."""
    begun, arrived = [], []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *_, init_kwargs, **__: begun.append(init_kwargs[tracker]))
    monkeypatch.setattr(
        Accelerator, "get_tracker", lambda *_, **__: TrackedRun(max(arrived, default=-1) if told else None)
    )
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = [tracker]
    lost = 3 if told else 0
    for start, stop, reached in ((0, 2, 0), (0, 13, 2), (10, 12, 13), (10, 11, 12), (10, 20, 11), (20, 20, 20)):
        sent = start_trackers(accelerator, tracker, tmp_path, step=start, reached=reached)
        steps = [step for step in range(1, stop + 1) if step > sent]
        arrived += steps[: len(steps) - lost] if stop < 20 else steps
    assert arrived == list(range(1, 21))
    assert all(run == begun[0] and run["resume"] == "allow" for run in begun)
    # A folder that another tracker, or none, was used in: all is new to this one, whatever the folder is called.
    new = tmp_path / "new" / tmp_path.name
    new.mkdir(parents=True)
    arrived.clear()
    assert start_trackers(accelerator, tracker, new, step=10, reached=13) == (-1 if told else 10)
    known = "id" if tracker == "wandb" else "name"
    assert begun[-1][known] != begun[0][known]
