"""split_segments: prologue | layers between cuts | epilogue, as graphs of their own."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.split_module import split_module

from tide_compile.passes.errors import GraphError
from tide_compile.passes.find_layers import layer_of_nodes
from tide_compile.passes.graph.fx_tools import add_placeholder, call, output_nodes, shape_of, value_of
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import ACTIVE, HIDDEN, Piece, Program, Segment, segment_name


def split_segments(gm: GraphModule, plan: Plan) -> Program:
    """Cut the Dynamo graph at the plan's cuts.

    Before: one graph ``(ids, weights, caches) -> (logits, caches)``. After: prologue, plain segments and epilogue, run
    one after the other on a shared environment of named values.

    Safe because a layer is a stretch of the graph in program order: writes to caches keep their order, and what a
    piece reads was either computed by an earlier piece or is an argument. Only nodes that the analysis proved free
    of hidden states and of written memory move, into the prologue.
    """
    owner = layer_of_nodes(gm.graph, plan.layers)
    part_of_layer = {-1: 0, len(plan.layers): plan.num_segments + 1}
    for segment in range(plan.num_segments):
        part_of_layer.update(dict.fromkeys(plan.segment_layers(segment), segment + 1))
    parts = {n: 0 if n.name in plan.boundaries.hoisted else part_of_layer[owner[n]] for n in gm.graph.nodes}

    arguments = tuple(n.name for n in gm.graph.find_nodes(op="placeholder"))
    results = tuple(_result(n) for n in output_nodes(gm.graph))
    try:
        split = split_module(
            gm, gm, parts.__getitem__, keep_original_order=True, keep_original_node_name=True, tuple_return=True,
            partition_affix="tide",
        )  # fmt: skip
    except RuntimeError as error:  # torch 2.13: the size of an argument is a number read from another one
        raise GraphError(
            f"torch's split_module cannot cut this graph ({error}): the model reads the length of the cache as a "
            "number, and the size of another argument is made of it. Use a DynamicCache."
        ) from error
    residual = {
        plan.boundaries.entering,
        *(plan.boundaries.leaving[layer] for layer in (*plan.cuts, len(plan.layers) - 1)),
    }
    names = ["prologue", *map(segment_name, range(plan.num_segments)), "epilogue"]
    parts = [getattr(split, f"submod_tide_{part}") for part in range(len(names))]
    prologue, *plain, epilogue = (_piece(n, gm, residual, results) for n, gm in zip(names, parts, strict=True))
    segments = tuple(Segment(piece, checkpoint=plan.checkpoint_of(i)) for i, piece in enumerate(plain))
    return Program(_mark_active(prologue, plan), segments, epilogue, arguments, results)


def _piece(name: str, gm: GraphModule, residual: set[str], results: tuple[object, ...]) -> Piece:
    """Name what goes in and out. All residual-stream values share one name; one that the model also returns (as with
    ``output_hidden_states``) is returned a second time under its own."""
    output = gm.graph.output_node()
    twice = [n for n in output_nodes(gm.graph) if n.name in residual and n.name in results]
    names = [HIDDEN if n.name in residual else n.name for n in output_nodes(gm.graph)]
    output.args = ((*output.args[0], *twice),)
    gm.recompile()
    inputs = (n.name for n in gm.graph.find_nodes(op="placeholder"))
    named = tuple(HIDDEN if n in residual else n for n in inputs)
    return Piece(name, gm, named, (*names, *(n.name for n in twice)))


def _result(value: object) -> object:
    return value.name if isinstance(value, Node) else value


def _mark_active(prologue: Piece, plan: Plan) -> Piece:
    """Let the prologue also return which tokens are no padding, [B, S] bool."""
    graph, inputs = prologue.graph.graph, prologue.inputs
    output = graph.output_node()
    outputs = prologue.outputs
    if HIDDEN not in outputs:  # the caller gave embeddings: an argument enters layer 0 as it is
        entering = add_placeholder(graph, plan.boundaries.entering, plan.boundaries.entering_value)
        output.args = ((*output.args[0], entering),)
        inputs, outputs = (*inputs, plan.boundaries.entering), (*outputs, HIDDEN)
    hidden = output.args[0][outputs.index(HIDDEN)]
    if plan.padding is not None and plan.padding.name not in inputs:
        add_placeholder(graph, plan.padding.name, plan.padding.value)
        inputs = (*inputs, plan.padding.name)
    with graph.inserting_before(output):
        rows = call(graph, "select", hidden, -1, 0)
        if plan.padding is None:
            active = call(graph, torch.ones_like, rows, dtype=torch.bool)
        else:
            mask = next(n for n in graph.find_nodes(op="placeholder") if n.target == plan.padding.name)
            active = call(graph, "expand_as", _visible(graph, mask, rows), rows)
    output.args = ((*output.args[0], active),)
    prologue.graph.recompile()
    return Piece(prologue.name, prologue.graph, inputs, (*outputs, ACTIVE))


def _visible(graph: Graph, mask: Node, rows: Node) -> Node:
    if value_of(mask).dim() == 4 and shape_of(mask)[2] == "1" != shape_of(rows)[1]:  # the same for all queries
        mask = call(graph, operator.getitem, mask, (slice(None), 0, 0))
        mask = mask if value_of(mask).dtype == torch.bool else call(graph, torch.ge, mask, 0)
    if value_of(mask).dim() == 2:  # [B, L]: the last S columns are the tokens of this call
        length = call(graph, "size", rows, 1)
        start = call(graph, operator.sub, call(graph, "size", mask, 1), length)
        return call(graph, "bool", call(graph, "narrow", mask, 1, start, length))
    visible = mask if value_of(mask).dtype == torch.bool else call(graph, torch.ge, mask, 0)
    return call(graph, "any", call(graph, "select", visible, 1, 0), -1)  # [B, 1, S, L] -> [B, S]
