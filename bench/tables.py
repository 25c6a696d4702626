"""python -m bench.tables: the tables of tide-inference's documentation, with this system and on real text.

Convergence per layer, exit rates of given text, latency of prompts, throughput of batches and the quality of what is
generated, per threshold. ``--markdown FILE`` writes them into a page, each with its machine, model, data and command;
tables that are not asked for stay there as they are. Measure on text that the routers were not calibrated on: without
``--router``, they are calibrated on text that the model writes itself.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from bench.support import table_quality, table_speed
from bench.support.models import SMOLLM2, load_model, model_title
from bench.support.page import Table, update_page
from bench.support.report import machine
from tide_compile import RouterBank, TIDEConfig, calibrate
from tide_compile.files import write_text

TITLES = {
    "convergence": "Convergence per layer",
    "exits": "Prefill exit rates",
    "latency": "Prefill latency",
    "throughput": "Batch throughput",
    "quality": "Generation quality",
}
HEADING = """# Benchmarks

The tables of tide-inference's documentation, for this system and on real text. Each has its data, model, machine and
command beside it, and can be made alone; a path in a command is given by its last two parts. What exits are worth apart
from routers is measured by other benchmarks: see docs/results.md.
"""


def make_tables(
    names: Sequence[str],
    model: nn.Module,
    tokenizer: object,
    bank_of: Callable[[], RouterBank],
    args: argparse.Namespace,
) -> Iterator[tuple[str, Table]]:
    """The tables of these names, one by one; ``bank_of`` is called if one of them needs routers."""
    bank = bank_of() if set(names) - {"convergence"} else None
    thresholds = args.thresholds
    own = [None] if bank is not None and bank.thresholds else []
    makers: dict[str, Callable[[], Table]] = {
        "convergence": lambda: table_quality.convergence(
            model, rows(math.ceil(args.tokens / args.length), args.length), TIDEConfig().convergence_threshold
        ),
        "exits": lambda: table_quality.exits(
            model, bank, rows(math.ceil(args.tokens / args.length), args.length), [*thresholds, *own]
        ),
        "latency": lambda: table_speed.latency(
            model,
            table_speed.contenders(model, bank, args.timed, args.lowering),
            {length: rows(args.turns, length) for length in args.lengths},
            args.rounds,
        ),
        "throughput": lambda: table_speed.throughput(
            model,
            lambda: table_speed.contenders(model, bank, args.timed, args.lowering),
            rows(max(args.batches), args.context),
            args.batches,
            args.rounds,
        ),
        "quality": lambda: table_quality.quality(
            model,
            tokenizer,
            bank,
            table_quality.beginnings(tokenizer, args.data, args.prompts, args.prompt_tokens),
            [1.0, *sorted(thresholds, reverse=True), *own],
            args.new_tokens,
        ),
    }

    def rows(count: int, length: int) -> list[list[int]]:
        return table_quality.text_rows(tokenizer, args.data, count, length)

    for name in names:
        yield name, makers[name]()


def routers(model: nn.Module, tokenizer: object, args: argparse.Namespace) -> RouterBank:
    """Those of ``--router``, or new ones."""
    if args.router:
        return RouterBank.load(args.router, model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "router.safetensors"
        config = TIDEConfig(checkpoint_interval=args.interval, min_layers=args.min_layers)
        return calibrate(model, tokenizer, config, path, dataset="self", num_samples=args.samples)


def described(bank: RouterBank) -> str:
    """What routers these are, without the folders of this machine."""
    data = "+".join(short(part) for part in str(bank.metadata.get("data", "unknown text")).split("+"))
    layers = ", ".join(map(str, bank.layers))
    return f"routers after layers {layers} from {bank.metadata.get('texts', '?')} rows of {data}"


def short(name: str) -> str:
    """A path without the folders above its own; other words as they are."""
    path = Path(name)
    return "/".join(path.parts[-2:]) if path.is_absolute() else name


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", nargs="+", choices=list(TITLES), default=list(TITLES), help="which; default: all")
    parser.add_argument("--model", default=SMOLLM2, help="smollm2, a hub name or a folder")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--data", default="pydoc", help="text to measure on: as for tide calibrate")
    parser.add_argument("--router", help="router file; default: calibrate on text that the model writes")
    parser.add_argument("--samples", type=int, default=200, help="texts for calibration")
    parser.add_argument("--interval", type=int, default=TIDEConfig().checkpoint_interval, help="when calibrating")
    parser.add_argument("--min-layers", type=int, default=TIDEConfig().min_layers, help="when calibrating")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.99, 0.95, 0.85, 0.7, 0.5])
    parser.add_argument("--timed", type=float, nargs="+", default=[0.95, 0.85, 0.5], help="thresholds to time")
    parser.add_argument("--tokens", type=int, default=16384, help="for convergence and exits")
    parser.add_argument("--length", type=int, default=256, help="of a row of these")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512], help="of prompts, for latency")
    parser.add_argument("--turns", type=int, default=8, help="different prompts of each of these lengths")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="for throughput")
    parser.add_argument("--context", type=int, default=64, help="tokens before those that are decoded")
    parser.add_argument("--rounds", type=int, default=24, help="turns of each contender that are timed")
    parser.add_argument("--prompts", type=int, default=32, help="for quality")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--lowering", default="inductor", choices=["inductor", "eager"], help="eager: compile nothing")
    parser.add_argument("--markdown", type=Path, help="put the tables into this page")
    parser.add_argument("--json", type=Path, help="write them to this file, too")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse(arguments)
    torch._dynamo.config.recompile_limit = 64
    model, tokenizer = load_model(args.model, getattr(torch, args.dtype))
    banks: list[RouterBank] = []

    def bank_of() -> RouterBank:
        banks.append(routers(model, tokenizer, args))
        return banks[0]

    name = model_title(short(args.model))
    kind = f"{name}, {model.config.get_text_config(decoder=True).num_hidden_layers} layers, {args.dtype}"
    shown = [a for i, a in enumerate(arguments) if "--json" not in arguments[max(0, i - 1) : i + 1]]
    command = " ".join(["python -m bench.tables", *map(short, shown)])
    made: dict[str, Table] = {}
    for name, table in make_tables(args.table, model, tokenizer, bank_of, args):
        made[name] = table
        used = [described(banks[0])] if banks and name != "convergence" else []
        setting = "; ".join([f"Text: {short(args.data)}", kind, *used, machine()]) + f".\n\n`{command}`"
        section = table.section(setting)
        print(f"\n{section}", flush=True)
        if args.markdown:  # as it comes: a long run may not come to its end
            update_page(args.markdown, HEADING, {table.title: section}, list(TITLES.values()))
        if args.json:
            record = {"machine": machine(), "command": command, "tables": {n: asdict(t) for n, t in made.items()}}
            write_text(args.json, json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
