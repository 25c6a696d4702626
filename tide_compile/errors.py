"""Every error a user can meet, in one place to import from."""

from tide_compile.passes.errors import (
    BoundaryNotUniqueError,
    CheckpointError,
    GraphError,
    KVNotFoundError,
    LayersNotFoundError,
    LayersSplitError,
    NothingToSkipError,
    PaddingError,
    TideError,
    VerificationError,
    WeightsInGraphError,
)


class NoRouterError(TideError):
    """The model has no routers yet."""


class RouterMismatchError(TideError):
    """The routers belong to another model."""


class RouterFileError(TideError):
    """A router file cannot be read."""


class OutputFileError(TideError):
    """A file cannot be written."""


class UnknownOptionError(TideError):
    """An option that does not exist."""


class ConfigError(TideError):
    """An option with a value that is not allowed."""


class GradEnabledError(TideError):
    """The model was traced for training."""


class GraphBreakError(TideError):
    """The model cannot be traced as one graph."""


class ModelChangedError(TideError):
    """The model was changed while it generated."""


class CalibrationDataError(TideError):
    """The calibration text cannot be had."""


class MissingExtraError(TideError):
    """A package that an optional part needs is not installed."""


__all__ = [
    "BoundaryNotUniqueError",
    "CalibrationDataError",
    "CheckpointError",
    "ConfigError",
    "GradEnabledError",
    "GraphBreakError",
    "GraphError",
    "KVNotFoundError",
    "LayersNotFoundError",
    "LayersSplitError",
    "MissingExtraError",
    "ModelChangedError",
    "NoRouterError",
    "NothingToSkipError",
    "OutputFileError",
    "PaddingError",
    "RouterFileError",
    "RouterMismatchError",
    "TideError",
    "UnknownOptionError",
    "VerificationError",
    "WeightsInGraphError",
]
