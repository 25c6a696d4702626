"""python -m bench.demo: calibrate a real model, generate with it, and compare.

Calibrates SmolLM2-135M on text that comes with Python, generates from a chat prompt with tide, and prints the text, the
exits per layer and a table of ms per decoded token for eager, stock Inductor and tide. Contenders generate in turn, in
one process, through transformers' ``generate`` with a static cache; times are of each token after the first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

import tide_compile
from bench.models import SMOLLM2, load_model
from bench.report import Timing, show, timed
from tide_compile.generate_guard import routed_through

PROMPT = "Explain in a few sentences how a bicycle stays upright."


class Clock(BaseStreamer):
    """Notes when each token arrives; the first arrival is the prompt."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.arrivals.append(time.perf_counter())

    def end(self) -> None:
        pass

    def seconds(self) -> list[float]:
        """Seconds of each token after the first."""
        return [b - a for a, b in zip(self.arrivals[1:], self.arrivals[2:], strict=False)]


def contenders(model: nn.Module, engine: tide_compile.TIDE) -> dict[str, Callable[..., torch.Tensor]]:
    stock = routed_through(torch.compile(model))
    return {"eager": model.generate, "inductor": stock.generate, "tide": engine.generate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--samples", type=int, default=30, help="calibration texts")
    parser.add_argument("--threshold", type=float, default=0.85)
    parser.add_argument("--tokens", type=int, default=40, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--router", help="router file to write; default: a temporary one")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model)
    config = tide_compile.TIDEConfig(
        exit_threshold=args.threshold, calibration_samples=args.samples, calibration_dataset="pydoc"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(args.router or Path(folder) / "router.safetensors")
        seconds = timed(lambda: tide_compile.calibrate(model, tokenizer, config, save_path=path))
        print(f"calibrated on {args.samples} texts of pydoc in {seconds:.0f} s\n")
        engine = tide_compile.TIDE(model, router_path=path, config=config)
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generate = {
        "max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False,
        "cache_implementation": "static", "max_cache_len": 256,
    }  # fmt: skip

    run = contenders(model, engine)
    first, texts = {}, {}
    for name, call in run.items():
        started = time.perf_counter()
        out = call(**inputs, **generate)
        first[name] = time.perf_counter() - started
        texts[name] = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    timings = {name: Timing() for name in run}
    totals: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(args.rounds):
        for name, call in run.items():
            clock = Clock()
            totals[name].append(timed(lambda call=call, clock=clock: call(**inputs, **generate, streamer=clock)))
            timings[name].seconds += clock.seconds()

    print(f"{PROMPT}\n\ntide:  {texts['tide']!r}\n\neager: {texts['eager']!r}\n\n{engine.last_stats.summary()}")
    rows = [
        [
            name, f"{timing.mean * 1e3:.1f}", *timing.cells(), f"{timing.mean / timings['inductor'].mean:.2f}",
            "" if name == "eager" else f"{first[name] - statistics.median(totals[name]):.0f}",
        ]
        for name, timing in timings.items()
    ]  # fmt: skip
    title = f"{args.model}, float32, batch 1, {args.rounds} x {args.tokens} tokens, exit threshold {args.threshold}"
    show(title, ["", "ms per token, mean", "median", "quartiles", "mean to inductor", "compile s"], rows, None)


if __name__ == "__main__":
    main()
