"""What goes wrong in a conversion, one class per kind; every message says what to do."""


class ConversionError(ValueError):
    """A source that cannot be converted."""


class UnsafeCheckpointError(ConversionError):
    """A file that asks to run code while it loads."""


class TensorMismatchError(ConversionError):
    """Missing, unexpected or wrongly shaped tensors."""


__all__ = ["ConversionError", "TensorMismatchError", "UnsafeCheckpointError"]
