"""python -m bench.breakdown: where the time of one decoded token goes.

Three ways of running the same weights take turns: tide without exits, with routers that let nobody leave, and with all
tokens leaving after N/3 of the layers. Medians of: the whole call; what comes before the executor (Dynamo's guards and
Python around the model); the executor without its pieces (Python, reading decisions); and its pieces: prologue
(embedding, masks, positions), segments (with the routers in them), exit projections, the fill of keys and values,
epilogue (final norm and head). ``calls``: compiled calls per token. What routers cost is the difference of the first
two columns. ``--engine``: the same as the engine's ``generate`` runs it.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable

import torch

import tide_compile
from bench.decode import CACHE, CONTEXT, decoder, in_engine, options
from bench.support.models import SMOLLM2, load_model
from bench.support.report import show
from tide_compile import RouterBank
from tide_compile.runtime.piece_times import EXECUTOR

PARTS = ("prologue", "segments", "projections", "fill", "epilogue")


def parts_of_token(step: Callable[[], float]) -> dict[str, float]:
    """Seconds of one token by part, and the number of calls."""
    with tide_compile.record_times() as times:
        whole = step()
    found: dict[str, float] = defaultdict(float)
    for name, seconds in times.seconds.items():
        if name != EXECUTOR:
            found[times.parts[name]] += sum(seconds)
            found["calls"] += len(seconds)
    executor = sum(times.seconds[EXECUTOR])
    pieces = sum(found[part] for part in PARTS)
    return found | {"whole": whole, "guards": whole - executor, "executor": executor - pieces}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=40, help="tokens measured per way")
    parser.add_argument("--engine", action="store_true", help="as the engine's generate runs it")
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 32
    model, _ = load_model(args.model, getattr(torch, args.dtype))
    n = model.config.num_hidden_layers
    ids = torch.randint(10, model.config.vocab_size - 1, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    never = {"router": RouterBank.untrained(model.config.hidden_size, n), "exit_threshold": 0.9999}
    ways = {"no exits": {"exit_threshold": 1.0}, "routers": never, f"exit {n // 3}": options(n // 3, model, n)}
    steps = {}
    for name, chosen in ways.items():
        call = in_engine(model, chosen) if args.engine else torch.compile(model, backend="tide", options=chosen)
        steps[name] = decoder(model, call, ids, CACHE - CONTEXT - 8)
        for _ in range(4):
            steps[name]()
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(args.rounds):
        for name, step in steps.items():
            found[name].append(parts_of_token(step))
    rows = []
    for part in ("whole", "guards", "executor", *PARTS):
        medians = [statistics.median(token.get(part, 0.0) for token in found[name]) for name in ways]
        rows.append([part, *(f"{m * 1e3:.2f}" for m in medians)])
    rows.append(["calls", *(f"{found[name][0]['calls']:.0f}" for name in ways)])
    engine = " in the engine" if args.engine else ""
    title = f"one token{engine}, {args.model}, {args.dtype}, batch 1, context {CONTEXT} to {CONTEXT + args.rounds}, ms"
    show(title, ["", *ways], rows, args.json)


if __name__ == "__main__":
    main()
