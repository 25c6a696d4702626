"""SmolLM2-135M: the same comparisons as for tiny models, where real weights have outliers and 30 layers add up."""

import itertools

import pytest
import torch

import tide_compile
from bench.support.models import truncated
from tests.support.compare import assert_close, check, threshold_between
from tests.support.models import CACHES, logits_of
from tide_compile import TIDE, RouterBank, TIDEConfig

pytestmark = pytest.mark.real_model
SETTINGS = {"min_layers": 10, "checkpoint_interval": 10}
GENERATE = {"max_new_tokens": 12, "do_sample": False}

SMALL = {  # what CI runs; ``make test-all`` runs the whole grid
    ("static", 4, "some", "propagate"),
}
GRID = [
    pytest.param(*case, marks=() if case in SMALL else pytest.mark.slow, id="-".join(map(str, case)))
    for case in itertools.product(CACHES, (1, 4), ("none", "some", "all"), ("propagate", "zero_pad"))
    if case[2:] != ("none", "zero_pad")  # without exits the strategies are one
]


@pytest.fixture(scope="module")
def bank():
    return RouterBank.untrained(576, 30)


@pytest.mark.parametrize(("cache", "batch", "exits", "strategy"), GRID)
def test_equals_the_reference(smollm2, bank, cache, batch, exits, strategy):
    model, _ = smollm2
    settings = {"lowering": "eager", "kv_cache_strategy": strategy, **SETTINGS}
    threshold = {"none": lambda: 0.9999, "all": lambda: 0.0}.get(
        exits, lambda: threshold_between(model, bank, 0.4, cache, batch, **settings)
    )()
    stats = check(model, bank, cache, batch, threshold, **settings)
    low, high = {"none": (0, 0), "all": (1, 1), "some": (0.05, 0.95)}[exits]
    assert low <= stats.exit_rate <= high
    if exits == "none":
        for ours, theirs in zip(
            logits_of(model, torch.compile(model, backend="tide", options={"exit_threshold": 1.0, "lowering": "eager"}),
                      cache, batch),
            logits_of(model, model, cache, batch),
            strict=True,
        ):  # fmt: skip
            assert_close(ours, theirs)


@pytest.mark.parametrize("depth", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_text(smollm2, depth):
    """Compiled by Inductor, with a chat template. Some tokens leave early: the eager reference's text. None does: the
    stock model's, to the letter."""
    model, tokenizer = smollm2
    model, bank = truncated(model, depth), RouterBank.untrained(576, depth)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    settings = {"min_layers": 2 * depth // 3, "checkpoint_interval": depth // 6}

    def reference(threshold):
        config = TIDEConfig(exit_threshold=threshold, **settings)
        with tide_compile.eager_reference(model, bank, config) as run:
            out = model.generate(**inputs, **GENERATE, cache_implementation="static")
        return out, run

    scores = torch.cat([s.flatten() for call in reference(0.9999)[1].scores for s in call.values()])
    threshold = scores.quantile(0.7).item() + 1e-4
    want, run = reference(threshold)
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=threshold, **settings))
    assert torch.equal(engine.generate(**inputs, **GENERATE), want)
    layers = torch.cat([e.flatten() for e in run.exit_layers])
    exits = {layer: int((layers == layer).sum()) for layer in (2 * depth // 3 - 1, 5 * depth // 6 - 1)}
    assert sum(exits.values()) > 0
    assert engine.last_stats.exits_per_layer == {layer: n for layer, n in exits.items() if n}
    with tide_compile.exit_threshold(1.0):
        assert torch.equal(engine.generate(**inputs, **GENERATE), model.generate(**inputs, **GENERATE))
    assert engine.last_stats.exit_rate == 0


def test_weights_are_not_copied(smollm2):
    """Compiled code takes the model's own parameters: no private memory of their size appears. The logits are the
    stock model's."""
    model, _ = smollm2
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values())
    compiled = torch.compile(model, backend="tide", options={"exit_threshold": 1.0})
    ids = torch.ones(1, 1, dtype=torch.long)
    before = _resident()
    with torch.no_grad():
        got = compiled(ids, use_cache=False).logits
        assert _resident() - before < 0.5 * weights
        assert_close(got, model(ids, use_cache=False).logits)


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
