"""mask_rows: the segment for a mix of exited and active rows."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch.fx import Node

from tide_compile.passes.frozen_states import add_frozen_states
from tide_compile.passes.graph.fx_tools import add_placeholder, call, value_of
from tide_compile.passes.kv_sources import find_kv_sources, zero_rows
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import ACTIVE, HIDDEN, VALID, Piece, Program, segment_name


def mask_rows(program: Program, plan: Plan) -> Program:
    """Add ``masked`` to every segment that can see exited rows.

    Before: ``h' = layer(h)``. After, behind every layer: ``h' = where(left, s', layer(h))`` with ``s'`` the state of
    rows that have left (``frozen_states``). So K and V of these rows come from it. With ``zero_pad`` they are set to
    zero where they enter the cache (or, without a cache, attention). Padding does not leave: recurrent layers carry
    what they make of it on to real tokens.

    Safe because rows only meet in attention, and active rows see there exactly the K and V that the eager
    reference gives them. Left out when a call has one row: then all rows have exited or none has.
    """
    if plan.single_row:
        return program
    segments = (
        replace(segment, masked=_masked(segment.plain, plan, index)) if plan.follows_checkpoint(index) else segment
        for index, segment in enumerate(program.segments)
    )
    return replace(program, segments=tuple(segments))


def with_running_rows(piece: Piece, plan: Plan, segment: int) -> tuple[Piece, Node]:
    """A copy of a piece that knows which rows are active and which are no padding, and in which, with ``zero_pad``, K
    and V of rows that have left are zero; and its node for the rows that run, [B, S] bool."""
    gm = copy.deepcopy(piece.graph)
    graph, inputs = gm.graph, piece.inputs
    placeholders = graph.find_nodes(op="placeholder")
    frozen = placeholders[inputs.index(HIDDEN)]
    rows = {}
    for name in (ACTIVE, VALID):
        if name in inputs:
            rows[name] = placeholders[inputs.index(name)]
        else:
            like = value_of(frozen)
            rows[name] = add_placeholder(graph, name, like.new_empty(like.shape[:2], dtype=torch.bool))
            inputs = (*inputs, name)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first):
        running = call(graph, torch.logical_or, rows[ACTIVE], call(graph, torch.logical_not, rows[VALID]))
    if plan.settings.kv_cache_strategy == "zero_pad":
        for source in find_kv_sources(graph, frozen, len(plan.segment_layers(segment))):
            zero_rows(graph, source, running)
    gm.recompile()
    return replace(piece, graph=gm, inputs=inputs), running


def _masked(piece: Piece, plan: Plan, segment: int) -> Piece:
    piece, running = with_running_rows(piece, plan, segment)
    piece, states = add_frozen_states(piece, plan, segment)
    graph = piece.graph.graph
    boundaries = {plan.boundaries.leaving[n]: s for n, s in zip(plan.segment_layers(segment), states, strict=True)}
    for node in [n for n in graph.nodes if n.name in boundaries]:
        with graph.inserting_after(node):
            column = call(graph, "unsqueeze", running, -1)
        with graph.inserting_after(column):
            merged = graph.call_function(torch.where, (column, node, boundaries[node.name]))
        merged.meta["example_value"] = value_of(node)
        node.replace_all_uses_with(merged, delete_user_cb=lambda user, merged=merged: user is not merged)
    piece.graph.recompile()
    return replace(piece, name=segment_name(segment, "masked"), needed="after an exit")
