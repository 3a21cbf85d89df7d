"""Files that are complete or not there, on disks that are full and on disks that do not know everything."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spidr_hf.system.files import make_public, replaced_file, replaced_folder, sync, write_text


def refusing(monkeypatch, name: str, number: int, when=lambda *arguments: True) -> None:
    """Have a system call of `os` refused with an error number."""
    call = getattr(os, name)

    def refused(*arguments, **options):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return call(*arguments, **options)

    monkeypatch.setattr(os, name, refused)


def is_folder(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").is_dir()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF])
def test_a_disk_that_cannot_wait_for_folders(tmp_path, monkeypatch, number):
    refusing(monkeypatch, "fsync", number, is_folder)
    with replaced_folder(tmp_path / "whole") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
    assert (tmp_path / "whole" / "inner" / "file").read_text() == "x"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_disk_that_cannot_wait_for_files(tmp_path, monkeypatch, number, caplog, new_warnings):
    refusing(monkeypatch, "fsync", number)
    for name in "ab":
        write_text(tmp_path / name, "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert caplog.text.count("does not take fsync") == 1


def test_a_folder_that_cannot_be_opened(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    refusing(monkeypatch, "open", errno.EISDIR)
    sync(tmp_path)
    with pytest.raises(OSError, match="Is a directory"):
        sync(tmp_path / "file")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_what_is_lost_is_told(tmp_path, monkeypatch, number):
    """A disk that says that it could not keep what was written."""
    refusing(monkeypatch, "fsync", number)
    with pytest.raises(OSError, match="file") as caught:
        write_text(tmp_path / "file", "x")
    assert caught.value.errno == number and caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL, errno.EACCES])
def test_a_disk_without_permissions(tmp_path, monkeypatch, number, caplog, new_warnings):
    """As FAT and some network file systems: every mode stays as it is."""
    refusing(monkeypatch, "chmod", number)
    monkeypatch.setattr(Path, "chmod", lambda self, mode: os.chmod(self, mode))
    for name in "ab":
        with replaced_file(tmp_path / f"{name}.safetensors") as partial:
            save_file({"x": torch.zeros(2)}, partial)  # these are private
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    assert caplog.text.count("does not take chmod") == 1


def test_permissions_that_are_right_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(Path, "chmod", lambda self, mode: pytest.fail("not needed"))
    make_public(tmp_path / "file")


FULL = {
    "python": lambda path: path.write_text("x" * 100_000),
    "safetensors": lambda path: save_file({"x": torch.zeros(100_000)}, path),
}


@pytest.mark.parametrize("write", FULL.values(), ids=FULL)
@pytest.mark.parametrize("replaced", [replaced_file, replaced_folder])
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, small_files, write, replaced):
    target = tmp_path / "target"
    with replaced(target) as partial:
        (partial if replaced is replaced_file else partial / "file").write_text("old")
    with pytest.raises(OSError, match="File too large") as caught, replaced(target) as partial:
        write(partial if replaced is replaced_file else partial / "file")
    assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target if replaced is replaced_file else target / "file").read_text() == "old"


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 120 + ".json", "." + "p" * 200 + ".pt"])
def test_names_as_long_as_disks_allow(tmp_path, name):
    write_text(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"
