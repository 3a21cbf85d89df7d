"""What every command has in common: its help, how it ends, with one line, and whose attention runs on a GPU."""

import argparse
import errno
import importlib.util
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from .allocation import prepare_training_process
from .errors import AudioError, BatchingError, ConfigError, ManifestError, RunFolderError
from .files import check_picture, check_place
from .messages import end_bars, log_above_bars, one_line
from .processes import contact_lost, die_with_launcher, kill_workers
from .shared_memory import worker_lost

DEVICE_IS_FULL = (
    "the device's memory is full: lower data.max_batch_length, and raise optimizer.gradient_accumulation_steps by as "
    "much."
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FIRST_SPEAKS_SECONDS = 5.0


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of a command: the description as it is written, and behind every option its default.

    Where leaving it out means more than doing without, as with None for "all", its own help says "default: ...".
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or action.nargs == 0 or action.required or "default:" in text:
            return text
        if isinstance(default, (list, tuple)):
            default = " ".join(map(str, default))
        elif isinstance(default, float):
            default = f"{default:g}"
        said = f"default: {'none' if default in (None, '') else default}".replace("%", "%%")
        return f"{text} ({said})" if text else said


@contextmanager
def clear_errors(extra: str = "eval", *, needs: Sequence[str] = ()) -> Iterator[None]:
    """Ends the command with one line and a non-zero status on bad input, a full disk, or Ctrl-C.

    What runs inside runs `without_cudnn_attention`.

    Args:
        extra: where a module is missing, the line names this pip extra, which brings it.
        needs: modules that come into use late, if they are here; one that is not is told before anything is done.
    """
    without_cudnn_attention()
    transformers_logging.set_verbosity_error()
    bars_of_downloads_alone()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    log_above_bars()
    try:
        for name in needs:
            if importlib.util.find_spec(name) is None:
                raise ModuleNotFoundError(f"No module named {name!r}")
        with _workers_end_first():
            yield
    except ModuleNotFoundError as error:
        end(f"error: {error}. The extra {extra} brings what this command needs: pip install 'spidr_hf[{extra}]'.")
    except (ValueError, OSError, RunFolderError, SafetensorError) as error:  # a full disk is safetensors' own error
        end_one_of_several(f"error: {describe(error)}")
    except torch.OutOfMemoryError:
        end_one_of_several(
            "error: the device's memory is full: lower --batch-seconds (or --batch-size), and start again."
        )
    except RuntimeError as error:
        if (message := contact_lost(error) or worker_lost(error)) is None:
            raise
        end(f"error: {message}")
    except KeyboardInterrupt:
        end("Interrupted. The same command resumes from here.")
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def _workers_end_first() -> Iterator[None]:
    """Where something ends what is inside, its workers go at once: a data loader would wait seconds for each."""
    try:
        yield
    except BaseException:
        kill_workers()
        raise


def user_path(text: str) -> Path:
    """A path as people type it: `~` is their home, wherever it stands in an argument (`--output-dir=~/runs`)."""
    return Path(text).expanduser()


def output_path(text: str) -> Path:
    """A `user_path` of a file to write. That it cannot be is told before anything is computed."""
    try:
        return check_place(user_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def folder_path(text: str) -> Path:
    """A `user_path` of a folder to write into, likewise."""
    try:
        return check_place(user_path(text), folder=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def picture_path(text: str) -> Path:
    """An `output_path` that ends as pictures do."""
    try:
        return check_picture(output_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def without_cudnn_attention() -> None:
    """Leaves attention on CUDA to PyTorch's own flash kernels, for the rest of this process.

    From cuDNN 9.15 on PyTorch prefers cuDNN's on Hopper and Blackwell, which plans every new pair of batch size and
    length for up to half a second. Batches by length bring hundreds of them, at every start.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def bars_of_downloads_alone() -> None:
    """Leaves of Transformers' and the Hub's progress bars those of downloads, which may take long."""
    transformers_logging.disable_progress_bar()  # the Hub's, too
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        for kind in ("http_get", "xet_get"):
            enable_progress_bars(f"huggingface_hub.{kind}")


def end(message: str) -> NoReturn:
    """End the process with a line on stderr, below what there is of progress bars, and status 1."""
    end_bars()
    sys.exit(message)


def end_one_of_several(message: str) -> NoReturn:
    """`end`, where the other processes of a launch may have stumbled over the same thing: then only the first speaks.

    The launcher ends the others when it ends. One that is still there a moment later has stumbled without it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is nothing left to save
        time.sleep(_FIRST_SPEAKS_SECONDS)
        message = f"{message} (process {rank})"
    end(message)


def describe(error: Exception) -> str:
    """An error as one line; of a full disk, with what to do."""
    if isinstance(error, OSError) and error.errno in _FULL:
        what = f"{error.filename} cannot be written" if error.filename else "nothing more can be written"
        return f"the disk is full: {what} ({error.strerror}). Make room there; the same command then continues."
    return one_line(" ".join(str(error).split()))


@contextmanager
def training_command() -> Iterator[None]:
    """Prepares a process that trains, and ends it with one line where its user can mend what went wrong.

    Any other error keeps its traceback: what a run of days died of must be found without a second one. The processes
    that decode audio end with this one (`make_loader`), and this one with its launcher.
    """
    die_with_launcher()
    prepare_training_process()
    without_cudnn_attention()
    log_above_bars()
    bars_of_downloads_alone()
    try:
        with _workers_end_first():
            yield
    except (AudioError, BatchingError, ConfigError, ManifestError, RunFolderError, OSError) as error:
        end_one_of_several(f"error: {describe(error)}")
    except torch.OutOfMemoryError as error:
        end_one_of_several(f"error: {DEVICE_IS_FULL} ({one_line(error, 300)})")
    except RuntimeError as error:
        if (message := contact_lost(error) or worker_lost(error)) is None:
            raise
        end(f"error: {message}")
    except KeyboardInterrupt:  # before there is anything to save
        end("Interrupted before the first step. The same command starts again.")


__all__ = [
    "DEVICE_IS_FULL",
    "HelpFormatter",
    "bars_of_downloads_alone",
    "clear_errors",
    "describe",
    "end",
    "end_one_of_several",
    "folder_path",
    "output_path",
    "picture_path",
    "training_command",
    "user_path",
    "without_cudnn_attention",
]
