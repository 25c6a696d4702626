"""The ops: interpreted kernels against the references, what Inductor makes of them, what is built for GPUs."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime import Autotuner
from typer.testing import CliRunner

from tide_compile.cli import app
from tide_compile.kernels import compact, project, route, scatter
from tide_compile.kernels.build import DTYPES, Sizes, build, launches
from tide_compile.kernels.gpu.autotune import FIXED, fitting
from tide_compile.kernels.gpu.cards import CAPABILITIES, CARDS, CardError, check_dtype
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
    """A part of the sizes; see kernel_cases.py for what each case catches."""
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


def traced(function, *arguments):
    """(kernel, constexprs, dtypes of its tensors) of every launch, traced on fake CUDA tensors."""
    found = []
    for node in make_fx(lambda *x: function(*x))(*arguments).graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            kernel = kernel.fn if isinstance(kernel, Autotuner) else kernel
            given = {**node.kwargs["kwargs"], **kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])}
            tensors = {n: v.meta["val"].dtype for n, v in given.items() if isinstance(v, torch.fx.Node)}
            assert set(given) <= set(kernel.arg_names)
            constants = {n: v for n, v in given.items() if n.isupper() and not n.startswith("BLOCK")}
            found.append((kernel.__name__, constants, tensors))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 100, 2048])
def test_what_is_built_is_what_is_launched(rows, dtype):
    """Catches a launcher that asks for another specialisation than ``tide kernels`` has built, and glue that fails on
    CUDA tensors only."""
    types = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i1": torch.bool, "i64": torch.int64}
    built = [
        (
            launch.kernel.__name__,
            {n: v for n, v in launch.constants.items() if not n.startswith("BLOCK")},
            {n: types[t[1:]] for n, t in launch.signature.items() if t.startswith("*")},
        )
        for launch in launches(Sizes(576, 100, 24), dtype, rows)
    ]
    kind = DTYPES[dtype]
    with FakeTensorMode():

        def on_gpu(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        h, flags = on_gpu(1, rows, 576, dtype=kind), on_gpu(1, rows, dtype=torch.bool)
        added = on_gpu(1, rows)
        norm, down, up, threshold = on_gpu(576), on_gpu(100, 576), on_gpu(1, 100), on_gpu()
        tall, wide, square = (on_gpu(*s, dtype=kind) for s in ((576, 24), (24, 576), (576, 576)))
        bias = on_gpu(576, dtype=kind)
        found = traced(
            lambda *x: route.launch_route(*x[:-1], 1e-6, True, x[-1]), h, flags, norm, norm, down, up, threshold, added
        )
        found += traced(
            lambda *x: route.launch_route(*x[:3], None, *x[3:-1], 1e-6, False, x[-1]),
            h,
            flags,
            norm,
            down,
            up,
            threshold,
            added,
        )
        found += traced(lambda a: compact.launch_compact(a, 5), flags)
        found += traced(scatter.launch_scatter, h, flags, h)
        found += traced(project.launch_project, h, flags, h, square, bias)
        found += traced(project.launch_project, h, flags, h, tall, bias, wide)
    assert {name for name, *_ in found} == {name for name, *_ in built}
    for launch in found:
        assert launch in built


def test_builds_without_a_gpu():
    """One card here; the rest is marked slow. Catches what the interpreter takes and the compiler does not."""
    for launch in launches(Sizes(), "fp16", 2048):
        built = build(launch, 80)
        assert built.cubin > 1000 and built.registers > 8 and built.spilled == 0, launch.name


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_nothing_spills(capability):
    """Every kernel, dtype and configuration, for one token, a batch and a prompt."""
    for dtype in DTYPES if capability >= 80 else ("fp32", "fp16"):
        for rows in (1, 64, 2048):
            for launch in launches(Sizes(), dtype, rows, every=True):
                assert build(launch, capability).spilled == 0, f"{launch.name} {dtype} {rows} {launch.settings}"


def test_scalars_are_single_precision():
    """Inductor passes Python floats as fp64: arithmetic in it is slow on most cards, and another number."""
    launch = next(iter(launches(Sizes(576, 16), "fp32", 1)))
    wide = dataclasses.replace(launch, signature={**launch.signature, "eps": "fp64"})
    for variant in (launch, wide):
        text = build(variant, 86).ptx
        assert not re.findall(r"^\s*(?:@\S+ )?(?:add|mul|fma|div|sqrt|rsqrt|setp)\S*\.f64", text, re.MULTILINE)
    assert "cvt.rn.f32.f64" in text


def test_bf16_needs_a_card_that_has_it():
    launch = next(iter(launches(Sizes(), "bf16", 1)))
    with pytest.raises(CardError, match=r"8\.0, and T4 has 7\.5"):
        build(launch, 75)
    with pytest.raises(CardError, match="Some Card"):
        check_dtype(torch.bfloat16, 70, "Some Card")
    check_dtype(torch.float16, 70, "Some Card")
    check_dtype(torch.bfloat16, 80, "Some Card")


def test_configurations_are_pruned_by_size_and_fixed_in_tests():
    """Catches a list that offers tiles longer than a row, or nothing, and a test that would measure."""
    kernel = route._route_kernel

    def offered(**sizes):
        return [c.kwargs["BLOCK_H"] for c in fitting(kernel.configs, sizes, kernel.fits)]

    assert offered(H=4096, BLOCK_T=1, BLOCK_D=16) == [256, 512]
    assert offered(H=64, BLOCK_T=1, BLOCK_D=16) == [256]
    assert offered(H=4096, BLOCK_T=16, BLOCK_D=32) == [32, 32]
    assert offered(H=4096, BLOCK_T=16, BLOCK_D=128) == [32]
    assert FIXED and len(kernel.early_config_prune(kernel.configs, dict(H=4096, BLOCK_T=1, BLOCK_D=16))) == 1
    for tuned in (kernel, scatter._scatter_kernel, project._project_kernel):
        assert tuned.cache_results and 1 < len(tuned.configs) < 8


def tide(*arguments):
    return CliRunner().invoke(app, ["kernels", *arguments])


def test_command(capfd):
    done = tide("--cc", "8.0", "--dtype", "fp16", "--rows", "1", "--hidden", "576", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["kernels"]
    assert {row["kernel"].split()[0] for row in found} == {"route", "compact", "scatter", "project"}
    affine = next(row for row in found if row["kernel"] == "project affine")
    assert affine["card"] == "A100" and affine["bytes_moved"] == 2 * (576 * 576 + 3 * 576) + 1
    assert affine["roofline_seconds"] == pytest.approx(affine["bytes_moved"] / 1555e9)
    assert {card.name for card in CARDS} == {"V100", "T4", "A100", "A10G", "L4", "H100", "B200"}
    table = tide("--cc", "8.0", "--cc", "7.0", "--dtype", "bf16", "--rows", "1", "--hidden", "576").stdout
    assert "A100" in table and "none: bfloat16 needs compute capability 8.0, and V100 has 7.0" in table


def test_errors_of_the_command_are_one_line():
    for arguments, text in (
        (["--cc", "7.5", "--dtype", "bf16"], "T4"),
        (["--cc", "6.1"], "7.0, 7.5, 8.0"),
        (["--dtype", "fp8"], "fp32, fp16, bf16"),
        (["--hidden", "0"], "at least 1"),
    ):
        done = tide(*arguments)
        assert done.exit_code == 1 and text in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
    assert tide("--no-such-option").exit_code == 2
    assert isinstance(tide("--cc", "6.1", "--debug").exception, ValueError | RuntimeError)
