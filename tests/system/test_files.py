"""Files that are complete or not there, on disks that are full and on disks that do not know everything."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spidr_hf.system.files import (
    check_place,
    make_public,
    remove_abandoned,
    replaced_file,
    replaced_folder,
    sync,
    unfinished,
    write_text,
)


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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", [True, False])
def test_what_a_living_process_writes_stays(kind: bool, tmp_path: Path) -> None:
    target = tmp_path / "o"
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        with unfinished(target, folder=kind):
            os.write(ready[1], b"x")
            os.read(go_on[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    (left,) = tmp_path.iterdir()
    remove_abandoned(target)
    with unfinished(target, folder=kind) as other:
        assert left.exists() and other != left
    assert left.exists()
    os.write(go_on[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    assert names(tmp_path) == []


def test_only_what_is_certainly_ours_is_removed(tmp_path: Path) -> None:
    others = [".o.pt.abcdefgh.partial", ".oo.abcdefgh.partial", ".o.partial"]
    others += ["o.abcdefgh.partial", ".o.abcdefgh.partial.txt"]
    for name in others:
        (tmp_path / name).write_text("keep")
    (tmp_path / ".o.linked_1.partial").symlink_to(tmp_path / others[0])
    (tmp_path / ".o.abcdefgh.partial").mkdir()
    remove_abandoned(tmp_path / "o")
    assert names(tmp_path) == sorted([*others, ".o.linked_1.partial"])


def test_two_that_write_one_folder_leave_each_other_alone(tmp_path):
    target = tmp_path / "made" / "target"
    with replaced_folder(target) as first:
        (first / "file").write_text("first")
        with replaced_folder(target) as second:
            (second / "file").write_text("second")
        assert (target / "file").read_text() == "second" and (first / "file").read_text() == "first"
    assert (target / "file").read_text() == "first" and names(target.parent) == ["target"]
    with pytest.raises(OSError, match="not empty") as caught, replaced_folder(target, new=True):
        pass
    assert caught.value.filename == str(target) and (target / "file").read_text() == "first"


def test_of_a_block_that_fails_no_folder_above_is_left(tmp_path):
    with pytest.raises(ValueError, match="as it is"), replaced_folder(tmp_path / "a" / "b" / "c") as folder:
        (folder / "file").touch()
        raise ValueError("as it is")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_of_a_file_is_written_over(tmp_path):
    child = os.fork()
    if not child:
        with replaced_file(tmp_path / "a.json") as partial:
            partial.write_text("x" * 100)
            os._exit(0)
    os.waitpid(child, 0)
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]  # its temporary one
    write_text(tmp_path / "a.json", "{}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "{}"}


@pytest.mark.parametrize("locks", [True, False])
def test_two_that_write_one_file_leave_each_other_alone(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(
            "fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)))
        )
    path = tmp_path / "a.json"
    with replaced_file(path) as first, replaced_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "first"}


def test_a_full_disk_by_the_writer_of_pytorch_is_one_of_the_disk(tmp_path, small_files):
    with pytest.raises(OSError, match="No space left on device") as error, replaced_file(tmp_path / "a.pt") as partial:
        torch.save(torch.zeros(100_000), partial)
    assert error.value.filename == str(tmp_path / "a.pt") and not list(tmp_path.iterdir())


def test_places_for_files_and_folders(tmp_path, monkeypatch):
    file, new = tmp_path / "file", tmp_path / "a" / "b"
    file.touch()
    for place, folder in ((file, False), (tmp_path, True), (new, False), (new, True)):
        assert check_place(place, folder=folder) == place
    for place, folder, kind in (
        (tmp_path, False, "a"),
        (file, True, "no"),
        (file / "a", False, "no"),
        (file / "a", True, "no"),
    ):
        with pytest.raises(ValueError, match=f"{place} cannot be written: .* is {kind} folder"):
            check_place(place, folder=folder)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for folder in (False, True):
        with pytest.raises(ValueError, match="nothing may be written there"):
            check_place(new, folder=folder)
    assert list(tmp_path.iterdir()) == [file]
