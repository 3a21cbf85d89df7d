"""Who watches a pretraining run. A new observer is a file with a class (`training.observers`) and a line here."""

from ..training.observers import Observers
from ..training.profiling import StepProfiler
from ..training.stopping import StopSignal
from .curves_picture import CurvesPicture
from .hub_push import start_push
from .reporter import Reporter
from .start import Run
from .validation_run import start_validation


def start_observers(run: Run, reporter: Reporter, stop: StopSignal) -> Observers:
    """What the run's config asks for, in the order in which it is called. Every process calls it."""
    config, folder, asked = run.config, run.output_dir, run.config.run
    observers = [start_validation(run, reporter, stop.agreed), reporter]
    if run.accelerator.is_main_process:
        observers += [
            StepProfiler(folder, asked.profile_steps),
            CurvesPicture(folder, config.model, asked.plot_minutes, reporter.say),
            start_push(config, folder, reporter.say),
        ]
    return Observers(observers)


__all__ = ["start_observers"]
