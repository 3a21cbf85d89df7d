"""Locks, on disks that know them and on disks that do not."""

import errno
import fcntl
import os

import pytest

from spidr_hf.pretraining.validation_run import ValidationFile
from spidr_hf.system.errors import RunFolderError
from spidr_hf.system.processes import RunLock, lock


@pytest.fixture
def refused(monkeypatch):
    """`refused(number)`: locking fails with this error number from now on."""

    def refuse(number: int) -> None:
        def lockf(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "lockf", lockf)

    return refuse


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EIO])
def test_a_disk_without_locks(tmp_path, refused, number, caplog, new_warnings):
    """The folder of a run, the list of validations, and whoever looks whether a run is going on: warned about once."""
    refused(number)
    for _ in range(2):
        RunLock(tmp_path, patience=0).release()
    validation = ValidationFile(tmp_path)
    validation.write({"step": 1, "name": "dev", "checkpoint": None})
    assert [row["step"] for row in validation.rows()] == [1]
    with open(tmp_path / ".lock", "a+") as file:
        assert lock(file)
    assert caplog.text.count("knows no locks") == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_in_use(tmp_path, refused, number):
    refused(number)
    with pytest.raises(RunFolderError, match="in use by another run"):
        RunLock(tmp_path, patience=0)


def test_a_full_disk_does_not_keep_a_lock_from_being_taken(tmp_path, monkeypatch):
    held = RunLock(tmp_path)
    assert "process" in (tmp_path / ".lock").read_text()
    held.release()
    os.symlink("/dev/full", tmp_path / ".lock")
    RunLock(tmp_path, patience=0).release()
