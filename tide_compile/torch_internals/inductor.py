"""inductor: private names of Inductor: compiling a graph, its compilers, its caches of code."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.utils.cpp_extension  # imports setuptools, which fails once a package has imported the stdlib's distutils
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache, torch_key, triton_key
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx import GraphModule

NAMES = (
    "torch._inductor.async_compile.AsyncCompile.wait",
    "torch._inductor.async_compile.AsyncCompile.cpp_pybinding",
    "torch._inductor.codecache.PyCodeCache.load_by_key_path",
    "torch._inductor.codecache.torch_key.prefetch",
    "torch._inductor.codecache.triton_key.prefetch",
    "torch._inductor.compile_fx.compile_fx",
    "torch._inductor.config.patch",
    "torch._inductor.cpu_vec_isa.supported_vec_isa_list",
    "torch._inductor.cpu_vec_isa.x86_isa_checker",
    "torch._inductor.list_mode_options",
    "torch._inductor.runtime.cache_dir_utils.cache_dir",
)

__all__ = [
    "NAMES",
    "AsyncCompile",
    "PyCodeCache",
    "code_cache",
    "compile_first_kernel",
    "compile_fx",
    "hand_on_static_addresses",
    "mode_options",
    "prefetch_keys",
    "try_instructions",
]

_NOTHING = 'extern "C" void kernel(float* x) {}'


def mode_options(mode: str | None) -> dict[str, object]:
    """Inductor's options for one of its modes."""
    return torch._inductor.list_mode_options(mode) if mode else {}


def hand_on_static_addresses(gm: GraphModule) -> None:
    """Let Inductor see which inputs Dynamo found at fixed addresses (parameters, static caches): CUDA graphs read those
    where they are, copy all others first, and give up on a graph that writes into any other.

    AOTAutograd looks for ``_dynamo_static_input_type`` only in graphs that look as if they came from Dynamo.
    """
    gm.meta.setdefault("dynamo_compile_id", None)
    gm._param_name_to_source = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None


def code_cache() -> Path:
    """The folder in which Inductor keeps its code."""
    return Path(cache_dir())


def prefetch_keys() -> None:
    """Begin to hash torch's and Triton's sources, which Inductor's caches ask for."""
    torch_key.prefetch()
    triton_key.prefetch()


def try_instructions() -> None:
    """Let Inductor find out which vector instructions compile and load here, all at a time instead of one by one."""
    known = x86_isa_checker()  # on other processors none: there is one set to try
    with ThreadPoolExecutor() as pool:
        list(pool.map(bool, [isa for isa in supported_vec_isa_list if known and set(str(isa).split()) <= set(known)]))


def compile_first_kernel(options: dict[str, object]) -> None:
    """Compile a kernel that does nothing: headers are precompiled for one set of compiler options."""
    with torch._inductor.config.patch(options):
        AsyncCompile().cpp_pybinding(["float*"], _NOTHING)
