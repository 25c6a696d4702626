"""What pieces of a graph cost, and when leaving rows out pays."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

import numpy as np
import torch
from tide_compile.passes.fx_tools import value_of
from torch.fx import GraphModule, Node

FLOPS = "tide_flops"  # node.meta: (operations of the node on all rows, whether it now runs on some only)
KEYS = (
    "tide_keys"  # node.meta of attention: (bytes of K and V moved for all rows, bytes read, whether for some rows only)
)
MOVED = "tide_moved"  # node.meta: the fake value that a gather or scatter reads or writes

aten = torch.ops.aten
_COPIES = {aten.reshape.default, aten.contiguous.default, aten.clone.default}
_LINEAR, _ATTENTION = torch._C._nn.linear, torch._C._nn.scaled_dot_product_attention  # in Dynamo's graphs
_PRODUCTS = {_LINEAR, aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default}


@dataclass(frozen=True, slots=True)
class Device:
    """``flops``: operations per second of a large matrix product. ``bandwidth``: bytes per second read or written.
    ``overhead``: seconds that a kernel costs whatever its size. ``keys``: bytes of keys and values per second in
    attention of one query, None: ``bandwidth``. ``attention``: operations per second of that of many queries, if
    known. ``few``: (rows, operations per second) of products of fewer rows than the large one, ascending, if known."""

    flops: float
    bandwidth: float
    overhead: float
    keys: float | None = None
    few: tuple[tuple[int, float], ...] = ()
    attention: float | None = None

    def for_rows(self, rows: int) -> Device:
        """The device as products of so many rows find it: between those of ``few``, in proportion."""
        if not self.few:
            return self
        numbers, speeds = zip(*self.few, strict=True)
        return replace(self, flops=float(np.interp(rows, numbers, speeds)))


@dataclass(frozen=True, slots=True)
class Work:
    """What a compact segment does, for the ``rows`` that the sizes in its graph stand for.

    Attributes:
        whole: operations on all rows, whatever is left out. some: operations on the chosen rows, if all are chosen.
        weights: bytes of the weights. keys: bytes of keys and values that attention and what prepares them move.
        whole_keys, some_keys: those that the compact segment's attention reads, for all rows and for the chosen ones.
        moved: bytes of the values that are gathered and scattered, if all rows are chosen. moves: their number.
    """

    rows: int
    whole: float
    some: float
    weights: float
    keys: float
    whole_keys: float
    some_keys: float
    moved: float
    moves: int

    def masked_seconds(self, rows: int, device: Device) -> float:
        """All of ``rows`` rows, with masks."""
        scale = rows / self.rows
        return self._seconds(scale * (self.whole + self.some), scale * self.keys, device)

    def left(self, rows: int, kept: int) -> float:
        """The share of the operations that ``kept`` of ``rows`` rows need."""
        return (self.whole + kept / rows * self.some) / (self.whole + self.some)

    def compact_seconds(self, rows: int, kept: int, device: Device) -> float:
        """``kept`` of ``rows`` rows."""
        scale, share = rows / self.rows, kept / self.rows
        operations = scale * self.whole + share * self.some
        moved = scale * self.whole_keys + share * (self.some_keys + 2 * self.moved)
        return self._seconds(operations, moved, device) + self.moves * device.overhead

    def _seconds(self, operations: float, moved: float, device: Device) -> float:
        return max(operations / device.flops, self.weights / device.bandwidth) + moved / device.bandwidth


def work_of(gm: GraphModule, rows: int) -> Work:
    """Add up a compact segment (after dead code is gone)."""
    counted = [n.meta[FLOPS] for n in gm.graph.nodes if FLOPS in n.meta]
    moved = [_bytes(n.meta[MOVED]) for n in gm.graph.nodes if MOVED in n.meta]
    operands = {n for node in gm.graph.nodes if node.meta.get(FLOPS, (0,))[0] for n in node.all_input_nodes}
    weights = sum(_bytes(value_of(n)) for n in operands if n.op == "placeholder" and value_of(n).dim() == 2)
    whole, some = (sum(f for f, is_some in counted if is_some == wanted) for wanted in (False, True))
    keys = [n.meta[KEYS] for n in gm.graph.nodes if KEYS in n.meta]
    whole_keys, some_keys = (sum(read for _, read, is_some in keys if is_some == wanted) for wanted in (False, True))
    return Work(rows, whole, some, weights, sum(m for m, _, _ in keys), whole_keys, some_keys, sum(moved), len(moved))


def flops_of(node: Node) -> float:
    """Operations of a matrix product or of attention, two for a multiplication and an addition; 0 for the rest."""
    if node.target in _PRODUCTS:
        left = node.args[1] if node.target is aten.addmm.default else node.args[0]
        return 2.0 * _count(value_of(node)) * hint(value_of(left).shape[-1])
    if node.target in (_ATTENTION, aten.scaled_dot_product_attention.default):
        return 4.0 * _count(value_of(node.args[0])) * hint(value_of(node.args[1]).shape[-2])
    return 0.0


def keys_of(node: Node) -> tuple[float, float]:
    """Bytes of keys and values that attention makes move on all rows, and that it reads itself: an operand that is
    copied on the way (heads repeated for groups of queries) is read and written once more."""
    operands = [n for n in node.args[1:3] if isinstance(n, Node)]
    read = [_bytes(value_of(n)) for n in operands]
    moved = [(3 if n.target in _COPIES else 1) * size for n, size in zip(operands, read, strict=True)]
    return sum(moved), sum(read)


def hint(size: int | torch.SymInt) -> int:
    """The number that a symbolic size stood for when the graph was traced."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _count(value: torch.Tensor) -> int:
    return math.prod(map(hint, value.shape))


def _bytes(value: torch.Tensor) -> int:
    return _count(value) * value.element_size()


@dataclass(frozen=True, slots=True)
class PieceCost:
    """What one run of a piece costs for the rows that it was traced with.

    Attributes:
        operations: of matrix products and attention. weights: bytes of weights read.
        keys: bytes of keys and values that attention reads. kernels: matrix products, attention and writes to a cache.
    """

    operations: float = 0.0
    weights: float = 0.0
    keys: float = 0.0
    kernels: int = 0

    def __add__(self, other: PieceCost) -> PieceCost:
        return PieceCost(
            self.operations + other.operations,
            self.weights + other.weights,
            self.keys + other.keys,
            self.kernels + other.kernels,
        )

    def scaled(self, operations: float, keys: float) -> PieceCost:
        """For so many times the rows, and so many times the keys; weights are read once."""
        return PieceCost(self.operations * operations, self.weights, self.keys * keys, self.kernels)

    def seconds(self, device: Device) -> float:
        """The roofline of a device for products, then attention, and the overhead of the kernels."""
        products = max(self.operations / device.flops, self.weights / device.bandwidth)
        return products + self.keys / (device.keys or device.bandwidth) + self.kernels * device.overhead


def cost_of(gm: GraphModule) -> PieceCost:
    """Add up a piece of Dynamo's graph: products with its 2-D inputs, attention, writes to caches."""
    total = PieceCost()
    for node in gm.graph.nodes:
        if node.target is _LINEAR:
            total += PieceCost(flops_of(node), _bytes(value_of(node.args[1])), 0.0, 1)
        elif node.target is _ATTENTION:
            keys = sum(_bytes(value_of(_source(n))) for n in node.args[1:3])
            total += PieceCost(flops_of(node), 0.0, keys, 1)
        elif node.op == "call_method" and node.target == "index_copy_":
            total += PieceCost(kernels=1)
    return total


def router_cost_of(gm: GraphModule) -> PieceCost:
    """Add up the routers and exit projections of a piece."""
    total = PieceCost()
    ops = torch.ops.tide
    for target, positions in ((ops.route.default, (4,)), (ops.probe.default, (3, 4)), (ops.project.default, (3, 5))):
        for node in gm.graph.find_nodes(op="call_function", target=target):
            hidden = value_of(node.args[0])
            rows = _count(hidden) / hint(hidden.shape[-1])
            for weight in (value_of(node.args[p]) for p in positions if p < len(node.args)):
                total += PieceCost(2.0 * rows * _count(weight), _bytes(weight), 0.0, 1)
    return total


def _source(node: Node) -> Node:
    """Keys before they are repeated for groups of queries."""
    while node.op == "call_method" and node.target in ("expand", "reshape", "view", "contiguous"):
        node = node.args[0]
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
