"""Where the keys and values of the tokens of this call enter a cache or, without a cache, attention."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from tide_compile.passes.errors import KVNotFoundError
from tide_compile.passes.graph.fx_tools import call, shape_of, value_of
from tide_compile.torch_internals.fx import ATTENTION


def find_kv_sources(graph: Graph, hidden: Node, num_layers: int) -> list[Node]:
    """The fresh K and V of a segment, [B, heads, S, D] each, before they meet older ones.

    1. An operand that depends on the hidden state and is written into, or concatenated to, memory that does not.
    2. Without a cache: the key and value arguments of ``scaled_dot_product_attention``.

    Raises:
        KVNotFoundError: a layer shows neither.
    """
    dependent = _descendants(hidden)
    sources: dict[Node, None] = {}
    for node in graph.nodes:
        for data in _merged_into_memory(node, dependent):
            sources[_whole(data)] = None
    if not sources:
        attention = [n for n in graph.nodes if n.target is ATTENTION]
        sources = {data: None for node in attention for data in node.args[1:3] if data in dependent}
    if len(sources) != 2 * num_layers or any(len(shape_of(s)) != 4 for s in sources):
        raise KVNotFoundError(
            f"kv_cache_strategy='zero_pad' needs the keys and values of {num_layers} layers and found {len(sources)} "
            f"of {2 * num_layers} in this graph. Use kv_cache_strategy='propagate', or load the model with "
            "attn_implementation='sdpa'."
        )
    return list(sources)


def zero_all(graph: Graph, source: Node, hidden: Node) -> None:
    """Let everything that reads ``source`` [B, heads, S, D] read zeros, which need nothing but the sizes of ``hidden``
    [B, S, H]."""
    _, heads, _, width = value_of(source).shape
    with graph.inserting_before(source):
        rows, length = call(graph, "size", hidden, 0), call(graph, "size", hidden, 1)
        zeros = call(graph, "new_zeros", hidden, (rows, heads, length, width), dtype=value_of(source).dtype)
    source.replace_all_uses_with(zeros)


def zero_rows(graph: Graph, source: Node, running: Node) -> None:
    """Let everything that reads ``source`` [B, heads, S, D] read zeros in the rows that are not ``running`` [B, S]."""
    with graph.inserting_after(source):
        column = call(graph, operator.getitem, running, (slice(None), None, slice(None), None))
    with graph.inserting_after(column):
        zeroed = call(graph, torch.where, column, source, 0.0)
    source.replace_all_uses_with(zeroed, delete_user_cb=lambda user: user is not zeroed)


def _descendants(*roots: Node) -> set[Node]:
    found, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.users)
    return found


def _merged_into_memory(node: Node, dependent: set[Node]) -> list[Node]:
    if node.op == "call_method" and node.target in ("index_copy_", "copy_"):
        target, data = node.args[0], [node.args[-1]]
    elif node.target is operator.setitem:
        target, data = node.args[0], [node.args[2]]
    elif node.target is torch.cat and len(node.args[0]) == 2 and node.args[0][0] not in dependent:
        target, data = node.args[0][0], [node.args[0][1]]
    else:
        return []
    return [d for d in data if target not in dependent and isinstance(d, Node) and d in dependent]


def _whole(data: Node) -> Node:
    """Undo the slice that keeps only the newest rows (sliding windows)."""
    while data.target is operator.getitem and len(shape_of(data)) == len(shape_of(data.args[0])) == 4:
        data = data.args[0]
    return data
