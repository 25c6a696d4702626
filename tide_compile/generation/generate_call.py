"""GenerateCall: what belongs to one ``generate``, and ends with it, however it ends.

The model that ``generate`` belongs to is shared by threads, by calls inside of calls (token healing, a callback that
asks the same model) and by all that come later; so nothing of a call is kept there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from tide_compile.generation.finished_rows import FinishedRows


class GenerateCall:
    """One ``generate`` of ``model``.

    Attributes:
        rows: the sequences that have ended.
        caches: those that were lent to it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.rows = FinishedRows()
        self.caches: list[object] = []


_current: ContextVar[GenerateCall | None] = ContextVar("tide_generate_call", default=None)


@contextmanager
def generate_call(model: nn.Module) -> Iterator[GenerateCall]:
    """Inside, the model's forward (in this thread or task) belongs to a new call."""
    with _set(GenerateCall(model)) as call:
        yield call


@contextmanager
def no_generate_call() -> Iterator[None]:
    """Inside, the forward of no model belongs to a ``generate``, even if this is a callback of one."""
    with _set(None):
        yield


def current_call(model: nn.Module) -> GenerateCall | None:
    """The innermost call, if it is of this model."""
    call = _current.get()
    return call if call is not None and call.model is model else None


@contextmanager
def _set(call: GenerateCall | None) -> Iterator[GenerateCall | None]:
    token = _current.set(call)
    try:
        yield call
    finally:
        _current.reset(token)
