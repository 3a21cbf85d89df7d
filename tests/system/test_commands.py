"""How commands end."""

import errno
import signal
from types import SimpleNamespace

import pytest
import torch
from commands import run_command
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from runs import write_audio, write_config
from tqdm import tqdm

from spidr_hf.data.open import open_data
from spidr_hf.pretraining.config import load_config
from spidr_hf.system.commands import clear_errors, end, training_command, user_path
from spidr_hf.system.messages import log_above_bars
from spidr_hf.system.processes import device_of


@pytest.mark.parametrize("leave", [True, False])
def test_an_error_has_a_line_of_its_own(capsys, leave):
    """Not behind the progress bar, which has not ended."""
    with pytest.raises(SystemExit) as stop, clear_errors():
        bar = tqdm(total=10, leave=leave, mininterval=0)
        bar.update(3)
        raise ValueError("something\nis wrong")
    assert stop.value.code == "error: something is wrong"
    printed = capsys.readouterr().err
    assert printed.endswith("\n" if leave else "\r")
    assert bar.disable


def test_the_last_line_of_a_run(capsys):
    bar = tqdm(total=10, mininterval=0)
    with pytest.raises(SystemExit):
        end("error: x")
    assert capsys.readouterr().err.endswith("\n") and bar.disable


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("extract_units", ["nowhere", "nowhere", "nowhere"]),
        ("extract_features", ["nowhere", "nowhere", "nowhere"]),
        ("finetune_ctc", ["nowhere", "nowhere", "nowhere", "--valid", "nowhere"]),
        ("pretrain", ["--config", "nowhere", "--output-dir", "nowhere"]),
    ],
)
def test_no_command_leaves_attention_to_cudnn(monkeypatch, tmp_path, name, arguments):
    """It plans anew for every length; PyTorch prefers it on newer GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("spidr_hf.system.commands.die_with_launcher", lambda: None)  # not with this process
    monkeypatch.setattr("spidr_hf.examples.finetune_ctc.die_with_launcher", lambda: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert run_command(name, *arguments).status != 0
    assert not torch.backends.cuda.cudnn_sdp_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(number):
    with pytest.raises(SystemExit) as stop, clear_errors():
        raise OSError(number, "No more", "/data/file")
    assert stop.value.code.startswith("error: the disk is full: /data/file cannot be written (No more). Make room")


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("command", [clear_errors, training_command])
def test_downloads_have_progress_bars(monkeypatch, command, wanted):
    """Transformers' switch for bars turns off those of the Hub, too: gigabytes would come without a sign."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None if wanted else True)
    disable_progress_bars()
    with command():
        assert are_progress_bars_disabled("huggingface_hub.http_get") is not wanted
        assert are_progress_bars_disabled("huggingface_hub.lfs_upload")


@pytest.mark.parametrize("command", [clear_errors, training_command])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("error", [OSError(5, "broken"), torch.OutOfMemoryError("CUDA out of memory.\nTried to ...")])
def test_an_error_of_any_process_is_heard_once(monkeypatch, command, rank, error):
    """The first process speaks at once. Another waits for the launcher to end it, and speaks where that does not."""
    pauses, handler = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("spidr_hf.system.commands.time", SimpleNamespace(sleep=pauses.append))
    monkeypatch.setattr("spidr_hf.system.commands.die_with_launcher", lambda: None)
    monkeypatch.setenv("RANK", str(rank))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a run that saves before it stops
    try:
        with pytest.raises(SystemExit) as stop, command():
            raise error
        assert signal.getsignal(signal.SIGTERM) == (signal.SIG_DFL if rank else signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    assert ("broken" if isinstance(error, OSError) else "memory is full: lower") in stop.value.code
    assert stop.value.code.endswith("(process 3)") == bool(rank) == bool(pauses)


def test_warnings_are_lines_above_the_bars(monkeypatch, capsys):
    import logging

    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    log_above_bars()
    log_above_bars()
    with tqdm(total=10, mininterval=0) as bar:
        bar.update(1)
        logging.getLogger("spidr_hf.test").warning("something is odd")
    lines = capsys.readouterr().err.replace("\r", "\n").split("\n")
    assert lines.count("something is odd") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("extract_units", ["MODEL", "DATA", "OUT"]),
        ("extract_features", ["MODEL", "DATA", "OUT"]),
        ("evaluate_abx", ["ITEMS", "FEATURES"]),
        ("score_pairs", ["MODEL", "PAIRS"]),
        ("check_parity", []),
        ("benchmark", []),
    ],
)
def test_a_device_that_is_not_here_is_one_line(command, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "cuda", "cuda:7"):
        with pytest.raises(ValueError, match=f"{name}'"):
            device_of(name)
    done = run_command(command, *arguments, "--device", "cuda")
    assert done.status != 0 and "Traceback" not in done.err and "error: " in done.err


def test_a_port_that_is_none(tmp_path):
    done = run_command("demo_app", "--port", "80000")
    assert done.status == 2 and "between 1 and 65535" in done.err


def test_home_is_home_wherever_it_stands(tmp_path, monkeypatch):
    """In an argument that no shell expands, in a config, in a manifest's root and as DATA; marks at the start go."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs") == tmp_path / "runs"
    write_audio(tmp_path / "audio")
    text = (write_config(tmp_path / "c.toml", "~/audio")).read_text()
    (tmp_path / "c.toml").write_text(text, encoding="utf-8-sig")
    config = load_config(tmp_path / "c.toml", ["--run.init_ckpt", "~/audio"])
    assert config.data.manifest == config.run.init_ckpt == str(tmp_path / "audio")
    assert len(open_data("~/audio", progress=False)) == 20
    (tmp_path / "m.tsv").write_text("~/audio\n00.flac\t5000\n", encoding="utf-8-sig")
    assert open_data("~/m.tsv", progress=False).read(0).size == 5_000
