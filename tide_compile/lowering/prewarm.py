"""headstart: what Inductor does once before its first code, begun in threads while Dynamo traces the model."""

from __future__ import annotations

import functools
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import torch_key, triton_key
from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

from tide_compile.lowering.compile_piece import PATCHES

log = logging.getLogger("tide_compile")

_NOTHING = 'extern "C" void kernel(float* x) {}'


@functools.cache
def begin() -> None:
    """Begin, once per process: torch's and Triton's sources are hashed, which Inductor's caches ask for, and without a
    GPU a first kernel is compiled, for which the compiler is tried and its headers are precompiled (10 to 15 s)."""
    torch_key.prefetch()
    triton_key.prefetch()
    if not torch.accelerator.is_available():
        threading.Thread(target=_first_kernel, name="tide-headstart", daemon=True).start()


def _first_kernel() -> None:
    try:
        _try_instructions()
        with torch._inductor.config.patch(PATCHES):  # headers are precompiled for one set of compiler options
            AsyncCompile().cpp_pybinding(["float*"], _NOTHING)
    except Exception as error:  # Inductor meets it again with a kernel that is needed, and says what to do
        log.debug("no kernel could be compiled: %s", error)


def _try_instructions() -> None:
    """Let Inductor find out which vector instructions compile and load here, all at a time instead of one by one."""
    known = x86_isa_checker()  # on other processors none: there is one set to try
    with ThreadPoolExecutor() as pool:
        list(pool.map(bool, [isa for isa in supported_vec_isa_list if known and set(str(isa).split()) <= set(known)]))
