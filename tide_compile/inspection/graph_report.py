"""GraphReport: what the passes made of one graph, as plain data. Legend: N layers."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

from tabulate import tabulate
from torch.fx import Graph, GraphModule, Node

from tide_compile.passes.find_layers import layer_of_nodes
from tide_compile.passes.graph.structure_key import structure_key
from tide_compile.passes.plan import Plan
from tide_compile.passes.program import Piece, Program
from tide_compile.passes.run import PassEvent
from tide_compile.torch_internals.fx import OpOverload

_NO_CALL = ("placeholder", "output", "get_attr")
_SHOWN = 3  # operators, apart from tide's own, in the line of a pass


@dataclass(frozen=True, slots=True)
class Step:
    """One pass: nodes and pieces before and after, and the operators that it added or took away, by name."""

    name: str
    seconds: float
    nodes: tuple[int, int]
    pieces: tuple[int, int]
    operators: dict[str, int]

    def __str__(self) -> str:
        parts = [f"nodes {self.nodes[0]} -> {self.nodes[1]}"]
        if self.pieces[0] != self.pieces[1]:
            parts.append(f"pieces {self.pieces[0]} -> {self.pieces[1]}")
        own = {n: d for n, d in self.operators.items() if n.startswith("tide.")}
        others = sorted((n for n in self.operators if n not in own), key=lambda n: -abs(self.operators[n]))
        parts += [f"{self.operators[n]:+d} {n}" for n in (*own, *others[:_SHOWN])]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer: nodes in Dynamo's graph; its segment; the threshold of the checkpoint behind it (None: no checkpoint);
    the earlier segment that its own shares code with (None: it is the first of its kind); nodes of the slice that
    writes its keys and values for tokens that have left (None: nobody can have left before it)."""

    layer: int
    nodes: int
    segment: int
    threshold: float | None
    twin_of: int | None
    kv_nodes: int | None


@dataclass(frozen=True, slots=True)
class PieceRow:
    """A piece: calls in its graph, and the earlier piece whose compiled code it shares, if any."""

    name: str
    nodes: int
    twin_of: str | None


@dataclass(frozen=True, slots=True)
class SegmentRow:
    """The pieces of a segment that there are, by the fields of ``Segment``."""

    plain: PieceRow
    masked: PieceRow | None
    compact: PieceRow | None
    project: PieceRow | None
    fill: PieceRow | None


@dataclass(slots=True)
class GraphReport:
    """An observer of the passes. ``shape`` is that of the hidden states, (B, S, H), symbols as text; ``error`` the
    reason why the graph is not cut, or None; ``notes`` what else there is to know."""

    shape: tuple[str, ...] = ()
    num_layers: int = 0
    checkpoints: tuple[int, ...] = ()
    kv_cache_strategy: str = ""
    steps: list[Step] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    pieces: list[PieceRow] = field(default_factory=list)
    prologue: PieceRow | None = None
    segments: list[SegmentRow] = field(default_factory=list)
    epilogue: PieceRow | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)
    _owner: dict[str, int] = field(default_factory=dict)
    _before: tuple[int, Counter] | None = None

    def __call__(self, event: PassEvent) -> None:
        graphs = _graphs_of(event.program)
        now = len(graphs), Counter(_name_of(n) for g in graphs for n in g.nodes if n.op not in _NO_CALL)
        before = self._before or now
        change = {n: d for n in {**before[1], **now[1]} if (d := now[1][n] - before[1][n])}
        nodes = event.nodes_before, event.nodes_after
        self.steps.append(Step(event.name, event.seconds, nodes, (before[0], now[0]), change))
        self._before = now
        if isinstance(event.program, GraphModule) and event.plan.layers and not self._owner:
            self.num_layers = len(event.plan.layers)
            owner = layer_of_nodes(event.program.graph, event.plan.layers)
            self._owner = {n.name: layer for n, layer in owner.items() if n.op not in _NO_CALL}
        if event.plan.boundaries and not self.shape:
            self.shape = tuple(map(str, event.plan.boundaries.entering_value.shape))

    def planned(self, program: Program, plan: Plan) -> None:
        """Take what the table needs from the finished program, before it is compiled."""
        self.checkpoints, self.kv_cache_strategy = plan.checkpoints, plan.settings.kv_cache_strategy
        rows = _rows_of(program)
        self.pieces = list(rows.values())
        self.prologue, self.epilogue = rows[program.prologue], rows[program.epilogue]
        twins = _twins_of(program)
        sizes, slices = Counter(self._owner.values()), self._slices(program)
        for index, segment in enumerate(program.segments):
            pieces = (segment.plain, segment.masked, segment.compact, segment.project, segment.fill)
            self.segments.append(SegmentRow(*(None if piece is None else rows[piece] for piece in pieces)))
            for layer in plan.segment_layers(index):
                threshold = plan.settings.routers[layer]["threshold"].item() if layer in plan.checkpoints else None
                kv = slices[layer] if plan.follows_checkpoint(index) else None
                self.layers.append(LayerRow(layer, sizes[layer], index, threshold, twins[index], kv))

    def _slices(self, program: Program) -> Counter:
        fills = (segment.fill.graph.graph for segment in program.segments if segment.fill is not None)
        largest = max(fills, key=lambda g: len(g.nodes), default=Graph())
        return Counter(self._owner.get(n.name) for n in largest.nodes if n.op not in _NO_CALL)

    def table(self) -> str:
        """The plan, a line per layer."""
        headers = ["layer", "nodes", "segment", "twin of", "checkpoint", "K/V slice, nodes"]
        rows = [
            [
                row.layer, row.nodes, row.segment, "" if row.twin_of is None else f"segment {row.twin_of}",
                "" if row.threshold is None else f"leave above {row.threshold:.3g}",
                "" if row.kv_nodes is None else row.kv_nodes,
            ]
            for row in self.layers
        ]  # fmt: skip
        return tabulate(rows, headers)

    def summary(self) -> str:
        """The plan in a few lines."""
        if self.error is not None:
            return f"not cut: {self.error}"
        after = ", ".join(map(str, self.checkpoints))
        distinct = sum(p.twin_of is None for p in self.pieces)
        lines = [
            f"{len(self.layers)} layers, hidden states [{', '.join(self.shape)}]",
            f"checkpoints after layers {after}" if after else "no checkpoints: every token runs all layers",
            f"{len(self.pieces)} pieces, {distinct} of them distinct",
            *self.notes,
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        if self.error is not None:
            return self.summary()
        passes = "\n".join(f"{s.name}: {s}" for s in self.steps)
        return f"{self.summary()}\n\n{self.table()}\n\n{passes}"

    def to_dict(self) -> dict[str, object]:
        """The same as plain values."""
        names = ("shape", "num_layers", "checkpoints", "kv_cache_strategy", "error", "notes")
        rows = {n: [asdict(row) for row in getattr(self, n)] for n in ("layers", "pieces", "steps")}
        return {n: getattr(self, n) for n in names} | rows


def _rows_of(program: Program) -> dict[Piece, PieceRow]:
    """A row for each piece."""
    first: dict[str, str] = {}
    rows = {}
    for piece in program.pieces():
        calls = sum(n.op not in _NO_CALL for n in piece.graph.graph.nodes)
        twin = first.setdefault(structure_key(piece.graph), piece.name)
        rows[piece] = PieceRow(piece.name, calls, None if twin == piece.name else twin)
    return rows


def _twins_of(program: Program) -> list[int | None]:
    """For each segment the first one whose code it shares, or None: that is itself."""
    first: dict[str, int] = {}
    found = [first.setdefault(structure_key(s.plain.graph), i) for i, s in enumerate(program.segments)]
    return [None if twin == index else twin for index, twin in enumerate(found)]


def _graphs_of(program: GraphModule | Program) -> list[Graph]:
    return [program.graph] if isinstance(program, GraphModule) else [p.graph.graph for p in program.pieces()]


def _name_of(node: Node) -> str:
    if isinstance(node.target, str | OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", None) or str(node.target)
