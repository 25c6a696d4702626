"""Tuning: which form of a product is fastest here, measured once per shape and kept in the cache folder."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch._guards import tracing
from torch.fx.experimental.proxy_tensor import make_fx

from tide_compile.compiled import compile_graph
from tide_compile.device import cpu_name, measured
from tide_compile.files import cache_folder, write_text
from tide_compile.passes.cost import Device
from tide_compile.passes.lower_linears import CHUNKS, MOST_STREAMED, Form, Linears, stream

log = logging.getLogger("tide_compile")

_WORKING_SET = 1 << 28  # bytes of weights that are read in turn, so that they come from memory, as in a model
_PARTS = 2 * CHUNKS  # a step of a loop for any size has more to do, so that it needs more parts for the same speed
_ROUNDS, _LEAST = 5, 0.2  # rounds, and seconds for all of them: a short disturbance must not decide
_CALL = 10e-6  # seconds that a call between the loops of a segment costs, apart from what it computes


def fastest_forms(found: Iterable[Linears]) -> dict[Linears, Form]:
    """The fastest form of products of few rows on this machine's CPU, measured in some 0.3 s unless it is known.

    Results are kept in ``linears.json`` in the cache folder, by processor, threads and torch version.
    """
    known = _load().get(_machine(), {})
    few = [linears for linears in sorted(found, key=str) if linears.rows <= MOST_STREAMED]
    missing = [linears for linears in few if str(linears) not in known]
    for linears in missing:
        seconds = _seconds(_candidates(linears), linears)
        known[str(linears)] = "stream" if seconds["stream"] < seconds["aten"] + _CALL * len(linears.outs) else "aten"
        log.info("%s: %s", linears, ", ".join(f"{form} {s * 1e6:.0f} us" for form, s in seconds.items()))
    if missing:
        try:
            write_text(_path(), json.dumps(_load() | {_machine(): known}, indent=1, sort_keys=True))
        except OSError as error:
            log.warning("what was measured is not kept for the next process: %s", error)
    return {linears: known[str(linears)] for linears in few}


@functools.cache
def measured_decoding(dtype: torch.dtype) -> Device:
    """This CPU as decoding finds it: bytes per second of streamed weights, and seconds that a product costs whatever
    its size."""
    streamed = _streamed(1, dtype, dtype)
    large, tiny = Linears(1, (1 << 15,), 1 << 10, dtype, dtype), Linears(1, (64,), 64, dtype, dtype)
    seconds = [_seconds({"stream": streamed}, linears)["stream"] for linears in (large, tiny)]
    bandwidth = sum(large.outs) * large.ins * dtype.itemsize / seconds[0]
    return Device(measured(torch.device("cpu"), dtype).flops, bandwidth, seconds[1])


def _candidates(linears: Linears) -> dict[Form, Callable[[Tensor, Tensor], object]]:
    total = sum(linears.outs)

    def one_by_one(x: Tensor, weight: Tensor) -> None:
        """Parts of ``weight`` [N, ins] in the proportions of ``outs``, as if each were a weight of its own."""
        ends = [sum(linears.outs[: i + 1]) * len(weight) // total for i in range(len(linears.outs))]
        for start, end in zip([0, *ends], ends, strict=False):
            torch.nn.functional.linear(x, weight[start:end].to(x.dtype))

    return {"aten": one_by_one, "stream": _streamed(linears.rows, linears.dtype, linears.stored)}


@functools.cache
def _streamed(rows: int, dtype: torch.dtype, stored: torch.dtype) -> Callable[[Tensor, Tensor], object]:
    """``stream`` compiled for weights of any size, in ``_PARTS``."""
    example = torch.ones(rows, 8 * _PARTS, dtype=dtype), torch.ones(16 * _PARTS, 8 * _PARTS).to(stored)

    def product(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        size = weight.shape[0] // _PARTS
        return (stream(x, [weight.narrow(0, i * size, size) for i in range(_PARTS)]),)

    with tracing(None):  # else the sizes become symbols of the model that is being compiled
        graph = make_fx(product, tracing_mode="symbolic")(*example)
    for node in graph.graph.nodes:
        node.type = None  # an annotation as text, which AOTAutograd's cache takes for a class
    return compile_graph(graph, [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")])


def _seconds(products: dict[Form, Callable[[Tensor, Tensor], object]], linears: Linears) -> dict[Form, float]:
    """Of each product, the least of some rounds in which they take turns, because whatever else the machine does adds.
    Of very large weights a part will do."""
    total, per_row = sum(linears.outs), linears.ins * linears.stored.itemsize
    outs = min(total, _WORKING_SET // (2 * per_row)) // _PARTS * _PARTS or _PARTS
    count = max(2, min(256, _WORKING_SET // (outs * per_row)))
    x = torch.ones(linears.rows, linears.ins, dtype=linears.dtype)
    weights = torch.ones(count, outs, linears.ins, dtype=linears.stored).unbind()
    for product in products.values():
        product(x, weights[0])
    rounds: list[dict[Form, float]] = []
    while len(rounds) < _ROUNDS or sum(sum(r.values()) for r in rounds) * count < _LEAST:
        rounds.append({form: _once(p, x, weights) / count for form, p in products.items()})
    return {form: min(r[form] for r in rounds) * total / outs for form in products}


def _once(product: Callable[[Tensor, Tensor], object], x: Tensor, weights: Iterable[Tensor]) -> float:
    started = time.perf_counter()
    for weight in weights:
        product(x, weight)
    return time.perf_counter() - started


def _path() -> Path:
    return cache_folder() / "linears.json"


def _machine() -> str:
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _load() -> dict[str, dict[str, Form]]:
    """Forms by product, by machine."""
    try:
        return json.loads(_path().read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError:
        log.warning("%s cannot be read and is measured anew", _path())
        return {}
