"""patching: methods of torch's classes, wrapped for the length of a ``with`` block and themselves again afterwards."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_patched: dict[tuple[type, str], tuple[object, int]] = {}  # what was there before, and how many blocks want it wrapped


@contextmanager
def patched(owner: type, name: str, wrapper: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, ``owner.name`` is ``wrapper`` of what it was. Blocks may overlap, in other threads too, if all give the
    same wrapper: the first wraps, the last puts back what was there."""
    key = owner, name
    with _lock:
        before, count = _patched.get(key, (vars(owner)[name], 0))
        if count == 0:
            setattr(owner, name, _wrapped(before, wrapper))
        _patched[key] = before, count + 1
    try:
        yield
    finally:
        with _lock:
            before, count = _patched[key]
            if count == 1:
                del _patched[key]
                setattr(owner, name, before)
            else:
                _patched[key] = before, count - 1


def _wrapped(before: object, wrapper: Callable[[Callable], Callable]) -> object:
    function = getattr(before, "__func__", before)  # of a static or class method
    wrapped = functools.wraps(function)(wrapper(function))
    return type(before)(wrapped) if isinstance(before, staticmethod | classmethod) else wrapped
