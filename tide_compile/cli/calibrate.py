"""``tide calibrate``: routers for a model, from the command line."""

from __future__ import annotations

import time
from pathlib import Path

from tide_compile.calibration.calibrate import calibrate
from tide_compile.cli.output import console, print_json, working
from tide_compile.cli.router_tables import checkpoint_table, sentence_of
from tide_compile.config import TIDEConfig
from tide_compile.files import router_cache
from tide_compile.model.loading import find_dtype, load_model, load_tokenizer
from tide_compile.thresholds.certify import CERTIFICATE


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
    if certificate := bank.metadata.get(CERTIFICATE):
        console().print(sentence_of(certificate), soft_wrap=True)
    console().print(f"routers for {name} in {path}, made in {seconds:.0f} s", markup=False, soft_wrap=True)
