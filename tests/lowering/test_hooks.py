"""Compilers that run together are waited for together."""

import threading
from concurrent.futures import Future

import torch
from torch._inductor.async_compile import AsyncCompile

from tide_compile.lowering.hooks import compiling_together


@torch._inductor.config.patch(compile_threads=2)
def test_compilers_are_waited_for_together():
    """At the end of the block, and only by the thread that is in it. Catches kernels that are never put in place, and
    those of another thread that are not there when it runs them."""
    made, scopes = Future(), [{}, {}, {}]
    made.set_result("kernel")
    for scope in scopes:
        scope["run"] = made
    with compiling_together():
        AsyncCompile().wait(scopes[0])
        other = threading.Thread(target=AsyncCompile().wait, args=(scopes[1],))
        other.start()
        other.join()
        assert scopes[0]["run"] is made and scopes[1]["run"] == "kernel"
    AsyncCompile().wait(scopes[2])
    assert [scope["run"] for scope in scopes] == ["kernel"] * 3
