"""prewarm: what Inductor does once before its first code, begun in threads while Dynamo traces the model."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from tide_compile.lowering.compile_piece import PATCHES
from tide_compile.torch_internals.inductor import compile_first_kernel, prefetch_keys, try_instructions
from tide_compile.torch_internals.switches import enabled

log = logging.getLogger("tide_compile")

_wanted: ContextVar[bool] = ContextVar("tide_prewarm", default=True)


@functools.cache
def _begun() -> None:
    prefetch_keys()
    if not torch.accelerator.is_available():
        threading.Thread(target=_first_kernel, name="tide-prewarm", daemon=True).start()


def begin() -> None:
    """Begin, once per process: torch's and Triton's sources are hashed, which Inductor's caches ask for, and without a
    GPU a first kernel is compiled, for which the compiler is tried and its headers are precompiled (10 to 15 s)."""
    if _wanted.get() and "prewarm" in enabled():
        _begun()


@contextmanager
def only_if(wanted: bool) -> Iterator[None]:
    """Inside, ``begin`` does nothing unless it is ``wanted``."""
    token = _wanted.set(_wanted.get() and wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def _first_kernel() -> None:
    try:
        try_instructions()
        compile_first_kernel(PATCHES)
    except Exception as error:  # Inductor meets it again with a kernel that is needed, and says what to do
        log.debug("no kernel could be compiled: %s", error)
