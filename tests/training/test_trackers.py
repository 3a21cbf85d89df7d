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
