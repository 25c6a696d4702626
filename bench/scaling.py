"""python -m bench.scaling: how the time of a decoded token grows, beside what the cost model predicts.

Four tables, and with ``--plot FILE.png`` a picture of them: ms per token as the engine's ``generate`` runs it, against
the depth of the exit, with all tokens leaving, and without exits against the length of the cache, the batch, and the
length of a prompt. Predictions are made for this machine (``tide plan --device cpu``); memory is the largest resident
size of the process so far.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
from collections.abc import Callable, Sequence

import torch
from tide_compile.passes.cost import Device
from torch import nn
from transformers import StaticCache

from bench.decode import in_engine
from bench.models import SMOLLM2, load_model
from bench.prefill import operations, prompt
from bench.report import Timing, show, timed
from tide_compile import RouterBank
from tide_compile.planning import CostModel, find_device

ROUNDS, WARM = 15, 4


@torch.no_grad()
def token_time(model: nn.Module, call: Callable, batch: int, length: int) -> Timing:
    """Decoding one token of ``batch`` sequences into a static cache of ``length`` tokens that is nearly full."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(torch.zeros(batch, 8, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    ids = torch.full((batch, 1), 5)

    @torch.no_grad()
    def step() -> float:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length - 2)
        return timed(lambda: call(ids, past_key_values=cache))

    for _ in range(WARM):
        step()
    return Timing([step() for _ in range(ROUNDS)])


def row(x: object, timing: Timing, predicted: float) -> list[object]:
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    median = timing.median * 1e3
    return [x, *timing.cells(), f"{predicted:.1f}", f"{predicted / median:.2f}", f"{memory:.1f}"]


def by_depth(model: nn.Module, costs: CostModel, device: Device, length: int) -> list[list[object]]:
    n, rows = costs.num_layers, []
    bank = RouterBank.untrained(model.config.hidden_size, n)
    for depth in costs.depths:
        torch._dynamo.reset()
        forced = {"router": bank, "exit_threshold": 0.0, "min_layers": depth, "checkpoint_interval": depth}
        call = in_engine(model, forced)
        predicted = costs.forecast(device, 1, length, depth, 1.0).on
        rows.append(row(depth, token_time(model, call, 1, length), predicted))
        print(rows[-1], flush=True)
    return rows


def without_exits(
    model: nn.Module, costs: CostModel, device: Device, cases: Sequence[tuple[int, int]]
) -> list[list[object]]:
    rows = []
    for batch, length in cases:
        torch._dynamo.reset()
        call = in_engine(model, {"exit_threshold": 1.0})
        predicted = costs.forecast(device, batch, length, costs.depths[0], 0.0).off
        rows.append(row(f"{batch} x {length}", token_time(model, call, batch, length), predicted))
        print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def prompts(model: nn.Module, device: Device, lengths: Sequence[int]) -> list[list[object]]:
    """Predicted: the operations at the speed of a large product."""
    torch._dynamo.reset()
    call, rows = torch.compile(model, backend="tide", options={"exit_threshold": 1.0}), []
    for length in lengths:
        ids = torch.randint(10, model.config.vocab_size - 1, (1, length))
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        step = prompt(model, call, ids)
        for _ in range(2):
            step()
        timing = Timing([step() for _ in range(ROUNDS // 3)])
        rows.append(row(length, timing, operations(model, ids) / device.flops * 1e3))
        print(rows[-1], flush=True)
    return rows


def plot(tables: dict[str, list[list[object]]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(tables), figsize=(5 * len(tables), 4), constrained_layout=True)
    for axis, (title, rows) in zip(axes, tables.items(), strict=True):
        x = range(len(rows))
        axis.plot(x, [float(r[1]) for r in rows], "o-", label="measured")
        axis.plot(x, [float(r[3]) for r in rows], "--", label="predicted")
        axis.set_xticks(x, [str(r[0]) for r in rows])
        axis.set(title=title, ylabel="ms per step", ylim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--depths", type=int, nargs="+", help="layers before the exit; default: every sixth of N")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--plot", help="write a picture to this PNG file")
    parser.add_argument("--json", help="also write the results to <json>.<table>")
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'tide-compile[plot]'")
    torch._dynamo.config.recompile_limit = 64
    model, _ = load_model(args.model, getattr(torch, args.dtype))
    n = model.config.num_hidden_layers
    depths = args.depths or [n * i // 6 for i in range(1, 6)]
    costs, device = CostModel(model, depths), find_device("cpu", model.dtype, model.config)
    print(
        f"{device.bandwidth / 1e9:.1f} GB/s of weights, {device.keys / 1e9:.1f} of keys; GFLOP/s of products of rows: "
        + ", ".join(f"{rows}: {speed / 1e9:.0f}" for rows, speed in device.few)
    )
    tables = {
        "exit after": by_depth(model, costs, device, 128),
        "length": without_exits(model, costs, device, [(1, length) for length in args.contexts]),
        "batch": without_exits(model, costs, device, [(batch, 128) for batch in args.batches]),
        "prompt": prompts(model, device, args.prompts),
    }
    for title, rows in tables.items():
        headers = [title, "ms", "quartiles", "predicted", "predicted / measured", "GB resident"]
        show(f"decode, {args.model}, {args.dtype}, by {title}", headers, rows, args.json and f"{args.json}.{title}")
    if args.plot:
        plot(tables, args.plot)


if __name__ == "__main__":
    main()
