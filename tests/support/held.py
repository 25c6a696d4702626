"""An engine that can be made to wait, to see what a server does meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from tide_compile import TIDE


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for it; AssertionError if it never comes."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never happened"
        time.sleep(0.01)


class Held:
    """An engine whose calls wait at a gate before every token."""

    def __init__(self, engine: TIDE) -> None:
        self._engine, self.gate, self.steps = engine, threading.Event(), 0
        self.model, self.config, self.stats, self.warmup = engine.model, engine.config, engine.stats, engine.warmup

    def generate(self, *args: object, stopping_criteria: list, **kwargs: object) -> object:
        job = stopping_criteria[0]

        def held(ids, scores, **rest):
            self.steps += 1
            assert self.gate.wait(60)
            return job(ids, scores, **rest)

        return self._engine.generate(*args, stopping_criteria=type(stopping_criteria)([held]), **kwargs)
