"""plan_page: the model as a column of layers, with segments, checkpoints, exit rates and milliseconds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import groupby

from tide_compile.inspection.graph_report import GraphReport, LayerRow, PieceRow
from tide_compile.inspection.html import render
from tide_compile.runtime.exit_stats import ExitStats
from tide_compile.runtime.piece_times import EXECUTOR, Times


def plan_page(
    report: GraphReport, stats: ExitStats | None = None, times: Times | None = None, title: str = "The plan"
) -> str:
    """The page.

    Args:
        report: of the graph.
        stats: exits, of which the shares that leave and go on are drawn.
        times: of the same calls; what is shown is milliseconds per call, on average, from the median of each piece.
        title: of the page.
    """
    shown = _Measured(report, stats, times)
    return render(
        "plan.html",
        title=title,
        report=report,
        stats=shown.stats,
        segments=list(shown.segments()),
        total=shown.ms_of(EXECUTOR),
        calls=shown.calls,
        prologue=shown.ms(report.prologue),
        epilogue=shown.ms(report.epilogue),
    )


class _Measured:
    """What the template shows of a segment."""

    def __init__(self, report: GraphReport, stats: ExitStats | None, times: Times | None) -> None:
        self.report = report
        self.stats = stats if stats is not None and stats.total_tokens else None
        self._seconds = {} if times is None else times.seconds
        self.calls = len(self._seconds.get(EXECUTOR, ()))

    def ms(self, *pieces: PieceRow | None) -> float | None:
        """Milliseconds per call in those of these pieces that there are; None where no times are known."""
        return self.ms_of(*(piece.name for piece in pieces if piece is not None))

    def ms_of(self, *names: str) -> float | None:
        """As ``ms``, by the names in ``Times``."""
        if not self.calls:
            return None
        found = (self._seconds[name] for name in names if name in self._seconds)
        return sum(statistics.median(s) * len(s) for s in found) / self.calls * 1e3

    def segments(self) -> Iterator[dict[str, object]]:
        active = 1.0
        for segment, group in groupby(self.report.layers, key=lambda row: row.segment):
            rows: list[LayerRow] = list(group)
            last, pieces = rows[-1], self.report.segments[segment]
            left = None
            if self.stats is not None and last.threshold is not None:
                left = self.stats.exits_per_layer.get(last.layer, 0)
            share = None if left is None else left / self.stats.total_tokens
            yield {
                "number": segment,
                "rows": rows,
                "twin_of": last.twin_of,
                "active": active,
                "ms": self.ms(pieces.plain, pieces.masked, pieces.compact),
                "threshold": last.threshold,
                "layer": last.layer,
                "left": left,
                "share": share,
                "exit_ms": self.ms(pieces.project, pieces.fill),
            }
            active -= share or 0.0
