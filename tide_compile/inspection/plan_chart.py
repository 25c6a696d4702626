"""plan_chart: the order in which pieces run, as a networkx graph for drawing programs."""

from __future__ import annotations

from pathlib import Path

import networkx as nx

from tide_compile.files import replacing
from tide_compile.inspection.graph_report import GraphReport, LayerRow


def chart_of(report: GraphReport) -> nx.DiGraph:
    """Pieces are nodes; an edge says what runs next, and its label when that is."""
    chart = nx.DiGraph()
    if report.prologue is None:
        return chart
    chart.add_node(report.prologue.name, label=f"{report.prologue.name}\n{report.prologue.nodes} nodes")
    before, reached = report.prologue.name, ""
    for index, segment in enumerate(report.segments):
        name = segment.plain.name
        last = _add_segment(chart, report, index)
        chart.add_edge(before, name, label=reached)
        before, reached = name, ""
        if last.threshold is not None:
            before, reached = f"router_{last.layer}", "some go on"
            chart.add_node(before, label=f"leave above {last.threshold:.3g}?", shape="diamond")
            chart.add_edge(name, before, label="")
            behind = report.epilogue.name
            if segment.fill is not None:
                behind = segment.fill.name
                chart.add_node(behind, label=f"{behind}\nkeys and values of later layers\n{segment.fill.nodes} nodes")
                chart.add_edge(behind, report.epilogue.name, label="")
            chart.add_edge(before, behind, label="all have left")
    chart.add_node(report.epilogue.name, label=f"{report.epilogue.name}\nnorm and head, {report.epilogue.nodes} nodes")
    chart.add_edge(before, report.epilogue.name, label="")
    for name in chart:
        chart.nodes[name].setdefault("shape", "box")
    return chart


def _add_segment(chart: nx.DiGraph, report: GraphReport, index: int) -> LayerRow:
    """A node for a segment; returns its last layer."""
    rows = [row for row in report.layers if row.segment == index]
    first, last, piece = rows[0].layer, rows[-1], report.segments[index].plain
    span = f"layer {first}" if first == last.layer else f"layers {first} to {last.layer}"
    twin = "" if last.twin_of is None else f"\ncode of {report.segments[last.twin_of].plain.name}"
    chart.add_node(piece.name, label=f"{piece.name}\n{span}, {piece.nodes} nodes{twin}")
    return last


def write_chart(report: GraphReport, folder: Path) -> None:
    """``plan.dot`` and ``plan.graphml`` in ``folder``."""
    chart = chart_of(report)
    with replacing(folder / "plan.graphml") as temporary:
        nx.write_graphml(chart, temporary)
    with replacing(folder / "plan.dot") as temporary:
        Path(temporary).write_text(nx.nx_pydot.to_pydot(chart).to_string())
