"""frontier_report: what ``tide tune`` prints and draws."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from tide_compile.cli.output import console
from tide_compile.planning.frontier import Point
from tide_compile.planning.token_costs import TokenCosts


def show_frontier(
    points: list[Point], best: Point | None, costs: TokenCosts, dropped: list[int], checked: dict | None, what: str,
    device: str | None, dtype: str,
) -> None:  # fmt: skip
    leaving = ", ".join(f"{seconds * 1e3:.3g} after {layer}" for layer, seconds in costs.leaving.items())
    predicted, screen = "" if device is None else f", predicted for {device} in {dtype}", console()
    screen.print(
        f"ms per token{predicted}: {costs.off * 1e3:.3g} without exits; {leaving}; {costs.checkpoint * 1e3:.2g} per "
        "checkpoint",
        soft_wrap=True,
    )
    if not points:
        where = "this machine" if device is None else device
        screen.print(f"No checkpoint of these routers pays on {where}: run without exits (exit_threshold=1).")
        return
    table = Table(
        "", "disagreement", "layers saved", "speed-up", "perplexity", "exits by layer", "thresholds", title=what
    )
    for point in points:
        exits = ", ".join(f"{layer}: {share:.1%}" for layer, share in point.exits.items())
        limits = ", ".join(f"{layer}: {value:.3f}" for layer, value in point.thresholds.items())
        table.add_row(
            "->" if point is best else "", f"{point.disagreement:.2%}", f"{point.layers_saved:.1%}",
            f"{point.speedup:.3f}", "" if point.perplexity is None else f"{point.perplexity - 1:+.1%}", exits, limits,
        )  # fmt: skip
    screen.print(table)
    if dropped:
        screen.print(f"Dropped, since they cost more than they save: the checkpoints after layers {dropped}.")
    if best is None:
        screen.print("No point keeps what was asked for.")
    else:
        timed = f"{best.speedup:.3f} times as fast, as predicted"
        if checked is not None:
            timed = (
                f"timed as it will be used, {checked['ms_on']:.1f} against {checked['ms_off']:.1f} ms per token, "
                f"{checked['speedup']:.3f} times as fast"
            )
        screen.print(
            f"Recommended: {best.disagreement:.2%} disagreement; {timed}. Disagreement was measured, not promised: "
            "`tide calibrate --max-disagreement` certifies.",
            soft_wrap=True,
        )


def draw_frontier(points: list[Point], best: Point | None, path: Path, name: str) -> None:
    """The frontier as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    x = [100 * p.disagreement for p in points]
    for axis, label, y in (
        (axes[0], "layers saved, %", [100 * p.layers_saved for p in points]),
        (axes[1], "speed-up of decoding", [p.speedup for p in points]),
    ):
        axis.plot(x, y, "o-")
        if best is not None:
            index = points.index(best)
            axis.plot(x[index], y[index], "s", markersize=10, label="recommended")
            axis.legend()
        axis.set(xlabel="tokens that differ from the full model's choice, %", ylabel=label)
        axis.grid(alpha=0.3)
    figure.suptitle(Path(name).name)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
