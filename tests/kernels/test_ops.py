"""The ops: interpreted kernels against the references, and what Inductor makes of them."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from tide_compile.kernels import compact, project, route, scatter  # noqa: F401  (registers the ops)
from tide_compile.kernels.probe import FEATURES

H, D, R = 64, 16, 8


def router(hidden=H, bottleneck=D, bias=True):
    torch.manual_seed(0)
    weights = torch.ones(hidden), torch.zeros(hidden) if bias else None
    return *weights, torch.randn(bottleneck, hidden) / 8, torch.randn(1, bottleneck), torch.tensor(0.5)


def samples():
    """(op, arguments) that cover each op's optional arguments."""
    h, out, flags = torch.randn(2, 7, H), torch.randn(2, 7, H), torch.rand(2, 7) > 0.5
    yield torch.ops.tide.route.default, (h, flags, *router(), 1e-6, True)
    yield torch.ops.tide.route.default, (h[:, :1].half(), flags[:, :1], *router(bias=False), 1e-6, False)
    yield torch.ops.tide.route.default, (h, flags, *router(), 1e-6, True, torch.randn(2, 7))
    maps = torch.randn(R, H), torch.randn(40, R), torch.zeros(40), torch.randn(D, FEATURES), torch.ones(D)
    yield torch.ops.tide.probe.default, (h, torch.ones(H), None, *maps, torch.randn(1, D), 1e-6, False)
    yield torch.ops.tide.scatter.default, (h, flags, out)
    h, out = h.bfloat16(), out.bfloat16()
    yield torch.ops.tide.project.default, (h, flags, out)
    yield torch.ops.tide.project.default, (h, flags, out, torch.ones(H, H), torch.ones(H))
    yield torch.ops.tide.project.default, (h, flags, out, h.new_ones(H, R), h.new_ones(H), h.new_ones(R, H))
    yield torch.ops.tide.compact.default, (flags, 4)


def test_opcheck():
    """Catches a schema that hides a mutation or an alias, and shapes or dtypes that differ while tracing."""
    for op, arguments in samples():
        torch.library.opcheck(op, arguments)


def interpret(*arguments):
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted_cases", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    assert re.search(r"^\d+ cases$", done.stdout, re.MULTILINE)


def test_interpreted_kernels_equal_the_references():
    """A part of the sizes; see interpreted_cases.py for what each case catches."""
    interpret()


@pytest.mark.slow
def test_interpreted_kernels_equal_the_references_in_all_sizes():
    interpret("--every")


def kernel_calls(code):
    """Calls of generated loops and of library products, per run."""
    body = code.split("def call(")[1]
    return len(re.findall(r"^ +(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.\S+)\(", body, re.MULTILINE))


@pytest.mark.parametrize("bias", [False, True])
def test_inductor_fuses_the_router(bias):
    """Decoding: the router is part of the loops behind the last matrix product, in the same call. Catches an op that
    stays opaque, a matrix product for one row, and a break of the graph."""
    weight = torch.randn(H, H)

    def layer(h, active, *rest):
        h = h + torch.nn.functional.linear(torch.nn.functional.silu(h), weight)
        if not rest:
            return h
        _, leave = torch.ops.tide.route(h, active, *rest, 1e-6, False)
        return h, leave, torch.stack([leave.sum(), (active & ~leave).sum()])

    def calls(*arguments):
        # the caches do not look into an op: they would hand out what an earlier version of it was compiled to
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            _, (code,) = run_and_get_code(torch.compile(layer, fullgraph=True), *arguments)
        assert "tide" not in re.sub(r'["#].*', "", code)
        return kernel_calls(code)

    h, active = torch.randn(1, 1, H), torch.ones(1, 1, dtype=torch.bool)
    without, with_router = calls(h, active), calls(h, active, *router(bias=bias))
    assert without >= 2 and with_router == without
    h, active = torch.randn(1, 32, H), torch.ones(1, 32, dtype=torch.bool)
    assert calls(h, active, *router(bias=bias)) <= without + 2  # prompts: one product, and loops behind it
