"""machine: what this machine can do, measured once per process: one model, which decides and predicts."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tide_compile.kernels.cpu.attention import attend
from tide_compile.lowering import measure_forms
from tide_compile.lowering.compile_piece import compile_graph
from tide_compile.lowering.measure_forms import ROUNDS, WORKING_SET, candidates, once
from tide_compile.passes.aten.gemm_forms import MANY, Linears, possible_forms
from tide_compile.passes.aten.lower_attention import attend_one
from tide_compile.passes.graph.cost import Device
from tide_compile.torch_internals.dynamo import compile_lock
from tide_compile.torch_internals.fx import FakeTensorMode, alone

log = logging.getLogger("tide_compile")

_SIZE = 1024  # of the matrices on a GPU: large enough for full speed
_BYTES = 1 << 27
_OUTS, _INS = (1 << 11, 1 << 11), 1 << 10  # of products on a CPU
_FEW = (1, 4, 16, 64)  # rows of products that are measured for predictions, besides ``MANY``
_LOOP = 4e-6  # seconds that the beginning of a loop on all cores of a CPU costs


@functools.cache
def measure_machine(device: torch.device, dtype: torch.dtype) -> Device:
    """Speed of large matrix products in ``dtype``, on a CPU in the form that is the fastest there; of copies; and what
    a kernel costs whatever its size. Takes a fraction of a second."""
    with torch.inference_mode():
        data = torch.ones(_BYTES // dtype.itemsize, device=device, dtype=dtype)
        target, small = torch.empty_like(data), torch.ones(1, device=device)
        bandwidth = 2.0 * _BYTES / _median(lambda: target.copy_(data), device)
        if device.type == "cpu":
            found = Device(_product_speed(MANY, dtype), bandwidth, _LOOP)
        else:
            left, right = (torch.ones(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
            flops = 2.0 * _SIZE**3 / _median(lambda: torch.mm(left, right), device)
            found = Device(flops, bandwidth, _median(lambda: small + 1, device))
    log.debug(
        "%s %s: %.0f GFLOP/s, %.1f GB/s, %.0f us per kernel",
        device, dtype, found.flops / 1e9, found.bandwidth / 1e9, found.overhead * 1e6,
    )  # fmt: skip
    return found


@functools.cache
def measure_decoding(dtype: torch.dtype, shared: int = 1) -> Device:
    """``measure_machine`` of this CPU, with what decoding finds of it: products of few rows in their fastest forms,
    streamed weights, and attention of one and of many queries, in which ``shared`` heads read each key."""
    machine = measure_machine(torch.device("cpu"), dtype)
    with compile_lock:  # else a product that another thread has begun to compile could be taken for ready
        keys, attention = _attention(dtype, shared), _prompt_attention(dtype, shared)
        # what decoding waits for last, so that it is of the latest moment
        speeds = {rows: _product_speed(rows, dtype) for rows in reversed(_FEW)}
    one = min(_FEW)
    return replace(
        machine,
        streaming=speeds[one] / (2 * one) * dtype.itemsize,
        keys=keys,
        few=(*sorted(speeds.items()), (MANY, machine.flops)),
        attention=attention,
    )


def _product_speed(rows: int, dtype: torch.dtype) -> float:
    """Operations per second of a product of so many rows in its fastest form; medians of several."""
    linears = Linears(rows, _OUTS, _INS, dtype, dtype)
    seconds = measure_forms.seconds_of(candidates(linears, possible_forms(linears)), linears, median)
    return 2.0 * rows * sum(_OUTS) * _INS / min(seconds.values())


def _attention(dtype: torch.dtype, shared: int) -> float:
    """Bytes of keys and values per second that attention of one query reads."""
    groups, length, size = 4, 1 << 12, 64
    with FakeTensorMode():
        fakes = [torch.empty(1, groups * n, m, size, dtype=dtype) for n, m in ((shared, 1), (1, length), (1, length))]
    with alone():
        graph = make_fx(lambda *given: (attend_one(*given, scale=None),))(*fakes)
    run = compile_graph(graph, fakes)
    query = torch.ones(1, groups * shared, 1, size, dtype=dtype)
    count = WORKING_SET // (2 * groups * length * size * dtype.itemsize)
    keys = torch.ones(2 * count, 1, groups, length, size, dtype=dtype).unbind()
    pairs = list(zip(keys[::2], keys[1::2], strict=True))
    seconds = median(once(run, query, pairs) for _ in range(ROUNDS))
    return sum(k.nbytes for k in keys) / seconds


def _prompt_attention(dtype: torch.dtype, shared: int) -> float:
    """Operations per second of attention of 256 queries to 512 keys that they all see."""
    groups, rows, length, size = 4, 256, 512, 64
    shapes = [(1, groups * n, m, size) for n, m in ((shared, rows), (1, length), (1, length))]
    query, key, value = (torch.ones(shape, dtype=dtype) for shape in shapes)
    operands = [(key, value, torch.zeros(rows, length, dtype=dtype), None)]
    seconds = median(once(attend, query, operands) for _ in range(1 + 2 * ROUNDS))
    return 4.0 * query.numel() * length / seconds


def _median(function: Callable[[], object], device: torch.device, times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds)
