"""What ATen operators do to rows: given the rows of an operand, which dimension of the result holds them, and how the
operator is called on some of them.

A *row* is a token of the call. Its axis is followed from the hidden state [B, S, H] through views, so nothing is
guessed from sizes. An operator without a rule, or one that mixes rows, must see all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tide_compile.passes.graph.axis import Axis, axis_after_view
from tide_compile.passes.graph.fx_tools import value_of

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


Rule = Callable[[Node, dict[Node, Axis]], "Call | None"]


@dataclass(frozen=True, slots=True)
class Call:
    """How to call an operator on some rows: ``axis`` of its result; ``taken`` maps tensor operands to the axis along
    which they are needed on these rows (the others are used whole); ``shape`` replaces its sizes, with None for the
    number of rows; ``causal`` asks for an explicit causal mask."""

    axis: Axis
    taken: dict[Node, Axis]
    shape: tuple[object, ...] | None = None
    causal: bool = False


def call_on_rows(node: Node, axes: dict[Node, Axis]) -> Call | None:
    """The call of ``node`` on some rows, where ``axes`` knows those of its operands; None if it must see all rows."""
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _UNTAGGED:
        return _pointwise(node, axes)
    rule = _RULES.get(node.target)
    return rule(node, axes) if rule is not None else None


def whole_operands(node: Node) -> list[Node]:
    """Operands of which attention needs all rows whatever is asked of it: keys and values."""
    if node.target is ATTENTION:
        return [n for n in node.args[1:3] if isinstance(n, Node)]
    return [node.args[1]] if node.target is aten.matmul.default and isinstance(node.args[1], Node) else []


def _rank(node: Node) -> int:
    return value_of(node).dim()


def _is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value_of(value), torch.Tensor)


def _aligned(operands: list[object], axis: Axis, rank: int) -> dict[Node, Axis] | None:
    """The operands that have rows along ``axis`` of a result of ``rank`` dimensions after broadcasting."""
    taken = {}
    for operand in filter(_is_tensor, operands):
        shift = rank - _rank(operand)
        row = axis.row - shift
        if row >= 0 and not statically_known_true(value_of(operand).shape[row] == 1):
            taken[operand] = axis.moved(lambda d, shift=shift: d - shift)
    return taken


def _pointwise(node: Node, axes: dict[Node, Axis]) -> Call | None:
    rank = value_of(node).dim()
    operands = [*node.args, *node.kwargs.values()]
    found = {axes[n].moved(lambda d, n=n: d + rank - _rank(n)) for n in filter(_is_tensor, operands) if n in axes}
    if len(found) != 1:
        return None
    (axis,) = found
    return Call(axis, _aligned(operands, axis, rank))


def _unary(node: Node, axes: dict[Node, Axis]) -> Call:
    (source,) = node.args[:1]
    return Call(axes[source], {source: axes[source]})


def _dropout(node: Node, axes: dict[Node, Axis]) -> Call | None:
    return None if node.args[2] and node.args[1] else _unary(node, axes)


def _times_weights(position: int) -> Rule:
    """x @ W: ``position`` of x among the arguments; rows are anywhere but in the last dimension."""

    def rule(node: Node, axes: dict[Node, Axis]) -> Call | None:
        source = node.args[position]
        axis = axes.get(source)
        others = [n for n in node.args if n is not source and n in axes]
        return None if axis is None or others or _rank(source) - 1 in axis.dims else Call(axis, {source: axis})

    return rule


def _matmul(node: Node, axes: dict[Node, Axis]) -> Call | None:
    left, right = node.args
    axis, rank = axes.get(left), _rank(left)
    if axis is None or rank - 1 in axis.dims:
        return None
    if _rank(right) == 2 or axis.row == rank - 2:
        return Call(axis, {left: axis})
    return Call(axis, _aligned([left, right], axis, rank))


def _attention(node: Node, axes: dict[Node, Axis]) -> Call | None:
    query, key, value, mask, *rest = (*node.args, *[None] * (6 - len(node.args)))
    axis, rank = axes.get(query), _rank(query)
    causal = bool(rest[1] or node.kwargs.get("is_causal"))
    mask = mask if mask is not None else node.kwargs.get("attn_mask")
    if axis is None or rank - 1 in axis.dims:
        return None
    if axis.row == rank - 2:
        return Call(axis, {query: axis, **_aligned([mask], axis, rank)}, causal=causal)
    return Call(axis, _aligned([query, key, value, mask], axis, rank))


def _last_dims(node: Node, axes: dict[Node, Axis]) -> Call | None:
    source, sizes = node.args[:2]
    axis = axes[source]
    return Call(axis, {source: axis}) if max(axis.dims) < _rank(source) - len(sizes) else None


def _reduction(node: Node, axes: dict[Node, Axis]) -> Call | None:
    source = node.args[0]
    axis, rank = axes[source], _rank(source)
    dims = node.args[1] if len(node.args) > 1 else None
    if dims is None or dims == []:
        return None
    gone = {d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}
    if gone & axis.dims:
        return None
    result = value_of(node)
    if result.dim() < rank:
        axis = axis.moved(lambda d: d - sum(g < d for g in gone))
    return Call(axis, {source: axes[source]})


def _reshape(node: Node, axes: dict[Node, Axis]) -> Call | None:
    source = node.args[0]
    axis = axis_after_view(value_of(source).shape, value_of(node).shape, axes[source])
    if axis is None:
        return None
    sizes = list(node.args[1]) if len(node.args) > 1 and isinstance(node.args[1], list | tuple) else [None]
    if len(sizes) != value_of(node).dim():  # flatten
        sizes = list(value_of(node).shape)
        if any(not isinstance(s, int) for i, s in enumerate(sizes) if i not in axis.dims):
            return None
    merged = axis.row == axis.batch
    sizes[axis.row] = -1 if merged and -1 not in sizes[: axis.row] + sizes[axis.row + 1 :] else None
    return None if merged and sizes[axis.row] is None else Call(axis, {source: axes[source]}, tuple(sizes))


def _expand(node: Node, axes: dict[Node, Axis]) -> Call | None:
    source, sizes = node.args[:2]
    shift = len(sizes) - _rank(source)
    axis = axes[source].moved(lambda d: d + shift)
    sizes = list(sizes)
    sizes[axis.row] = -1
    return Call(axis, {source: axes[source]}, tuple(sizes))


def _transpose(node: Node, axes: dict[Node, Axis]) -> Call:
    source, a, b = node.args
    a, b = a % _rank(source), b % _rank(source)
    return Call(axes[source].moved(lambda d: {a: b, b: a}.get(d, d)), {source: axes[source]})


def _permute(node: Node, axes: dict[Node, Axis]) -> Call:
    source, order = node.args
    order = [d % len(order) for d in order]
    return Call(axes[source].moved(order.index), {source: axes[source]})


def _unsqueeze(node: Node, axes: dict[Node, Axis]) -> Call:
    source, dim = node.args
    dim %= _rank(source) + 1
    return Call(axes[source].moved(lambda d: d + (d >= dim)), {source: axes[source]})


def _along(keeps: bool) -> Rule:
    """Cuts along one dimension (slice, select, split); ``keeps`` the dimension or drops it."""

    def rule(node: Node, axes: dict[Node, Axis]) -> Call | None:
        source = node.args[0]
        position = 1 if node.target in _DIM_FIRST else 2
        dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", 0)
        dim %= _rank(source)
        axis = axes[source]
        if dim in axis.dims:
            return None
        return Call(axis if keeps else axis.moved(lambda d: d - (d > dim)), {source: axis})

    return rule


def _cat(node: Node, axes: dict[Node, Axis]) -> Call | None:
    parts = node.args[0]
    rank = value_of(node).dim()
    dim = (node.args[1] if len(node.args) > 1 else 0) % rank
    found = {axes[n] for n in parts if n in axes}
    if len(found) != 1 or dim in next(iter(found)).dims or any(_rank(n) != rank for n in parts):
        return None
    (axis,) = found
    return Call(axis, _aligned(parts, axis, rank))


_UNTAGGED = {
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.type_as.default,
}  # pointwise as well
_DIM_FIRST = {aten.slice.Tensor, aten.select.int, aten.unbind.int, aten.squeeze.dim}
_RULES: dict[object, Rule] = {
    operator.getitem: _unary,
    ATTENTION: _attention,
    aten.linear.default: _times_weights(0),
    aten.mm.default: _times_weights(0),
    aten.addmm.default: _times_weights(1),
    aten.matmul.default: _matmul,
    aten.dropout.default: _dropout,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.expand.default: _expand,
    aten.cat.default: _cat,
    **dict.fromkeys((aten.to.dtype, aten.to.dtype_layout, aten.contiguous.default, aten.clone.default,
                     aten.detach.default, aten.alias.default, aten._to_copy.default), _unary),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _last_dims),
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.softmax.int, aten._softmax.default,
                     aten.var.dim, aten.linalg_vector_norm.default), _reduction),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
                     aten.unflatten.int), _reshape),
    **dict.fromkeys((aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default,
                     aten.split.sizes), _along(keeps=True)),
    **dict.fromkeys((aten.select.int, aten.unbind.int, aten.squeeze.dim), _along(keeps=False)),
}  # fmt: skip
