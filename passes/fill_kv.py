"""fill_kv: per segment, the slice that only writes K and V."""

from __future__ import annotations

import copy

from tide_compile.passes.fx_tools import output_nodes, remove_dead
from tide_compile.passes.kv_sources import find_kv_sources, zero_all
from tide_compile.passes.plan import HIDDEN, Piece, Plan, Program
from torch.fx import GraphModule


def fill_kv(program: Program, plan: Plan) -> Program:
    """Add ``segment_<i>.fill`` for every segment that can be skipped.

    Before: ``h -> layer -> h' -> layer -> h''`` with cache writes on the side. In a copy, every layer reads the
    segment's input instead (the residual stream is short-circuited, an exited token's state is frozen) and the hidden
    state is no longer returned. What is still needed are the cache writes and the caches that are returned: norm, K/V
    projection, rotary embedding, write; attention and MLP are dead and go.

    1. ``propagate``: K and V come from the frozen state.
    2. ``zero_pad``: what is written is zero, so the projections are dead too.

    Safe because a write is kept whenever it reaches memory that outlives the call (see ``live_nodes``), and because
    the eager reference defines the K/V of a skipped layer as exactly this. A segment without caches has an empty
    slice, which is left out.
    """
    pieces = dict(program.pieces)
    for segment in range(plan.num_segments):
        if plan.follows_checkpoint(segment):
            slice_ = _fill(program.pieces[f"segment_{segment}"], plan, segment)
            if slice_ is not None:
                pieces[f"segment_{segment}.fill"] = slice_
    return Program(pieces, program.arguments, program.results, program.constants)


def _fill(piece: Piece, plan: Plan, segment: int) -> Piece | None:
    gm: GraphModule = copy.deepcopy(piece.graph)
    graph = gm.graph
    frozen = graph.find_nodes(op="placeholder")[piece.inputs.index(HIDDEN)]
    if plan.settings.kv_cache_strategy == "zero_pad":
        for source in find_kv_sources(graph, frozen, len(plan.segment_layers(segment))):
            zero_all(graph, source, frozen)
    boundaries = {plan.boundaries.leaving[layer] for layer in plan.segment_layers(segment)}
    for node in graph.nodes:
        if node.name in boundaries:
            node.replace_all_uses_with(frozen)
    output = graph.output_node()
    kept = [i for i, n in enumerate(piece.outputs) if not n.startswith("tide_")]
    nodes = output_nodes(graph)
    output.args = (tuple(nodes[i] for i in kept),)
    remove_dead(gm)
    names = {
        n.target: name for n, name in zip(piece.graph.graph.find_nodes(op="placeholder"), piece.inputs, strict=True)
    }
    inputs = tuple(names[n.target] for n in graph.find_nodes(op="placeholder"))
    if not inputs:
        return None
    return Piece(gm, inputs, tuple(piece.outputs[i] for i in kept))
