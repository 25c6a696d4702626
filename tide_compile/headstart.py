"""headstart: what Inductor does once before its first code, begun in threads while Dynamo traces the model."""

from __future__ import annotations

import functools
import logging
import threading

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import torch_key, triton_key

from tide_compile.compiled import PATCHES

log = logging.getLogger("tide_compile")

_NOTHING = 'extern "C" void kernel(float* x) {}'


@functools.cache
def begin() -> None:
    """Begin, once per process: torch's and Triton's sources are hashed, which Inductor's caches ask for, and without a
    GPU a first kernel is compiled, for which the compiler is tried and its headers are precompiled (some 15 s)."""
    torch_key.prefetch()
    triton_key.prefetch()
    if not torch.accelerator.is_available():
        threading.Thread(target=_first_kernel, name="tide-headstart", daemon=True).start()


def _first_kernel() -> None:
    try:
        with torch._inductor.config.patch(PATCHES):  # headers are precompiled for one set of compiler options
            AsyncCompile().cpp_pybinding(["float*"], _NOTHING)
    except Exception as error:  # Inductor meets it again with a kernel that is needed, and says what to do
        log.debug("no kernel could be compiled: %s", error)
