"""The page's folder ends with its process, whatever ends that."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spidr_hf.examples.demo_page.temporary import temporary_folder

ROOT = Path(__file__).resolve().parents[3]
MODULE = ROOT / "examples" / "demo_page" / "temporary.py"
HOLDER = f"""
import os, runpy, tempfile, time
from pathlib import Path
with runpy.run_path({str(MODULE)!r})["temporary_folder"]() as folder:
    Path(os.environ["GRADIO_TEMP_DIR"], "microphone").mkdir()
    Path(os.environ["GRADIO_TEMP_DIR"], "microphone", "take.wav").write_bytes(b"speech")
    tempfile.NamedTemporaryFile(delete=False).close()
    print(folder, *sorted(os.listdir(folder)), flush=True)
    time.sleep(600)
"""


def emptied(folder: Path) -> bool:
    for _ in range(200):
        if not any(folder.iterdir()):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_process(number, tmp_path):
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, stderr=subprocess.PIPE
    ) as process:
        folder, first, second = process.stdout.readline().split()
        assert Path(folder).parent == tmp_path and "microphone" in (first, second)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert number == signal.SIGKILL or "KeyboardInterrupt" in errors
    assert emptied(tmp_path)


def test_afterwards_all_is_as_before(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), temporary_folder() as folder:
        assert os.environ["TMPDIR"] == os.environ["GRADIO_TEMP_DIR"] == folder
        raise KeyError
    assert os.environ["TMPDIR"] == str(tmp_path) and "GRADIO_TEMP_DIR" not in os.environ
    assert signal.getsignal(signal.SIGTERM) is handler and not any(tmp_path.iterdir())


def test_what_was_ignored_stays_ignored():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with temporary_folder():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # nohup
    finally:
        signal.signal(signal.SIGHUP, handler)
