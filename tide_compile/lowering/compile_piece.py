"""compile_piece: one piece, handed to Inductor now."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch.fx import GraphModule

from tide_compile.lowering.buffer_reuse import reuse_buffers
from tide_compile.lowering.hooks import changing_modules
from tide_compile.lowering.self_test import buffers_can_be_reused
from tide_compile.passes.graph.fx_tools import value_of
from tide_compile.passes.program import Piece
from tide_compile.torch_internals.fx import tracing_with
from tide_compile.torch_internals.inductor import compile_fx, hand_on_static_addresses, mode_options
from tide_compile.torch_internals.switches import enabled

log = logging.getLogger("tide_compile")

Runnable = Callable[..., tuple]

PATCHES = {
    "cpp.enable_floating_point_contract_flag": "fast",  # one instruction for a product and its sum
    "size_asserts": False,  # of every input of every piece in every call; Dynamo's guards have seen the model's
}


def compile_whole(gm: GraphModule, example_inputs: Sequence[object], mode: str | None) -> Runnable:
    """The graph as stock ``torch.compile`` would lower it."""
    started = time.perf_counter()
    log.info("compiling a graph of %d nodes as stock Inductor does", len(gm.graph.nodes))
    run = compile_fx(gm, list(example_inputs), config_patches=mode_options(mode) or None)
    log.info("compiled it in %.1f s", time.perf_counter() - started)
    return run


def compile_piece(piece: Piece, patches: Mapping[str, object], tricks: frozenset[str]) -> Runnable:
    """The piece compiled by Inductor now, within the guards of the graph it comes from.

    Args:
        patches: of Inductor's config. tricks: those that are switched on.
    """
    inputs = [_canonical(value_of(n)) for n in piece.graph.graph.find_nodes(op="placeholder")]
    if patches.get("triton.cudagraphs") and "static_addresses" in tricks:
        hand_on_static_addresses(piece.graph)
    return compile_graph(piece.graph, inputs, patches, tricks)


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[object],
    patches: Mapping[str, object] | None = None,
    tricks: frozenset[str] | None = None,
) -> Runnable:
    """A graph compiled by Inductor for these fake inputs. ``tricks``: None for those that the environment leaves on."""
    mode = next(v.fake_mode for v in inputs if isinstance(v, torch.Tensor))
    reuse = "buffer_reuse" in (enabled() if tricks is None else tricks) and buffers_can_be_reused()
    # Dynamo has put a fresh fake mode in its own context; the graph's values have theirs
    with tracing_with(mode), changing_modules(reuse_buffers) if reuse else nullcontext():
        return compile_fx(gm, list(inputs), config_patches=PATCHES | dict(patches or {}))


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
