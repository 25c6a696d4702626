"""EngineStats: the exits of all calls of an engine so far."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass

from tide_compile.stats import ExitStats


@dataclass(slots=True)
class EngineStats(ExitStats):
    """Counts of every call and ``generate`` since the engine was made. What ``warmup`` runs is not counted.

    Attributes:
        calls: calls and ``generate`` calls, also those that ended in an error after the model had run.
        seconds: that they took, without waiting for one another.
    """

    calls: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """``ExitStats.summary`` of all calls, and how many there were."""
        return f"{ExitStats.summary(self)}\n  Calls: {self.calls}, {self.seconds:.1f} s"


class Totals:
    """Adds up the statistics of calls; any thread may add and read."""

    def __init__(self) -> None:
        self._stats, self._lock = EngineStats(), threading.Lock()

    def add(self, stats: ExitStats, seconds: float) -> None:
        """Count one call. One in which no compiled code ran (it failed before) is left out."""
        if not stats.num_layers:
            return
        with self._lock:
            self._stats.add(stats.num_layers, stats.exits_per_layer, stats.remaining_tokens)
            self._stats.calls += 1
            self._stats.seconds += seconds

    def read(self) -> EngineStats:
        """A copy, which later calls do not change."""
        with self._lock:
            return copy.deepcopy(self._stats)
