"""python -m bench.batch: decoding one token for each sequence of a batch, of which a chosen share leaves early.

Sequences leave after a third of the layers (``synthetic_routers``; sequences are chosen so that exactly this share
of their last tokens does). Contenders share their weights and run in turn in one process, each step decoding the same
token behind the same context: eager, stock Inductor, tide without exits (off; packed: with copies of the weights, the
size of which is printed), tide with compaction never (masked), always (compact) and decided by its cost model (auto).
Ideal: the share of the full model's operations that is left when
rows that have left cost their keys and values only, and of the bytes of weights (all, unless every row leaves).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import StaticCache

import tide_compile
from bench.prefill import KINDS, compared, compiled_kinds, fill_share, ideal, show_memory
from bench.support.models import SMOLLM2, load_model, truncated
from bench.support.report import interleave, show
from tide_compile import RouterBank, TIDEConfig, synthetic_routers

SHARES = (0.0, 0.5, 1.0)
CONTEXT, CACHE = 64, 128  # tokens in the cache, and its length


@torch.no_grad()
def sequences(model: nn.Module, batch: int, share: float, depth: int) -> tuple[torch.Tensor, RouterBank]:
    """Token ids [B, CONTEXT + 1] and routers after ``depth`` layers, with which ``share`` of the last tokens leave."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size - 1, (max(4 * batch, 16), CONTEXT + 1), generator=generator)
    bank = synthetic_routers(model, ids, {depth - 1: share})
    config = TIDEConfig(min_layers=depth, checkpoint_interval=depth)
    with tide_compile.eager_reference(model, bank, config) as reference:
        model(ids, use_cache=False, logits_to_keep=1)
    leaves = reference.exit_layers[0][:, -1] == depth - 1
    leaving = round(share * batch)
    return torch.cat([ids[leaves][:leaving], ids[~leaves][: batch - leaving]]), bank


@torch.no_grad()
def decoder(model: nn.Module, call: Callable, ids: torch.Tensor) -> Callable[[], float]:
    """A step that decodes the last tokens of ``ids`` [B, S] and returns its seconds."""
    cache = StaticCache(config=model.config, max_cache_len=CACHE)
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)

    @torch.no_grad()
    def step() -> float:
        for layer in cache.layers:
            layer.cumulative_length.fill_(ids.shape[1] - 1)
        started = time.perf_counter()
        call(ids[:, -1:], past_key_values=cache)
        return time.perf_counter() - started

    return step


def weights_left(model: nn.Module, depth: int, share: float) -> float:
    """The share of the bytes of all weights that a step reads, without those that fill keys and values."""
    parts = [sum(p.numel() for p in m.parameters()) for m in (truncated(model, depth), model)]
    return parts[0] / parts[1] if share == 1 else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 32, 64])
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of sequences that leave, 0 to 1")
    parser.add_argument("--rounds", type=int, default=15, help="tokens timed per contender and share")
    parser.add_argument("--json", help="also write the result to this file")
    args = parser.parse_args()
    model, _ = load_model(args.model, getattr(torch, args.dtype))
    depth = model.config.num_hidden_layers // 3
    rows, fill = [], None
    for batch in args.batches:
        torch._dynamo.reset()  # sizes are constants: the batch is that of the cache
        stock, kinds = torch.compile(model), compiled_kinds(model, depth)
        for share in args.shares if batch > 1 else (0.0, 1.0):
            ids, bank = sequences(model, batch, share, depth)
            tide_compile.attach(model, bank)
            steps = {"eager": decoder(model, model, ids), "inductor": decoder(model, stock, ids)}
            steps |= {name: decoder(model, call, ids) for name, call in kinds.items()}
            with tide_compile.record_exits() as stats:
                for _ in range(3):
                    for step in steps.values():
                        step()  # compiles
            timings = interleave(steps, args.rounds)
            fill = fill_share(stats) or fill
            operations = ideal(model, ids, depth, share, fill)
            left = [f"{operations:.2f}" if operations else "", f"{weights_left(model, depth, share):.2f}"]
            for name in timings:
                cells = left if name in KINDS else ["", ""]
                rows.append([batch, f"{share:.0%}", *compared(name, timings), *cells])
                print(rows[-1], flush=True)
    headers = ["batch", "exits", "", "ms", "quartiles", "to inductor", "to off", "ideal FLOPs", "ideal bytes"]
    title = f"decode, {args.model}, {args.dtype}, context {CONTEXT}, exits after {depth} layers"
    show(title, headers, rows, args.json)
    show_memory(model)


if __name__ == "__main__":
    main()
