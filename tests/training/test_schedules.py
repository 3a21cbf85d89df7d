"""Learning rates: the recorded ones, and the shape of every schedule."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest

from spidr_hf.training.schedules import SCHEDULES, OptimizerSection, learning_rate

FIXTURES = Path(__file__).parents[1] / "fixtures" / "parity"
SHORT = {"lr": 1.0, "warmup_steps": 10, "hold_steps": 20, "decay_steps": 30, "max_steps": 60}


def rates(steps, **options):
    section = OptimizerSection(**{**SHORT, **options})
    return [learning_rate(section, step) for step in steps]


@pytest.mark.parametrize("case", ["spidr-tiny", "dinosr-tiny", "spidr-tiny-variant"])
def test_recorded_rates(case):
    trajectory = json.loads((FIXTURES / case / "trajectory.json").read_text())
    section = OptimizerSection(**trajectory["optimizer"])
    for step, expected in enumerate(trajectory["log"]["lr"], start=1):
        assert learning_rate(section, step) == pytest.approx(expected, rel=1e-6)  # recorded in float32


def test_reference_run():
    """Rates of the recorded 2 000-step run: 4e-4, warm-up 200, hold 800, decay 1 000."""
    section = OptimizerSection(lr=4e-4, warmup_steps=200, hold_steps=800, decay_steps=1000, max_steps=2000)
    recorded = {20: 4.162000000000002e-05, 100: 2.0001999999999987e-04, 200: 3.9802e-04, 300: 4e-4, 1000: 4e-4}
    for step, expected in recorded.items():
        assert learning_rate(section, step) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(scheduler):
    values = rates(range(1, 12), scheduler=scheduler)
    assert values[0] == pytest.approx(0.01) and values[10] == pytest.approx(1.0)
    steps = [b - a for a, b in pairwise(values)]
    assert steps == pytest.approx([0.099] * 10)


def test_tristage():
    assert rates([11, 30, 31]) == [1.0, 1.0, 1.0]
    assert rates([46]) == pytest.approx([0.1])  # half of the decay: the geometric mean of 1 and 0.01
    assert rates([61, 62, 1000]) == pytest.approx([0.01] * 3)
    assert rates([31], decay_steps=0) == [0.01]


def test_cosine():
    assert rates([11, 36, 61, 80], scheduler="cosine") == pytest.approx([1.0, 0.505, 0.01, 0.01])


def test_rsqrt():
    options = {"scheduler": "rsqrt", "rsqrt_timescale": 100}
    assert rates([11, 31, 31 + 300], **options) == pytest.approx([1.0, 1.0, 0.5])
    shifted = {**options, "rsqrt_shift": 300}
    assert rates([1, 11, 31, 31 + 500], **shifted) == pytest.approx([0.01, 0.5, 0.5, 1 / 3])


def test_constant():
    assert rates([11, 500, 10**6], scheduler="constant") == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("scheduler", SCHEDULES)
def test_without_warm_up_the_first_update_has_the_peak(scheduler):
    assert rates([1], scheduler=scheduler, warmup_steps=0) == [1.0]


def test_updates_count_from_one():
    with pytest.raises(ValueError, match="counted from 1"):
        rates([0])
    assert not math.isnan(rates([1])[0])
