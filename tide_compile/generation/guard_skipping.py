"""GuardSkipping: tokens of a ``generate`` run the code that Dynamo chose for the tokens before them, without asking.

Dynamo looks at everything that its code depends on before each call: 6,000 guards for 30 layers. A token reads all
weights, so none of that is in the processor's caches any more, and this takes 1.5 ms where it would take 0.4. Inside
``generate`` little can change between two tokens. So once a call is like the one before it, its guards are evaluated
here, and further calls of that kind run the code that passed, or its graph alone (``graph_replay``). When there are no
more, the guards are evaluated again: were they to fail now, the model was changed meanwhile, and that is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from tide_compile.errors import ModelChangedError
from tide_compile.generation.graph_replay import GraphReplay
from tide_compile.torch_internals.dynamo import Guards, OptimizedModule, code_with_guards, is_plain_call, original_of
from tide_compile.torch_internals.versions import warn_if_unchecked

_VALUES = (bool, int, float, str, type(None))
_Kind = tuple[tuple[object, ...], ...]


class GuardSkipping:
    """The calls of one ``generate``.

    Args:
        compiled: the compiled model; nothing but its whole graph runs (``fullgraph``).
        replays: whether the graph may run alone (``graph_replay``).

    Raises:
        ModelChangedError: at the end (``finish``, or the first call of another kind).
    """

    def __init__(self, compiled: OptimizedModule, replays: bool = True) -> None:
        self.compiled, self.model, self._replays = compiled, original_of(compiled), replays
        self._weight = next(self.model.parameters())
        self._kind: _Kind | None = None
        self._run: GraphReplay | None = None
        self._guards: Guards | None = None
        self._latest: dict[str, object] | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        kind = None if args else _kind_of(kwargs, self._weight)
        if kind is None or kind != self._kind:
            self.finish()
            self._kind = kind
            return self.compiled(*args, **kwargs)
        if self._run is None and not self._find(kwargs):
            return self.compiled(**kwargs)
        self._latest = kwargs
        try:
            return self._run(self.model, kwargs)
        except Exception:
            self.finish()  # a changed model explains any error, such as a module that is gone
            raise

    def finish(self) -> None:
        """Evaluate the guards of what ran without them."""
        if self._latest is not None:
            with torch.no_grad():
                variables = _variables(type(self.model).forward, self.model, self._latest)
                holds = self._guards.hold_here(variables) and self._run.is_valid(self.model, self._latest)
            self._run = self._guards = self._latest = None
            if not holds:
                raise ModelChangedError(
                    "the model, its config or a setting of torch changed while generate ran, so some of the tokens are "
                    "not those of the changed model. Change it between two calls of generate."
                )

    def _find(self, kwargs: dict[str, object]) -> bool:
        """Take the code whose guards hold for this call, if there is any and nothing else belongs to a call."""
        function = type(self.model).forward
        if not (_steady(kwargs) and is_plain_call(self.model) and isinstance(function, FunctionType)):
            return False
        variables = _variables(function, self.model, kwargs)
        for code, guards in code_with_guards(self.compiled, function):
            if code.co_freevars == function.__code__.co_freevars and guards.hold(variables):
                self._run, self._guards = GraphReplay(code, function, self._replays), guards
                return True
        return False


_skipping: ContextVar[GuardSkipping | None] = ContextVar("tide_guard_skipping", default=None)


@contextmanager
def skipping_guards(skipping: GuardSkipping) -> Iterator[None]:
    """Inside, calls of ``call`` (of this thread or task) are among these calls, if they are of the same model."""
    warn_if_unchecked("guard_skipping")
    token = _skipping.set(skipping)
    try:
        yield
    finally:
        _skipping.reset(token)


def call(compiled: OptimizedModule, *args: object, **kwargs: object) -> object:
    """Call the compiled model."""
    skipping = _skipping.get()
    if skipping is not None and skipping.compiled is compiled:
        return skipping(*args, **kwargs)
    return compiled(*args, **kwargs)


def _kind_of(kwargs: dict[str, object], weight: Tensor) -> _Kind | None:
    """Equal for calls that no guard on arguments tells apart. None: there is something here that may change."""
    kind = [(weight.dtype, weight.device)]  # of a model that was cast, the code would read past the end
    for name, value in kwargs.items():
        if type(value) is Tensor:
            place = value.device, value.is_inference(), value.requires_grad
            kind.append((name, value.shape, value.stride(), value.dtype, *place))
        elif type(value) in _VALUES:
            kind.append((name, type(value), value))
        elif type(value) is StaticCache:
            kind.append((name, id(value)))
        else:
            return None
    return tuple(kind)


def _steady(kwargs: dict[str, object]) -> bool:
    """Whether the cache has no state but tensors: layers with a window also count tokens in Python."""
    layers = [layer for value in kwargs.values() if type(value) is StaticCache for layer in value.layers]
    return bool(layers) and all(type(layer) is StaticLayer and layer.is_initialized for layer in layers)


def _variables(function: FunctionType, model: nn.Module, kwargs: dict[str, object]) -> dict[str, object]:
    """Those of the function's frame in a call, which Dynamo evaluates guards on."""
    cells = {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)}
    bound = inspect.signature(function, follow_wrapped=False).bind(model, **kwargs)
    bound.apply_defaults()
    return {**cells, **bound.arguments}
