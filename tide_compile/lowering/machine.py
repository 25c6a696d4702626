"""What a device can do: measured once per process, device and dtype, in a fraction of a second."""

from __future__ import annotations

import functools
import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tide_compile.kernels.cpu.linear import can_multiply, linear
from tide_compile.passes.graph.cost import Device

log = logging.getLogger("tide_compile")

Product = Callable[[Tensor, Tensor], Tensor]

_SIZE = 1024  # of the matrices: large enough for full speed
_ROWS = (16, 64, 256, _SIZE)  # of the first: a processor without products of a dtype is 100 times slower
_LONG = 0.005  # seconds that tell the speed well enough
_BYTES = 1 << 27


@functools.cache
def measure_machine(device: torch.device, dtype: torch.dtype) -> Device:
    """Speed of matrix products in ``dtype``, on a CPU in fp32 and by oneDNN if that is faster, as products are lowered
    there; of copies, and the time of an empty kernel; medians of several."""
    with torch.inference_mode():
        flops = max(_flops(device, *each) for each in _products(device, dtype))
        data = torch.ones(_BYTES // dtype.itemsize, device=device, dtype=dtype)
        target, small = torch.empty_like(data), torch.ones(1, device=device)
        copying = _median(lambda: target.copy_(data), device)
        nothing = _median(lambda: small + 1, device)
    found = Device(flops, 2.0 * _BYTES / copying, nothing)
    log.info(
        "%s %s: %.0f GFLOP/s, %.1f GB/s, %.0f us per kernel",
        device, dtype, found.flops / 1e9, found.bandwidth / 1e9, found.overhead * 1e6,
    )  # fmt: skip
    return found


def _products(device: torch.device, dtype: torch.dtype) -> list[tuple[torch.dtype, Product]]:
    if device.type != "cpu":
        return [(dtype, torch.mm)]
    onednn = [(torch.float32, linear)] if can_multiply(torch.float32) else []
    return [*((d, torch.mm) for d in {dtype, torch.float32}), *onednn]


def _flops(device: torch.device, dtype: torch.dtype, product: Product) -> float:
    left, right = (torch.ones(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
    for rows in _ROWS:
        seconds = _median(lambda some=left[:rows]: product(some, right), device)
        if seconds > _LONG:
            break
    return 2.0 * rows * _SIZE**2 / seconds


def _median(function: Callable[[], object], device: torch.device, times: int = 7) -> float:
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[times // 2]


@functools.cache
def cpu_name() -> str:
    """As the operating system calls it, or its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def machine_name() -> str:
    return f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
