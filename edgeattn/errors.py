"""The one exception tree. Every message says what was found, what was expected, where, and what to do."""

from __future__ import annotations

EXIT_OK = 0
EXIT_VERDICT = 1
EXIT_USAGE = 2
EXIT_MISSING_DEPENDENCY = 3
EXIT_DEVICE = 4
EXIT_INCONCLUSIVE = 5
EXIT_INTERRUPTED = 130


class EdgeAttnError(Exception):
    """Base of all errors that edgeattn raises on purpose; `exit_code` is what the command line returns."""

    exit_code = EXIT_USAGE


class UsageError(EdgeAttnError):
    """The input (argument, file, data, recipe) cannot be used as given."""


class CheckpointError(UsageError):
    """A weights file is unreadable, unsafe, or does not fit the model."""


class DataError(UsageError):
    """Calibration or validation data is missing, empty, corrupt, or of the wrong kind."""


class RecipeError(UsageError):
    """A recipe has an unknown key, a wrong value, or asks for what the target cannot run."""


class NumericError(UsageError):
    """NaN or infinity in weights or activations; the message names the layer."""


class BundleError(UsageError):
    """A bundle is missing a file, was tampered with, or was written by an incompatible version."""


class MissingDependency(EdgeAttnError):
    """An optional package or native library is not installed; the message names the command that installs it."""

    exit_code = EXIT_MISSING_DEPENDENCY


class UnsupportedOp(EdgeAttnError):
    """A target or pass met an operation that it cannot express."""


class DeviceError(EdgeAttnError):
    """The runtime or the device failed: disk full, no memory, session refused, connection lost."""

    exit_code = EXIT_DEVICE


class GateFailed(EdgeAttnError):
    """An accuracy or latency gate was not met."""

    exit_code = EXIT_VERDICT
