"""GuardSkipping: tokens of a ``generate`` run the code that Dynamo chose for the tokens before them, without asking.

Dynamo looks at everything that its code depends on before each call: 6,000 guards for 30 layers. A token reads all
weights, so none of that is in the processor's caches any more, and this takes 1.5 ms where it would take 0.4. Inside
``generate`` little can change between two tokens. So once a call is like the one before it, its guards are evaluated
here, and further calls of that kind run the code that passed, or its graph alone (``replay``). When there are no more,
the guards are evaluated again: were they to fail now, the model was changed in the meantime, and that is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._dynamo.eval_frame import OptimizedModule
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from tide_compile.errors import ModelChangedError
from tide_compile.generation.graph_replay import GraphReplay

_VALUES = (bool, int, float, str, type(None))
_Kind = tuple[tuple[object, ...], ...]


class GuardSkipping:
    """The calls of one ``generate``.

    Args:
        compiled: the compiled model; nothing but its whole graph runs (``fullgraph``).

    Raises:
        ModelChangedError: at the end (``finish``, or the first call of another kind).
    """

    def __init__(self, compiled: OptimizedModule) -> None:
        self.compiled = compiled
        self._weight = next(compiled._orig_mod.parameters())
        self._kind: _Kind | None = None
        self._run: GraphReplay | None = None
        self._holds: Callable[[dict[str, object]], bool] | None = None
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
            return self._run(self.compiled._orig_mod, kwargs)
        except Exception:
            self.finish()  # a changed model explains any error, such as a module that is gone
            raise

    def finish(self) -> None:
        """Evaluate the guards of what ran without them."""
        if self._latest is not None:
            with torch.no_grad():
                holds = self._holds(self._latest) and self._run.is_valid(self.compiled._orig_mod, self._latest)
            self._run = self._holds = self._latest = None
            if not holds:
                raise ModelChangedError(
                    "the model, its config or a setting of torch changed while generate ran, so some of the tokens are "
                    "not those of the changed model. Change it between two calls of generate."
                )

    def _find(self, kwargs: dict[str, object]) -> bool:
        """Take the code whose guards hold for this call, if there is any and nothing else belongs to a call."""
        model = self.compiled._orig_mod
        function = type(model).forward
        if not (_steady(kwargs) and _plain(model) and isinstance(function, FunctionType)):
            return False
        region = self.compiled.dynamo_ctx._isolate_recompiles_id
        for entry in eval_frame._get_cache_entries_for_region(function.__code__, region):
            holds = _guards(entry.guard_manager.check, function, model)
            if entry.code.co_freevars == function.__code__.co_freevars and holds(kwargs):
                self._run, self._holds = GraphReplay(entry.code, function), holds
                return True
        return False


_repeats: ContextVar[GuardSkipping | None] = ContextVar("tide_repeats", default=None)


@contextmanager
def skipping_guards(repeats: GuardSkipping) -> Iterator[None]:
    """Inside, calls of ``repeat`` (of this thread or task) are among these repeats, if they are of the same model."""
    token = _repeats.set(repeats)
    try:
        yield
    finally:
        _repeats.reset(token)


def repeat(compiled: OptimizedModule, *args: object, **kwargs: object) -> object:
    """Call the compiled model."""
    repeats = _repeats.get()
    if repeats is not None and repeats.compiled is compiled:
        return repeats(*args, **kwargs)
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


def _plain(model: nn.Module) -> bool:
    """Whether a call of the model is its class's ``forward`` and nothing else, and Dynamo is to run it."""
    hooks = model._forward_hooks or model._forward_pre_hooks or torch.nn.modules.module._has_any_global_hook()
    own = "forward" in vars(model) or type(model).__call__ is not nn.Module.__call__
    stance = eval_frame._stance
    return not hooks and not own and stance.stance == "default" and stance.backend is None


def _guards(
    check: Callable[[dict[str, object]], bool], function: FunctionType, model: nn.Module
) -> Callable[[dict[str, object]], bool]:
    """The guards as a function of a call's arguments; Dynamo evaluates them on the local variables of the frame."""
    signature = inspect.signature(function, follow_wrapped=False)
    cells = {n: c.cell_contents for n, c in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)}

    def holds(kwargs: dict[str, object]) -> bool:
        bound = signature.bind(model, **kwargs)
        bound.apply_defaults()
        return check({**cells, **bound.arguments})

    return holds
