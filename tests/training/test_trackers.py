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


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_what_keeps_its_steps_is_not_sent_them_twice(tmp_path, tracker, monkeypatch):
    """Killed at 13, at 12 and at 11, each time resumed from 10: the second and third start do not know of 13."""
    begun = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda *_, init_kwargs, **__: begun.append(init_kwargs[tracker]))
    accelerator = Accelerator(cpu=True)
    accelerator.log_with = [tracker]
    sent = []
    for start, stop, reached in ((0, 13, 0), (10, 12, 13), (10, 11, 12), (10, 20, 11)):
        again = start_trackers(accelerator, tracker, tmp_path, step=start, reached=reached)
        sent += [step for step in range(start + 1, stop + 1) if step not in again]
    assert sent == list(range(1, 21))
    assert all(run == begun[0] and run["resume"] == "allow" for run in begun)
    # A folder that another tracker, or none, was used in: all is new to this one, whatever the folder is called.
    new = tmp_path / "new" / tmp_path.name
    new.mkdir(parents=True)
    assert not start_trackers(accelerator, tracker, new, step=10, reached=13)
    known = "id" if tracker == "wandb" else "name"
    assert begun[-1][known] != begun[0][known]
