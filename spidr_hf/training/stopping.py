"""Signals that ask a run to save and stop, on all processes at the same update."""

import _thread
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..system.files import is_writing
from ..system.host_copy import HostCopy

# How long a signalled process may take to stop before it is ended, and how much longer where files are being written
# all that time: what they come to, a disk does not say before they are there.
GRACE_SECONDS = 120


WRITING_SECONDS = 1800


LOOK_SECONDS = 2.0


# What asks a run to stop.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class StopSignal:
    """SIGTERM, SIGUSR1 (what SLURM sends before a time limit), SIGHUP and Ctrl-C ask the run to save and stop.

    A second Ctrl-C ends the process at once. What was ignored when the process was started (SIGHUP by `nohup`, Ctrl-C
    by a shell's `&`) stays ignored.

    `agreed` tells every process at the same update, so that they stop together. A process that does not get there is
    ended after two minutes, but not while a folder is written, by itself or by the process that all wait for: a slow
    disk has half an hour.

    Args:
        device: where processes exchange messages.
        folders: where `replaced_folder` writes; shared by all processes.
    """

    def __init__(self, device: torch.device | str = "cpu", folders: Sequence[str | Path] = ()):
        self.received: str | None = None
        self._device = device
        self._folders = [Path(folder) for folder in folders]
        self._pending: tuple[Any, HostCopy | Tensor] | None = None
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def agreed(self) -> bool:
        """Whether to stop now: whether any process had been asked to when this was called the last time.

        One update late, so that no update waits for an answer. Every process must call it once per update.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.received is not None
        stop = False
        if self._pending is not None:
            work, answer = self._pending
            work.wait()
            stop = bool(answer.tolist()[0])
        flag = torch.full((1,), float(self.received is not None), device=self._device)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        if flag.is_cuda:
            work.wait()  # the GPU does, and then copies; Python asks for the copy next time
        self._pending = (work, HostCopy(flag) if flag.is_cuda else flag)
        return stop

    def finish(self) -> None:
        """Leave no question open: processes must not part while one is under way."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def _handle(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:  # the next one does what it does without us
            signal.signal(number, signal.SIG_DFL)
        if self.received is None:
            self.received = signal.Signals(number).name
            # If the others are gone, nothing in this process may ever return, Python's signal handlers included:
            # SIGALRM, which has none, then ends it.
            signal.alarm(GRACE_SECONDS)
            if self._folders:
                # Not a `threading.Thread`, which takes locks: this handler may have interrupted one who holds them.
                _thread.start_new_thread(self._put_off, ())

    def _put_off(self) -> None:
        """Put the end off for as long as something is written."""
        limit = time.monotonic() + WRITING_SECONDS
        while time.monotonic() < limit:
            time.sleep(LOOK_SECONDS)
            if any(is_writing(folder) for folder in self._folders) and signal.alarm(GRACE_SECONDS) == 0:
                signal.alarm(0)  # there was none any more: it was called off
                return


__all__ = ["STOPPING", "StopSignal"]
