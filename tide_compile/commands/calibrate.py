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
    """What calibration measured at each checkpoint, and the threshold that was chosen, if one was."""
    rows = {row["layer"]: row for row in bank.metadata.get("table", []) if "layer" in row}
    names = list(dict.fromkeys(n for row in rows.values() for n in row if n != "layer"))
    table = Table("layer", *([] if not bank.thresholds else ["threshold"]), *names, title="checkpoints")
    for layer in bank.layers:
        chosen = (
            [] if not bank.thresholds else [f"{bank.thresholds[layer]:.4g}" if layer in bank.thresholds else "none"]
        )
        table.add_row(str(layer), *chosen, *(_cell(rows.get(layer, {}).get(n)) for n in names))
    return table


def reliability_rows(bank: RouterBank) -> tuple[list[str], list[list[str]]]:
    """How far scores can be trusted, on held-out tokens, as headers and rows: per interval of scores, for each
    checkpoint, the mean score, the share that agrees, and tokens."""
    curves = {layer: {r["from"]: r for r in curve} for layer, curve in bank.metadata.get("reliability", {}).items()}
    headers = ["score", *(f"{layer}: {what}" for layer in curves for what in ("mean", "agree", "tokens"))]
    rows = []
    for low in sorted({low for curve in curves.values() for low in curve}):
        cells = [f"{low:.1f} to {low + 0.1:.1f}"]
        for curve in curves.values():
            r = curve.get(low)
            cells += [""] * 3 if r is None else [f"{r['score']:.3f}", f"{r['agreement']:.3f}", str(r["tokens"])]
        rows.append(cells)
    return headers, rows


def _cell(value: object) -> str:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
