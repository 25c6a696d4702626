"""find_layers: which nodes of the Dynamo graph belong to decoder layer i."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict

from torch import nn
from torch.fx import Graph, GraphModule, Node

from tide_compile.passes.errors import LayersNotFoundError, LayersSplitError, NothingToSkipError
from tide_compile.passes.graph.fx_tools import shape_of, value_of
from tide_compile.passes.layer_structure import layers_by_structure
from tide_compile.passes.plan import Layers, Plan

_INDEXED = re.compile(r"\.(\d+)(?=\.|$)")


def find_layers(gm: GraphModule, plan: Plan) -> dict[str, Layers]:
    """Read the layers from ``nn_module_stack``: the list of modules that covers most of the graph.

    Dynamo records for each node the path of the module it came from, such as ``L['self'].model.layers.7.mlp``. Every
    path component that is a number is a candidate for a layer index; nested lists (experts in a layer) cover fewer
    nodes than the list of layers and lose. Members that do not run (cross attention without an image) are not counted:
    a graph break would cut off all that come before or after. A graph in which no list runs is searched for repeating
    blocks instead (``layers_by_structure``).

    Raises:
        NothingToSkipError: nor is there a sign of any in the graph.
        LayersNotFoundError: no list with two or more members runs once, in order, through the graph, and no block
            repeats.
        LayersSplitError: the list is there, but not all of it.
    """
    candidates: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "output")]
    for position, node in enumerate(nodes):
        for prefix, index in _indexed_paths(node):
            candidates[prefix][index].append(position)
    ordered = {prefix: members for prefix, members in candidates.items() if _runs_in_order(members)}
    if not ordered:
        found = layers_by_structure(gm.graph)
        if found is not None:
            return {"layers": found}
        kind = NothingToSkipError if _is_rest(gm.graph) else LayersNotFoundError
        raise kind(
            "no decoder layers found in this graph: no list of two or more modules runs through it in order, and no "
            "block between hidden states [B, S, H] repeats. Compile the whole causal language model; if it is whole, "
            "look for breaks that cut its layers apart with TORCH_LOGS=graph_breaks; or pass "
            "options={'fallback': 'inductor'} to compile such graphs with plain Inductor."
        )
    prefix, members = max(ordered.items(), key=lambda item: sum(map(len, item[1].values())))
    indices = sorted(members)
    if indices[0] != 0:
        raise LayersSplitError(
            f"this graph holds layers {indices[0]} to {indices[-1]} of {prefix!r}, {len(indices)} in all: a graph "
            "break cuts the model. Find it with TORCH_LOGS=graph_breaks and remove it, or pass "
            "options={'fallback': 'inductor'}."
        )
    starts = tuple(nodes[members[i][0]].name for i in indices)
    return {"layers": Layers(prefix, starts, nodes[members[indices[-1]][-1]].name)}


def layer_of_nodes(graph: Graph, layers: Layers) -> dict[Node, int]:
    """The layer of every node: -1 before the first layer, N after the last.

    Layers are stretches of the graph in program order, so cutting between them never reorders a write.
    """
    starts = {name: i for i, name in enumerate(layers.starts)}
    owner, current = {}, -1
    for node in graph.nodes:
        current = starts.get(node.name, current)
        owner[node] = -1 if node.op == "placeholder" else current
        if node.name == layers.end:
            current = len(layers)
    return owner


def _is_rest(graph: Graph) -> bool:
    """No weight matrix but for looking up embeddings: the weights of the model's layers are in other graphs."""
    matrices = [n for n in graph.nodes if isinstance(value_of(n), nn.Parameter) and len(shape_of(n)) > 1]
    return all(user.target is nn.functional.embedding for n in matrices for user in n.users)


def _indexed_paths(node: Node) -> set[tuple[str, int]]:
    found = set()
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        for match in _INDEXED.finditer(path):
            found.add((path[: match.start()], int(match.group(1))))
    return found


def _runs_in_order(members: dict[int, list[int]]) -> bool:
    spans = [(members[i][0], members[i][-1]) for i in sorted(members)]
    return len(spans) >= 2 and all(a[1] < b[0] for a, b in itertools.pairwise(spans))
