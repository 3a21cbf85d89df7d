"""What goes wrong in a conversion, one class per kind; every message says what to do."""

from spidr_hf.system.messages import one_line


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


__all__ = ["ConversionError", "NonFiniteError", "TensorMismatchError", "UnsafeCheckpointError"]
