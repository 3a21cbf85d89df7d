"""A pretraining run that takes seconds, for tests that start it on several machines."""

from pathlib import Path

from runs import TINY, write_audio

from spidr_hf.system.fields import dump_toml


def write_run(folder: Path, **sections: dict) -> Path:
    """Audio and config in a new folder; `sections` add to the config. Returns the config."""
    merged = {name: {**TINY.get(name, {}), **sections.get(name, {})} for name in {**TINY, **sections}}
    merged["data"]["manifest"] = str(write_audio(folder / "audio"))
    path = folder / "small.toml"
    path.write_text(dump_toml(merged))
    return path


def slow_down(folder: Path, seconds: float, condition: str = "True") -> dict[str, str]:
    """Environment in which every row of metrics.jsonl takes `seconds` longer (while a Python expression holds), so that
    a test can interrupt a run whatever the machine's speed."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, time\nfsync = os.fsync\n"
        f"def slow(descriptor):\n    fsync(descriptor)\n    time.sleep({seconds} if {condition} else 0)\n"
        "os.fsync = slow\n"
    )
    return {"PYTHONPATH": str(folder)}
