"""A published name as MODEL: downloaded and converted once, found again, in the cache."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from commands import fails, run_command
from huggingface_hub import constants
from mounts import needs_mounts
from tiny import tiny_model
from walk import ROOT, write_checkpoint

from spidr_hf.conversion.sources import MIRROR_VARIABLE, published
from spidr_hf.hub.published import model_folder

DATA = ROOT / "examples" / "data" / "manifest.csv"


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """Has a small checkpoint where spidr-base lies; the cache is empty."""
    file = tmp_path / "served" / published()["spidr-base"]["source"]["url"].split("/", 3)[3]
    file.parent.mkdir(parents=True)
    write_checkpoint(file, tiny_model(num_hidden_layers=6, num_codebooks=2))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        monkeypatch.setenv(MIRROR_VARIABLE, f"http://127.0.0.1:{httpd.server_port}")
        yield httpd
        httpd.shutdown()


def test_a_published_name_is_a_model(server, tmp_path):
    first = run_command("extract_units", "spidr-base", DATA, tmp_path / "units")
    assert first.status == 0, first.err
    assert "Licence of its weights: cc-by-nc-4.0" in first.err and " MB, once." in first.err
    assert "dl.fbaipublicfiles.com" in first.err
    assert (tmp_path / "units" / "6" / "units.jsonl").exists()
    server.shutdown()  # found again without a network
    again = run_command("extract_units", "spidr-base", DATA, tmp_path / "more", "--layers", "6")
    assert again.status == 0 and "Licence" not in again.err
    assert (tmp_path / "more" / "6" / "units.jsonl").read_bytes() == (
        tmp_path / "units" / "6" / "units.jsonl"
    ).read_bytes()


def test_a_damaged_download_is_fetched_again(server, tmp_path):
    """Though the server says that the file has not changed since."""
    (served,) = (tmp_path / "served").rglob("*.pt")
    good, time = served.read_bytes(), served.stat().st_mtime
    served.write_bytes(good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 255]) + good[len(good) // 2 + 1 :])
    os.utime(served, (time, time))
    fails(run_command("extract_units", "spidr-base", DATA, tmp_path / "units"), "damaged", "It is removed")
    served.write_bytes(good)
    os.utime(served, (time, time))
    assert (Path(model_folder("spidr-base")) / "model.safetensors").exists()


def test_a_folder_of_that_name_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spidr-base").mkdir()
    assert model_folder("spidr-base") == "spidr-base"
    assert model_folder("someone/else") == "someone/else"


def test_what_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(MIRROR_VARIABLE, "http://127.0.0.1:9")
    fails(run_command("extract_units", "spidr-base", DATA, tmp_path / "units"), "cannot be fetched")
    assert not (tmp_path / "cache" / "spidr_hf" / "models" / "spidr-base").exists()


def test_a_cache_that_can_only_be_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr("spidr_hf.system.files.os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"cannot be written.*HF_HOME may name another cache"):
        model_folder("spidr-base")
    monkeypatch.undo()
    assert not (tmp_path / "cache").exists()


@needs_mounts
def test_a_model_in_a_cache_that_can_only_be_read(server, tmp_path):
    folder = model_folder("spidr-base")
    script = f"""if True:
        from huggingface_hub import constants
        from spidr_hf.hub.published import model_folder
        constants.HF_HOME = {str(tmp_path / "cache")!r}
        print(model_folder("spidr-base"))
    """
    read_only = 'mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" && shift && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", read_only, "sh", tmp_path / "cache", sys.executable, "-c", script]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == folder, done.stderr


def test_hf_hub_offline_is_heeded(server, tmp_path, monkeypatch):
    """Nobody is asked; a mirror, which somebody has named, is."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    mirror = os.environ[MIRROR_VARIABLE]
    monkeypatch.delenv(MIRROR_VARIABLE)
    with monkeypatch.context() as patched:
        patched.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the network was used"))
        fails(run_command("extract_units", "spidr-base", DATA, tmp_path / "units"), "HF_HUB_OFFLINE is set")
    monkeypatch.setenv(MIRROR_VARIABLE, mirror)
    assert (Path(model_folder("spidr-base")) / "model.safetensors").exists()
