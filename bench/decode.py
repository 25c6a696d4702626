"""python -m bench.decode: decoding one token at batch 1, with exits forced at a third and two thirds of the layers.

Contenders share their weights and run in turn, four tokens each behind one that does not count, in one process: eager,
stock Inductor, tide with no exits (default options), tide with every token leaving after N/3 and 2N/3 layers (threshold
0, ``min_layers``), and for each of these depths the genuinely truncated model compiled by the same route (tide with no
exits).
``--engine``: all of tide as the engine's ``generate`` runs it, without Dynamo's guards for every token.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import StaticCache

import tide_compile
from bench.support.models import SMOLLM2, load_model, truncated
from bench.support.report import interleave, show, timed
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.generation.guard_skipping import GuardSkipping, skipping_guards

CONTEXT = 64  # tokens in the cache when timing starts
CACHE = 256  # length of the static cache
TURN = 4  # tokens, timed one by one
COLD = {"inductor": "inductor", "tide off": "tide", "tide with routers": "tide"}


@torch.no_grad()
def decoder(model: nn.Module, call: Callable, ids: torch.Tensor, steps: int) -> Callable[[], float]:
    """A step that decodes one greedy token and returns its seconds. The prompt is run eagerly; when ``steps`` are
    done the cache starts again behind it."""
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    model(ids, past_key_values=cache)
    start = ids[:, -1:]
    state = {"ids": start, "left": 0}

    @torch.no_grad()
    def step() -> float:
        if not state["left"]:
            for layer in cache.layers:
                layer.cumulative_length.fill_(ids.shape[1])
            state.update(ids=start, left=steps)
        state["left"] -= 1
        started = time.perf_counter()
        logits = call(state["ids"], past_key_values=cache).logits
        state["ids"] = logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started

    return step


def options(depth: int | None, model: nn.Module, num_layers: int) -> dict[str, object]:
    """Options that let every token leave after ``depth`` layers (None: no exits)."""
    interval = cut_interval(num_layers)
    if depth is None:
        return {"exit_threshold": 1.0, "checkpoint_interval": interval}
    bank = RouterBank.untrained(model.config.hidden_size, num_layers)
    return {"router": bank, "exit_threshold": 0.0, "min_layers": depth, "checkpoint_interval": interval}


def cut_interval(num_layers: int) -> int:
    """The largest interval up to 6 that puts a cut after N/3 layers."""
    third = num_layers // 3
    return max(i for i in range(1, min(third, 6) + 1) if third % i == 0)


def in_engine(model: nn.Module, chosen: dict[str, object]) -> Callable[..., object]:
    """The model's forward for one token as it is called in the engine's ``generate``."""
    chosen = dict(chosen)
    engine = TIDE(model, chosen.pop("router", None), TIDEConfig.from_options(chosen))
    skipping = GuardSkipping(engine._compiled)

    def call(ids: torch.Tensor, **kwargs: object) -> object:
        with skipping_guards(skipping):
            return engine.model(input_ids=ids, **kwargs)

    return call


def contenders(
    model: nn.Module, ids: torch.Tensor, steps: int, engine: bool = False
) -> tuple[dict[str, Callable[[], float]], dict[str, float]]:
    """The steps to time, compiled and warm, and the seconds that each took to its first token (warm caches)."""
    n = model.config.num_hidden_layers
    plans = {"eager": (model, None), "inductor": (model, {"backend": "inductor"})}
    plans["tide off"] = (model, {"backend": "tide", "options": {"exit_threshold": 1.0}})
    for depth in (n // 3, 2 * n // 3):
        plans[f"tide exit {depth}"] = (model, {"backend": "tide", "options": options(depth, model, n)})
        plans[f"truncated {depth}"] = (
            truncated(model, depth),
            {"backend": "tide", "options": options(None, model, n)},
        )
    steps_, first = {}, {}
    for name, (net, compile_arguments) in plans.items():
        if engine and name not in ("eager", "inductor"):
            call = in_engine(net, compile_arguments["options"])
        else:
            call = net if compile_arguments is None else torch.compile(net, **compile_arguments)
        step = decoder(net, call, ids, steps)
        first[name] = step()
        for _ in range(4):
            step()
        steps_[name] = step
    return steps_, first


def start_seconds(name: str, args: argparse.Namespace) -> list[float]:
    """Seconds to the first decoded token in a fresh process with empty caches and in a second, loading apart, and of
    all of the second process."""
    command = [sys.executable, "-m", "bench.decode", "--cold", name, "--model", args.model, "--dtype", args.dtype]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        # TMPDIR: there Inductor keeps the headers that it precompiles
        caches = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TIDE_CACHE", "TMPDIR"
        env = {**os.environ, **dict.fromkeys(caches, folder)}
        for _ in range(2):
            started = time.perf_counter()
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
            found.append(float(done.stdout.split()[-1]))
    return [*found, time.perf_counter() - started]


def run_cold(name: str, model: nn.Module, ids: torch.Tensor) -> float:
    n = model.config.num_hidden_layers
    arguments = {"backend": COLD[name]}
    if name == "tide off":
        arguments["options"] = {"exit_threshold": 1.0}
    if name == "tide with routers":
        arguments["options"] = {"router": RouterBank.untrained(model.config.hidden_size, n)}
    step = decoder(model, torch.compile(model, **arguments), ids, 1)
    return timed(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=30, help=f"turns of {TURN} tokens, 0: compile times only")
    parser.add_argument("--json", help="also write the result to this file")
    parser.add_argument("--no-cold", action="store_true", help="do not measure compile times (minutes)")
    parser.add_argument("--engine", action="store_true", help="tide as the engine's generate runs it")
    parser.add_argument("--cold", choices=list(COLD), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 32
    model, _ = load_model(args.model, getattr(torch, args.dtype))
    torch.manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size - 1, (1, CONTEXT))
    if args.cold:
        print(run_cold(args.cold, model, ids))
        return

    cold = {} if args.no_cold else {name: start_seconds(name, args) for name in COLD}
    if args.rounds:
        steps, first = contenders(model, ids, CACHE - CONTEXT - 8, args.engine)
        timings = interleave(steps, args.rounds, steps=TURN, uncounted=1)
        n = model.config.num_hidden_layers
        compared = {"tide off": "inductor", **{f"tide exit {d}": f"truncated {d}" for d in (n // 3, 2 * n // 3)}}
        rows = []
        for name, timing in timings.items():
            other = compared.get(name)
            ratio = f"{timing.median / timings[other].median:.2f} x {other}" if other else ""
            rows.append([name, *timing.cells(), ratio, f"{timing.median / timings['inductor'].median:.2f}"])
        context = f"context {CONTEXT} to {CACHE}{', in the engine' if args.engine else ''}"
        title = f"decode, {args.model}, {args.dtype}, batch 1, {context}, tide_compile {tide_compile.__version__}"
        show(
            title,
            ["", "ms per token", "quartiles", "ratio", "to inductor"],
            rows,
            args.json,
            first_call_seconds=first,
            cold_seconds=cold,
        )
    if cold:
        base = cold["inductor"][0]
        rows = [[n, *(f"{x:.1f}" for x in seconds), f"{seconds[0] / base:.2f}"] for n, seconds in cold.items()]
        headers = ["", "first token, empty caches", "second process", "all of that process", "cold to inductor"]
        show("compilation, seconds", headers, rows, None)


if __name__ == "__main__":
    main()
