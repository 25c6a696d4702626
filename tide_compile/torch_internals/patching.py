"""patching: methods of torch's classes, wrapped for the length of a ``with`` block and themselves again afterwards."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tide_compile.torch_internals.versions import warn_if_unchecked

_lock = threading.Lock()
_patched: dict[tuple[type, str], tuple[object, object, int]] = {}  # before, wrapped, and for how many blocks


@contextmanager
def patched(owner: type, name: str, wrapper: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, ``owner.name`` is ``wrapper`` of what it was. Blocks may overlap, in other threads too, if all give the
    same wrapper: the first wraps, the last puts back what was there, unless somebody else has put something there."""
    warn_if_unchecked(f"what wraps {owner.__name__}.{name}")
    key = owner, name
    with _lock:
        if key not in _patched:
            before = vars(owner)[name]
            _patched[key] = before, _wrapped(before, wrapper), 0
            setattr(owner, name, _patched[key][1])
        before, ours, count = _patched[key]
        _patched[key] = before, ours, count + 1
    try:
        yield
    finally:
        with _lock:
            before, ours, count = _patched[key]
            _patched[key] = before, ours, count - 1
            if count == 1:
                del _patched[key]
                if vars(owner)[name] is ours:
                    setattr(owner, name, before)


def _wrapped(before: object, wrapper: Callable[[Callable], Callable]) -> object:
    function = getattr(before, "__func__", before)  # of a static or class method
    wrapped = functools.wraps(function)(wrapper(function))
    return type(before)(wrapped) if isinstance(before, staticmethod | classmethod) else wrapped
