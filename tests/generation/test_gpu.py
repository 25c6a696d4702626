"""What only a GPU can show of an engine. Skipped without one: nobody has seen these pass yet (docs/kernels.md)."""

import pytest
import torch

import tide_compile
from tests.support.models import GENERATE, HIDDEN, LAYERS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig

pytestmark = pytest.mark.gpu


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
