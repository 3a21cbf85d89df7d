"""The errors that end a command with one line. Each message says what to do."""


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file and says what to do."""


class BatchingError(ValueError):
    """Audio of which no batches can be made; the message says why."""


class ManifestError(ValueError):
    """A manifest, folder or tar that cannot be used; the message says what to do."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field and says what to do."""


class NonFiniteError(ValueError):
    """What a model gives is NaN or infinite; the message says what to do."""


class RunFolderError(RuntimeError):
    """A run folder that cannot be used or written to; the message says why."""


__all__ = ["AudioError", "BatchingError", "ConfigError", "ManifestError", "NonFiniteError", "RunFolderError"]
