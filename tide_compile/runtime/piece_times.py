"""Times: how long the pieces of a forward pass take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch

EXECUTOR = "executor"  # a whole forward pass behind Dynamo's guards


@dataclass(slots=True)
class Times:
    """How long what ran has taken.

    Attributes:
        seconds: by name, one entry per run: of ``executor`` (all of a call that follows Dynamo's guards) and of the
            pieces in it.
        parts: what each piece is: ``prologue``, ``segments``, ``projections``, ``fill`` or ``epilogue``.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str, part: str | None = None) -> Iterator[None]:
        """Time a block; ``part``: what of a pass it is, if it is a piece."""
        _wait()
        started = time.perf_counter()
        yield
        _wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        if part is not None:
            self.parts[name] = part


_times: ContextVar[Times | None] = ContextVar("tide_times", default=None)


@contextmanager
def record_times() -> Iterator[Times]:
    """Time the pieces of every compiled call inside the block (of this thread or task). On a GPU each is waited for,
    so that a pass takes longer than it would.

    Yields:
        ``times.seconds``: name of a piece -> seconds, one entry per run.
    """
    times = Times()
    token = _times.set(times)
    try:
        yield times
    finally:
        _times.reset(token)


def active_times() -> Times | None:
    """Where times are wanted right now."""
    return _times.get()


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
