"""Half precision and quantised weights: calibrate, compile, compare with the eager reference; on a tiny model."""

import pytest
import torch

import tide_compile
from tests.support.calibration import Characters, texts
from tests.support.compare import check, threshold_between
from tests.support.models import FEW, probing, prompt, shortcuts, tiny
from tide_compile import TIDEConfig, calibrate
from tide_compile.model.fingerprint import fingerprint

SETTINGS = {"min_layers": 1, "checkpoint_interval": 1}


def quantised(dtype=torch.float32):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny("rmsnorm-rope-gqa", dtype, layers=FEW)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


@pytest.mark.parametrize(
    ("model", "lowering"),
    [
        (lambda: tiny("rmsnorm-rope-gqa", torch.float16, layers=FEW), "eager"),
        (lambda: tiny("layernorm-learned-positions", torch.bfloat16, layers=FEW), "eager"),
        (quantised, "eager"),
        pytest.param(
            quantised, "inductor", marks=pytest.mark.slow
        ),  # AOTAutograd takes the subclasses apart, per piece
    ],
    ids=["float16", "bfloat16", "int8", "int8-inductor"],
)
def test_calibrate_and_compile(model, lowering):
    model = model()
    config = TIDEConfig(router_bottleneck_dim=8, distillation_steps=8, **SETTINGS)
    bank = calibrate(model, Characters(), config, dataset=texts(20), progress=False)
    settings = {"lowering": lowering, **SETTINGS}
    threshold = threshold_between(model, bank, 0.4, "static", 2, **settings)
    stats = check(model, bank, "static", 2, threshold, **settings)
    assert 0 < stats.exit_rate < 1


def test_quantised_weights_have_a_fingerprint():
    """Routers are found by the graph's parameters, which are subclasses here."""
    model = quantised()
    mark = fingerprint(model.parameters())
    assert mark == fingerprint(quantised().parameters())
    assert mark != fingerprint(tiny("rmsnorm-rope-gqa", layers=FEW).parameters())
    config = TIDEConfig(router_bottleneck_dim=8, distillation_steps=8, **SETTINGS)
    calibrate(model, Characters(), config, dataset=texts(20), progress=False)  # attaches
    options = {"exit_threshold": 0.0, "lowering": "eager", **SETTINGS}
    with torch.no_grad(), tide_compile.record_exits() as stats:
        torch.compile(model, backend="tide", options=options)(prompt(1)[0], use_cache=False)
    assert stats.exit_rate == 1


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16])
def test_states_in_another_dtype_than_the_weights(states):
    """A residual stream in fp32 in a bf16 model, or the other way round. Catches shortcuts, projections or routers that
    are multiplied with states of another dtype than their own."""
    model = tiny("layernorm-learned-positions", torch.bfloat16 if states == torch.float32 else torch.float32)
    for block in model.transformer.h:
        block.ln_1.to(states), block.ln_2.to(states)
        block.attn, block.mlp = _Cast(block.attn, model.dtype, states), _Cast(block.mlp, model.dtype, states)
    model.transformer.ln_f.to(states)
    for embedding in (model.transformer.wte, model.transformer.wpe):
        embedding.register_forward_hook(lambda module, arguments, output: output.to(states))
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.lm_head.register_forward_pre_hook(lambda module, arguments: arguments[0].to(module[0].weight.dtype))
    bank = probing()
    bank.shortcuts = shortcuts()
    settings = {"lowering": "eager", "kv_cache_strategy": "shortcut", **SETTINGS}
    threshold = threshold_between(model, bank, 0.4, "static", 2, **settings)
    assert 0 < check(model, bank, "static", 2, threshold, **settings).exit_rate < 1


class _Cast(torch.nn.Module):
    """A part of a layer, between states of another dtype."""

    def __init__(self, inner, inside, outside):
        super().__init__()
        self.inner, self.inside, self.outside = inner, inside, outside

    def forward(self, x, *args, **kwargs):
        found = self.inner(x.to(self.inside), *args, **kwargs)
        if isinstance(found, tuple):
            return (found[0].to(self.outside), *found[1:])
        return found.to(self.outside)
