"""What only a GPU can show of the kernels. Skipped without one: nobody has seen these pass yet (docs/kernels.md)."""

import re

import pytest
import torch

from tide_compile.kernels import compact, project, route, scatter
from tide_compile.kernels.gpu import autotune

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# as in interpreted_cases.py, with other sums
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(1, 1, 576), (3, 21, 64), (1, 577, 768), (2, 1000, 4096)]


def supported(dtype):
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} has no bfloat16")
    return dtype


def close(got, want, dtype):
    bound = TOLERANCE[dtype] * max(1.0, want.float().abs().max().item())
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ops_equal_their_references(shape, dtype, compiled, on_gpu):
    """Eager passes scalars as fp32, Inductor as fp64."""
    h, out = (torch.randn(shape).to(supported(dtype)) for _ in range(2))
    flags, hidden = torch.rand(shape[:2]) > 0.5, shape[-1]
    wrap = torch.compile(fullgraph=True) if compiled else lambda f: f
    router = torch.rand(hidden), torch.randn(hidden), torch.randn(100, hidden) / hidden**0.5, torch.randn(1, 100)
    for layer_norm in (False, True):
        score, leave = wrap(route.route)(h, flags, *router, torch.tensor(0.5), 1e-6, layer_norm)
        want, leaving = route.route_reference(h, flags, *router, torch.tensor(0.5), 1e-6, layer_norm)
        close(score, want, torch.float32)
        assert torch.equal(leave, leaving) or (want[leave != leaving] - 0.5).abs().max() < 1e-4
    assert torch.equal(wrap(scatter.scatter)(h, flags, out), scatter.scatter_reference(h, flags, out))
    tall, wide = torch.randn(hidden, 24).to(dtype), (torch.randn(24, hidden) / hidden**0.5).to(dtype)
    square, bias = (torch.randn(hidden, hidden) / hidden**0.5).to(dtype), torch.randn(hidden).to(dtype)
    for maps in ((), (square, bias), (tall, bias, wide)):
        got = wrap(project.project)(h, flags, out, *maps)
        close(got, project.project_reference(h, flags, out, *maps), dtype)
    count = shape[1] // 2 + 1
    assert torch.equal(wrap(compact.compact)(flags, count), compact.compact_reference(flags, count))


def test_tuning_chooses_among_what_fits(on_gpu, monkeypatch):
    """Tests run with a fixed choice; here the configurations are measured."""
    monkeypatch.setattr(autotune, "FIXED", False)
    h, flags = torch.randn(1, 9, 1536), torch.rand(1, 9) > 0.5
    assert torch.equal(scatter.scatter(h, flags, -h), scatter.scatter_reference(h, flags, -h))
    assert scatter._scatter_kernel.best_config in scatter._scatter_kernel.configs


def test_bf16_error_names_the_card(on_gpu):
    if torch.cuda.get_device_capability() >= (8, 0):
        pytest.skip("this card has bfloat16")
    with pytest.raises(RuntimeError, match=re.escape(torch.cuda.get_device_name())):
        scatter.scatter(torch.ones(1, 1, 64).bfloat16(), torch.ones(1, 1).bool(), torch.ones(1, 1, 64).bfloat16())
