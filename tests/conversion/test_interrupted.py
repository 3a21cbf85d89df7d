"""A full disk and a kill at any moment leave nothing that stays: not a byte of the target, and no temporary files."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from spidr_hf.conversion import convert_checkpoint, export_checkpoint

TINY = Path(__file__).parents[1] / "fixtures" / "parity" / "spidr-tiny" / "checkpoint.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder to export."""
    path = tmp_path_factory.mktemp("model") / "model"
    convert_checkpoint.convert(str(TINY), str(path))
    return path


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may become larger than `size` bytes; writing more fails as on a full disk, with another number."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def killed(work: Callable[[], object]) -> None:
    """Does `work` in a copy of this process, which has to end by SIGKILL."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def kill_this_process(*_args: object, **_options: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [0, 500, 20_000, 1_000_000])
def test_a_full_disk_while_converting(size: int, tmp_path: Path, capsys) -> None:
    arguments = [str(TINY), str(tmp_path / "a" / "b")]
    with room_for(size):
        assert convert_checkpoint.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'a'}") and "cannot be written" in error
    assert names(tmp_path) == []
    assert convert_checkpoint.main(arguments) == 0


@pytest.mark.parametrize("size", [0, 500, 20_000, 1_000_000])
def test_a_full_disk_while_exporting(size: int, folder: Path, tmp_path: Path, capsys) -> None:
    arguments = [str(folder), str(tmp_path / "a" / "b.pt")]
    with room_for(size):
        assert export_checkpoint.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'a' / 'b.pt'} cannot be written") and error.count("\n") == 1
    assert names(tmp_path) == []
    assert export_checkpoint.main(arguments) == 0
    assert names(tmp_path / "a") == ["b.pt", "config.json"]


def test_a_killed_conversion_is_tidied_up_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(convert_checkpoint, "converted_card", kill_this_process)
        killed(lambda: convert_checkpoint.convert(str(TINY), str(tmp_path / "o")))
    (left,) = tmp_path.iterdir()
    assert (left / "model.safetensors").exists()
    convert_checkpoint.convert(str(TINY), str(tmp_path / "other"))
    assert names(tmp_path) == [left.name, "other"]  # of another target
    convert_checkpoint.convert(str(TINY), str(tmp_path / "o"))
    assert names(tmp_path) == ["o", "other"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, "Interrupted")])
@pytest.mark.parametrize("name", ["convert_checkpoint.py", "spidr-hf convert"])
def test_a_conversion_that_is_stopped_leaves_nothing(
    number: int, status: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever name it was started."""
    monkeypatch.setattr(sys, "argv", [name, str(TINY), str(tmp_path / "o")])
    monkeypatch.setattr(convert_checkpoint, "converted_card", lambda *_, **__: os.kill(os.getpid(), number))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            convert_checkpoint.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert str(stopped.value.code).startswith(str(status)) and names(tmp_path) == []


def test_a_refused_start_tidies_up_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(convert_checkpoint, "converted_card", kill_this_process)
        killed(lambda: convert_checkpoint.convert(str(TINY), str(tmp_path / "o")))
    assert convert_checkpoint.main([str(tmp_path / "absent.pt"), str(tmp_path / "o")]) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["to_spidr", "publish"])
def test_a_killed_export_is_tidied_up_by_the_next(
    moment: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(export_checkpoint, moment, kill_this_process)
        killed(lambda: export_checkpoint.export(folder, tmp_path / "x.pt"))
    assert len(names(tmp_path)) == 2 and all(name.endswith(".partial") for name in names(tmp_path))
    export_checkpoint.export(folder, tmp_path / "x.pt")
    assert names(tmp_path) == ["config.json", "x.pt"]


def test_a_killed_export_between_its_two_files_goes_on(folder: Path, tmp_path: Path) -> None:
    export_checkpoint.export(folder, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").unlink()
    export_checkpoint.export(folder, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == whole


@pytest.mark.parametrize("name", ["n" * 237, "n" * 255, "ü" * 127])
def test_long_names(name: str, folder: Path, tmp_path: Path) -> None:
    convert_checkpoint.convert(str(TINY), str(tmp_path / name))
    assert load_file(tmp_path / name / "model.safetensors")
    export_checkpoint.export(folder, tmp_path / "out" / name)
    assert names(tmp_path / "out") == sorted(["config.json", name])
