"""Commands that see a small disk where another one was, in a mount namespace of their own."""

import shutil
import subprocess

import pytest


def can_mount() -> bool:
    """Whether this user may mount file systems of its own."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs leave to mount file systems")


def on_small_disk(place: object, kilobytes: int, command: list[str]) -> list[str]:
    """The command, with a disk of this size mounted over a folder."""
    mount = f'mount -t tmpfs -o size={kilobytes}k tmpfs {place} && exec "$@"'
    return ["unshare", "-m", "sh", "-c", mount, "sh", *command]


def inside(process: subprocess.Popen, *command: str) -> None:
    """Run a command that sees what a process of `on_small_disk` sees; its failure is passed over."""
    subprocess.run(["nsenter", "-t", str(process.pid), "-m", *command], capture_output=True, check=False)
