"""retrace: a piece of Dynamo's graph in ATen operators, which have one name and one signature each."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tide_compile.passes.graph.fx_tools import output_nodes, value_of
from tide_compile.torch_internals.fx import tracing_with


def retrace(gm: GraphModule, watched: Sequence[str]) -> tuple[GraphModule, list[Node]]:
    """Trace a graph before autograd and decompositions (linear and attention stay whole, writes stay writes).

    Args:
        gm: the graph; not changed.
        watched: names of nodes to find again.

    Returns:
        The new graph, with the fake values of all nodes, and the nodes that compute what the watched ones did.
    """
    gm = copy.deepcopy(gm)
    nodes, output = {n.name: n for n in gm.graph.nodes}, gm.graph.output_node()
    count = len(output_nodes(gm.graph))
    output.args = ((*output_nodes(gm.graph), *(nodes[name] for name in watched)),)
    gm.recompile()
    inputs = [value_of(n) for n in gm.graph.find_nodes(op="placeholder")]
    mode = next(v.fake_mode for v in inputs if isinstance(v, torch.Tensor))
    with torch.no_grad(), tracing_with(mode), mode:
        traced = make_fx(gm, pre_dispatch=True)(*inputs)
    for node in list(traced.graph.nodes):
        node.meta["example_value"] = node.meta.get("val")
        if node.target is torch.sym_sum:
            _as_additions(traced.graph, node)
    output = traced.graph.output_node()
    results = list(output.args[0])
    output.args = (tuple(results[:count]),)
    traced.recompile()
    return traced, results[count:]


def _as_additions(graph: Graph, node: Node) -> None:
    """Dynamo, which traces these graphs once more, takes no ``sym_sum`` of plain numbers."""
    with graph.inserting_before(node):
        total = functools.reduce(lambda a, b: graph.call_function(operator.add, (a, b)), node.args[0])
    total.meta["example_value"] = value_of(node)
    node.replace_all_uses_with(total)
    graph.erase_node(node)
