"""The cost model counts what a step does, and forecasts follow from it."""

import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, StaticCache

from tests.support.models import CONFIGS, HIDDEN, LAYERS, SETTINGS, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import ConfigError
from tide_compile.generation.static_cache import new_static_cache
from tide_compile.passes.graph.cost import Device, PieceCost
from tide_compile.planning.choose_checkpoints import choose
from tide_compile.planning.forecast import CostModel, find_device, predict_costs

SLOW = Device(flops=1e12, bandwidth=1e9, overhead=0.0)  # bound by memory, as decoding is


@torch.no_grad()
def test_operations_and_weights():
    """Catches a product that is counted twice or not at all, and attention of another length."""
    model = tiny("rmsnorm-rope-gqa")
    first, router, rest, fill, ends = CostModel(model, (2,), bottleneck=16).costs[2]
    cache = StaticCache(config=model.config, max_cache_len=64)
    model(torch.zeros(1, 2, dtype=torch.long), past_key_values=cache)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    total = first + rest + ends
    attention = LAYERS * 4 * HIDDEN * 64  # which the counter does not know on a CPU
    assert total.operations == counter.get_total_flops() + attention
    products = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n]
    assert total.weights == 4 * sum(p.numel() for p in products)
    assert total.keys == LAYERS * 2 * 2 * 16 * 64 * 4  # K and V, 2 heads of 16, before they are repeated
    assert fill.weights == 2 * 2 * 32 * HIDDEN * 4 and router.weights == 16 * HIDDEN * 4
    assert first.weights == rest.weights


def test_no_weights_are_needed():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["rmsnorm-rope-gqa"](), dtype=torch.float32)
    assert CostModel(model, (1,)).costs == CostModel(tiny("rmsnorm-rope-gqa"), (1,)).costs


def test_forecasts():
    """One token that leaves needs no more layers; in a large batch somebody always goes on and reads all weights."""
    costs = CostModel(tiny("rmsnorm-rope-gqa"), (1, 3), bottleneck=16)
    few, many = (costs.forecast(SLOW, batch, 1, 1, 0.5) for batch in (1, 64))  # hardly any keys
    assert few.speedup > many.speedup > 1
    one = costs.forecast(SLOW, 1, 64, 1, 0.5)
    assert costs.forecast(SLOW, 1, 64, 1, 1.0).on < one.on < one.off < costs.forecast(SLOW, 1, 640, 1, 0.5).off
    even = one.break_even
    assert costs.forecast(SLOW, 1, 64, 1, even + 0.01).speedup > 1 > costs.forecast(SLOW, 1, 64, 1, even - 0.01).speedup
    huge = CostModel(tiny("rmsnorm-rope-gqa"), (3,), bottleneck=2048)
    assert huge.forecast(SLOW, 1, 64, 3, 1.0).break_even is None


def test_predicted_costs(bank):
    """What measuring would tell. Catches the router of a checkpoint counted as part of what its exit costs, layers of
    the wrong side of an exit, keys of another context, and a bank of which only some checkpoints are looked at."""
    model = tiny("rmsnorm-rope-gqa")
    costs = predict_costs(model, bank, TIDEConfig(**SETTINGS), SLOW, 640)
    forecasts = CostModel(model, [layer + 1 for layer in bank.layers], bottleneck=16)
    routers = {layer: forecasts.costs[layer + 1][1].seconds(SLOW) for layer in bank.layers}
    assert list(costs.leaving) == bank.layers and costs.checkpoint == pytest.approx(statistics.fmean(routers.values()))
    for layer, seconds in costs.leaving.items():
        forecast = forecasts.forecast(SLOW, 1, 640, layer + 1, 1.0)
        assert costs.off == pytest.approx(forecast.off / 1e3)
        assert seconds + routers[layer] == pytest.approx(forecast.on / 1e3)


def test_dear_checkpoints_are_dropped():
    """On a device on which a router takes longer than the layers behind it. Catches costs that are not those of these
    routers."""
    model, scores = tiny("rmsnorm-rope-gqa"), torch.full((50, 1), 0.999)
    for width, wanted in ((16, [{0}]), (4096, [])):
        bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=width).keep([0])
        costs = predict_costs(model, bank, TIDEConfig(**SETTINGS), SLOW, 64)
        found = choose(scores, scores > 0.5, bank.layers, LAYERS, costs, levels=(0.01,))
        assert [set(thresholds) for thresholds in found] == wanted


def test_devices_and_depths():
    assert find_device("h100", torch.bfloat16).bandwidth == 3350e9
    with pytest.raises(ConfigError, match="H100"):
        find_device("h900", torch.bfloat16)
    with pytest.raises(ConfigError, match="4"):
        CostModel(tiny("rmsnorm-rope-gqa"), (LAYERS,))


def test_this_machine(monkeypatch):
    """Catches keys that are not read, and products of a few rows that are taken to run as fast as large ones."""
    monkeypatch.setattr("tide_compile.lowering.machine._FEW", (16, 64))
    device = find_device("cpu", torch.bfloat16, CONFIGS["rmsnorm-rope-gqa"]())
    assert device.keys > 0 and device.streaming > 0 and device.bandwidth > 0 and device.attention > 0
    assert [rows for rows, _ in device.few] == [16, 64, 256] and device.flops == device.few[-1][1]
    device = Device(8.0, 1.0, 0.0, keys=0.5, few=((4, 2.0), (8, 4.0)))
    assert [device.for_rows(n).flops for n in (1, 4, 6, 8, 100)] == [2, 2, 3, 4, 4]
    assert PieceCost(8, 3, 1, 7).seconds(device.for_rows(8)) == 3 + 1 / 0.5


def test_planning_leaves_nothing_behind(bank):
    """Catches sizes of the plan's cache, which would be symbols, and slower, in what the user compiles later."""
    model, symbols = tiny("rmsnorm-rope-gqa"), []

    def backend(gm, example_inputs):
        symbols.extend(x for x in example_inputs if isinstance(x, torch.SymInt))
        return gm

    predict_costs(model, bank, TIDEConfig(), Device(1e12, 1e10, 1e-6), 64)
    cache = new_static_cache(model, 1, 256)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, isolate_recompiles=True)
        compiled(torch.ones(1, 1, dtype=torch.long), past_key_values=cache)
    assert symbols == []
