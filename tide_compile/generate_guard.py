"""generate_guard: ``torch.compile(model, backend="tide").generate()`` runs the compiled model.

``OptimizedModule`` hands every unknown attribute to the module it wraps, so its ``generate`` is the original model's
and calls the original forward: no backend is ever reached, and nothing says so. Only ``model.compile(...)`` is free of
this. Importing this package's backend (which ``torch.compile(backend="tide")`` does by itself) therefore makes
``generate`` of modules compiled for tide, and of no others, run through the compiled forward.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

_TWIN = "_tide_twin"  # in the OptimizedModule's own __dict__: its __setattr__ would write to the user's model


def install() -> None:
    """Teach ``OptimizedModule`` about ``generate``; once."""
    if getattr(OptimizedModule.__getattr__, "_tide", False):
        return
    inherited = OptimizedModule.__getattr__

    @functools.wraps(inherited)
    def getattr_(self: OptimizedModule, name: str) -> object:
        if name == "generate" and _backend_name(self) in ("tide", "tide_backend"):
            return routed_through(self).generate
        return inherited(self, name)

    getattr_._tide = True
    OptimizedModule.__getattr__ = getattr_


def routed_through(compiled: OptimizedModule, call: Callable[..., object] | None = None) -> nn.Module:
    """A twin of the wrapped model whose calls run ``compiled`` (or ``call``, which should).

    It shares all modules, parameters and buffers with the model, which stays as it is. transformers' own compilation
    of static-cache decoding, which would put plain Inductor in the place of tide, is switched off in it.
    """
    if _TWIN not in compiled.__dict__:
        model = compiled._orig_mod
        twin = compiled.__dict__[_TWIN] = copy.copy(model)
        twin._compiled_call_impl = call or compiled.__call__
        twin._valid_auto_compile_criteria = lambda *_: False
    return compiled.__dict__[_TWIN]


def _backend_name(compiled: OptimizedModule) -> str | None:
    callback = getattr(compiled.dynamo_ctx, "callback", None)
    while hasattr(callback, "_torchdynamo_orig_backend"):
        callback = callback._torchdynamo_orig_backend
    return getattr(callback, "compiler_name", None)
