"""The measuring of data: that every number is there and of a plausible size."""

import sys

import numpy as np
import pytest

from spidr_hf.data.manifests import open_manifest
from spidr_hf.examples.benchmarks.data_costs import (
    core_seconds,
    decoding_speed,
    manifest_cost,
    simulated_run,
    write_made_manifest,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_made_manifests_are_manifests(tmp_path):
    write_made_manifest(tmp_path / "m.csv", 500)
    manifest = open_manifest(tmp_path / "m.csv")
    assert len(manifest) == 500 and 11 < manifest.num_samples.mean() / 16_000 < 14


def test_decoding(tmp_path):
    rng = np.random.default_rng(0)
    speed = decoding_speed(tmp_path, [0.1 * rng.standard_normal(20_000) for _ in range(4)], repeats=1)
    assert min(speed.flac, speed.tar, speed.batches) > 10
    assert core_seconds(lambda: sum(range(100_000)), 3) > 0


@linux
def test_a_run_of_epochs_does_not_grow():
    run = simulated_run(rows=3_000, batches=8_000)
    assert run.batches == 8_000 and run.epochs > 40
    assert run.growth < 2


@linux
@pytest.mark.slow
def test_workers_hold_nothing_of_a_manifest(tmp_path):
    write_made_manifest(tmp_path / "m.csv", 300_000)
    cost = manifest_cost(tmp_path / "m.csv", workers=1)
    # As objects, or copied, it would be 30 MiB and more.
    assert cost.rows == 300_000 and cost.worker_memory < 10
