"""lower_linears: products of few rows with weights, those of one input together, in the form that is fastest for them.

Runs inside Inductor, on the ATen graph of a piece: there quantised weights have become plain tensors too.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tide_compile.kernels import route
from tide_compile.kernels.linear import can_multiply, has_template, linear, packed_linear, template_linear
from tide_compile.passes.fx_tools import insert_traced, replace_traced, value_of
from torch import Tensor
from torch._inductor import test_operators  # noqa: F401 (defines realize)
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

Form = Literal["aten", "stream", "swapped", "onednn", "onednn swapped", "packed", "template"]

MOST_STREAMED = 4  # rows; with more it has not been faster anywhere
CHUNKS = 4  # of a weight that are read side by side: accumulators that do not wait for each other
MANY = 256  # rows that stand for any larger number of them, and for one that only the run tells
_TEMPORARY = 1 << 24  # bytes of a weight that are there in fp32 at a time

aten, prims = torch.ops.aten, torch.ops.prims
_OPS = tuple(sorted(map(str, Path(route.__file__).parent.glob("*.py"))))  # Inductor's cache does not look into an op


@dataclass(frozen=True, slots=True)
class Linears:
    """x [rows, ins] in ``dtype`` times transposes of weights [out, ins], kept in ``stored``, for each of ``outs``.
    ``rows``: see ``rows_like``."""

    rows: int
    outs: tuple[int, ...]
    ins: int
    dtype: torch.dtype
    stored: torch.dtype

    def __str__(self) -> str:
        kept = "" if self.stored == self.dtype else f" from {self.stored}"
        outs = "+".join(map(str, self.outs))
        return f"[{self.rows}, {self.ins}] x [{outs}, {self.ins}] {self.dtype}{kept}".replace("torch.", "")


def rows_like(rows: int | torch.SymInt) -> int:
    """Rows that are measured in the place of so many: more than ``MOST_STREAMED`` are rounded up to a power of two."""
    if not isinstance(rows, int):
        return MANY
    return rows if rows <= MOST_STREAMED else min(MANY, 1 << (rows - 1).bit_length())


def find_linears(graph: Graph) -> set[Linears]:
    """The products on a CPU in a Dynamo graph, or one that was traced anew (``retrace``)."""
    by_input: dict[tuple[Node, torch.dtype], list[Tensor]] = defaultdict(list)
    for target in (torch._C._nn.linear, aten.linear.default):
        for node in graph.find_nodes(op="call_function", target=target):
            weight = value_of(node.args[1])
            if weight.device.type == "cpu" and all(isinstance(size, int) for size in weight.shape):
                by_input[_undropped(node.args[0]), _stored(weight)].append(weight)
    found = set()
    for (node, stored), weights in by_input.items():
        x, outs = value_of(node), tuple(sorted(weight.shape[0] for weight in weights))
        rows = MANY if x is None else rows_like(math.prod(x.shape[:-1]))  # None: the run chooses rows
        found.add(Linears(rows, outs, weights[0].shape[1], weights[0].dtype, stored))
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


def swapped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    by: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.linear,
) -> Tensor:
    """x [M, K] times the transpose of a weight [N, K], as the transpose of the product of the weight with that of x.

    Libraries copy the second factor into an order of their own before they multiply, and here that is the smaller one.
    Products ``by`` oneDNN are in the dtype of ``x`` and the weight if that is one, and the processor has instructions
    for it. All others are in fp32, for which a weight in less is converted part by part: without instructions, products
    in bf16 or fp16 take several times as long. The result is in ``dtype`` or that of ``x``.
    """
    parts, kind = [weight], weight.dtype
    if not (by is linear and kind == x.dtype and can_multiply(kind)) and kind != torch.float32:
        parts, kind = weight.split(max(1, _TEMPORARY // (4 * weight.shape[1]))), torch.float32
    columns = [by(part.to(kind), x.to(kind)) for part in parts]
    result = (columns[0] if len(columns) == 1 else torch.cat(columns)).t().to(dtype or x.dtype)
    return result if bias is None else result + bias


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x [M, K] times the transpose of a weight [N, K] of the same dtype. The result is in ``dtype`` or that of
    ``x``."""
    result = linear(x, weight).to(dtype or x.dtype)
    return result if bias is None else result + bias


TOGETHER: dict[Form, Callable[[Tensor, Sequence[Tensor]], Tensor]] = {
    "packed": packed_linear,
    "template": template_linear,
}
ALONE: dict[Form, Callable[..., Tensor]] = {
    "swapped": swapped,
    "onednn": by_onednn,
    "onednn swapped": functools.partial(swapped, by=linear),
}


def possible_forms(linears: Linears, pack_weights: bool = False) -> list[Form]:
    """The forms that a product can take here, and that may be the fastest."""
    if linears.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return ["aten"]  # all others compute in fp32
    many, whole = linears.rows > MOST_STREAMED, linears.stored == linears.dtype
    able = can_multiply(linears.dtype) and whole
    found: dict[Form, bool] = {
        "aten": True,
        "stream": not many,
        "swapped": linears.rows > 1,
        "onednn": many and able and linears.dtype == torch.float32,  # which ATen takes in less
        "onednn swapped": many and can_multiply(torch.float32),
        "packed": pack_weights and many and able,
        "template": pack_weights and many and whole and has_template(linears.dtype) and linears.ins % 4 == 0,
    }
    return [form for form, possible in found.items() if possible]


def part_size(outs: Sequence[int]) -> int:
    """Rows of a part, so that all products with one ``x`` have about ``CHUNKS`` parts together: if possible a number
    that divides all their weights."""
    wanted, shared = max(1, sum(outs) // CHUNKS), math.gcd(*outs)
    size = min((d for d in range(1, shared + 1) if shared % d == 0), key=lambda d: abs(math.log(d / wanted)))
    return size if wanted / 2 <= size <= wanted * 2 else wanted


class LowerLinears(CustomGraphPass):
    """Rewrite products in the forms that are listed for them; the others stay as they are.

    Before: ``mm(x, permute(w))``, with ``w`` an input of the graph, maybe converted to the dtype of ``x``. After: sums
    of elementwise products, see ``stream``, the product of the transposes, see ``swapped``, a call of oneDNN, see
    ``by_onednn``, or for those of one input together one product with a copy of their weights.

    Safe because all compute the same sums of products; weights are neither kept in a copy nor reordered, but for those
    of the forms in ``TOGETHER``.
    """

    def __init__(self, forms: Mapping[Linears, Form]) -> None:
        self.forms = {linears: form for linears, form in forms.items() if form != "aten"}

    def uuid(self) -> object:
        """What Inductor's caches tell code made with this pass by."""
        able = [can_multiply(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]  # of this processor
        forms = sorted((str(linears), form) for linears, form in self.forms.items())
        return get_hash_for_files((__file__, *_OPS)), torch.backends.cpu.get_cpu_capability(), able, forms

    def __call__(self, graph: Graph) -> None:
        by_input: dict[tuple[Node, torch.dtype], list[Node]] = defaultdict(list)
        for target in (aten.mm.default, aten.addmm.default):
            for node in graph.find_nodes(op="call_function", target=target):
                *_, x, transposed = node.args
                weight = _weight_of(transposed)
                if weight is not None and not node.kwargs:
                    by_input[_origin(x), _value(weight).dtype].append(node)
        for (_, stored), products in by_input.items():
            x, outs = products[0].args[-2], sorted(_value(node).shape[1] for node in products)
            (rows, ins), dtype = _value(x).shape, _value(x).dtype
            form = self.forms.get(Linears(rows_like(rows), tuple(outs), ins, dtype, stored))
            if form in TOGETHER:
                _write_together(graph, products, TOGETHER[form])
            elif form is not None:
                if form == "stream":
                    shared = _realized(graph, x, (rows, ins))
                for node in products:
                    *bias, x, transposed = node.args
                    if form == "stream":
                        x, written = shared, functools.partial(_streamed, size=part_size(outs), dtype=dtype)
                    else:
                        written = functools.partial(ALONE[form], dtype=dtype)
                    replace_traced(graph, node, [x, _weight_of(transposed), *bias], written)


def _streamed(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, size: int, dtype: torch.dtype) -> Tensor:
    return stream(x, weight.split(size), bias, dtype)


def _write_together(
    graph: Graph, products: Sequence[Node], written: Callable[[Tensor, Sequence[Tensor]], Tensor]
) -> None:
    """One product for all, of which each takes its columns."""
    rows, ins = _value(products[0].args[-2]).shape

    def whole(*operands: Tensor) -> Tensor:
        x, *weights = operands
        return written(x.reshape(rows, ins), weights)

    weights = [_weight_of(node.args[-1]) for node in products]
    result = _insert_behind(graph, products[0].args[-2], weights, whole)
    start = 0
    for node in products:
        end = start + _value(node).shape[1]
        replace_traced(graph, node, [result, *node.args[:-2]], functools.partial(_columns, start=start, end=end))
        start = end


def _columns(result: Tensor, bias: Tensor | None = None, *, start: int, end: int) -> Tensor:
    return result[:, start:end] if bias is None else result[:, start:end] + bias


def _realized(graph: Graph, x: Node, shape: tuple[int, int]) -> Node:
    """``x`` in fp32 and in memory. Inductor would compute it anew for each row of a weight, a norm's root and all."""
    return _insert_behind(graph, x, [], lambda value: in_memory(value.float()).view(shape))


def _insert_behind(graph: Graph, x: Node, others: list[Node], function: Callable[..., Tensor]) -> Node:
    """``function`` of what ``x`` is a view of, as early as that is there, and of ``others``, which are inputs."""
    origin = _origin(x)
    after = graph.find_nodes(op="placeholder")[-1] if origin.op == "placeholder" else origin
    return insert_traced(graph, after, [origin, *others], function)


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
