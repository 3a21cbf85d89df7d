"""The folder in which a page keeps what is brought to it, and which ends with the page's process, however that ends."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A process of its own waits for the end of the page's, since no handler runs where that is killed outright.
_CLEANER = """
import shutil, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
sys.stdin.buffer.read()
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@contextmanager
def temporary_folder() -> Iterator[str]:
    """A folder for all temporary files, Gradio's among them (import it inside), which is removed at the end.

    SIGTERM and SIGHUP end what is inside as Ctrl-C does, by KeyboardInterrupt, unless they were ignored (nohup). A
    process that is killed, or crashes, leaves nothing behind either. Call it in the main thread.
    """
    folder = tempfile.mkdtemp(prefix="spidr_hf-page-")
    command = [sys.executable, "-I", "-S", "-c", _CLEANER, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as cleaner:  # its end is waited for
        previous = {number: signal.getsignal(number) for number in _SIGNALS}
        environment = {name: os.environ.get(name) for name in ("TMPDIR", "GRADIO_TEMP_DIR")}
        try:
            for number, handler in previous.items():
                if handler != signal.SIG_IGN:
                    signal.signal(number, _end)
            os.environ |= dict.fromkeys(environment, folder)
            tempfile.tempdir = folder
            yield folder
        finally:
            tempfile.tempdir = None
            for name, value in environment.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            assert cleaner.stdin is not None
            cleaner.stdin.close()
            cleaner.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)


def _end(number: int, frame: Any) -> NoReturn:
    for each in _SIGNALS:  # a second one must not end the removal
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


__all__ = ["temporary_folder"]
