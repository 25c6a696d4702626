"""ExitStats: who left where, counted from the decisions that the executor reads anyway."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class ExitStats:
    """Counts of one or more forward passes. Padding is not counted.

    Attributes:
        num_layers: layers of the model.
        exits_per_layer: layer -> tokens that left after it.
        remaining_tokens: tokens that ran all layers.
        exit_layers: with ``record_exits(per_token=True)``, one [B, S] int64 tensor per call: the layer a token left
            after, ``num_layers`` - 1 for one that ran them all, -1 for padding.
        scores: likewise, [B, S] fp32: what the last router that a token met said of it; NaN where there was none.
        decisions: segment -> the latest ``CompactionDecision`` whether to leave out rows that had exited; printing one
            tells why.
    """

    num_layers: int = 0
    exits_per_layer: dict[int, int] = field(default_factory=dict)
    exit_layers: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    per_token: bool = False
    decisions: dict[str, object] = field(default_factory=dict)
    _remaining: int = 0
    _uncounted: list[torch.Tensor] = field(default_factory=list)

    @property
    def remaining_tokens(self) -> int:
        """Tokens that ran all layers."""
        if self._uncounted:  # one read, however many calls there were
            self._remaining += int(torch.stack([rows.sum() for rows in self._uncounted]).sum())
            self._uncounted.clear()
        return self._remaining

    @property
    def total_exited(self) -> int:
        """Tokens that left early."""
        return sum(self.exits_per_layer.values())

    @property
    def total_tokens(self) -> int:
        """Tokens that were run, without padding."""
        return self.total_exited + self.remaining_tokens

    @property
    def exit_rate(self) -> float:
        """Share of tokens that left early, 0..1."""
        return self.total_exited / self.total_tokens if self.total_tokens else 0.0

    @property
    def mean_depth(self) -> float:
        """Layers that a token ran, on average."""
        return self.layer_passes_run / self.total_tokens if self.total_tokens else 0.0

    @property
    def layer_passes_run(self) -> int:
        """Layers that tokens ran: a token that ran them all counts ``num_layers``. The keys and values that are written
        for skipped layers are not counted."""
        exited = sum((layer + 1) * n for layer, n in self.exits_per_layer.items())
        return exited + self.num_layers * self.remaining_tokens

    @property
    def layer_passes_saved(self) -> int:
        """Layers that tokens skipped."""
        return self.num_layers * self.total_tokens - self.layer_passes_run

    @property
    def layers_saved(self) -> float:
        """Share of layer passes that exits made unnecessary, 0..1."""
        return 1 - self.mean_depth / self.num_layers if self.num_layers and self.total_tokens else 0.0

    def summary(self) -> str:
        """The reference's report, with the depth that it lacks."""
        total = self.total_tokens
        lines = [f"Total tokens: {total}, Exited: {self.total_exited} ({self.exit_rate:.1%})"]
        for layer, count in sorted(self.exits_per_layer.items()):
            lines.append(f"  Layer {layer}: {count} exits ({count / total:.1%})")
        lines.append(f"  Ran all layers: {self.remaining_tokens}")
        lines.append(f"  Mean depth: {self.mean_depth:.1f} of {self.num_layers} layers, {self.layers_saved:.1%} saved")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, object]:
        """The figures as plain values."""
        return {
            "tokens": self.total_tokens,
            "exit_rate": self.exit_rate,
            "mean_depth": self.mean_depth,
            "num_layers": self.num_layers,
            "layers_saved": self.layers_saved,
            "exits_per_layer": {str(layer): n for layer, n in sorted(self.exits_per_layer.items())},
        }

    def add_layers(self, num_layers: int, layers: torch.Tensor) -> None:
        """Count tokens by the layer [T] that each left after; ``num_layers`` - 1 for one that ran them all."""
        left = layers[layers < num_layers - 1]
        found, counts = left.unique(return_counts=True)
        self.add(num_layers, dict(zip(found.tolist(), counts.tolist(), strict=True)), len(layers) - len(left))

    def add(self, num_layers: int, exits: dict[int, int], remaining: int | torch.Tensor) -> None:
        """Count one forward pass; ``remaining`` may be the [B, S] mask of tokens that ran all layers, counted when the
        statistics are read."""
        self.num_layers = num_layers
        for layer, count in exits.items():
            self.exits_per_layer[layer] = self.exits_per_layer.get(layer, 0) + count
        if isinstance(remaining, torch.Tensor):
            self._uncounted.append(remaining)
        else:
            self._remaining += remaining


_recorders: ContextVar[tuple[tuple[ExitStats, object], ...]] = ContextVar("tide_recorders", default=())


@contextmanager
def record_exits(*, per_token: bool = False, owner: object = None) -> Iterator[ExitStats]:
    """Collect the exits of every compiled call inside the block (of this thread or task).

    Args:
        per_token: also keep the exit layer and the score of every token (``stats.exit_layers``, ``stats.scores``).
        owner: whose calls are recorded, where a call may hold others of the same owner: each counts for itself.

    Yields:
        The statistics, empty at first; they can be read inside the block and after it.
    """
    stats = ExitStats(per_token=per_token)
    around = (each for each in _recorders.get() if owner is None or each[1] is not owner)
    token = _recorders.set((*around, (stats, owner)))
    try:
        yield stats
    finally:
        _recorders.reset(token)


def active_recorders() -> tuple[ExitStats, ...]:
    """The statistics that are being collected right now."""
    return tuple(stats for stats, _ in _recorders.get())


@dataclass(slots=True)
class EngineStats(ExitStats):
    """Counts of every call and ``generate`` since the engine was made. What ``warmup`` runs is not counted.

    Attributes:
        calls: calls and ``generate`` calls, also those that ended in an error after the model had run.
        seconds: from the beginning of each to its end.
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
