"""gemm_forms: the forms that a product with weights can take on a CPU, and which are possible for which product."""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tide_compile.kernels.cpu.linear import linear, packed_linear, template_linear
from tide_compile.kernels.cpu.onednn import can_multiply
from tide_compile.kernels.few_rows import FEW_ROWS
from tide_compile.passes.graph.fx_tools import value_of
from tide_compile.torch_internals.fx import LINEAR

log = logging.getLogger("tide_compile")
aten = torch.ops.aten

Form = Literal["aten", "stream", "swapped", "onednn", "onednn swapped", "packed", "template"]
CHUNKS = 4  # of a weight that are read side by side: accumulators that do not wait for each other
MANY = 256  # rows that stand for any larger number of them, and for one that only the run tells
_TEMPORARY = 1 << 24  # bytes of a weight that are there in fp32 at a time


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
    """Rows that are measured in the place of so many: more than ``FEW_ROWS`` are rounded up to a power of two."""
    if not isinstance(rows, int):
        return MANY
    return rows if rows <= FEW_ROWS else min(MANY, 1 << (rows - 1).bit_length())


def find_linears(graph: Graph) -> set[Linears]:
    """The products on a CPU in a Dynamo graph, or one that was traced anew (``retrace``)."""
    by_input: dict[tuple[Node, torch.dtype], list[Tensor]] = defaultdict(list)
    for target in (LINEAR, aten.linear.default):
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


def possible_forms(linears: Linears, pack_weights: bool = False, template: bool = True) -> list[Form]:
    """The forms that a product can take here, and that may be the fastest. ``template``: also Inductor's."""
    if linears.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return ["aten"]  # all others compute in fp32
    many, whole = linears.rows > FEW_ROWS, linears.stored == linears.dtype
    able = can_multiply(linears.dtype) and whole
    found: dict[Form, bool] = {
        "aten": True,
        "stream": not many,
        "swapped": linears.rows > 1,
        "onednn": many and able and linears.dtype == torch.float32,  # which ATen takes in less
        "onednn swapped": many and can_multiply(torch.float32),
        "packed": pack_weights and many and able,
        "template": pack_weights
        and template
        and many
        and whole
        and has_template(linears.dtype)
        and linears.ins % 4 == 0,
    }
    return [form for form, possible in found.items() if possible]


def part_size(outs: Sequence[int]) -> int:
    """Rows of a part, so that all products with one ``x`` have about ``CHUNKS`` parts together: if possible a number
    that divides all their weights."""
    wanted, shared = max(1, sum(outs) // CHUNKS), math.gcd(*outs)
    size = min((d for d in range(1, shared + 1) if shared % d == 0), key=lambda d: abs(math.log(d / wanted)))
    return size if wanted / 2 <= size <= wanted * 2 else wanted


@functools.cache
def has_template(dtype: torch.dtype) -> bool:
    """Whether Inductor has its template, and inner loops for products in ``dtype`` on this processor."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    try:
        import tide_compile.kernels.cpu.gemm_template  # noqa: F401 (only here: its many imports are not for other processes)
    except ImportError as error:
        log.warning("products do not try Inductor's C++ GEMM template, which this torch has elsewhere: %s", error)
        return False
    return True
