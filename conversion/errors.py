"""What goes wrong in a conversion, one class per kind; every message says what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spidr_hf.system.messages import one_line, shown


class ConversionError(ValueError):
    """A source that cannot be converted.

    The message is one printable line of bounded length, whatever the names are that it takes from a file.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


class UnsafeCheckpointError(ConversionError):
    """A file that asks to run code while it loads."""


class TensorMismatchError(ConversionError):
    """Missing, unexpected or wrongly shaped tensors."""


class NonFiniteError(ConversionError):
    """Tensors with NaN or infinite numbers."""


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns what goes wrong while `target` is written, a full disk above all, into one line that names it.

    Raises:
        ConversionError: in place of `OSError` and the errors that safetensors and PyTorch make of it.
    """
    try:
        yield
    except OSError as error:
        raise ConversionError(f"{shown(target)} cannot be written: {error.strerror or error}.") from None
    except (SafetensorError, RuntimeError) as error:
        space = os.strerror(errno.ENOSPC)
        full = " (is the disk full?)" if space not in str(error) else ""
        raise ConversionError(f"{shown(target)} cannot be written{full}: {one_line(error, 200)}") from None


__all__ = ["ConversionError", "NonFiniteError", "TensorMismatchError", "UnsafeCheckpointError", "writing"]
