"""``tide warmup``: compile for a model before anybody waits for it."""

from __future__ import annotations

from tide_compile.cli.check_inputs import check_dtype, check_router
from tide_compile.cli.model_inputs import open_engine
from tide_compile.cli.output import console, print_json, working
from tide_compile.model.loading import load_model


def warm_up(name: str, router: str | None, threshold: float | None, dtype: str, batch: int, as_json: bool) -> None:
    """Compile all that batches of ``batch`` sequences need."""
    chosen = check_dtype(dtype)
    check_router(router)
    with working(f"loading {name}"):
        engine = open_engine(load_model(name, chosen), router, threshold, name)
    with working("compiling"):
        seconds = engine.warmup(batch)
    if as_json:
        print_json({"model": name, "batch": batch, "seconds": seconds})
    else:
        console().print(f"compiled for batches of {batch} in {seconds:.1f} s")
