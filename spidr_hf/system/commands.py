"""How every command ends: with one line and a status, whatever went wrong."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from .errors import RunFolderError


@contextmanager
def clear_errors(extra: str = "eval") -> Iterator[None]:
    """Ends the command with one line and a non-zero status on bad input, a full disk, or Ctrl-C.

    Where a module is missing, the line names the pip extra that brings it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}. The extra {extra} brings what this command needs: pip install 'spidr_hf[{extra}]'.")
    except (ValueError, OSError, RunFolderError, SafetensorError) as error:  # a full disk is safetensors' own error
        # Of several processes that stumble over the same thing one speaks.
        if int(os.environ.get("RANK", "0")):
            sys.exit(1)
        sys.exit(f"error: {' '.join(str(error).split())}")
    except torch.OutOfMemoryError:
        sys.exit("error: the device's memory is full: lower --batch-seconds (or --batch-size), and start again.")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on from here.")
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


__all__ = ["clear_errors"]
