"""``tide tune``: what can be had for which disagreement, and one point of it recommended."""

from __future__ import annotations

import importlib.util
import statistics
from dataclasses import asdict
from pathlib import Path

from tide_compile.cli.frontier_report import draw_frontier, show_frontier
from tide_compile.cli.output import notes, print_json, working
from tide_compile.config import TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.model.loading import find_dtype, load_model, load_tokenizer
from tide_compile.planning.forecast import find_device, predict_costs
from tide_compile.planning.frontier import (
    LEVELS,
    find_frontier,
    perplexity_texts,
    recommend,
    save_point,
    time_point,
    tuning_data,
)
from tide_compile.planning.token_costs import measure_costs
from tide_compile.routers.lookup import resolve_bank
from tide_compile.text.corpus import Corpus


def tune_model(
    name: str, *, router: str | None, device: str | None, data: str | None, prompts: int, max_new_tokens: int,
    chat: bool, max_disagreement: float | None, min_speedup: float | None, plot: Path | None, save: Path | None,
    dtype: str, as_json: bool,
) -> bool:  # fmt: skip
    """Print the frontier and the recommendation, for this machine or, predicted, for a ``device``. Returns whether
    there is a point that was asked for."""
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'tide-compile[plot]'.")
    if prompts < 2:
        raise ConfigError("--prompts must be at least 2: half of them screen, the others measure.")
    with working(f"loading {name}"):
        model, tokenizer = load_model(name, find_dtype(dtype)), load_tokenizer(name)
        bank = resolve_bank(router, model)
    source, skip = tuning_data(bank, data)
    corpus = Corpus(source, model, tokenizer, chat=chat)
    with working("reading prompts"):
        chosen = corpus.prompts(prompts, skip)
        texts = perplexity_texts(source, tokenizer)
    if len(chosen) < 2:
        raise ConfigError(f"{source!r} holds {len(chosen)} texts after those of the calibration: give other --data.")
    config = TIDEConfig()
    if device is None:
        with working("compiling and timing tokens by the layer that they leave after"):
            costs = measure_costs(model, bank, config, chosen[0])
    else:
        with working("tracing the model"):
            target = find_device(device, model.dtype, model.config)
            context = round(statistics.median(map(len, chosen))) + max_new_tokens // 2
            costs = predict_costs(model, bank, config, target, context)
    levels = LEVELS if max_disagreement is None else (*LEVELS, *(max_disagreement * f for f in (0.6, 0.8, 1.0)))
    points = find_frontier(model, bank, config, chosen, costs, texts=texts, levels=levels,
                           max_new_tokens=max_new_tokens, progress=not as_json)  # fmt: skip
    best = recommend(points, max_disagreement, min_speedup)
    checked = None
    if best is not None and device is None:
        with working("compiling and timing the recommended point"):
            checked = time_point(model, bank, best, chosen[1])
    if save is not None and best is not None:
        save_point(bank, best, save, device)
    if plot is not None:
        draw_frontier(points, best, plot, name)
    dropped = [layer for layer in bank.layers if not any(layer in p.thresholds for p in points)]
    if as_json:
        print_json(
            {
                "model": name, "device": device, "data": source, "prompts": len(chosen), "costs": asdict(costs),
                "dropped": dropped,
                "points": [asdict(p) for p in points], "recommended": None if best is None else asdict(best),
                "speedup_of_recommended": checked, "saved": save if best is not None else None, "plot": plot,
            }
        )  # fmt: skip
    else:
        what = f"{len(chosen)} prompts of {source}, {max_new_tokens} tokens each"
        show_frontier(points, best, costs, dropped, checked, what, device, dtype)
        for path in (save if best is not None else None, plot):
            if path is not None:
                notes().print(f"written: {path}", style="dim", markup=False)
    return best is not None
