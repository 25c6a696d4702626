"""fx: private names behind graphs: what Dynamo and Inductor put into them, and how pieces of them are traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch._dynamo.exc import ShortenTraceback
from torch._guards import TracingContext, tracing
from torch._inductor import test_operators  # noqa: F401 (defines realize)
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._logging import trace_structured
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.graph_module import _format_import_statement
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

NAMES = (
    "torch._C._nn.linear",
    "torch._C._nn.scaled_dot_product_attention",
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.get_unwrapped",
    "torch._functorch.predispatch",
    "torch._dynamo.exc.ShortenTraceback",
    "torch._guards.TracingContext",
    "torch._guards.tracing",
    "torch._inductor.custom_graph_pass.CustomGraphPass",
    "torch._inductor.custom_graph_pass.get_hash_for_files",
    "torch._inductor.pattern_matcher.fwd_only",
    "torch._inductor.virtualized.V",
    "torch._inductor.test_operators",
    "torch.ops._inductor_test.realize",
    "torch._logging.trace_structured",
    "torch._ops.OpOverload",
    "torch._subclasses.FakeTensorMode",
    "torch.fx.graph_module._format_import_statement",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
)

__all__ = [
    "ATTENTION",
    "LINEAR",
    "NAMES",
    "CustomGraphPass",
    "FakeTensorMode",
    "OpOverload",
    "ShortenTraceback",
    "alone",
    "get_hash_for_files",
    "import_statement",
    "is_functorch",
    "is_traceable_wrapper_subclass",
    "realize",
    "trace_inside_inductor",
    "trace_structured",
    "tracing_with",
    "unwrapped",
    "without_modes",
]

LINEAR, ATTENTION = torch._C._nn.linear, torch._C._nn.scaled_dot_product_attention  # as Dynamo's graphs call them
import_statement = _format_import_statement
without_modes = _disable_current_modes


def unwrapped(value: torch.Tensor) -> torch.Tensor:
    """The tensor inside those that vmap and its like put around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def is_functorch(node: Node) -> bool:
    """Whether a node enters or leaves a vmap or its like."""
    return getattr(node.target, "__module__", None) == "torch._functorch.predispatch"


def realize(x: torch.Tensor) -> torch.Tensor:
    """``x``, put into memory by Inductor where this stands."""
    return torch.ops._inductor_test.realize(x)


def trace_inside_inductor(function: Callable[..., object], values: Sequence[object]) -> GraphModule:
    """A function of fake values as an ATen graph, while Inductor compiles."""
    from torch._inductor.pattern_matcher import fwd_only
    from torch._inductor.virtualized import V

    with V.fake_mode:
        return fwd_only(function, list(values))


def tracing_with(mode: FakeTensorMode) -> AbstractContextManager[object]:
    """Trace with this fake mode, whatever Dynamo has put into the context around."""
    return tracing(TracingContext(mode))


def alone() -> AbstractContextManager[object]:
    """Trace apart from the model that is being compiled, whose symbols sizes would become."""
    return tracing(None)
