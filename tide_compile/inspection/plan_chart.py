"""graph_chart: the order in which pieces run, as a networkx graph for drawing programs."""

from __future__ import annotations

from pathlib import Path

import networkx as nx

from tide_compile.files import replacing
from tide_compile.inspection.graph_report import GraphReport


def chart_of(report: GraphReport) -> nx.DiGraph:
    """Pieces are nodes; an edge says what runs next, and its label when that is."""
    chart = nx.DiGraph()
    nodes = {p.name: p.nodes for p in report.pieces}
    count = 1 + max((row.segment for row in report.layers), default=-1)
    chart.add_node("prologue", label=f"prologue\n{nodes.get('prologue', 0)} nodes")
    before = "prologue"
    for segment in range(count):
        rows = [row for row in report.layers if row.segment == segment]
        first, last = rows[0].layer, rows[-1]
        name = f"segment_{segment}"
        span = f"layer {first}" if first == last.layer else f"layers {first} to {last.layer}"
        twin = "" if last.twin_of is None else f"\ncode of segment_{last.twin_of}"
        chart.add_node(name, label=f"{name}\n{span}, {nodes[name]} nodes{twin}")
        chart.add_edge(before, name, label="" if before.startswith(("prologue", "segment")) else "some go on")
        before = name
        if last.threshold is not None:
            router, before = f"router_{last.layer}", f"router_{last.layer}"
            chart.add_node(router, label=f"leave above {last.threshold:.3g}?", shape="diamond")
            chart.add_edge(name, router, label="")
            fill = f"fill_{last.layer}"
            if fill in nodes:
                chart.add_node(fill, label=f"{fill}\nkeys and values of later layers\n{nodes[fill]} nodes")
                chart.add_edge(fill, "epilogue", label="")
            chart.add_edge(router, fill if fill in nodes else "epilogue", label="all have left")
    chart.add_node("epilogue", label=f"epilogue\nnorm and head, {nodes.get('epilogue', 0)} nodes")
    chart.add_edge(before, "epilogue", label="")
    for name in chart:
        chart.nodes[name].setdefault("shape", "box")
    return chart


def write_chart(report: GraphReport, folder: Path) -> None:
    """``plan.dot`` and ``plan.graphml`` in ``folder``."""
    chart = chart_of(report)
    with replacing(folder / "plan.graphml") as temporary:
        nx.write_graphml(chart, temporary)
    with replacing(folder / "plan.dot") as temporary:
        Path(temporary).write_text(nx.nx_pydot.to_pydot(chart).to_string())
