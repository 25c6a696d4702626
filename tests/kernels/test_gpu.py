"""What only a GPU can show. Skipped without one: nobody has seen these pass yet (README, "Kernels")."""

import re

import pytest
import torch

import tide_compile
from tests.support.models import GENERATE, HIDDEN, LAYERS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig
from tide_compile.kernels import compact, project, route, scatter
from tide_compile.kernels.gpu import autotune as tuning
from tide_compile.runtime.host_read import CountsReader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # as in kernel_cases.py, with other sums
SHAPES = [(1, 1, 576), (3, 21, 64), (1, 577, 768), (2, 1000, 4096)]


@pytest.fixture
def on_gpu():
    """What is made without a device is made on the GPU."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        yield


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


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("batch", [1, 4])
def test_generate_equals_the_reference(batch, mode):
    """Text and exit layers; with CUDA graphs, a buffer that is written again too early would show here."""
    model = tiny("rmsnorm-rope-gqa").cuda()
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    config = TIDEConfig(exit_threshold=0.5, min_layers=1, checkpoint_interval=1)
    ids, mask = (t.cuda() for t in prompt(batch))
    with tide_compile.eager_reference(model, bank, config):
        want = model.generate(ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **GENERATE)
    engine = TIDE(model, bank, config, mode=mode)
    for _ in range(3):  # warm-up, capture, replay
        assert torch.equal(engine.generate(ids, attention_mask=mask, **GENERATE), want)


def test_nothing_waits_but_the_decisions():
    """PyTorch raises on every synchronising call while an executor runs, except the reader's own wait on its event."""
    model = tiny("rmsnorm-rope-gqa").cuda()
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    options = {"router": bank, "exit_threshold": 0.5, "min_layers": 1, "checkpoint_interval": 1}
    compiled = torch.compile(model, backend="tide", options=options)
    ids = prompt(1)[0].cuda()
    with torch.no_grad():
        compiled(ids, use_cache=False)
        torch.cuda.set_sync_debug_mode("error")
        try:
            compiled(ids, use_cache=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_decisions_come_through_pinned_memory(on_gpu):
    reader = CountsReader(size=3)
    assert reader(torch.tensor([1, 2, 3])) == [1, 2, 3]
    assert reader(torch.tensor([4, 5, 6])) == [4, 5, 6]
    assert reader._local.buffer.is_pinned()


def test_tuning_chooses_among_what_fits(on_gpu, monkeypatch):
    """Tests run with a fixed choice; here the configurations are measured."""
    monkeypatch.setattr(tuning, "FIXED", False)
    h, flags = torch.randn(1, 9, 1536), torch.rand(1, 9) > 0.5
    assert torch.equal(scatter.scatter(h, flags, -h), scatter.scatter_reference(h, flags, -h))
    assert scatter._scatter_kernel.best_config in scatter._scatter_kernel.configs


def test_bf16_error_names_the_card(on_gpu):
    if torch.cuda.get_device_capability() >= (8, 0):
        pytest.skip("this card has bfloat16")
    with pytest.raises(RuntimeError, match=re.escape(torch.cuda.get_device_name())):
        scatter.scatter(torch.ones(1, 1, 64).bfloat16(), torch.ones(1, 1).bool(), torch.ones(1, 1, 64).bfloat16())
