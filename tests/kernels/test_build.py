"""What is built for GPUs, on a machine without one."""

import dataclasses
import re

import pytest
import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime import Autotuner

from tide_compile.kernels import compact, project, route, scatter
from tide_compile.kernels.build import DTYPES, Sizes, build, launches
from tide_compile.kernels.gpu.autotune import FIXED, fitting
from tide_compile.kernels.gpu.cards import CAPABILITIES, CardError, check_dtype


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
