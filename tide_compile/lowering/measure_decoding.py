"""measure_decoding: the model of this machine, with what decoding finds of it."""

from __future__ import annotations

import functools
from statistics import median

import torch
from torch._dynamo.convert_frame import compile_lock
from torch._guards import tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tide_compile.kernels.cpu.attention import attend
from tide_compile.lowering.compile_piece import compile_graph
from tide_compile.lowering.measure_forms import _ROUNDS, _WORKING_SET, _candidates, _once, _seconds
from tide_compile.passes.aten.gemm_forms import Linears
from tide_compile.passes.aten.lower_attention import attend_one
from tide_compile.passes.graph.cost import Device

_FEW = (1, 4, 16, 64, 256)  # rows of products that are measured for predictions
_LOOP = 4e-6  # seconds that the beginning of a loop on all cores costs


@functools.cache
def measure_decoding(dtype: torch.dtype, shared: int = 1) -> Device:
    """This CPU as decoding finds it: products of ``_FEW`` rows in their fastest forms, streamed weights, and attention
    of one and of many queries, in which ``shared`` heads read each key."""
    outs, ins = (1 << 11, 1 << 11), 1 << 10
    speeds: dict[int, float] = {}
    with compile_lock:  # else a product that another thread has begun to compile could be taken for ready
        keys, attention = _attention(dtype, shared), _prompt_attention(dtype, shared)
        for rows in reversed(_FEW):  # what decoding waits for last, so that it is of the latest moment
            linears = Linears(rows, outs, ins, dtype, dtype)
            seconds = _seconds(_candidates(linears), linears, median)
            speeds[rows] = 2.0 * rows * sum(outs) * ins / min(seconds.values())
    bandwidth = speeds[_FEW[0]] / (2 * _FEW[0]) * dtype.itemsize
    return Device(speeds[_FEW[-1]], bandwidth, _LOOP, keys, tuple(sorted(speeds.items())), attention)


def _attention(dtype: torch.dtype, shared: int) -> float:
    """Bytes of keys and values per second that attention of one query reads."""
    groups, length, size = 4, 1 << 12, 64
    with FakeTensorMode():
        fakes = [torch.empty(1, groups * n, m, size, dtype=dtype) for n, m in ((shared, 1), (1, length), (1, length))]
    with tracing(None):
        graph = make_fx(lambda *given: (attend_one(*given, scale=None),))(*fakes)
    run = compile_graph(graph, fakes)
    query = torch.ones(1, groups * shared, 1, size, dtype=dtype)
    count = _WORKING_SET // (2 * groups * length * size * dtype.itemsize)
    keys = torch.ones(2 * count, 1, groups, length, size, dtype=dtype).unbind()
    pairs = list(zip(keys[::2], keys[1::2], strict=True))
    seconds = median(_once(run, query, pairs) for _ in range(_ROUNDS))
    return sum(k.nbytes for k in keys) / seconds


def _prompt_attention(dtype: torch.dtype, shared: int) -> float:
    """Operations per second of attention of 256 queries to 512 keys that they all see."""
    groups, rows, length, size = 4, 256, 512, 64
    shapes = [(1, groups * n, m, size) for n, m in ((shared, rows), (1, length), (1, length))]
    query, key, value = (torch.ones(shape, dtype=dtype) for shape in shapes)
    operands = [(key, value, torch.zeros(rows, length, dtype=dtype), None)]
    seconds = median(_once(attend, query, operands) for _ in range(1 + 2 * _ROUNDS))
    return 4.0 * query.numel() * length / seconds
