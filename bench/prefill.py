"""python -m bench.prefill: a prompt of which a chosen share of tokens leaves after a third of the layers.

Contenders share their weights and run in turn in one process: eager, stock Inductor, tide without exits (off; packed:
with copies of the weights, the size of which is printed), tide with compaction never (masked), always (compact) and
decided by its cost model (auto). Routers are synthetic
(``synthetic_routers``). Ideal: the share of the full model's operations (matrix products and attention) that is left
when rows that have left cost their keys and values only; to ideal: time relative to this share of tide off's time. A
static cache, the logits of the last token, batch 1.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import StaticCache

import tide_compile
from bench.support.models import SMOLLM2, load_model, truncated
from bench.support.report import Timing, interleave, show
from tide_compile import ExitStats, synthetic_routers

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
KINDS = {"tide masked": "never", "tide compact": "always", "tide auto": "auto"}


@torch.no_grad()
def prompt(model: nn.Module, call: Callable, ids: torch.Tensor) -> Callable[[], float]:
    """A step that runs the prompt and returns its seconds."""
    cache = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 64)
    model(ids[:, :8], past_key_values=cache)

    @torch.no_grad()
    def step() -> float:
        cache.reset()
        started = time.perf_counter()
        call(ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - started

    return step


def operations(model: nn.Module, ids: torch.Tensor, attention: bool = True) -> int:
    counted = {}
    if attention:
        counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}  # which torch does not count
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        model(ids, use_cache=False, logits_to_keep=1)
    return counter.get_total_flops()


def _attention(query: Sequence[int], key: Sequence[int], *_: object, **__: object) -> int:
    return 4 * math.prod(query) * key[-2]


def fill_share(stats: ExitStats) -> float | None:
    """What a row that has left still costs, as a share of a row, from the decisions on segments (which are printed);
    None if there were none."""
    print(*stats.decisions.values(), sep="\n", flush=True)
    for decision in stats.decisions.values():
        kept = decision.kept / decision.rows
        return (decision.left - kept) / (1 - kept) if kept < 1 else None
    return None


def ideal(model: nn.Module, ids: torch.Tensor, depth: int, share: float, fill: float | None) -> float | None:
    """The share of operations left: layers behind the exit cost ``fill`` of themselves for a token that has left. None
    when that is not known."""
    if fill is None:
        return None if share else 1.0
    whole, first = operations(model, ids), operations(truncated(model, depth), ids)
    return (first + (whole - first) * (1 - share + share * fill)) / whole


def compiled_kinds(model: nn.Module, depth: int) -> dict[str, Callable]:
    common = {"min_layers": depth, "checkpoint_interval": depth, "compaction_threshold": 0.1}
    off = {"exit_threshold": 1.0}
    kinds = {
        "tide off": torch.compile(model, backend="tide", options=off),
        "tide off, packed": torch.compile(model, backend="tide", options={**off, "pack_weights": True}),
    }
    return kinds | {
        name: torch.compile(model, backend="tide", options={"compaction": kind, **common})
        for name, kind in KINDS.items()
    }


def show_memory(model: nn.Module) -> None:
    sizes = sum(p.nbytes for p in model.parameters()), tide_compile.packed_bytes()
    print("weights {:.0f} MB, copies of them (pack_weights) {:.0f} MB".format(*(size / 1e6 for size in sizes)))


def compared(name: str, timings: dict[str, Timing]) -> list[str]:
    """Cells of a contender: its time, and that relative to stock Inductor and, for tide, to tide without exits."""
    timing = timings[name]
    to_off = f"{timing.median / timings['tide off'].median:.2f}" if name.startswith("tide") else ""
    return [name, *timing.cells(), f"{timing.median / timings['inductor'].median:.2f}", to_off]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024], help="tokens of the prompts")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of tokens that leave, 0 to 1")
    parser.add_argument("--rounds", type=int, default=7, help="prompts timed per contender and share")
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 32
    model, _ = load_model(args.model, getattr(torch, args.dtype))
    depth = model.config.num_hidden_layers // 3
    torch.manual_seed(0)
    stock, kinds = torch.compile(model), compiled_kinds(model, depth)
    rows, fill = [], None
    for length in args.lengths:
        ids = torch.randint(10, model.config.vocab_size - 1, (1, length))
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        steps = {"eager": prompt(model, model, ids), "inductor": prompt(model, stock, ids)}
        steps |= {name: prompt(model, call, ids) for name, call in kinds.items()}
        for share in args.shares:
            bank = synthetic_routers(model, ids, {depth - 1: share})
            tide_compile.attach(model, bank)
            with tide_compile.record_exits() as stats:
                for _ in range(2):
                    for step in steps.values():
                        step()  # compiles
            timings = interleave(steps, args.rounds)
            fill = fill_share(stats) or fill
            left = ideal(model, ids, depth, share, fill)
            for name, timing in timings.items():
                cells = ["", ""]
                if name in KINDS and left is not None:
                    cells = [f"{left:.2f}", f"{timing.median / timings['tide off'].median / left:.2f}"]
                rows.append([length, f"{share:.0%}", *compared(name, timings), *cells])
                print(rows[-1], flush=True)
    headers = ["tokens", "exits", "", "ms", "quartiles", "to inductor", "to off", "ideal", "to ideal"]
    show(f"prefill, {args.model}, {args.dtype}, batch 1, exits after {depth} layers", headers, rows, args.json)
    show_memory(model)


if __name__ == "__main__":
    main()
