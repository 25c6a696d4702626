"""Every compiled mode equals the eager reference: exit layers exactly, logits within tolerance."""

import pytest
import torch

import tide_compile
from tests.support.compare import assert_close, check, check_each, threshold_between
from tests.support.models import CACHES, CONFIGS, FEW, HIDDEN, LAYERS, logits_of, probing, prompt, shortcuts, tiny
from tide_compile import RouterBank, TIDEConfig
from tide_compile.errors import ConfigError, RouterFileError
from tide_compile.routers.settings import settings_of_bank

SETTINGS = {"min_layers": 2, "checkpoint_interval": 1, "compaction": "never"}  # its tests: passes/test_compact_rows.py


def part(fast, *values):
    """A case that always runs, or one of those that only ``make test-all`` runs."""
    return pytest.param(*values, marks=() if fast else pytest.mark.slow)


SINGLE = part(False, 1)
KEEPING = [part(False, "none"), "dynamic", "static"]  # without one: families/test_matrix.py
EXITS = [  # all of batch 4, one cache of batch 1, one case of zero_pad
    part(
        (batch == 4 or i % 3 == j) if strategy == "propagate" else (i, j, batch) == (0, 2, 4),
        name, cache, batch, strategy,
    )
    for i, name in enumerate(CONFIGS)
    for j, cache in enumerate(CACHES)
    for batch in (1, 4)
    for strategy in ("propagate", "zero_pad")
]  # fmt: skip
SHORTCUTS = [
    part(i == j, name, batch, cache)
    for i, (name, batch) in enumerate([("parallel-residual", 4), ("rmsnorm-rope-gqa", 1), ("sliding-window", 4)])
    for j, cache in enumerate(CACHES)
]


@pytest.mark.parametrize("batch", [SINGLE, 4])
@pytest.mark.parametrize("cache", KEEPING)
@pytest.mark.parametrize("name", CONFIGS)
def test_threshold_one_is_the_stock_model(name, cache, batch):
    """Catches a cut that loses or reorders something."""
    model = tiny(name)
    options = {"exit_threshold": 1.0, "lowering": "eager", **SETTINGS}
    compiled = torch.compile(model, backend="tide", options=options)
    want = logits_of(model, model, cache, batch)
    with tide_compile.record_exits() as stats:
        got = logits_of(model, compiled, cache, batch)
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs)
    assert stats.exit_rate == 0
    assert stats.total_tokens == sum(len(logits) for logits in want)  # and padding is not counted


@pytest.mark.parametrize(("name", "cache", "batch", "strategy"), EXITS)
def test_exits(name, cache, batch, strategy):
    """Some tokens leave, then all. Catches a wrong mask, a lost cache write, K/V from the wrong state, and a fill slice
    that forgets a layer's K/V: the next token would see it."""
    model = tiny(name)
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    settings = {"lowering": "eager", "kv_cache_strategy": strategy, **SETTINGS}
    threshold = threshold_between(model, bank, 0.4, cache, batch, **settings)
    some, every = check_each(model, bank, cache, batch, [threshold, 0.0], **settings)
    assert 0 < some.total_exited < some.total_tokens
    assert every.exits_per_layer == {1: every.total_tokens}


@pytest.mark.parametrize(("name", "batch", "cache"), SHORTCUTS)
def test_shortcuts(name, batch, cache):
    """Some leave, then all. Catches a shortcut of another layer, one that active rows go through, one too many or too
    few on the way, and a state that does not get from one segment to the next."""
    model = tiny(name)
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    bank.shortcuts = shortcuts()
    settings = {"lowering": "eager", **SETTINGS, "min_layers": 1}
    threshold = threshold_between(model, bank, 0.4, cache, batch, **settings)
    assert check_each(model, bank, cache, batch, [threshold, 0.0], **settings)[0].total_exited > 0


def test_shortcuts_are_asked_for_or_come_with_the_routers(model, bank, tmp_path):
    """Catches a file that loses them, and a strategy that is silently another."""
    bank.shortcuts = shortcuts()
    bank = RouterBank.load(bank.save(tmp_path / "r.safetensors"))
    ids, logits = prompt(1)[0], {}
    options = {**SETTINGS, "min_layers": 1, "lowering": "eager"}
    options["exit_threshold"] = threshold_between(model, bank, 0.5, "none", 1, **options)
    for strategy in ("auto", "shortcut", "propagate", "zero_pad"):
        torch._dynamo.reset()
        compiled = torch.compile(
            model, backend="tide", options={"router": bank, **options, "kv_cache_strategy": strategy}
        )
        with torch.no_grad():
            logits[strategy] = compiled(ids, use_cache=False).logits
    assert torch.equal(logits["auto"], logits["shortcut"])
    assert len({tuple(x.flatten().tolist()) for x in logits.values()}) == 3
    config = TIDEConfig(kv_cache_strategy="shortcut", **SETTINGS)
    with pytest.raises(ConfigError, match="have none"):
        settings_of_bank(RouterBank.untrained(HIDDEN, LAYERS), config, torch.device("cpu"), torch.float32)
    del bank.shortcuts[2]
    with pytest.raises(RouterFileError, match=r"layers \[2\]"):
        settings_of_bank(bank, config, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(("dtype", "batch"), [part(run, dtype, batch) for run, dtype, batch in (
    (True, torch.float32, 1), (False, torch.float32, 4), (False, torch.bfloat16, 1), (True, torch.bfloat16, 4),
)])  # fmt: skip
def test_affine_projection(dtype, batch):
    """Catches a projection of the wrong rows, layer or dtype."""
    model = tiny("rmsnorm-rope-gqa", dtype)
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    generator = torch.Generator().manual_seed(2)
    bank.projections = {
        layer: (torch.randn(HIDDEN, HIDDEN, generator=generator) / 8, torch.randn(HIDDEN, generator=generator))
        for layer in bank.layers
    }
    settings = {"lowering": "eager", **SETTINGS}
    threshold = threshold_between(model, bank, 0.4, "static", batch, **settings)
    assert check(model, bank, "static", batch, threshold, **settings).total_exited > 0


def test_nan_never_exits():
    """Catches a comparison that lets NaN pass."""
    model = tiny("rmsnorm-rope-gqa")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    bank = RouterBank.untrained(HIDDEN, LAYERS)
    options = {"router": bank, "exit_threshold": 0.0, "lowering": "eager", **SETTINGS}
    compiled = torch.compile(model, backend="tide", options=options)
    with torch.no_grad(), tide_compile.record_exits(per_token=True) as stats:
        compiled(torch.tensor([[7], [5]]), use_cache=False)
    assert stats.exit_layers[0].tolist() == [[1], [LAYERS - 1]]


@pytest.mark.parametrize(
    ("name", "cache", "batch", "strategy"),
    [
        ("rmsnorm-rope-gqa", "dynamic", 2, "shortcut"),
        pytest.param("layernorm-learned-positions", "static", 2, "zero_pad", marks=pytest.mark.slow),
        pytest.param("parallel-residual", "none", 2, "zero_pad", marks=pytest.mark.slow),
        pytest.param("sliding-window", "static", 1, "propagate", marks=pytest.mark.slow),
    ],
)
def test_inductor_lowering(name, cache, batch, strategy):
    """With all that a router file can hold. Catches what only compiled code gets wrong: aliasing, symbolic sizes, twins
    wired to the wrong weights, a projection that Inductor fuses in another dtype than the reference's."""
    model, bank = tiny(name, layers=3), probing(3)
    bank.shortcuts = {1: shortcuts()[1]}
    settings = {"kv_cache_strategy": strategy, **SETTINGS}
    threshold = threshold_between(model, bank, 0.4, cache, batch, **settings)
    assert check(model, bank, cache, batch, threshold, **settings).total_exited > 0


@pytest.mark.parametrize(
    ("batch", "lowering"),
    [(1, "eager"), (3, "eager"), pytest.param(1, "inductor", marks=pytest.mark.slow)],
)
def test_compiled_equals_the_reference(batch, lowering, tmp_path):
    """Probe and low-rank projection, from a file. Catches a tensor in the wrong place of the op."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    bank = RouterBank.load(probing(FEW).save(tmp_path / "r.safetensors"))
    assert bank.exit_strategy == "low_rank"
    settings = {"min_layers": 1, "checkpoint_interval": 1, "lowering": lowering}
    threshold = threshold_between(model, bank, 0.5, "static", batch, **settings)
    stats = check(model, bank, "static", batch, threshold, **settings)
    assert 0 < stats.exit_rate < 1


@pytest.mark.slow
def test_inductor_lowering_of_projections():
    """Catches a projection that Inductor fuses in another dtype than the reference's."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    bank = RouterBank.untrained(HIDDEN, FEW, bottleneck_dim=16)
    bank.projections = {layer: (torch.eye(HIDDEN).roll(layer + 1, 0), torch.ones(HIDDEN)) for layer in bank.layers}
    settings = {**SETTINGS, "min_layers": 1}
    threshold = threshold_between(model, bank, 0.4, "static", 2, **settings)
    assert check(model, bank, "static", 2, threshold, **settings).total_exited > 0
