"""self_test: whether rewritten code of Inductor computes what it should, asked where its torch was not checked."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tide_compile.lowering.buffer_reuse import reuse_buffers
from tide_compile.lowering.hooks import changing_modules
from tide_compile.torch_internals.fx import FakeTensorMode, alone, tracing_with
from tide_compile.torch_internals.inductor import compile_fx
from tide_compile.torch_internals.versions import warn_if_unchecked

log = logging.getLogger("tide_compile")

_SIZE = 16


@functools.cache
def buffers_can_be_reused() -> bool:
    """For a torch that was checked this is known. For another one, code with temporaries, views of them and results
    that share memory is compiled, rewritten and compared, once per process, before anything else is rewritten."""
    if warn_if_unchecked("buffer_reuse, which rewrites Inductor's code,"):
        return True
    try:
        right = reuse_is_right()
    except Exception as error:  # of a generated code that looks otherwise
        log.warning("buffer_reuse stays off: its self-test failed (%s)", error)
        return False
    if not right:
        log.warning("buffer_reuse stays off: in its self-test rewritten code computed something else")
    return right


def reuse_is_right() -> bool:
    """Whether rewritten code gives the same numbers, in results that a later call does not write again."""
    weight = torch.arange(float(_SIZE**2), dtype=torch.float32).view(_SIZE, _SIZE) / 100
    inputs = [torch.full((4, _SIZE), value, dtype=torch.float32) for value in (0.1, 0.2)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (inputs[0], weight)]
    with alone():
        graph = make_fx(_layer)(*fakes)
    with tracing_with(mode), changing_modules(reuse_buffers):
        run = compile_fx(graph, fakes)
    results = [run(x, weight) for x in inputs]
    return all(
        torch.allclose(ours, wanted, atol=1e-5)
        for x, found in zip(inputs, results, strict=True)
        for ours, wanted in zip(found, _layer(x, weight), strict=True)
    )


def _layer(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    middle = torch.softmax(x @ weight, -1)
    parts = torch.cat([middle, middle.flip(-1)], 1)
    return parts, parts[:, : _SIZE // 2], (middle @ weight).sum(-1)
