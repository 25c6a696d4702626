"""find_boundaries: the one [B, S, H] value that crosses from each layer to the next."""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx
from torch.fx import Graph, GraphModule, Node

from tide_compile.passes.errors import BoundaryNotUniqueError, LayersSplitError
from tide_compile.passes.find_layers import layer_of_nodes
from tide_compile.passes.graph.fx_tools import ancestors, mutated_arguments, shape_of, storage_of, value_of
from tide_compile.passes.plan import Boundaries, Layers, Plan


def find_boundaries(gm: GraphModule, plan: Plan) -> dict[str, Boundaries | bool]:
    """Find what enters layer 0 and what each layer hands on, and prove that nothing else crosses.

    1. At each cut, collect the values computed inside the layers before it that are used after it by anything but the
       graph's output. Values that depend on no hidden state (sizes, a mask built in layer 0) are marked for hoisting
       into the prologue. Of the rest exactly one must have the shape of the hidden state. Those of other shapes are
       carried along (keys and values that several layers share): they are computed in skipped layers too.
    2. In the graph of everything that the layers compute from the value that enters layer 0, without what is carried,
       each boundary must lie on every path to the last boundary's successors: it is in the chain of immediate
       dominators (networkx). What is computed before layer 0 is known to every layer and no bypass.

    Raises:
        BoundaryNotUniqueError: names the values that cross.
        LayersSplitError: nothing follows the last layer, or nothing enters the first.
    """
    layers, graph = plan.layers, gm.graph
    owner = layer_of_nodes(graph, layers)
    crossing = [_crossing(graph, owner, layer) for layer in range(len(layers))]
    if not crossing[-1]:
        raise LayersSplitError(
            f"nothing follows the last layer found ({layers.prefix}.{len(layers) - 1}): the graph ends there, so the "
            "model's norm and head are in another graph. Find the break with TORCH_LOGS=graph_breaks, or pass "
            "options={'fallback': 'inductor'}."
        )
    shapes = set.intersection(*({shape_of(n) for n in values} for values in crossing))
    entering = _entering(graph, owner, shapes, layers)
    flow = _flow_from(entering, owner)
    free = _free_of(flow, owner)
    movable = {n for n in {v for values in crossing for v in values} if _comes_before(n, owner) <= free}
    leaving, carried = [], set()
    for layer, values in enumerate(crossing):
        stays = [n for n in values if n not in movable]
        leaving.append(_state_among(stays, entering, layer, layers))
        carried |= {n for n in stays if n is not leaving[-1]}
    _check_dominance(flow.subgraph(set(flow) - carried), entering, leaving, layers)
    _check_not_overwritten(owner, [entering, *leaving], layers)
    hoisted = frozenset(n.name for m in movable for n in _comes_before(m, owner) if owner[n] >= 0)
    return {
        "boundaries": Boundaries(entering.name, value_of(entering), tuple(n.name for n in leaving), hoisted),
        "single_row": shape_of(entering)[:2] == ("1", "1"),
    }


def _flow_from(entering: Node, owner: Mapping[Node, int]) -> nx.DiGraph:
    """Everything that the layers and what follows them compute from a value."""
    behind = {entering, *(n for n, layer in owner.items() if layer >= 0)}
    flow = nx.DiGraph((n, u) for n in behind for u in n.users if u in behind and u.op != "output")
    return flow.subgraph({entering} | nx.descendants(flow, entering))


def _free_of(flow: nx.DiGraph, owner: Mapping[Node, int]) -> set[Node]:
    """Nodes that depend on no hidden state and neither write to memory nor share any that is written."""
    written = {storage_of(a) for n in owner for a in mutated_arguments(n)} - {None}
    return {n for n in owner if n not in flow and not mutated_arguments(n) and storage_of(n) not in written}


def _comes_before(node: Node, owner: Mapping[Node, int]) -> set[Node]:
    """A node and what it is computed from, down to what is there before layer 0."""
    return set(ancestors(node, lambda n: owner[n] < 0))


def _state_among(values: list[Node], entering: Node, layer: int, layers: Layers) -> Node:
    """The one value like the hidden state."""
    alike = [n for n in values if shape_of(n) == shape_of(entering)]
    if len(alike) == 1:
        return alike[0]
    named = ", ".join(f"{n.name} [{', '.join(shape_of(n))}]" for n in values) or "nothing"
    raise BoundaryNotUniqueError(
        f"after layer {layer} of {layers.prefix!r} exactly one hidden state [{', '.join(shape_of(entering))}] "
        f"should be used later on, but these are: {named}. Exits are not possible there; pass "
        "options={'fallback': 'inductor'} to compile this model without them."
    )


def _crossing(graph: Graph, owner: dict[Node, int], layer: int) -> list[Node]:
    return [
        node
        for node in graph.nodes
        if 0 <= owner[node] <= layer and any(owner[u] > layer and u.op != "output" for u in node.users)
    ]


def _entering(graph: Graph, owner: dict[Node, int], shapes: set[tuple[str, ...]], layers: Layers) -> Node:
    like = [
        node
        for node in graph.nodes
        if owner[node] < 0
        and shape_of(node) in shapes
        and len(shape_of(node)) == 3
        and value_of(node).is_floating_point()
        and {owner[u] for u in node.users if owner[u] >= 0 and u.op != "output"} == {0}
    ]
    if len(like) == 1:
        return like[0]
    named = ", ".join(n.name for n in like) or "nothing"
    raise BoundaryNotUniqueError(
        f"exactly one hidden state [B, S, H] should enter layer 0 of {layers.prefix!r}, but found: {named}. Pass "
        "options={'fallback': 'inductor'} to compile without exits."
    )


def _check_dominance(flow: nx.DiGraph, entering: Node, leaving: list[Node], layers: Layers) -> None:
    dominators = nx.immediate_dominators(flow, entering)
    for layer in range(len(leaving) - 1, 0, -1):
        node = dominators[leaving[layer]]
        while node not in (leaving[layer - 1], entering):
            node = dominators[node]
        if node is entering:
            raise BoundaryNotUniqueError(
                f"the hidden state after layer {layer - 1} of {layers.prefix!r} can be bypassed on the way to layer "
                f"{layer}: exits are not possible there. Pass options={{'fallback': 'inductor'}} to compile without "
                "them."
            )


def _check_not_overwritten(owner: dict[Node, int], stream: list[Node], layers: Layers) -> None:
    writes = [(n, storage_of(a)) for n in owner if owner[n] < len(layers) for a in mutated_arguments(n)]
    for layer, state in enumerate(stream):
        for node, storage in writes:
            if owner[node] >= layer and storage == storage_of(state):
                raise BoundaryNotUniqueError(
                    f"layer {owner[node]} of {layers.prefix!r} overwrites the hidden state that it is given "
                    f"({node.name}), so no token's state can be kept there. Pass options={{'fallback': 'inductor'}} to "
                    "compile without exits."
                )
