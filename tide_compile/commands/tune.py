"""``tide tune``: what can be had for which disagreement, and one point of it recommended."""

from __future__ import annotations

import importlib.util
import statistics
from dataclasses import asdict, replace
from pathlib import Path

from rich.table import Table

from tide_compile.certify import PROMISE
from tide_compile.commands.output import console, notes, print_json, working
from tide_compile.config import TIDEConfig
from tide_compile.corpus import Corpus
from tide_compile.costs import Costs, measure_costs, time_decoding
from tide_compile.engine import TIDE
from tide_compile.errors import ConfigError
from tide_compile.loading import find_dtype, load_model, load_tokenizer
from tide_compile.planning import find_device, predict_costs
from tide_compile.registry import resolve_bank
from tide_compile.routers import RouterBank
from tide_compile.texts import calibration_texts
from tide_compile.tune import LEVELS, Point, recommend, tune

_TEXTS, _TEXT_TOKENS = 16, 256  # for the perplexity


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
    points = tune(model, bank, config, chosen, costs, texts=texts, levels=levels, max_new_tokens=max_new_tokens,
                  progress=not as_json)  # fmt: skip
    best = recommend(points, max_disagreement, min_speedup)
    checked = check(model, bank, best, chosen[1]) if best is not None and device is None else None
    if save is not None and best is not None:
        save_point(bank, best, save, device)
    if plot is not None:
        draw(points, best, plot, name)
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
        show(points, best, costs, dropped, checked, what, device, dtype)
        for path in (save if best is not None else None, plot):
            if path is not None:
                notes().print(f"written: {path}", style="dim", markup=False)
    return best is not None


def tuning_data(bank: RouterBank, data: str | None) -> tuple[str, int]:
    """Where prompts come from, and how many calibration rows of it to pass over.

    Raises:
        ConfigError: nothing is given, and the routers do not say what they were made of.
    """
    made_of = bank.metadata.get("data")
    source = data or made_of
    if not isinstance(source, str) or source == "list":
        raise ConfigError("these routers do not say what they were made of: give --data.")
    seen = bank.metadata.get("config", {}).get("calibration_samples", 0)
    return source, seen if source == made_of else 0


def perplexity_texts(source: str, tokenizer: object) -> list[list[int]]:
    """Token ids of some texts; none where the model's own samples are all there is."""
    texts = next((s for s in source.split("+") if s != "self"), None)
    if texts is None:
        return []
    ids = tokenizer(list(calibration_texts(texts, _TEXTS)), truncation=True, max_length=_TEXT_TOKENS)["input_ids"]
    return [row for row in ids if len(row) > 1]


def check(model: object, bank: RouterBank, point: Point, prompt: list[int]) -> dict[str, float]:
    """Speed of a point as it will be used, compiled for its own checkpoints, on one prompt: median times without exits
    over with them."""
    with working("compiling and timing the recommended point"):
        used = TIDE(model, replace(bank, thresholds=point.thresholds))
        plain = TIDE(model, None, TIDEConfig(exit_threshold=1.0))
        found = time_decoding({"off": (plain, None), "on": (used, None)}, prompt, tokens=64)
    on, off = (statistics.fmean(found[n]) for n in ("on", "off"))
    return {"ms_on": on * 1e3, "ms_off": off * 1e3, "speedup": off / on}


def save_point(bank: RouterBank, point: Point, path: Path, device: str | None) -> None:
    """A router file with the thresholds of a point, whose speed was predicted if there is a ``device``; a promise that
    was about others is taken out."""
    kept = {n: value for n, value in bank.metadata.items() if n != PROMISE}
    tuned = {**asdict(point), "device": device}
    replace(bank, thresholds=point.thresholds, metadata={**kept, "tuned": tuned}).save(path)


def show(
    points: list[Point], best: Point | None, costs: Costs, dropped: list[int], checked: dict | None, what: str,
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


def draw(points: list[Point], best: Point | None, path: Path, name: str) -> None:
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
