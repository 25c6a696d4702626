"""lower_linears: products of few rows with weights, those of one input together, in the form that is fastest for them.

Runs inside Inductor, on the ATen graph of a piece: there quantised weights have become plain tensors too.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tide_compile.kernels.cpu.onednn import can_multiply
from tide_compile.passes.aten.gemm_forms import ALONE, TOGETHER, Form, Linears, part_size, rows_like, stream
from tide_compile.passes.aten.hash_of_sources import hash_of_sources
from tide_compile.passes.graph.fx_tools import insert_traced, replace_traced
from tide_compile.torch_internals.fx import CustomGraphPass, realize

aten, prims = torch.ops.aten, torch.ops.prims


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
        return hash_of_sources(), torch.backends.cpu.get_cpu_capability(), able, forms

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
    return _insert_behind(graph, x, [], lambda value: realize(value.float()).view(shape))


def _insert_behind(graph: Graph, x: Node, others: list[Node], function: Callable[..., Tensor]) -> Node:
    """``function`` of what ``x`` is a view of, as early as that is there, and of ``others``, which are inputs."""
    origin = _origin(x)
    after = graph.find_nodes(op="placeholder")[-1] if origin.op == "placeholder" else origin
    return insert_traced(graph, after, [origin, *others], function)


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
