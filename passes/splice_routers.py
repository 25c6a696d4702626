"""splice_routers: a router at the end of every segment that closes with a checkpoint."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from tide_compile.kernels import project, route  # noqa: F401  (defines the ops)
from tide_compile.kernels.probe import PARTS
from tide_compile.passes.errors import CheckpointError
from tide_compile.passes.graph.fx_tools import add_placeholder, call, value_of
from tide_compile.passes.plan import (
    ACTIVE,
    COUNTS,
    HIDDEN,
    LEAVE,
    OUT,
    SCORE,
    Piece,
    Plan,
    Program,
    Settings,
)


def splice_routers(program: Program, plan: Plan) -> Program:
    """Append the decision to each checkpoint's segment.

    Before: ``segment(h, ...) -> h'``. After: ``segment(h, ..., active, router) -> h', score, leave, active', counts``
    with ``leave = active and score > threshold`` and ``counts = [leaving, still active, most in a sequence]``: all that
    the host wants to know, so that it reads once.
    With exit projections, one more piece per checkpoint: ``project(h, leave, out, W, b) -> out'``.

    Safe because it only adds nodes behind the segment's last value; the residual stream is untouched.
    """
    pieces, constants = dict(program.pieces), dict(program.constants)
    settings = plan.settings
    for segment in range(plan.num_segments):
        layer = plan.checkpoint_of(segment)
        if layer is None:
            continue
        found = settings.constants(layer)
        constants |= found
        name = f"segment_{segment}"
        pieces[name] = _with_router(pieces[name], settings, {n: t for n, t in found.items() if n.startswith("router.")})
        if settings.projections is not None:
            pieces[f"project_{layer}"] = _projection(pieces[name], layer, settings.projections[layer])
    return Program(pieces, program.arguments, program.results, constants)


def _with_router(piece: Piece, settings: Settings, tensors: dict[str, torch.Tensor]) -> Piece:
    graph = piece.graph.graph
    output = graph.output_node()
    hidden = output.args[0][piece.outputs.index(HIDDEN)]
    like = value_of(hidden)
    if settings.norm_weight.numel() != like.shape[-1]:
        raise CheckpointError(
            f"the routers are for hidden size {settings.norm_weight.numel()} and this model has {like.shape[-1]}. "
            "Calibrate this model."
        )
    active = add_placeholder(graph, ACTIVE, like.new_empty(like.shape[:2], dtype=torch.bool))
    parts = [name.rsplit(".", 1)[-1] for name in tensors]
    router = {
        part: add_placeholder(graph, f"tide_{part}", _fake_like(like, tensor))
        for part, tensor in zip(parts, tensors.values(), strict=True)
    }
    with graph.inserting_before(output):
        probe = None
        if PARTS[0] in router:
            read = [router[n] for n in PARTS]
            probe = graph.call_function(
                torch.ops.tide.probe.default,
                (hidden, router["norm_weight"], router.get("norm_bias"), *read, settings.norm_eps, settings.layer_norm),
            )
            probe.meta["example_value"] = like.new_empty(like.shape[:2], dtype=torch.float32)
        routed = graph.call_function(
            torch.ops.tide.route.default,
            (hidden, active, router["norm_weight"], router.get("norm_bias"), router["down"], router["up"],
             router["threshold"], settings.norm_eps, settings.layer_norm, probe),
        )  # fmt: skip
        score_value = like.new_empty(like.shape[:2], dtype=torch.float32)
        routed.meta["example_value"] = (score_value, score_value > 0)
        score, leave = (call(graph, operator.getitem, routed, i) for i in (0, 1))
        remaining = call(graph, torch.logical_and, active, call(graph, torch.logical_not, leave))
        per_sequence = call(graph, torch.sum, remaining, 1)
        most = call(graph, torch.amax, per_sequence)
        counts = call(graph, torch.stack, [call(graph, torch.sum, leave), call(graph, torch.sum, remaining), most])
    output.args = ((*output.args[0], score, leave, remaining, counts),)
    piece.graph.recompile()
    return Piece(
        piece.graph,
        (*piece.inputs, ACTIVE, *tensors),
        (*piece.outputs, SCORE, LEAVE, ACTIVE, COUNTS),
    )


def _projection(segment: Piece, layer: int, tensors: dict[str, torch.Tensor]) -> Piece:
    hidden = value_of(segment.graph.graph.output_node().args[0][segment.outputs.index(HIDDEN)])
    graph = Graph()
    result: Node = graph.output(())
    values = {
        "hidden": hidden,
        "leave": hidden.new_empty(hidden.shape[:2], dtype=torch.bool),
        "out": torch.empty_like(hidden),
        **{name: _fake_like(hidden, tensors[name]) for name in ("weight", "bias", "down") if name in tensors},
    }
    nodes = [add_placeholder(graph, n, v) for n, v in values.items()]
    with graph.inserting_before(result):
        node = graph.call_function(torch.ops.tide.project.default, tuple(nodes))
    node.meta["example_value"] = torch.empty_like(hidden)
    result.args = ((node,),)
    names = (HIDDEN, LEAVE, OUT, *(f"projection.{layer}.{n}" for n in ("weight", "bias", "down") if n in tensors))
    return Piece(GraphModule(torch.nn.Module(), graph), names, (OUT,))


def _fake_like(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the mode of ``fake`` with the metadata of ``real``."""
    return fake.new_empty(real.shape, dtype=real.dtype)
