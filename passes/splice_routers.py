"""splice_routers: a router at the end of every segment that closes with a checkpoint."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Graph, GraphModule, Node

from tide_compile.kernels import project, route  # noqa: F401  (defines the ops)
from tide_compile.kernels.probe import PARTS
from tide_compile.passes.errors import CheckpointError
from tide_compile.passes.graph.fx_tools import add_placeholder, call, value_of
from tide_compile.passes.plan import Plan, Settings
from tide_compile.passes.program import ACTIVE, COUNTS, HIDDEN, LEAVE, OUT, SCORE, Piece, Program, project_name


def splice_routers(program: Program, plan: Plan) -> Program:
    """Append the decision to each checkpoint's segment, and what the rows that leave go through.

    Before: ``segment(h, ...) -> h'``. After: ``segment(h, ..., active, router) -> h', score, leave, active', counts``
    with ``leave = active and score > threshold`` and ``counts = [leaving, still active, most in a sequence]``: all that
    the host wants to know, so that it reads once. Beside it ``project(h, leave, out, W, b) -> out'``; without an exit
    projection, ``project(h, leave, out) -> out'``.

    Safe because it only adds nodes behind the segment's last value; the residual stream is untouched.
    """
    settings, segments, constants = plan.settings, [], dict(program.constants)
    for segment in program.segments:
        layer = segment.checkpoint
        if layer is not None:
            router, projection = settings.router_constants(layer), settings.projection_constants(layer)
            constants |= router | projection
            hidden = _hidden_of(segment.plain)
            project = _projection(project_name(layer), value_of(hidden), projection)
            segment = replace(segment, plain=_with_router(segment.plain, hidden, settings, router), project=project)
        segments.append(segment)
    return replace(program, segments=tuple(segments), constants=constants)


def _hidden_of(piece: Piece) -> Node:
    return piece.graph.graph.output_node().args[0][piece.outputs.index(HIDDEN)]


def _with_router(piece: Piece, hidden: Node, settings: Settings, tensors: Mapping[str, torch.Tensor]) -> Piece:
    graph, like = piece.graph.graph, value_of(hidden)
    if settings.norm_weight.numel() != like.shape[-1]:
        raise CheckpointError(
            f"the routers are for hidden size {settings.norm_weight.numel()} and this model has {like.shape[-1]}. "
            "Calibrate this model."
        )
    active = add_placeholder(graph, ACTIVE, like.new_empty(like.shape[:2], dtype=torch.bool))
    router = {
        (part := name.rpartition(".")[2]): add_placeholder(graph, f"tide_{part}", _fake_like(like, tensor))
        for name, tensor in tensors.items()
    }
    output = graph.output_node()
    with graph.inserting_before(output):
        score, leave = _score(graph, hidden, active, router, settings)
        remaining = call(graph, torch.logical_and, active, call(graph, torch.logical_not, leave))
        counts = _counts(graph, leave, remaining)
    output.args = ((*output.args[0], score, leave, remaining, counts),)
    piece.graph.recompile()
    outputs = (*piece.outputs, SCORE, LEAVE, ACTIVE, COUNTS)
    return replace(piece, inputs=(*piece.inputs, ACTIVE, *tensors), outputs=outputs)


def _score(
    graph: Graph, hidden: Node, active: Node, router: Mapping[str, Node], settings: Settings
) -> tuple[Node, Node]:
    """What the router says of each row [B, S], and which rows leave [B, S]."""
    scores = value_of(active).new_empty(value_of(active).shape, dtype=torch.float32)
    norm = (router["norm_weight"], router.get("norm_bias"))
    kind = (settings.norm_eps, settings.layer_norm)
    offset = None
    if PARTS[0] in router:
        read = (router[name] for name in PARTS)
        offset = graph.call_function(torch.ops.tide.probe.default, (hidden, *norm, *read, *kind))
        offset.meta["example_value"] = scores
    network = (router["down"], router["up"], router["threshold"])
    routed = graph.call_function(torch.ops.tide.route.default, (hidden, active, *norm, *network, *kind, offset))
    routed.meta["example_value"] = (scores, scores > 0)
    score, leave = (call(graph, operator.getitem, routed, i) for i in (0, 1))
    return score, leave


def _counts(graph: Graph, leave: Node, remaining: Node) -> Node:
    most = call(graph, torch.amax, call(graph, torch.sum, remaining, 1))
    return call(graph, torch.stack, [call(graph, torch.sum, leave), call(graph, torch.sum, remaining), most])


def _projection(name: str, hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Piece:
    """``tensors`` by environment name, in the order in which ``tide::project`` takes them; none: the row itself."""
    graph = Graph()
    result = graph.output(())
    values = {
        "hidden": hidden,
        "leave": hidden.new_empty(hidden.shape[:2], dtype=torch.bool),
        "out": torch.empty_like(hidden),
        **{n.rpartition(".")[2]: _fake_like(hidden, tensor) for n, tensor in tensors.items()},
    }
    nodes = [add_placeholder(graph, n, v) for n, v in values.items()]
    with graph.inserting_before(result):
        node = graph.call_function(torch.ops.tide.project.default, tuple(nodes))
    node.meta["example_value"] = torch.empty_like(hidden)
    result.args = ((node,),)
    gm = GraphModule(torch.nn.Module(), graph)
    return Piece(name, gm, (HIDDEN, LEAVE, OUT, *tensors), (OUT,), "after an exit")


def _fake_like(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the mode of ``fake`` with the metadata of ``real``."""
    return fake.new_empty(real.shape, dtype=real.dtype)
