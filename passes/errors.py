"""Named errors of the compiler: each says what was found and what to do."""

from tide_compile.torch_internals.fx import ShortenTraceback


class TideError(ShortenTraceback):
    """Base of every error this project raises on purpose.

    It derives from Dynamo's ``ShortenTraceback`` so that one raised inside a backend reaches the user as itself
    and not wrapped in ``BackendCompilerFailed``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class GraphError(TideError):
    """A graph that cannot be cut for exits."""


class WeightsInGraphError(GraphError):
    """Weights are part of the graph and not inputs of it."""


class LayersNotFoundError(GraphError):
    """The graph has no repeated decoder layers."""


class NothingToSkipError(LayersNotFoundError):
    """The graph has no decoder layers and no weights that could be of one: what a graph break has left over."""


class LayersSplitError(GraphError):
    """The graph holds only a part of the model's layers (a graph break lies between them)."""


class BoundaryNotUniqueError(GraphError):
    """More than the hidden state crosses from one layer to the next."""


class KVNotFoundError(GraphError):
    """``zero_pad`` cannot find the keys and values of a layer."""


class PaddingError(GraphError):
    """The attention mask does not say which tokens are padding."""


class CheckpointError(TideError):
    """No router can be placed with this configuration."""


class VerificationError(TideError):
    """A pass left the program in a state that cannot run: a bug in the pass, not in the model."""
