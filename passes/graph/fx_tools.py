"""Questions about FX graphs that several passes ask: values, aliases, mutations, liveness, sameness."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tide_compile.torch_internals.fx import OpOverload, is_functorch, trace_inside_inductor, unwrapped

_IN_PLACE_OPERATORS = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
    operator.ipow, operator.iand, operator.ior, operator.ixor, operator.setitem,
}  # fmt: skip


def value_of(node: Node) -> object:
    """The fake value that Dynamo recorded for a node, or None."""
    return node.meta.get("example_value")


def hint(size: object) -> object:
    """The number that a symbolic size stood for when the graph was traced; anything else as it is."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def shape_of(node: Node) -> tuple[str, ...]:
    """The shape of a tensor node, () for anything else; as text, because comparing symbolic sizes adds guards."""
    value = value_of(node)
    return tuple(map(str, value.shape)) if isinstance(value, torch.Tensor) else ()


def storage_of(node: Node) -> int | None:
    """Identity of the storage behind a tensor node: equal for a tensor and all its views and in-place results."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return unwrapped(value).untyped_storage()._cdata


def mutated_arguments(node: Node) -> tuple[Node, ...]:
    """The arguments whose memory a node writes to; empty for a pure node."""
    written: list[object] = []
    if node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
        written.append(node.args[0])
    elif node.op == "call_function":
        if node.target in _IN_PLACE_OPERATORS:
            written.append(node.args[0])
        elif isinstance(node.target, OpOverload):
            names = [a.name for a in node.target._schema.arguments]
            mutable = [i for i, a in enumerate(node.target._schema.arguments) if a.alias_info and a.alias_info.is_write]
            written.extend(node.args[i] if i < len(node.args) else node.kwargs.get(names[i]) for i in mutable)
        elif getattr(node.target, "__name__", "").rstrip("0123456789").endswith(
            "_"
        ) and not node.target.__name__.endswith("__"):
            written.append(node.args[0])
        if node.kwargs.get("inplace") is True:
            written.append(node.args[0])
    written.append(node.kwargs.get("out"))
    return tuple(n for n in written if isinstance(n, Node))


def output_nodes(graph: Graph) -> list[object]:
    """The flat arguments of the output node."""
    return list(graph.output_node().args[0])


def live_nodes(graph: Graph) -> set[Node]:
    """Nodes that the outputs need, directly or through a write to memory that outlives the call or that is read.

    A write counts when it goes to a placeholder (or a view of one), or to memory that a live node uses. Entering and
    leaving a vmap counts always: no data flows there.
    """
    written = {node: {storage_of(a) for a in mutated_arguments(node)} - {None} for node in graph.nodes}
    writes = [node for node in graph.nodes if written[node]]
    kept_memory = {storage_of(p) for p in graph.find_nodes(op="placeholder")} - {None}
    live: set[Node] = set()

    def mark(roots: Iterable[Node]) -> None:
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node not in live:
                live.add(node)
                stack.extend(node.all_input_nodes)

    mark([graph.output_node(), *(n for n in graph.nodes if not n.users and is_functorch(n))])
    while True:
        memory = kept_memory | {storage_of(n) for n in live if n.op != "placeholder"}
        found = [n for n in writes if n not in live and written[n] & memory]
        if not found:
            return live
        mark(found)


def remove_dead(gm: GraphModule) -> None:
    """Delete everything outside ``live_nodes``, unused placeholders too."""
    live = live_nodes(gm.graph)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "placeholder":
            if not node.users:
                gm.graph.erase_node(node)
        elif node not in live:
            gm.graph.erase_node(node)
    gm.recompile()


def ancestors(node: Node, stop: Callable[[Node], bool]) -> Iterator[Node]:
    """A node and everything it is computed from, not looking behind nodes for which ``stop`` holds."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        yield current
        if not stop(current):
            stack.extend(current.all_input_nodes)


def derive_value(node: Node) -> None:
    """Record the fake value of a freshly inserted node from the fake values of its arguments."""
    args = map_arg(node.args, value_of)
    kwargs = map_arg(node.kwargs, value_of)
    tensors = (v for v in map(value_of, node.all_input_nodes) if isinstance(v, torch.Tensor))
    mode = next((v.fake_mode for v in tensors), contextlib.nullcontext())  # sizes need none
    call = node.target if node.op == "call_function" else lambda self, *a, **k: getattr(self, node.target)(*a, **k)
    with mode, torch.no_grad():
        node.meta["example_value"] = call(*args, **kwargs)


def call(graph: Graph, target: object, *args: object, **kwargs: object) -> Node:
    """Insert a call at the graph's insertion point and record its fake value."""
    create = graph.call_method if isinstance(target, str) else graph.call_function
    node = create(target, args, kwargs)
    derive_value(node)
    return node


def cast(graph: Graph, node: Node, dtype: torch.dtype) -> Node:
    """``node`` in another dtype, or itself if it has that one."""
    return node if value_of(node).dtype == dtype else call(graph, "to", node, dtype)


def add_placeholder(graph: Graph, name: str, value: object) -> Node:
    """A new last placeholder, named ``name``, holding the fake ``value``."""
    placeholders = graph.find_nodes(op="placeholder")
    anchor = placeholders[-1].next if placeholders else next(iter(graph.nodes))
    with graph.inserting_before(anchor):
        node = graph.placeholder(name)
    node.meta["example_value"] = value
    return node


def replace_traced(graph: Graph, node: Node, inputs: list[Node], function: Callable[..., object]) -> None:
    """In an ATen graph inside Inductor: let ``function`` of ``inputs`` take the place of a node."""
    node.replace_all_uses_with(insert_traced(graph, node, inputs, function))
    graph.erase_node(node)


def insert_traced(graph: Graph, after: Node, inputs: list[Node], function: Callable[..., object]) -> Node:
    """In an ATen graph inside Inductor: the result of ``function`` of ``inputs``, computed behind a node."""
    traced = trace_inside_inductor(function, [n.meta["val"] for n in inputs])
    given = zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True)
    with graph.inserting_before(after.next):
        return graph.graph_copy(traced.graph, dict(given))
