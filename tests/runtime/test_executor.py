"""What runs of a model, and whose routers decide it."""

import pytest
import torch

import tide_compile
from tests.support.compare import assert_close, threshold_between
from tests.support.models import GENERATE, HIDDEN, LAYERS, SETTINGS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig


def test_two_models_keep_their_routers():
    """Dynamo runs one model's code for another of the same shape; the routers must not come along."""
    models = [tiny("rmsnorm-rope-gqa"), tiny("rmsnorm-rope-gqa", seed=1)]
    depths = []
    for seed, model in enumerate(models):
        bank = RouterBank.untrained(HIDDEN, LAYERS, layers=[1], seed=seed)
        bank.routers[1].up.weight.data.fill_(50.0 if seed else -50.0)
        bank.routers[1].down.weight.data.abs_()
        bank.norm.bias = torch.ones(HIDDEN)  # silu of something positive: the score is 1 or 0
        tide_compile.attach(model, bank)
        compiled = torch.compile(model, backend="tide", options={"exit_threshold": 0.5, **SETTINGS})
        with torch.no_grad(), tide_compile.record_exits() as stats:
            compiled(prompt(1)[0], use_cache=False)
        depths.append(stats.mean_depth)
    assert depths[0] > depths[1]


@pytest.mark.parametrize("batch", [1, 3])
def test_layers_are_not_run(batch, monkeypatch):
    """The promise: once every row has left, no later layer runs, in prompts, batches and decoding."""
    from tide_compile.runtime import executor

    ran = []
    original = executor._Step.__call__
    monkeypatch.setattr(executor._Step, "__call__", lambda self, env: (ran.append(self), original(self, env))[1])
    built = []
    monkeypatch.setattr(executor.Executor, "_forward", _noting(executor.Executor._forward, built))
    model, bank = tiny("rmsnorm-rope-gqa"), RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.0, min_layers=2, checkpoint_interval=1, lowering="eager"))
    engine.generate(*prompt(batch)[:1], **GENERATE)
    executors = {id(e): e for e in built}
    assert len(executors) == 2  # prompt, decoding
    for segments in (e._segments for e in executors.values()):
        assert segments[0].plain in ran and segments[1].plain in ran
        assert segments[1].fill in ran
        for segment in segments[2:]:
            assert segment.fill not in ran
            assert segment.plain not in ran and (segment.masked is None or segment.masked not in ran)


def test_padding_keeps_its_state():
    """Where all have left, at two checkpoints: padding has run as far as the last of them. Catches one that stays where
    the first left."""
    model, bank = tiny("rmsnorm-rope-gqa"), RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    ids, mask = prompt(2)
    config = TIDEConfig(exit_threshold=0.5, compaction="never", **SETTINGS)
    thresholds = {0: threshold_between(model, bank, 0.5, "none", 2, **{**SETTINGS, "compaction": "never"}), 1: 0.0}
    compiled = torch.compile(model, backend="tide", options={"router": bank, **config.to_dict()})
    by_layer = RouterBank(bank.routers, bank.norm, LAYERS)
    by_layer.thresholds = thresholds
    with torch.no_grad(), tide_compile.exit_threshold(thresholds), tide_compile.record_exits() as stats:
        got = compiled(ids, attention_mask=mask, use_cache=False).logits
    with torch.no_grad(), tide_compile.eager_reference(model, by_layer, TIDEConfig(compaction="never")):
        want = model(ids, attention_mask=mask, use_cache=False).logits
    assert set(stats.exits_per_layer) == {0, 1} and stats.remaining_tokens == 0 and not mask.all()
    assert_close(got, want)


def test_a_call_of_padding_alone():
    """Nobody is there to leave. Catches layers that are skipped, and keys and values that nobody writes."""
    model, bank = tiny("rmsnorm-rope-gqa"), RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    ids, mask = prompt(2)
    compiled = torch.compile(model, backend="tide", options={"router": bank, "exit_threshold": 0.0, **SETTINGS})
    with torch.no_grad():
        got, want = (m(ids, attention_mask=torch.zeros_like(mask)) for m in (compiled, model))
    assert_close(got.logits, want.logits)
    for ours, theirs in zip(got.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert_close(ours.keys, theirs.keys)


def _noting(method, seen):
    def noting(self, *args):
        seen.append(self)
        return method(self, *args)

    return noting
