"""Compiled pieces: at once, or when they are first run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.utils.cpp_extension  # imports setuptools, which fails once a package has imported the stdlib's distutils
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from tide_compile.lowering.hooks import reusing_buffers
from tide_compile.passes.graph.fx_tools import value_of
from tide_compile.passes.plan import Piece

log = logging.getLogger("tide_compile")

Runnable = Callable[..., tuple]

PATCHES = {
    "cpp.enable_floating_point_contract_flag": "fast",  # one instruction for a product and its sum
    "size_asserts": False,  # of every input of every piece in every call; Dynamo's guards have seen the model's
}


def compile_whole(gm: GraphModule, example_inputs: Sequence[object], mode: str | None) -> Runnable:
    """The graph as stock ``torch.compile`` would lower it."""
    patches = torch._inductor.list_mode_options(mode) if mode else None
    return compile_fx(gm, list(example_inputs), config_patches=patches)


def compile_piece(piece: Piece, patches: dict[str, object]) -> Runnable:
    """The piece compiled by Inductor now, within the guards of the graph it comes from."""
    inputs = [_canonical(value_of(n)) for n in piece.graph.graph.find_nodes(op="placeholder")]
    if patches.get("triton.cudagraphs"):
        _hand_on_static_addresses(piece.graph)
    return compile_graph(piece.graph, inputs, patches)


def compile_graph(gm: GraphModule, inputs: Sequence[object], patches: dict[str, object] | None = None) -> Runnable:
    """A graph compiled by Inductor for these fake inputs."""
    mode = next(v.fake_mode for v in inputs if isinstance(v, torch.Tensor))
    # Dynamo has put a fresh fake mode in its own context; the graph's values have theirs
    with tracing(TracingContext(mode)), reusing_buffers():
        return compile_fx(gm, list(inputs), config_patches=PATCHES | (patches or {}))


def _hand_on_static_addresses(gm: GraphModule) -> None:
    """Let Inductor see which inputs Dynamo found at fixed addresses (parameters, static caches): CUDA graphs read those
    where they are, copy all others first, and give up on a graph that writes into any other.

    AOTAutograd looks for ``_dynamo_static_input_type`` only in graphs that look as if they came from Dynamo.
    """
    gm.meta.setdefault("dynamo_compile_id", None)
    gm._param_name_to_source = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None


def _canonical(value: object) -> object:
    """The same fake value in terms of the symbols that stand for their equals.

    Dynamo may have learnt that two sizes are equal after it had named both. Inductor would bind the old name of an
    input and use the other, which in the whole graph another input binds, but in a piece maybe none.
    """
    if isinstance(value, torch.SymInt):
        return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)
    if isinstance(value, torch.Tensor) and any(isinstance(s, torch.SymInt) for s in (*value.shape, *value.stride())):
        shape, stride = (tuple(map(_canonical, sizes)) for sizes in (value.shape, value.stride()))
        with value.fake_mode:
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return value
