"""``tide calibrate``: routers for a model, from the command line."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from tide_compile.calibrate import calibrate
from tide_compile.commands.output import console, print_json, working
from tide_compile.config import TIDEConfig
from tide_compile.files import router_cache
from tide_compile.loading import find_dtype, load_model, load_tokenizer
from tide_compile.routers import RouterBank


def calibrate_model(
    name: str, save: Path | None, *, dtype: str, as_json: bool, settings: dict[str, object], **arguments: object
) -> None:
    """Calibrate and show the table. ``settings``: fields of ``TIDEConfig``; None means its default. ``arguments``: of
    ``calibrate``."""
    config = TIDEConfig(**{n: value for n, value in settings.items() if value is not None})
    with working(f"loading {name}"):
        model, tokenizer = load_model(name, find_dtype(dtype)), load_tokenizer(name)
    started = time.perf_counter()
    bank = calibrate(model, tokenizer, config, save_path=save, progress=not as_json, **arguments)
    seconds = time.perf_counter() - started
    path = save or router_cache() / f"{bank.fingerprint}.safetensors"
    if as_json:
        print_json({"model": name, "router": path, "seconds": seconds, "num_layers": bank.num_layers, **bank.metadata})
        return
    console().print(checkpoint_table(bank))
    if certificate := bank.metadata.get("certificate"):
        console().print(promise(certificate), soft_wrap=True)
    console().print(f"routers for {name} in {path}, made in {seconds:.0f} s", markup=False, soft_wrap=True)


def promise(certificate: dict[str, object]) -> str:
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
