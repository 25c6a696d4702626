"""What all benchmarks share: interleaved timing, the machine line, tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from tabulate import tabulate

from tide_compile.lowering.machine_name import cpu_name


@dataclass(slots=True)
class Timing:
    """Seconds per step of one contender, one entry per step."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile."""
        first, _, third = statistics.quantiles(self.seconds, n=4)
        return first, third

    @property
    def mean(self) -> float:
        return statistics.fmean(self.seconds)

    def cells(self) -> list[str]:
        first, third = self.spread
        return [f"{self.median * 1e3:.1f}", f"{first * 1e3:.1f} to {third * 1e3:.1f}"]


def interleave(
    contenders: dict[str, Callable[[], float]], rounds: int, steps: int = 1, uncounted: int = 0
) -> dict[str, Timing]:
    """Run all contenders in turn, ``rounds`` times; each call returns the seconds of one step. A turn is ``steps``
    steps behind some that do not count, because they find the processor's caches full of what the others ran."""
    timings = {name: Timing() for name in contenders}
    for _ in range(rounds):
        for name, step in contenders.items():
            for _ in range(uncounted):
                step()
            timings[name].seconds += [step() for _ in range(steps)]
    return timings


def timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def machine() -> str:
    """Processor, threads and versions, for the line above a table."""
    return (
        f"{cpu_name()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def show(title: str, headers: list[str], rows: list[list[object]], path: str | None, **facts: object) -> None:
    """Print a table under its machine line and, with ``path``, write the same as JSON."""
    print(f"\n{title}\n{machine()}\n")
    print(tabulate(rows, headers=headers, disable_numparse=True), flush=True)
    if path is not None:
        record = {"title": title, "machine": machine(), "headers": headers, "rows": rows, **facts}
        temporary = f"{path}.part"
        Path(temporary).write_text(json.dumps(record, indent=1))
        os.replace(temporary, path)
