"""overrides: what a ``with`` block sets in the place of what code was compiled with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from tide_compile.config import TIDEConfig

_threshold: ContextVar[float | Mapping[int, float] | None] = ContextVar("tide_exit_threshold", default=None)
_rehearsing: ContextVar[bool] = ContextVar("tide_rehearsing", default=False)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, every call also runs the pieces that it does not need, which compiles them, and records
    no exits. What it writes into a cache is of no use."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


@contextmanager
def exit_threshold(value: float | Mapping[int, float]) -> Iterator[None]:
    """Inside, this threshold (0..1; 1: nobody leaves) takes the place of those that the code was compiled with, in
    calls of this thread or task. Nothing is compiled again.

    Args:
        value: for all checkpoints, or by the layer of each; where none is named, nobody leaves.

    Raises:
        ConfigError: not a number from 0 to 1.
    """
    by_layer = isinstance(value, Mapping)
    for each in value.values() if by_layer else [value]:
        TIDEConfig(exit_threshold=each)
    token = _threshold.set(dict(value) if by_layer else value)
    try:
        yield
    finally:
        _threshold.reset(token)


def overridden_threshold() -> float | Mapping[int, float] | None:
    """What ``exit_threshold`` says right now, if anything."""
    return _threshold.get()


def is_rehearsal() -> bool:
    """Whether this is inside ``rehearsal``."""
    return _rehearsing.get()
