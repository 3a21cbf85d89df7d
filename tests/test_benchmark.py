"""The benchmark runs and tells what it measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "benchmark.py"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_are_printed_and_written(tmp_path, monkeypatch, capsys, dtype):
    out = tmp_path / "out.json"
    options = ["--size", "tiny", "--batch", "1", "--seconds", "0.5", "--repeats", "2", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options, "--dtype", dtype, "--json", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    result, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert [row["name"] for row in result["results"]] == ["inference", "training step"]
    for row in result["results"]:
        assert 0 < row["milliseconds"] <= row["slowest_milliseconds"]
        assert row["audio_seconds_per_second"] == pytest.approx(500 / row["milliseconds"], rel=0.1)
        assert row["peak_mebibytes"] > 50
        assert f"{row['milliseconds']:.1f}" in printed
    assert result["dtype"] == dtype and result["device"].startswith("CPU")


def test_impossible_sizes_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--repeats", "0"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "must be at least 1" in capsys.readouterr().err
