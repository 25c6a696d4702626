"""The states of rows that have left: what each skipped layer makes keys and values of."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.fx import Node

from tide_compile.passes.graph.fx_tools import add_placeholder, call, cast, value_of
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import HIDDEN, Piece


def add_frozen_states(piece: Piece, plan: Plan, segment: int) -> tuple[Piece, list[Node]]:
    """Add to a piece, in place, the state [B, S, H] of rows that have left behind each layer of its segment.

    That is the state which entered the segment; with ``kv_cache_strategy="shortcut"`` each layer's shortcut has led it
    on, ``s -> s + W (V s) + b``, multiplied in the dtype of the shortcut, whose tensors become inputs. The state behind
    the model's last layer is the one before it: nothing reads it.
    """
    graph, inputs, states = piece.graph.graph, piece.inputs, []
    frozen = state = graph.find_nodes(op="placeholder")[inputs.index(HIDDEN)]
    like = value_of(frozen)
    for layer in plan.segment_layers(segment):
        tensors = plan.settings.shortcut(layer)
        if tensors:
            down, weight, bias = (
                add_placeholder(graph, name.replace(".", "_"), like.new_empty(t.shape, dtype=t.dtype))
                for name, t in tensors.items()
            )
            inputs = (*inputs, *tensors)
            behind = next(n for n in graph.nodes if n.op != "placeholder") if state is frozen else state.next
            with graph.inserting_before(behind):
                narrow = call(graph, torch.nn.functional.linear, cast(graph, state, value_of(down).dtype), down)
                step = call(graph, torch.nn.functional.linear, narrow, weight, bias)
                state = call(graph, torch.add, state, cast(graph, step, like.dtype))
        states.append(state)
    return replace(piece, inputs=inputs), states
