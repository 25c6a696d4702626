"""fill_kv: what is left of a model behind a checkpoint when everybody has left."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from dataclasses import replace

from torch.fx import Graph, GraphModule, Node

from tide_compile.passes.frozen_states import add_frozen_states
from tide_compile.passes.graph.fx_tools import output_nodes, remove_dead
from tide_compile.passes.kv_sources import find_kv_sources, zero_all
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import HIDDEN, KEPT, Piece, Program, fill_name


def fill_kv(program: Program, plan: Plan) -> Program:
    """Add ``fill`` to every segment that closes with a checkpoint: one piece for all segments behind it.

    Before: ``h -> layer -> h' -> layer -> h''`` with cache writes on the side. In a copy, every layer reads the state
    of a token that has left (``frozen_states``) instead, and the hidden state is no longer returned. What is still
    needed are the cache writes and the caches that are returned: norm, K/V projection, rotary embedding, write;
    attention and MLP are dead and go.

    1. ``propagate``: K and V come from the checkpoint's state.
    2. ``shortcut``: from that state, led on from layer to layer by a small map in place of each.
    3. ``zero_pad``: what is written is zero, so the projections are dead too.

    Safe because a write is kept whenever it reaches memory that outlives the call (see ``live_nodes``), and because
    the eager reference defines the K/V of a skipped layer as exactly this. Without caches nothing is left and there is
    no such piece.
    """
    segments = [s for s in range(plan.num_segments) if plan.follows_checkpoint(s)]
    slices = {s: _fill(program.segments[s].plain, plan, s) for s in segments}
    filled = []
    for index, segment in enumerate(program.segments):
        if segment.checkpoint is not None:
            piece = _chain(fill_name(segment.checkpoint), [slices[s] for s in segments if s > index])
            segment = replace(segment, fill=piece if piece.inputs else None)
        filled.append(segment)
    constants = program.constants | (plan.settings.shortcut_constants() if plan.checkpoints else {})
    return replace(program, segments=tuple(filled), constants=constants)


def _chain(name: str, pieces: list[Piece]) -> Piece:
    """One piece that does what ``pieces`` do one after the other, and hands on no hidden state."""
    graph, attributes, inputs, defined = Graph(), {}, {}, set()
    output = graph.output(())
    with graph.inserting_before(output):
        for piece in pieces:
            for value, placeholder in _placeholders(piece):
                if value not in inputs and value not in defined:
                    inputs[value] = graph.node_copy(placeholder)
            defined |= set(piece.outputs)
        values, results = dict(inputs), {}
        for piece in pieces:
            given = {placeholder: values[value] for value, placeholder in _placeholders(piece)}
            returned = graph.graph_copy(piece.graph.graph, given)
            results |= dict(zip(piece.outputs, returned, strict=True))
            values |= results
            constants = {n.target for n in piece.graph.graph.nodes if n.op in ("get_attr", "call_module")}
            attributes |= {target: operator.attrgetter(target)(piece.graph) for target in constants}
    results.pop(HIDDEN, None)
    output.args = (tuple(results.values()),)
    gm = GraphModule(attributes, graph)
    names = {node.name: value for value, node in inputs.items()}
    remove_dead(gm)
    taken = tuple(names[n.name] for n in gm.graph.find_nodes(op="placeholder"))
    return Piece(name, gm, taken, tuple(results), "after an exit")


def _placeholders(piece: Piece) -> Iterator[tuple[str, Node]]:
    return zip(piece.inputs, piece.graph.graph.find_nodes(op="placeholder"), strict=True)


def _fill(piece: Piece, plan: Plan, segment: int) -> Piece:
    piece = replace(piece, graph=copy.deepcopy(piece.graph))
    piece, states = add_frozen_states(piece, plan, segment)
    graph = piece.graph.graph
    if plan.settings.kv_cache_strategy == "zero_pad":
        frozen = graph.find_nodes(op="placeholder")[piece.inputs.index(HIDDEN)]
        for source in find_kv_sources(graph, frozen, len(states)):
            zero_all(graph, source, frozen)
    behind = {plan.boundaries.leaving[n]: s for n, s in zip(plan.segment_layers(segment), states, strict=True)}
    for node in graph.nodes:
        if node.name in behind:
            node.replace_all_uses_with(behind[node.name])
    output, nodes = graph.output_node(), output_nodes(graph)
    kept = [i for i, name in enumerate(piece.outputs) if name == HIDDEN or name not in KEPT]
    output.args = (tuple(nodes[i] for i in kept),)
    return replace(piece, outputs=tuple(piece.outputs[i] for i in kept))
