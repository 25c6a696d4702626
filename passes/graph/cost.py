"""cost: what pieces of a graph cost."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.fx import GraphModule, Node

from tide_compile.passes.graph.fx_tools import hint, value_of
from tide_compile.torch_internals.fx import ATTENTION, LINEAR

aten = torch.ops.aten
_PRODUCTS = {LINEAR, aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default}


@dataclass(frozen=True, slots=True)
class Device:
    """What a device can do.

    Attributes:
        flops: operations per second of a large matrix product.
        bandwidth: bytes per second read or written. overhead: seconds that a kernel costs whatever its size.
        keys: bytes of keys and values per second in attention of one query; None: ``bandwidth``.
        few: (rows, operations per second) of products of so many rows, ascending, if known.
        attention: operations per second of attention of many queries, if known.
        streaming: bytes of weights per second in products of few rows; None: ``bandwidth``.
    """

    flops: float
    bandwidth: float
    overhead: float
    keys: float | None = None
    few: tuple[tuple[int, float], ...] = ()
    attention: float | None = None
    streaming: float | None = None

    def for_rows(self, rows: int) -> Device:
        """The device as products of so many rows find it: between those of ``few``, in proportion."""
        if not self.few:
            return self
        numbers, speeds = zip(*self.few, strict=True)
        return replace(self, flops=float(np.interp(rows, numbers, speeds)))


def flops_of(node: Node) -> float:
    """Operations of a matrix product or of attention, two for a multiplication and an addition; 0 for the rest."""
    if node.target in _PRODUCTS:
        left = node.args[1] if node.target is aten.addmm.default else node.args[0]
        return 2.0 * _count(value_of(node)) * hint(value_of(left).shape[-1])
    if node.target in (ATTENTION, aten.scaled_dot_product_attention.default):
        return 4.0 * _count(value_of(node.args[0])) * hint(value_of(node.args[1]).shape[-2])
    return 0.0


def _count(value: torch.Tensor) -> int:
    return math.prod(map(hint, value.shape))


def bytes_of(value: torch.Tensor) -> int:
    """Of a tensor; of symbolic sizes, with the hint of each."""
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
        products = max(self.operations / device.flops, self.weights / (device.streaming or device.bandwidth))
        return products + self.keys / (device.keys or device.bandwidth) + self.kernels * device.overhead


def cost_of(gm: GraphModule) -> PieceCost:
    """Add up a piece of Dynamo's graph: products with its 2-D inputs, attention, writes to caches."""
    total = PieceCost()
    for node in gm.graph.nodes:
        if node.target is LINEAR:
            total += PieceCost(flops_of(node), bytes_of(value_of(node.args[1])), 0.0, 1)
        elif node.target is ATTENTION:
            keys = sum(bytes_of(value_of(_source(n))) for n in node.args[1:3])
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
                total += PieceCost(2.0 * rows * _count(weight), bytes_of(weight), 0.0, 1)
    return total


def _source(node: Node) -> Node:
    """Keys before they are repeated for groups of queries."""
    while node.op == "call_method" and node.target in ("expand", "reshape", "view", "contiguous"):
        node = node.args[0]
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    return node
