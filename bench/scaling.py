"""python -m bench.scaling: how the time of a decoded token grows, beside what the cost model predicts.

Four tables, and with ``--plot FILE.png`` a picture of them: ms per token as the engine's ``generate`` runs it, against
the depth of the exit, with all tokens leaving, and without exits against the length of the cache, the batch, and the
length of a prompt. Predictions are made for this machine (``tide plan --device cpu``), which is measured right
before each turn; prompts run in plain ``torch.compile``; memory is the largest resident size of the process when a case
had run first.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm
from transformers import StaticCache

from bench.decode import in_engine
from bench.prefill import operations, prompt
from bench.support.models import SMOLLM2, load_model
from bench.support.report import Timing, interleave, show, timed
from tide_compile import RouterBank
from tide_compile.kernels.cpu.attention import ROWS
from tide_compile.lowering.machine import measure_decoding, measure_machine
from tide_compile.passes.graph.cost import Device
from tide_compile.planning.forecast import CostModel, find_device

TABLES, WARM = ("exit after", "length", "batch", "prompt"), 4
TURN = 4, 1  # steps of a case, behind one that does not count


@dataclass(frozen=True, slots=True)
class Case:
    """``step``: seconds of one. ``predicted``: ms of one on a device. ``memory``: resident GB once it had run.
    ``turn``: steps that are timed one after the other, and how many before them do not count."""

    name: object
    step: Callable[[], float]
    predicted: Callable[[Device], float]
    memory: float
    turn: tuple[int, int]

    @classmethod
    def warm(
        cls, name: object, step: Callable[[], float], predicted: Callable[[Device], float], turn: tuple[int, int] = TURN
    ) -> Case:
        for _ in range(WARM):
            step()
        print(f"{name} is compiled", flush=True)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return cls(name, step, predicted, memory, turn)


def measure(cases: Sequence[Case], model: nn.Module, rounds: int) -> list[list[object]]:
    """One row for each case. They take turns, and right before each the machine is measured for its prediction,
    because a shared one changes within seconds; of the predictions and their ratios, too, the medians are taken."""
    devices = []
    timings, predictions, shares = (defaultdict(kind) for kind in (Timing, list, list))
    for _ in tqdm(range(rounds), "turns"):
        for case in cases:
            devices.append(device_now(model))
            timing = interleave({case.name: case.step}, 1, *case.turn)[case.name]
            timings[case.name].seconds += timing.seconds
            predictions[case.name].append(case.predicted(devices[-1]))
            shares[case.name].append(predictions[case.name][-1] / (timing.median * 1e3))
    show_devices(devices)
    rows = []
    for case in cases:
        low, middle, high = statistics.quantiles(shares[case.name], n=4)
        predicted = f"{statistics.median(predictions[case.name]):.1f}"
        share = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        rows.append([case.name, *timings[case.name].cells(), predicted, share, f"{case.memory:.1f}"])
    return rows


def device_now(model: nn.Module) -> Device:
    measure_machine.cache_clear()
    measure_decoding.cache_clear()
    return find_device("cpu", model.dtype, model.config)


def show_devices(devices: Sequence[Device]) -> None:
    """Medians of what was measured, and how far it went."""

    def told(value: Callable[[Device], float]) -> str:
        values = sorted(value(device) / 1e9 for device in devices)
        return f"{statistics.median(values):.0f} ({values[0]:.0f} to {values[-1]:.0f})"

    few = [f"{rows}: {told(lambda d, i=i: d.few[i][1])}" for i, (rows, _) in enumerate(devices[0].few)]
    print(f"GB/s of weights: {told(lambda d: d.streaming)}, of keys: {told(lambda d: d.keys)}")
    print(f"GFLOP/s of products of rows: {', '.join(few)}; of attention: {told(lambda d: d.attention)}", flush=True)


@torch.no_grad()
def token(model: nn.Module, call: Callable, batch: int, length: int) -> Callable[[], float]:
    """A step that decodes one token of ``batch`` sequences into a static cache of ``length`` tokens that is nearly
    full."""
    cache = StaticCache(config=model.config, max_cache_len=length)
    model(torch.zeros(batch, 8, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
    ids = torch.full((batch, 1), 5)

    @torch.no_grad()
    def step() -> float:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length - 2)
        return timed(lambda: call(ids, past_key_values=cache))

    return step


def by_depth(model: nn.Module, costs: CostModel, length: int) -> list[Case]:
    n, cases = costs.num_layers, []
    bank = RouterBank.untrained(model.config.hidden_size, n)
    for depth in costs.depths:
        forced = {"router": bank, "exit_threshold": 0.0, "min_layers": depth, "checkpoint_interval": depth}
        step = token(model, in_engine(model, forced), 1, length)
        cases.append(Case.warm(depth, step, lambda device, d=depth: costs.forecast(device, 1, length, d, 1.0).on))
    return cases


def without_exits(model: nn.Module, costs: CostModel, sizes: Sequence[tuple[int, int]]) -> list[Case]:
    """``sizes``: sequences, and tokens of the cache."""
    cases = []
    for batch, length in sizes:
        step = token(model, in_engine(model, {"exit_threshold": 1.0}), batch, length)

        def predicted(device: Device, batch: int = batch, length: int = length) -> float:
            return costs.forecast(device, batch, length, costs.depths[0], 0.0).off

        cases.append(Case.warm(f"{batch} x {length}", step, predicted))
    return cases


@torch.no_grad()
def prompts(model: nn.Module, lengths: Sequence[int]) -> list[Case]:
    """Predicted: products at the speed of those of so many rows, and attention at its own, of which a prompt needs half
    and what its blocks of queries reach over."""
    call, cases = torch.compile(model, backend="tide", options={"exit_threshold": 1.0}), []
    for length in lengths:
        ids = torch.randint(10, model.config.vocab_size - 1, (1, length))
        torch._dynamo.maybe_mark_dynamic(ids, 1)
        products = operations(model, ids, attention=False)
        attention = (operations(model, ids) - products) * (0.5 + min(ROWS, length) / (2 * length))

        def predicted(
            device: Device, length: int = length, products: float = products, attention: float = attention
        ) -> float:
            return (products / device.for_rows(length).flops + attention / device.attention) * 1e3

        cases.append(Case.warm(length, prompt(model, call, ids), predicted, (1, 0)))
    return cases


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
    parser.add_argument("--rounds", type=int, default=10, help=f"turns of {TURN[0]} steps, of prompts one")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="default: all")
    parser.add_argument("--plot", help="write a picture to this PNG file")
    parser.add_argument("--json", help="also write the results to <json>.<table>")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'tide-compile[plot]'")
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False  # each case has code for its sizes, as if it were alone
    model, _ = load_model(args.model, getattr(torch, args.dtype))
    n = model.config.num_hidden_layers
    depths = args.depths or [n * i // 6 for i in range(1, 6)]
    costs = CostModel(model, depths)
    kinds = {
        "exit after": lambda: by_depth(model, costs, 128),
        "length": lambda: without_exits(model, costs, [(1, length) for length in args.contexts]),
        "batch": lambda: without_exits(model, costs, [(batch, 128) for batch in args.batches]),
        "prompt": lambda: prompts(model, args.prompts),
    }
    tables = {}
    for title in args.tables:
        torch._dynamo.reset()
        tables[title] = rows = measure(kinds[title](), model, args.rounds)
        headers = [title, "ms", "quartiles", "predicted", "predicted / measured", "GB resident"]
        show(f"decode, {args.model}, {args.dtype}, by {title}", headers, rows, args.json and f"{args.json}.{title}")
    if args.plot:
        plot(tables, args.plot)


if __name__ == "__main__":
    main()
