"""examples/benchmark_cuda.py runs anywhere, in small."""

import json

import pytest
from commands import run_command


@pytest.mark.slow
def test_every_part_reports(tmp_path):
    path = tmp_path / "rows.json"
    done = run_command(
        "benchmark_cuda", "--size", "tiny", "--batch", 2, "--seconds", 0.5, "--device", "cpu", "--rounds", 1,
        "--top", 3, "--json", path,
    )  # fmt: skip
    assert done.status == 0, done.err
    rows = json.loads(path.read_text())["rows"]
    assert {row["part"] for row in rows} >= {"step", "modules", "kernels", "profile"}
    assert all(row.get("ms", 1) > 0 for row in rows)
