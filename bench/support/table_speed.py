"""table_speed: what exits do to the time: latency of a prompt, tokens per second of a batch.

Contenders share their weights and take turns in one process on the same text.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import StaticCache

import tide_compile
from bench.support.page import Table
from bench.support.report import Timing, interleave
from bench.support.table_quality import at_threshold
from tide_compile import ExitStats, RouterBank

Step = Callable[[], float]
PIECE = 8  # tokens decoded in a turn
WRITTEN = 64  # tokens after which decoding starts again behind the context
BASE = "inductor"


def contenders(
    model: nn.Module, bank: RouterBank, thresholds: Sequence[float], lowering: str = "inductor"
) -> dict[str, Callable]:
    """Calls of the model: eager, by stock Inductor, by tide without exits, and with the routers at each threshold.
    ``lowering="eager"`` compiles nothing, for a look at the exits."""
    common = {"lowering": lowering, "compaction": "auto" if lowering == "inductor" else "never"}
    routed = torch.compile(model, backend="tide", options={**common, "router": at_threshold(bank, thresholds[0])})
    return {
        "eager": model,
        BASE: torch.compile(model, backend=lowering),
        "tide off": torch.compile(model, backend="tide", options={"exit_threshold": 1.0, **common}),
        **{f"tide at {t:g}": _at(routed, t) for t in thresholds},
    }


def _at(routed: Callable, threshold: float) -> Callable:
    def call(*args: object, **kwargs: object) -> object:
        with tide_compile.exit_threshold(threshold):
            return routed(*args, **kwargs)

    return call


def reading(call: Callable, cache: StaticCache, prompts: Sequence[Sequence[int]]) -> Step:
    """A step that runs the next of the prompts, all of a length, and returns its seconds."""
    turns = itertools.cycle(torch.tensor([prompt]) for prompt in prompts)

    @torch.no_grad()
    def step() -> float:
        cache.reset()
        ids = next(turns)
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        started = time.perf_counter()
        call(ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - started

    return step


@torch.no_grad()
def writing(model: nn.Module, call: Callable, ids: torch.Tensor) -> Step:
    """A step that decodes ``PIECE`` greedy tokens for each row of ``ids`` [B, S] and returns the seconds. The context
    is read without exits; behind ``WRITTEN`` tokens it starts again."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + WRITTEN)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    state = {"ids": ids[:, -1:], "left": WRITTEN}

    @torch.no_grad()
    def step() -> float:
        if not state["left"]:
            for layer in cache.layers:
                layer.cumulative_length.fill_(ids.shape[1] - 1)
            state.update(ids=ids[:, -1:], left=WRITTEN)
        started = time.perf_counter()
        for _ in range(PIECE):
            logits = call(state["ids"], past_key_values=cache).logits
            state["ids"] = logits[:, -1].argmax(-1, keepdim=True)
        state["left"] -= PIECE
        return time.perf_counter() - started

    return step


def compare(steps: Mapping[str, Step], turns: int, rounds: int) -> tuple[dict[str, Timing], dict[str, ExitStats]]:
    """Run every step ``turns`` times to compile what it needs and ``turns`` times to count exits, then time them."""
    exits = {}
    for name, step in steps.items():
        for _ in range(turns):
            step()
        with tide_compile.record_exits() as exits[name]:
            for _ in range(turns):
                step()
    return interleave(dict(steps), rounds), exits


def latency(
    model: nn.Module, calls: Mapping[str, Callable], prompts: Mapping[int, Sequence[Sequence[int]]], rounds: int
) -> Table:
    """Milliseconds for prompts of each length; ``prompts`` by length."""
    rows, longest = [], max(prompts)
    cache = StaticCache(config=model.config, max_cache_len=longest)  # one for all: another one is compiled for again
    with torch.no_grad():
        model(torch.tensor([prompts[longest][0]]), past_key_values=cache)
    for length, texts in prompts.items():
        steps = {name: reading(call, cache, texts) for name, call in calls.items()}
        timings, exits = compare(steps, len(texts), rounds)
        for name, timing in timings.items():
            ratio = f"{timing.median / timings[BASE].median:.2f}"
            rows.append([str(length), name, *timing.cells(), ratio, *_left(name, exits[name])])
            print(*rows[-1], sep="  ", flush=True)
    return Table(
        "Prefill latency",
        "One prompt, a static cache, the logits of the last token. Medians and quartiles; contenders take turns on the "
        "same prompts.",
        f"{len(prompts[longest])} prompts of each length, a cache of {longest} tokens, {rounds} rounds.",
        ["tokens", "", "ms", "quartiles", "time to Inductor's", "leave early", "layers saved"],
        rows,
    )


def throughput(
    model: nn.Module,
    contenders_of: Callable[[], Mapping[str, Callable]],
    rows: Sequence[Sequence[int]],
    batches: Sequence[int],
    rounds: int,
) -> Table:
    """Tokens per second of decoding; a batch is the first of ``rows``. Every batch size has contenders of its own,
    because sizes are constants."""
    cells = []
    for batch in batches:
        torch._dynamo.reset()
        ids = torch.tensor(rows[:batch])
        steps = {name: writing(model, call, ids) for name, call in contenders_of().items()}
        timings, exits = compare(steps, WRITTEN // PIECE, rounds)
        for name, timing in timings.items():
            slow, fast = (batch * PIECE / seconds for seconds in timing.spread[::-1])
            middle = batch * PIECE / timing.median
            speed = f"{timings[BASE].median / timing.median:.2f}"
            figures = [f"{middle:.1f}", f"{slow:.1f} to {fast:.1f}", speed]
            cells.append([str(batch), name, *figures, *_left(name, exits[name])])
            print(*cells[-1], sep="  ", flush=True)
    return Table(
        "Batch throughput",
        f"Greedy decoding with a static cache, {WRITTEN} tokens behind each context, then again; each contender goes "
        f"on with its own tokens. Medians and quartiles of turns of {PIECE} tokens.",
        f"Contexts of {len(rows[0])} tokens, {rounds} rounds.",
        ["batch", "", "tokens per second", "quartiles", "speed to Inductor's", "leave early", "layers saved"],
        cells,
    )


def _left(name: str, stats: ExitStats) -> list[str]:
    return [f"{stats.exit_rate:.1%}", f"{stats.layers_saved:.1%}"] if name.startswith("tide at") else ["", ""]
