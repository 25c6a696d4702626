"""fill_kv: what is left of a model behind a checkpoint when everybody has left: keys and values."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator

from tide_compile.passes.fx_tools import output_nodes, remove_dead
from tide_compile.passes.kv_sources import find_kv_sources, zero_all
from tide_compile.passes.plan import HIDDEN, Piece, Plan, Program
from torch.fx import Graph, GraphModule, Node


def fill_kv(program: Program, plan: Plan) -> Program:
    """Add ``fill_<layer>`` for every checkpoint: one piece for all segments behind it.

    Before: ``h -> layer -> h' -> layer -> h''`` with cache writes on the side. In a copy, every layer reads the
    checkpoint's state instead (the residual stream is short-circuited, an exited token's state is frozen) and the
    hidden state is no longer returned. What is still needed are the cache writes and the caches that are returned:
    norm, K/V projection, rotary embedding, write; attention and MLP are dead and go.

    1. ``propagate``: K and V come from the frozen state.
    2. ``zero_pad``: what is written is zero, so the projections are dead too.

    Safe because a write is kept whenever it reaches memory that outlives the call (see ``live_nodes``), and because
    the eager reference defines the K/V of a skipped layer as exactly this. Without caches nothing is left and there is
    no such piece.
    """
    segments = [s for s in range(plan.num_segments) if plan.follows_checkpoint(s)]
    slices = {s: _fill(program.pieces[f"segment_{s}"], plan, s) for s in segments}
    pieces = dict(program.pieces)
    for layer in plan.checkpoints:
        behind = [slices[s] for s in segments if plan.segment_layers(s)[0] > layer and slices[s] is not None]
        if behind:
            pieces[f"fill_{layer}"] = _chain(behind)
    return Program(pieces, program.arguments, program.results, program.constants)


def _chain(pieces: list[Piece]) -> Piece:
    """One piece that does what ``pieces`` do one after the other."""
    graph, attributes, inputs = Graph(), {}, {}
    values: dict[str, Node] = {}
    output = graph.output(())
    results: dict[str, Node] = {}
    with graph.inserting_before(output):
        for piece in pieces:
            for name, placeholder in _placeholders(piece):
                if name not in values:
                    values[name] = inputs[name] = graph.node_copy(placeholder)
            values |= dict.fromkeys(piece.outputs)
        for piece in pieces:
            given = {placeholder: values[name] for name, placeholder in _placeholders(piece)}
            returned = graph.graph_copy(piece.graph.graph, given)
            results |= dict(zip(piece.outputs, returned, strict=True))
            values |= results
            constants = {n.target for n in piece.graph.graph.nodes if n.op in ("get_attr", "call_module")}
            attributes |= {name: operator.attrgetter(name)(piece.graph) for name in constants}
    output.args = (tuple(results.values()),)
    return Piece(GraphModule(attributes, graph), tuple(inputs), tuple(results))


def _placeholders(piece: Piece) -> Iterator[tuple[str, Node]]:
    return zip(piece.inputs, piece.graph.graph.find_nodes(op="placeholder"), strict=True)


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
