"""router_tables: what is known of routers, as tables and sentences."""

from __future__ import annotations

from rich.table import Table

from tide_compile.routers.bank import RouterBank


def sentence_of(certificate: dict[str, object]) -> str:
    """A certificate as a sentence."""
    if certificate["measured"] is None:
        return f"No thresholds keep a disagreement of {certificate['bound']:.2%}: TIDE is off for these routers."
    return (
        f"Certified with {certificate['confidence']:.0%} confidence on {certificate['prompts']} prompts: at most "
        f"{certificate['bound']:.2%} of the tokens differ from the full model's choice (measured "
        f"{certificate['measured']:.2%}), with {certificate['layers saved']:.1%} of the layers saved."
    )


def checkpoint_table(bank: RouterBank) -> Table:
    """What calibration measured, and the threshold that was chosen, if one was: a column for each checkpoint."""
    measured = {row["layer"]: row for row in bank.metadata.get("table", []) if "layer" in row}
    names = list(dict.fromkeys(n for row in measured.values() for n in row if n != "layer"))
    table = Table("after layer", *map(str, bank.layers), title="checkpoints")
    if bank.thresholds:
        chosen = (f"{bank.thresholds[n]:.4g}" if n in bank.thresholds else "none" for n in bank.layers)
        table.add_row("threshold", *chosen)
    for name in names:
        table.add_row(name, *(_cell(measured.get(layer, {}).get(name)) for layer in bank.layers))
    return table


def reliability_rows(bank: RouterBank) -> tuple[list[str], list[list[str]]]:
    """How far scores can be trusted, on held-out tokens, as headers and rows: per interval of scores, for each
    checkpoint, the mean score, the share that agrees, and of how many tokens."""
    curves = {layer: {r["from"]: r for r in curve} for layer, curve in bank.metadata.get("reliability", {}).items()}
    rows = []
    for low in sorted({low for curve in curves.values() for low in curve}):
        found = (curve.get(low) for curve in curves.values())
        cells = ("" if r is None else f"{r['score']:.3f}: {r['agreement']:.3f} of {r['tokens']}" for r in found)
        rows.append([f"{low:.1f} to {low + 0.1:.1f}", *cells])
    return ["score", *(f"after {layer}" for layer in curves)], rows


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
