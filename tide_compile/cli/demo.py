"""``tide demo``: calibrate a real model, generate with it, and compare with eager and stock Inductor.

Contenders generate in turn, in one process, through transformers' ``generate`` with a static cache; times are of each
token after the first.
"""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.table import Table
from transformers import PreTrainedModel

from tide_compile.calibration.calibrate import calibrate
from tide_compile.cli.check_inputs import check_files
from tide_compile.cli.demo_model import demo_model_file
from tide_compile.cli.model_inputs import encode
from tide_compile.cli.output import console, print_json, working
from tide_compile.config import TIDEConfig
from tide_compile.generation.compiled_generate import routed_through
from tide_compile.generation.engine import TIDE
from tide_compile.generation.token_clock import TokenClock
from tide_compile.lowering.machine_name import cpu_name
from tide_compile.model.fingerprint import fingerprint
from tide_compile.model.loading import load_model, load_tokenizer
from tide_compile.routers.bank import RouterBank
from tide_compile.routers.lookup import cached_file
from tide_compile.runtime.exit_stats import ExitStats

_DATA = "pydoc"
PROMPT = "Explain in a few sentences how a bicycle stays upright."


def run_demo(
    name: str | None, *, samples: int, threshold: float, tokens: int, rounds: int, router: Path | None,
    html: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Calibrate on text that comes with Python, generate from a prompt, print the text, the exits and a table of
    milliseconds per decoded token."""
    check_files(router=router, html=html)
    path = name or str(demo_model_file())
    with working(f"loading {Path(path).name}"):
        model, tokenizer = load_model(path, torch.float32), load_tokenizer(path)
    config = TIDEConfig(
        exit_threshold=threshold, calibration_samples=samples, calibration_dataset=_DATA, distillation_steps=20
    )  # fmt: skip
    file = router or _free_file(cached_file(fingerprint(model.parameters())))
    started = time.perf_counter()
    bank = calibrate(model, tokenizer, config, save_path=file, progress=not as_json)
    calibration = time.perf_counter() - started
    engine = TIDE(model, bank, config)
    measured = _compare(model, engine, tokenizer, tokens, rounds)
    if html is not None:
        engine.last_trace.to_html(html, title=f"Token depth: {Path(path).name}")
    if as_json:
        print_json(
            {
                "model": path, "machine": _machine(), "calibration_seconds": calibration, "prompt": PROMPT,
                "contenders": measured, "exits": engine.last_stats.to_dict(),
            }
        )  # fmt: skip
        return
    about = f"calibrated on {samples} texts of Python's documentation in {calibration:.0f} s"
    console().print(f"{about}\n\n{PROMPT}\n", soft_wrap=True)
    title = f"{Path(path).name}, float32, batch 1, {rounds} x {tokens} tokens, exit threshold {threshold}"
    _show(measured, engine.last_stats, title)
    given = "" if router is None and file == cached_file(bank.fingerprint) else f" --router {shlex.quote(str(file))}"
    command = f"tide generate {shlex.quote(path)}{given} --prompt 'Why is the sky blue?' --stream"
    console().print(f"routers: {file}\nTry them: {command}", markup=False, soft_wrap=True)


def _free_file(cached: Path) -> Path:
    """Where the demo's routers go: the router cache, but not in the place of routers that were made with more care."""
    made_of = RouterBank.load(cached).metadata.get("data") if os.path.isfile(cached) else _DATA
    return cached if made_of == _DATA else cached.with_name(f"{cached.stem}.demo.safetensors")


def _compare(
    model: PreTrainedModel, engine: TIDE, tokenizer: object, tokens: int, rounds: int
) -> dict[str, dict[str, object]]:
    """Of each contender: its text, the times of its tokens, and what its first call took beyond later ones, seconds."""
    inputs = encode(tokenizer, [PROMPT], chat=bool(tokenizer.chat_template))
    arguments = {
        **inputs, "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False,
        "cache_implementation": "static", "max_cache_len": 256, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    stock = routed_through(torch.compile(model))
    run = {"eager": model.generate, "inductor": stock.generate, "tide": engine.generate}
    texts, first = {}, {}
    for name, call in run.items():
        with working(f"{name}: first call"):
            started = time.perf_counter()
            out = call(**arguments)
            first[name] = time.perf_counter() - started
        texts[name] = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    with working(f"{rounds} rounds of {tokens} tokens"):
        seconds, totals = _take_turns(run, arguments, rounds)
    engine.generate(**arguments, tokenizer=tokenizer, trace=True)
    return {
        name: {
            "text": texts[name],
            "mean_ms": statistics.fmean(seconds[name]) * 1e3,
            "quartiles_ms": [q * 1e3 for q in statistics.quantiles(seconds[name], n=4)],
            "compile_seconds": first[name] - statistics.median(totals[name]),
        }
        for name in run
    }


def _take_turns(
    run: Mapping[str, Callable[..., object]], arguments: Mapping[str, object], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each contender's tokens after the first, and of its whole calls."""
    seconds: dict[str, list[float]] = {name: [] for name in run}
    totals: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, call in run.items():
            clock, started = TokenClock(), time.perf_counter()
            call(**arguments, streamer=clock)
            totals[name].append(time.perf_counter() - started)
            seconds[name] += clock.seconds()
    return seconds, totals


def _show(measured: Mapping[str, Mapping[str, object]], exits: ExitStats, title: str) -> None:
    """Texts, exits, and a table of times."""
    screen = console()
    for contender in ("tide", "eager"):
        screen.print(f"{contender}: {measured[contender]['text']}\n", markup=False, soft_wrap=True)
    screen.print(exits.summary(), markup=False)
    table = Table("", "ms per token, mean", "median", "quartiles", "mean to inductor", "compile s", title=title)
    for contender, m in measured.items():
        first, middle, third = m["quartiles_ms"]
        ratio = m["mean_ms"] / measured["inductor"]["mean_ms"]
        compiling = "" if contender == "eager" else f"{m['compile_seconds']:.0f}"
        spread = f"{first:.1f} to {third:.1f}"
        table.add_row(contender, f"{m['mean_ms']:.1f}", f"{middle:.1f}", spread, f"{ratio:.2f}", compiling)
    screen.print(table)
    screen.print(_machine(), style="dim", markup=False)


def _machine() -> str:
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
