"""lower_linears: products of few rows with weights, those of one input together, in the form that is fastest for them.

Runs inside Inductor, on the ATen graph of a piece: there quantised weights have become plain tensors too.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tide_compile.kernels import route
from tide_compile.passes.fx_tools import insert_traced, replace_traced, value_of
from torch import Tensor
from torch._inductor import test_operators  # noqa: F401 (defines realize)
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

Form = Literal["aten", "stream"]

MOST_STREAMED = 4  # rows; with more it has not been faster anywhere
CHUNKS = 4  # of a weight that are read side by side: accumulators that do not wait for each other

aten, prims = torch.ops.aten, torch.ops.prims
_OPS = tuple(sorted(map(str, Path(route.__file__).parent.glob("*.py"))))  # Inductor's cache does not look into an op


@dataclass(frozen=True, slots=True)
class Linears:
    """x [rows, ins] in ``dtype`` times transposes of weights [out, ins], kept in ``stored``, for each of ``outs``."""

    rows: int
    outs: tuple[int, ...]
    ins: int
    dtype: torch.dtype
    stored: torch.dtype

    def __str__(self) -> str:
        kept = "" if self.stored == self.dtype else f" from {self.stored}"
        outs = "+".join(map(str, self.outs))
        return f"[{self.rows}, {self.ins}] x [{outs}, {self.ins}] {self.dtype}{kept}".replace("torch.", "")


def find_linears(graph: Graph) -> set[Linears]:
    """The products on a CPU in a Dynamo graph whose sizes are constants."""
    outs: dict[tuple[Node, torch.dtype], list[int]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=torch._C._nn.linear):
        x, weight = (value_of(n) for n in node.args[:2])
        if x.device.type == "cpu" and all(isinstance(size, int) for size in (*x.shape, *weight.shape)):
            outs[_undropped(node.args[0]), _stored(weight)].append(weight.shape[0])
    found = set()
    for (node, stored), sizes in outs.items():
        x = value_of(node)
        found.add(Linears(math.prod(x.shape[:-1]), tuple(sorted(sizes)), x.shape[-1], x.dtype, stored))
    return found


def _undropped(x: Node) -> Node:
    while x.target is torch.nn.functional.dropout:  # none where nothing is trained
        x = x.args[0]
    return x


def _stored(weight: Tensor) -> torch.dtype:
    """The dtype in memory: a quantised weight is a subclass around a smaller tensor of the same shape."""
    if hasattr(weight, "__tensor_flatten__"):
        parts = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
        return next((_stored(p) for p in parts if p.shape == weight.shape), weight.dtype)
    return weight.dtype


def stream(x: Tensor, parts: Sequence[Tensor], bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K] times the transpose of a weight [N, K] that is given in parts: one sum for each row and each part.

    Inductor makes one loop of all sums of the same size, also of those of other products with the same ``x``, which
    reads every weight once, in order, at the speed of the memory. Sums are in fp32, the result in ``dtype`` or that of
    ``x``.
    """
    parts = [part.float() for part in parts]
    sums = torch.cat([(part * row).sum(-1) for row in x.float() for part in parts])  # written in place, not copied
    result = sums.view(x.shape[0], -1).to(dtype or x.dtype)
    return result if bias is None else result + bias


def part_size(outs: Sequence[int]) -> int:
    """Rows of a part, so that all products with one ``x`` have about ``CHUNKS`` parts together: if possible a number
    that divides all their weights."""
    wanted, shared = max(1, sum(outs) // CHUNKS), math.gcd(*outs)
    size = min((d for d in range(1, shared + 1) if shared % d == 0), key=lambda d: abs(math.log(d / wanted)))
    return size if wanted / 2 <= size <= wanted * 2 else wanted


class LowerLinears(CustomGraphPass):
    """Rewrite products that are listed as ``"stream"``; the others stay as they are.

    Before: ``mm(x, permute(w))``, with ``w`` an input of the graph, maybe converted to the dtype of ``x``. After: sums
    of elementwise products, see ``stream``.

    Safe because both compute the same sums of products; weights are neither copied nor reordered.
    """

    def __init__(self, forms: Mapping[Linears, Form]) -> None:
        self.streamed = {linears for linears, form in forms.items() if form == "stream"}

    def uuid(self) -> object:
        """What Inductor's caches tell code made with this pass by."""
        return get_hash_for_files((__file__, *_OPS)), sorted(map(str, self.streamed))

    def __call__(self, graph: Graph) -> None:
        by_input: dict[tuple[Node, torch.dtype], list[Node]] = defaultdict(list)
        for target in (aten.mm.default, aten.addmm.default):
            for node in graph.find_nodes(op="call_function", target=target):
                *_, x, transposed = node.args
                weight = _weight_of(transposed)
                if weight is not None and not node.kwargs and isinstance(_value(x).shape[0], int):
                    by_input[_origin(x), _value(weight).dtype].append(node)
        for (_, stored), products in by_input.items():
            x, outs = products[0].args[-2], sorted(_value(node).shape[1] for node in products)
            (rows, ins), dtype = _value(x).shape, _value(x).dtype
            if Linears(rows, tuple(outs), ins, dtype, stored) not in self.streamed:
                continue
            size, shared = part_size(outs), _realized(graph, products[0].args[-2], (rows, ins))
            for node in products:
                *bias, _, transposed = node.args
                inputs = [shared, _weight_of(transposed), *bias]
                replace_traced(graph, node, inputs, functools.partial(_streamed, size=size, dtype=dtype))


def _streamed(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, size: int, dtype: torch.dtype) -> Tensor:
    return stream(x, weight.split(size), bias, dtype)


def _realized(graph: Graph, x: Node, shape: tuple[int, int]) -> Node:
    """``x`` in fp32 and in memory. Inductor would compute it anew for each row of a weight, a norm's root and all."""
    origin = _origin(x)
    after = graph.find_nodes(op="placeholder")[-1] if origin.op == "placeholder" else origin

    def wide(value: Tensor) -> Tensor:
        return in_memory(value.float()).view(shape)

    return insert_traced(graph, after, [origin], wide)


def in_memory(x: Tensor) -> Tensor:
    """``x``, which Inductor would else compute anew in every loop that reads it."""
    return torch.ops._inductor_test.realize(x)


def _origin(x: Node) -> Node:
    """What ``x`` is another shape of."""
    while x.target in (aten.view.default, aten.reshape.default):
        x = x.args[0]
    return x


def _weight_of(factor: Node) -> Node | None:
    """The input [N, K] of which ``factor`` [K, N] is the transpose, maybe in another dtype; None if it is none."""
    transposed = False
    while factor.op != "placeholder":
        if factor.target is aten.permute.default and list(factor.args[1]) == [1, 0]:
            transposed = not transposed
        elif factor.target is not prims.convert_element_type.default:
            return None
        factor = factor.args[0]
    return factor if transposed and _value(factor).is_contiguous() else None


def _value(node: Node) -> Tensor:
    return node.meta["val"]
