"""frontier_report: what ``tide tune`` prints and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from tide_compile.cli.output import console
from tide_compile.files import replacing
from tide_compile.planning.frontier import Point
from tide_compile.planning.token_costs import TokenCosts

_HEADERS = ("", "disagreement", "layers saved", "speed-up", "perplexity", "exits by layer", "thresholds")


@dataclass(frozen=True, slots=True)
class Findings:
    """What can be had.

    Attributes:
        device: that times were predicted for, in ``dtype``; None: they were measured on this machine.
        source: of the prompts. prompts, new_tokens: how many, and how many tokens after each.
        dropped: layers of the checkpoints that no point has.
        points: by disagreement. best: the one that is recommended, if one keeps what was asked for.
        timed: ms per token without exits and at ``best``, and the speed-up; None where it was not timed.
    """

    device: str | None
    dtype: str
    source: str
    prompts: int
    new_tokens: int
    costs: TokenCosts
    dropped: Sequence[int]
    points: Sequence[Point]
    best: Point | None
    timed: dict[str, float] | None


def findings_record(found: Findings) -> dict[str, object]:
    """As plain values."""
    return {
        "device": found.device, "data": found.source, "prompts": found.prompts, "costs": asdict(found.costs),
        "dropped": found.dropped, "points": [asdict(point) for point in found.points],
        "recommended": None if found.best is None else asdict(found.best), "speedup_of_recommended": found.timed,
    }  # fmt: skip


def show_frontier(found: Findings) -> None:
    """Print costs, points and the recommendation."""
    screen = console()
    screen.print(_costs(found), soft_wrap=True)
    if not found.points:
        where = found.device or "this machine"
        screen.print(f"No checkpoint of these routers pays on {where}: run without exits (exit_threshold=1).")
        return
    screen.print(_table(found))
    if found.dropped:
        screen.print(f"Dropped, since they cost more than they save: the checkpoints after layers {found.dropped}.")
    if found.best is None:
        screen.print("No point keeps what was asked for.")
        return
    screen.print(
        f"Recommended: {found.best.disagreement:.2%} disagreement; {_speed(found)}. Disagreement was measured, not "
        "certified: `tide calibrate --max-disagreement` does that.",
        soft_wrap=True,
    )


def _costs(found: Findings) -> str:
    costs, predicted = found.costs, f", predicted for {found.device} in {found.dtype}" if found.device else ""
    leaving = ", ".join(f"{seconds * 1e3:.3g} after {layer}" for layer, seconds in costs.leaving.items())
    return (
        f"ms per token{predicted}: {costs.off * 1e3:.3g} without exits; {leaving}; {costs.checkpoint * 1e3:.2g} per "
        "checkpoint"
    )


def _table(found: Findings) -> Table:
    table = Table(*_HEADERS, title=f"{found.prompts} prompts of {found.source}, {found.new_tokens} tokens each")
    for point in found.points:
        exits = ", ".join(f"{layer}: {share:.1%}" for layer, share in point.exits.items())
        limits = ", ".join(f"{layer}: {value:.3f}" for layer, value in point.thresholds.items())
        table.add_row(
            "->" if point is found.best else "", f"{point.disagreement:.2%}", f"{point.layers_saved:.1%}",
            f"{point.speedup:.3f}", "" if point.perplexity is None else f"{point.perplexity - 1:+.1%}", exits, limits,
        )  # fmt: skip
    return table


def _speed(found: Findings) -> str:
    if found.timed is None:
        return f"{found.best.speedup:.3f} times as fast, as predicted"
    return (
        f"timed as it will be used, {found.timed['ms_on']:.1f} against {found.timed['ms_off']:.1f} ms per token, "
        f"{found.timed['speedup']:.3f} times as fast"
    )


def draw_frontier(found: Findings, path: Path, title: str) -> None:
    """The frontier as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    x = [100 * p.disagreement for p in found.points]
    for axis, label, y in (
        (axes[0], "layers saved, %", [100 * p.layers_saved for p in found.points]),
        (axes[1], "speed-up of decoding", [p.speedup for p in found.points]),
    ):
        axis.plot(x, y, "o-")
        if found.best is not None:
            index = found.points.index(found.best)
            axis.plot(x[index], y[index], "s", markersize=10, label="recommended")
            axis.legend()
        axis.set(xlabel="tokens that differ from the full model's choice, %", ylabel=label)
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
