"""compact_rows: the segment in which rows that have left cost their K and V and nothing else."""

from __future__ import annotations

import logging
import math
import operator
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tide_compile.passes.aten.gemm_forms import FEW_ROWS
from tide_compile.passes.frozen_states import add_frozen_states
from tide_compile.passes.graph.axis import Axis
from tide_compile.passes.graph.compaction_cost import FLOPS, KEYS, MOVED, keys_of
from tide_compile.passes.graph.cost import flops_of
from tide_compile.passes.graph.fx_tools import add_placeholder, mutated_arguments, remove_dead, storage_of, value_of
from tide_compile.passes.graph.retrace import retrace
from tide_compile.passes.graph.row_rules import ATTENTION, Call, call_on_rows, whole_operands
from tide_compile.passes.graph.structure_key import structure_key
from tide_compile.passes.mask_rows import with_running_rows
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import ACTIVE, HIDDEN, ROWS, Piece, Program, segment_name

log = logging.getLogger("tide_compile")
aten = torch.ops.aten
_TO_MEMORY = {aten.cat.default, aten.slice.Tensor}  # of the keys and values of several calls: no rows of this call


def compact_rows(program: Program, plan: Plan) -> Program:
    """Add ``compact`` to every segment that can see exited rows and whose layers treat rows alike.

    Before: ``h' = layer(h)`` on [B, S, H]. After: with ``rows`` the indices of n tokens, all active ones among them,
    queries, attention, MLP and residual stream are [.., n, H]; keys, values and whatever else is written to a cache
    are computed for all rows, from ``h`` scattered back over the states of rows that have left at each boundary. Every
    value that crosses from the first set of nodes to the second is gathered (norms, cos and sin, masks), and
    ``is_causal`` becomes a mask.

    1. Tokens of one sequence, or of several with a row of indices [B, n] each: along the sequence.
    2. One token for each of several sequences (decoding): along the batch, caches too.

    Safe because a node is computed on some rows only by a rule that says what its operator does to rows
    (``row_rules``). A segment with an operator that has no such rule, or mixes rows in another way than attention (its
    padding matters, see ``mask_rows``), gets no compact form, and that is logged. With ``compaction="auto"`` none does
    on a CPU for so few rows that products read weights at the speed of the memory (``lower_linears``): weights are read
    whatever is left out, and products of a number of rows that only the run tells are slower.
    """
    wish = plan.settings.compaction
    if plan.single_row or wish == "never" or (wish == "auto" and _streamed(plan.boundaries.entering_value)):
        return program
    segments, done = list(program.segments), {}
    for index, segment in enumerate(program.segments):
        if not plan.follows_checkpoint(index):
            continue
        name = segment.plain.name
        piece, _ = with_running_rows(segment.plain, plan, index)
        piece, states = add_frozen_states(piece, plan, index)
        key = structure_key(piece.graph)
        if key not in done:
            try:
                done[key] = _compact(piece, states, plan, index)
            except Exception as error:  # the masked segment is as right, and a model must not fail for want of this one
                log.warning("no compact form of segments like %s, they are masked: %r", name, error)
                done[key] = "the part that is not understood"
        if isinstance(done[key], str):
            log.debug("%s is masked, never compacted: %s sees all rows", name, done[key])
            continue
        graph, kept = done[key]
        names = (*piece.inputs, ROWS)
        taken = tuple(names[i] for i in kept)
        compact = Piece(segment_name(index, "compact"), graph, taken, piece.outputs, "after an exit")
        segments[index] = replace(segment, compact=compact)
    return replace(program, segments=tuple(segments))


def _streamed(hidden: torch.Tensor) -> bool:
    rows = hidden.shape[:-1]
    return hidden.device.type == "cpu" and all(isinstance(n, int) for n in rows) and math.prod(rows) <= FEW_ROWS


def axis_of(hidden: torch.Tensor) -> Axis:
    """Along which axis of hidden states [B, S, H] rows are left out."""
    batch, length = hidden.shape[:2]
    if isinstance(length, int) and length == 1:
        return Axis(0)
    return Axis(1) if isinstance(batch, int) and batch == 1 else Axis(1, 0)


def _compact(piece: Piece, states: list[Node], plan: Plan, segment: int) -> tuple[GraphModule, list[int]] | str:
    """The compact graph and which of its possible inputs it takes, or the operator that mixes rows."""
    boundaries = [plan.boundaries.leaving[layer] for layer in plan.segment_layers(segment)]
    gm, watched = retrace(piece.graph, [*boundaries, *(n.name for n in states)])
    left = dict(zip(watched[: len(states)], watched[len(states) :], strict=True))
    placeholders = gm.graph.find_nodes(op="placeholder")
    frozen, active = (placeholders[piece.inputs.index(name)] for name in (HIDDEN, ACTIVE))
    hidden = value_of(frozen)
    axis = axis_of(hidden)
    shape = [hidden.shape[d] for d in sorted(axis.dims)]
    rows = add_placeholder(gm.graph, ROWS, hidden.new_empty(shape, dtype=torch.int64))
    sets = _RowSets.of(gm.graph, frozen, left, axis)
    if sets.mixing is not None:
        return sets.mixing
    graph = _Rewriter(sets, frozen, active, rows).run(gm.graph)
    compacted = GraphModule(gm, graph)
    order = [n.name for n in graph.find_nodes(op="placeholder")]
    remove_dead(compacted)
    return compacted, [order.index(n.name) for n in graph.find_nodes(op="placeholder")]


@dataclass(slots=True)
class _RowSets:
    """``whole``: nodes computed for all rows. ``calls``: how to call the others. ``axes``: where rows are, for every
    value in which each row stands for itself. ``boundaries``: the residual stream behind each layer, with the state of
    rows that have left there. ``mixing``: the operator that forbids it, or None."""

    boundaries: dict[Node, Node]
    axis: Axis
    axes: dict[Node, Axis] = field(default_factory=dict)
    calls: dict[Node, Call] = field(default_factory=dict)
    whole: set[Node] = field(default_factory=set)
    mixing: str | None = None

    @classmethod
    def of(cls, graph: Graph, frozen: Node, boundaries: dict[Node, Node], axis: Axis) -> _RowSets:
        sets = cls(boundaries, axis, {frozen: axis})
        stops, roots, dependent = {*boundaries, frozen}, set(boundaries.values()), {frozen}
        for node in graph.nodes:
            operands = node.all_input_nodes
            if dependent.isdisjoint(operands):
                continue
            dependent.add(node)
            written = mutated_arguments(node)
            if written or node.op == "output":
                roots |= set(operands)
            else:
                sets._follow(node, operands)
            if node in sets.calls:
                call = sets.calls[node]
                roots |= {n for n in whole_operands(node) if n not in call.taken}
                if axis.row > 0 and any(n in dependent and n not in sets.axes for n in call.taken):
                    sets.mixing = str(node.target)
            elif node in boundaries:
                sets.mixing = str(node.target)
        while roots:
            node = roots.pop()
            if node not in sets.whole and node not in stops and node in dependent:
                sets.whole.add(node)
                roots |= set(node.all_input_nodes)
        sets.whole |= {n for n in graph.nodes if n.target is operator.getitem and n.args[0] in sets.whole}
        return sets

    def _follow(self, node: Node, operands: list[Node]) -> None:
        if self.axes.keys().isdisjoint(operands):
            return
        call = call_on_rows(node, self.axes)
        if call is not None:
            self.calls[node], self.axes[node] = call, call.axis
        elif node.target not in _TO_MEMORY and getattr(node.target, "namespace", "") != "tide":
            self.mixing = str(node.target)


class _Rewriter:
    """Copies a graph; ``all`` and ``some`` hold each old node's copy for all rows and for the chosen ones."""

    def __init__(self, sets: _RowSets, frozen: Node, active: Node, rows: Node) -> None:
        self.sets, self.frozen, self.active, self.rows = sets, frozen, active, rows
        self.graph = Graph()
        self.all: dict[Node, Node] = {}
        self.some: dict[tuple[Node, Axis], Node] = {}

    def run(self, old: Graph) -> Graph:
        written = {storage_of(a) for n in old.nodes for a in mutated_arguments(n)} - {None}
        self.lasting = {n for n in old.nodes if storage_of(n) not in written}  # a gather of them stays valid
        prepared = False
        for node in old.nodes:
            if node.op not in ("placeholder", "get_attr") and not prepared:
                self._prepare()
                prepared = True
            if node in self.sets.calls and node not in self.sets.whole:
                self._on_some_rows(node, self.sets.calls[node])
            else:
                self.all[node] = self.graph.node_copy(node, self.all.__getitem__)
                if node.op == "call_function":
                    self.all[node].meta[FLOPS] = (flops_of(node), False)
            if node in self.sets.boundaries:
                self._meet(node)
        return self.graph

    def _prepare(self) -> None:
        self.count = self._call(aten.sym_size.int, self.all[self.rows], len(self.sets.axis.dims) - 1)
        flags = self._taken(self.active, self.sets.axis)
        self.flags = self._call(aten.unsqueeze.default, flags, -1)

    def _on_some_rows(self, node: Node, call: Call) -> None:
        taken = {n: self._taken(n, axis) for n, axis in call.taken.items()}
        args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: taken[n] if n in taken else self.all[n])
        target = node.target
        if call.shape is not None:
            sizes = [self.count if s is None else self.all.get(s, s) if isinstance(s, Node) else s for s in call.shape]
            target = aten.expand.default if target is aten.expand.default else aten.reshape.default
            args, kwargs = (args[0], sizes), {}
        if call.causal:
            mask, dropout = self._causal_mask(node.args[1], call.axis), args[4] if len(args) > 4 else 0.0
            kwargs = {n: v for n, v in kwargs.items() if n not in ("is_causal", "attn_mask", "dropout_p")}
            args = (*args[:3], mask, dropout, False)
        result = self.graph.call_function(target, tuple(args), kwargs)
        result.meta[FLOPS] = (flops_of(node), True)
        if target is ATTENTION:
            moved, read = keys_of(node)
            some = node.args[1] in taken
            result.meta[KEYS] = (moved, read if some else moved, some)
        self.some[node, call.axis] = result

    def _meet(self, boundary: Node) -> None:
        """Rows that have left keep their state; the full stream is theirs with the others written over it."""
        axis, state = self.sets.axis, self.sets.boundaries[boundary]
        merged = self._call(aten.where.self, self.flags, self.some[boundary, axis], self._taken(state, axis))
        self.some[boundary, axis] = merged
        frozen = self.all[state]
        if axis.batch is None:
            whole = self._call(aten.index_copy.default, frozen, axis.row, self.all[self.rows], merged)
        else:
            index = self._call(aten.unsqueeze.default, self.all[self.rows], -1)
            index = self._call(aten.expand.default, index, [-1, -1, value_of(self.frozen).shape[-1]])
            whole = self._call(aten.scatter.src, frozen, axis.row, index, merged)
        whole.meta[MOVED] = value_of(self.frozen)
        self.all[boundary] = whole

    def _taken(self, node: Node, axis: Axis) -> Node:
        """``node`` on the chosen rows, which it has along ``axis``."""
        if (node, axis) in self.some:
            return self.some[node, axis]
        source, row = self.all[node], axis.row
        if axis.batch is None:
            result = self._call(aten.index_select.default, source, row, self.all[self.rows])
        elif axis.batch == row:
            result = self._call(aten.index_select.default, source, row, self._flat_index())
        else:
            for _ in range(-axis.batch):  # the value is the same for all sequences and has no dimension for them
                source, row = self._call(aten.unsqueeze.default, source, 0), row + 1
            result = self._gathered(source, (*[1] * -axis.batch, *value_of(node).shape), max(axis.batch, 0), row)
        result.meta[MOVED] = value_of(node)
        if node in self.lasting:
            self.some[node, axis] = result
        return result

    def _gathered(self, source: Node, shape: tuple[int | torch.SymInt, ...], batch: int, row: int) -> Node:
        """``source`` of ``shape``, with sequences (or one for all of them) and rows at these dimensions, on the rows of
        each sequence. Not by ``take_along_dim``, which takes the sizes of ``source`` for constants."""
        index = self.all[self.rows]
        for dim in range(len(shape)):
            if dim not in (batch, row):
                index = self._call(aten.unsqueeze.default, index, dim)
        sequences = self._call(aten.sym_size.int, self.all[self.rows], 0)
        source = self._call(aten.expand.default, source, [sequences if d == batch else -1 for d in range(len(shape))])
        kept = (batch, row)
        sizes = [
            -1 if d in kept else s if isinstance(s, int) else self._call(aten.sym_size.int, source, d)
            for d, s in enumerate(shape)
        ]
        return self._call(aten.gather.default, source, row, self._call(aten.expand.default, index, sizes))

    def _flat_index(self) -> Node:
        """The indices into [B * S]."""
        size = [self._call(aten.sym_size.int, self.all[self.frozen], d) for d in (0, 1)]
        device = value_of(self.frozen).device
        starts = self._call(aten.arange.start_step, 0, self._call(operator.mul, *size), size[1], device=device)
        starts = self._call(aten.unsqueeze.default, starts, -1)
        return self._call(aten.reshape.default, self._call(aten.add.Tensor, self.all[self.rows], starts), [-1])

    def _causal_mask(self, key: Node, axis: Axis) -> Node:
        """[n, L] or [B, 1, n, L]: a query sees the keys up to its own place."""
        length = self._call(aten.sym_size.int, self.all[key], value_of(key).dim() - 2)
        places = self._call(aten.arange.default, length, device=value_of(key).device)
        index = self.all[self.rows]
        if axis.batch is not None:
            index = self._call(aten.unsqueeze.default, index, 1)
        return self._call(aten.ge.Tensor, self._call(aten.unsqueeze.default, index, -1), places)

    def _call(self, target: object, *args: object, **kwargs: object) -> Node:
        return self.graph.call_function(target, args, kwargs)
