"""``tide plan``: what exits would bring on a device, as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from tide_compile.cli.check_inputs import check_device, check_dtype
from tide_compile.cli.output import console
from tide_compile.model.loading import load_skeleton
from tide_compile.planning.forecast import CostModel, find_device

_HEADERS = ("batch", "context", "leave after", "share", "off, ms", "with exits, ms", "speed-up", "pays from")


def show_plan(
    model: str, device: str, dtype: str, batches: Sequence[int], contexts: Sequence[int], depths: Sequence[int] | None,
    share: float, as_json: bool,
) -> None:  # fmt: skip
    """Print a forecast for every batch, context and depth, or write it to stdout as JSON."""
    chosen = check_dtype(dtype)
    check_device(device, chosen)
    skeleton = load_skeleton(model, chosen)
    target = find_device(device, chosen, skeleton.config)
    layers = skeleton.config.get_text_config(decoder=True).num_hidden_layers
    costs = CostModel(skeleton, depths or (layers // 3, 2 * layers // 3))
    forecasts = [
        costs.forecast(target, batch, context, depth, share)
        for batch in batches
        for context in contexts
        for depth in costs.depths
    ]
    if as_json:
        record = {"model": model, "device": device, "dtype": dtype, **asdict(target)}
        print(json.dumps(record | {"forecasts": [asdict(f) | {"speedup": f.speedup} for f in forecasts]}, indent=1))
        return
    title = f"{model}, {layers} layers, {dtype} on {device}: decoding, ms per step (predicted)"
    table = Table(*_HEADERS, title=title, caption="pays from: the share of tokens that has to leave there")
    for f in forecasts:
        even = "never" if f.break_even is None else f"{f.break_even:.1%}"
        numbers = f"{f.off:.2f}", f"{f.on:.2f}", f"{f.speedup:.2f}", even
        table.add_row(str(f.batch), str(f.context), f"{f.depth} of {layers}", f"{f.share:.0%}", *numbers)
    console().print(table)
