"""dynamo: private names of Dynamo: compiled modules, the code that it made of them, and its guards."""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FunctionType

import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame, pgo
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import FailOnRecompileLimitHit as RecompileLimitHit
from torch._dynamo.exc import Unsupported

from tide_compile.torch_internals.versions import warn_if_unchecked

NAMES = (
    "torch._dynamo.comptime.ComptimeContext.get_local",
    "torch._dynamo.comptime.ComptimeVar._i_will_not_complain_if_bc_breaks_VariableTracker",
    "torch._dynamo.comptime.comptime",
    "torch._dynamo.config.disable",
    "torch._dynamo.convert_frame.compile_lock",
    "torch._dynamo.eval_frame.OptimizedModule.__getattr__",
    "torch._dynamo.eval_frame._get_cache_entries_for_region",
    "torch._dynamo.eval_frame._stance.stance",
    "torch._dynamo.eval_frame._stance.backend",
    "torch._dynamo.config.accumulated_recompile_limit",
    "torch._dynamo.exc.FailOnRecompileLimitHit",
    "torch._dynamo.exc.Unsupported",
    "torch._dynamo.mark_static",
    "torch._dynamo.pgo.get_code_state",
    "torch._C._dynamo.guards.GlobalStateGuard.__getstate__",
    "torch._C._dynamo.guards.GlobalStateGuard.__setstate__",
    "torch._dynamo.mark_dynamic",
    "torch._dynamo.maybe_mark_dynamic",
    "torch.nn.modules.module._has_any_global_hook",
)

__all__ = [
    "GRAPH",
    "NAMES",
    "STATIC_INPUT",
    "Guards",
    "OptimizedModule",
    "RecompileLimitHit",
    "Unsupported",
    "backend_name",
    "break_of",
    "call_while_tracing",
    "code_with_guards",
    "compile_lock",
    "compiles",
    "copy_marks",
    "forgetting_sizes",
    "is_plain_call",
    "mark_dynamic",
    "mark_static",
    "maybe_mark_dynamic",
    "no_process_limit",
    "original_of",
    "replace_attribute",
]

GRAPH = "__compiled_fn"  # how Dynamo names a graph in the code around it
STATIC_INPUT = "_dynamo_static_input_type"  # its mark on tensors that stay where they are
_STATIC_SIZES = "_dynamo_static_indices"
_OURS = "_tide"
_OF_A_THREAD = ("autocast_state", "grad_mode", "torch_function", "torch_function_all_disabled")  # in a GlobalStateGuard

mark_dynamic, maybe_mark_dynamic = torch._dynamo.mark_dynamic, torch._dynamo.maybe_mark_dynamic
mark_static = torch._dynamo.mark_static


def compiles(module: nn.Module) -> bool:
    """Whether ``torch.compile`` has made this of a module for compiling it, and has not been switched off."""
    return isinstance(module, OptimizedModule) and not torch._dynamo.config.disable


def original_of(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given, or ``module`` itself."""
    return module._orig_mod if isinstance(module, OptimizedModule) else module


def backend_name(compiled: OptimizedModule) -> str | None:
    """The name of the backend that a module was compiled for."""
    callback = getattr(compiled.dynamo_ctx, "callback", None)
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return getattr(callback, "compiler_name", None)


def replace_attribute(name: str, value_of: Callable[[OptimizedModule], object | None]) -> None:
    """Let compiled modules have an attribute of their own where ``value_of`` them is not None, in the place of that of
    the module inside; once per process."""
    inherited = OptimizedModule.__getattr__
    if getattr(inherited, _OURS, False):
        return
    warn_if_unchecked("what wraps OptimizedModule.__getattr__")

    @functools.wraps(inherited)
    def getattr_(self: OptimizedModule, wanted: str) -> object:
        found = value_of(self) if wanted == name else None
        return inherited(self, wanted) if found is None else found

    setattr(getattr_, _OURS, True)
    OptimizedModule.__getattr__ = getattr_


def call_while_tracing(function: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    """A function of a module that Dynamo calls where it would trace ``function``: once, and as no part of what it
    compiles."""
    if getattr(function, _OURS, False):
        return function
    warn_if_unchecked(f"what wraps {function.__name__}")

    def call(context: ComptimeContext) -> None:
        function(context.get_local("module")._i_will_not_complain_if_bc_breaks_VariableTracker().value)

    @functools.wraps(function)
    def wrapper(module: nn.Module) -> None:
        if torch.compiler.is_dynamo_compiling():
            comptime(call)
        else:
            function(module)

    setattr(wrapper, _OURS, True)
    return wrapper


def code_with_guards(compiled: OptimizedModule, function: FunctionType) -> Iterator[tuple[CodeType, Guards]]:
    """What Dynamo has made of a function for a compiled module: code and its guards. The module was compiled with
    ``isolate_recompiles``."""
    region = compiled.dynamo_ctx._isolate_recompiles_id
    for entry in eval_frame._get_cache_entries_for_region(function.__code__, region):
        yield entry.code, Guards(entry.guard_manager)


class Guards:
    """What a piece of compiled code depends on, as functions of the local variables of a frame."""

    def __init__(self, manager: object) -> None:
        self._manager = manager

    def hold(self, values: dict[str, object]) -> bool:
        """Whether Dynamo would run the code."""
        return self._manager.check(values)

    def hold_here(self, values: dict[str, object]) -> bool:
        """The same, whatever has become of settings of the whole process: those are for any thread to change, such as
        one that loads a model in another default dtype."""
        if self.hold(values):
            return True
        state = self._manager.closure_vars["___check_global_state"].__self__
        expected = state.__getstate__()
        now = json.loads(type(state)().__getstate__())
        here = {n: v for n, v in json.loads(expected).items() if n in _OF_A_THREAD}
        try:
            state.__setstate__(json.dumps({**now, **here}))
            return self.hold(values)
        finally:
            state.__setstate__(expected)


@contextmanager
def no_process_limit() -> Iterator[None]:
    """Inside, Dynamo compiles a function again however often all that ran it in this process have had it compiled."""
    with torch._dynamo.config.patch(accumulated_recompile_limit=sys.maxsize):
        yield


def break_of(error: Unsupported) -> str:
    """What Dynamo could not trace, and the line of it."""
    what = str(error).partition("\n")[0].rstrip(".")
    frames = list(getattr(error, "real_stack", None) or ())
    return f"{what} ({frames[-1].filename}:{frames[-1].lineno})" if frames else what


def is_plain_call(model: nn.Module) -> bool:
    """Whether a call of the model is its class's ``forward`` and nothing else, and Dynamo is to run it."""
    hooks = model._forward_hooks or model._forward_pre_hooks or torch.nn.modules.module._has_any_global_hook()
    own = "forward" in vars(model) or type(model).__call__ is not nn.Module.__call__
    stance = eval_frame._stance
    return not hooks and not own and stance.stance == "default" and stance.backend is None


@contextmanager
def forgetting_sizes() -> Iterator[None]:
    """Inside, Dynamo has seen no sizes of any function's arguments before, and what it sees is forgotten afterwards: a
    size that differs between two compilations becomes a symbol in all later ones."""
    state = pgo.get_code_state()
    before = copy.deepcopy(dict(state))
    state.clear()
    try:
        yield
    finally:
        state.clear()
        state.update(before)


def copy_marks(tensor: Tensor, alias: Tensor) -> None:
    """Let an alias be known to stay where it is, and to have sizes that do not change, if ``tensor`` is: guards ask."""
    for name in (STATIC_INPUT, _STATIC_SIZES):
        if hasattr(tensor, name):
            setattr(alias, name, copy.copy(getattr(tensor, name)))
