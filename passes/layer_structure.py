"""Layers by structure alone: the repeating blocks of a graph whose nodes do not say which module they come from."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import networkx as nx
from torch.fx import Graph, Node

from tide_compile.passes.graph.fx_tools import ancestors, output_nodes, shape_of, value_of
from tide_compile.passes.plan import Layers


@dataclass(frozen=True, slots=True)
class _Block:
    """What lies between one single-value cut [B, S, H] and the next one, ``end``.

    ``label`` is equal for isomorphic blocks; ``heavy`` blocks read a weight matrix.
    """

    end: Node
    label: str
    heavy: bool


def layers_by_structure(graph: Graph) -> Layers | None:
    """Find decoder layers as the repeated part of the chain of values that everything passes through.

    1. The cuts are the [B, S, H] values that dominate the logits in the flow from the embeddings (networkx).
    2. Blocks between cuts are compared by their Weisfeiler-Lehman hash (Shervashidze et al., 2011) over operators.
    3. A layer is the shortest run of blocks that repeats: at least half of the heavy blocks equal the block one period
       before. So layers may differ (a dense MLP here, experts there) as long as they have something in common.

    Returns:
        The layers, or None if nothing repeats.
    """
    chains = [chain for root in _roots(graph) if len(chain := _blocks(graph, root)) > 1]
    if not chains:
        return None
    blocks = max(chains, key=len)
    period = _period(blocks[1:])
    if period is None:
        return None
    start, count = _extent(blocks, period)
    if count < 2:
        return None
    ends = [blocks[start + i * period - 1].end for i in range(count + 1)]
    position = {node: i for i, node in enumerate(graph.nodes)}
    first = min(ends[0].users, key=position.__getitem__)
    starts = (first, *(end.next for end in ends[1:-1]))
    return Layers("repeated blocks", tuple(n.name for n in starts), ends[-1].name)


def _roots(graph: Graph) -> list[Node]:
    """Values [B, S, H] that are computed from no other such value."""
    roots: list[Node] = []
    behind: set[Node] = set()
    for node in graph.nodes:
        if node in behind or any(n in behind for n in node.all_input_nodes):
            behind.add(node)
        elif len(shape_of(node)) == 3 and value_of(node).is_floating_point() and node.op != "get_attr":
            roots.append(node)
            behind.add(node)
    return roots


def _blocks(graph: Graph, root: Node) -> list[_Block]:
    """The chain from ``root`` to the logits, the root's own (empty) block first."""
    flow = nx.DiGraph((n, u) for n in graph.nodes for u in n.users if u.op != "output")
    if root not in flow:
        return []
    flow = flow.subgraph({root} | nx.descendants(flow, root))
    results = [n for n in output_nodes(graph) if isinstance(n, Node) and n in flow and len(shape_of(n)) == 3]
    if not results:
        return []
    position = {node: i for i, node in enumerate(graph.nodes)}
    dominators = nx.immediate_dominators(flow, root)
    node = max(results, key=position.__getitem__)
    chain = [node]
    while node is not root:
        node = dominators[node]
        chain.append(node)
    chain = [n for n in reversed(chain) if shape_of(n) == shape_of(root)]
    cuts = {n: i for i, n in enumerate(chain)}
    belongs = dict(cuts)
    for node in sorted(flow, key=position.__getitem__):  # a block holds its end and what the cut before it dominates
        if node not in cuts:
            above = dominators[node]
            belongs[node] = belongs[above] + (above in cuts)
    members: dict[int, list[Node]] = {}
    for node, block in belongs.items():
        members.setdefault(block, []).append(node)
    return [_block(flow, members[i], end) for i, end in enumerate(chain)]


def _block(flow: nx.DiGraph, members: list[Node], end: Node) -> _Block:
    part = nx.Graph(flow.subgraph(members))
    nx.set_node_attributes(part, {n: str(n.target) for n in part}, "operator")
    label = nx.weisfeiler_lehman_graph_hash(part, node_attr="operator")
    aside = {a for m in members for n in m.all_input_nodes if n not in flow for a in ancestors(n, flow.has_node)}
    return _Block(end, label, any(_is_matrix(n) for n in aside))


def _is_matrix(node: Node) -> bool:
    given = node.op in ("placeholder", "get_attr")
    return given and len(shape_of(node)) >= 2 and value_of(node).is_floating_point()


def _period(blocks: list[_Block]) -> int | None:
    heavy = sum(b.heavy for b in blocks)
    for period in range(1, len(blocks) // 2 + 1):
        pairs = [(a, b) for a, b in zip(blocks, blocks[period:], strict=False) if a.heavy and b.heavy]
        if len(pairs) >= heavy / 2 and sum(a.label == b.label for a, b in pairs) >= len(pairs) / 2:
            return period
    return None


def _extent(blocks: list[_Block], period: int) -> tuple[int, int]:
    """The first block of the first layer and the number of layers: the longest run of periods that are alike."""
    best = (0, 0)
    for start in range(1, 1 + period):
        firsts = range(start, len(blocks) - period + 1, period)
        groups = {i: blocks[i : i + period] for i in firsts if any(b.heavy for b in blocks[i : i + period])}
        alike = _alike(groups)
        for first in groups:
            count = len(
                list(itertools.takewhile(lambda i, alike=alike: alike.get(i, False), range(first, len(blocks), period)))
            )
            if count > best[1]:
                best = (first, count)
    return best


def _alike(groups: dict[int, list[_Block]]) -> dict[int, bool]:
    """Which groups have, in each light place, the block that most have there, and so in at least one heavy place."""
    places = list(zip(*groups.values(), strict=True))
    usual = [Counter(b.label for b in place).most_common(1)[0][0] for place in places]
    heavy = [Counter(b.heavy for b in place).most_common(1)[0][0] for place in places]
    return {
        i: all(b.heavy == h and (h or b.label == u) for b, u, h in zip(group, usual, heavy, strict=True))
        and any(b.label == u for b, u, h in zip(group, usual, heavy, strict=True) if h)
        for i, group in groups.items()
    }
