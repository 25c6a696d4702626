"""When rows are left out: where that is faster, and enough have left."""

import torch

import tide_compile
from tests.support.graphs import capture, passes
from tests.support.graphs import settings as plan_settings
from tests.support.models import COMPACT, VOCABULARY, prompt
from tide_compile import TIDEConfig, synthetic_routers
from tide_compile.passes.graph.cost import Device
from tide_compile.runtime.compaction_policy import CompactionPolicy


def test_policy(model, monkeypatch):
    """Fewer rows pay where operations cost, not where reading the weights does or where moving rows costs more."""
    (gm,) = capture(model, prompt(1, 16)[0], use_cache=False)
    program, plan = passes(gm, plan_settings((0,)))
    active = torch.ones(1, 16, dtype=torch.bool)
    rows = torch.arange(4)

    def decide(flops, bandwidth, overhead=0.0, **chosen):
        monkeypatch.setattr(
            "tide_compile.runtime.compaction_policy.measure_machine", lambda *_: Device(flops, bandwidth, overhead)
        )
        return CompactionPolicy(program, plan, TIDEConfig(**chosen)).decide(1, rows, active)

    slow = decide(1e6, 1e12)
    assert slow.compact and slow.compact_seconds < slow.masked_seconds and "4 of 16 rows" in str(slow)
    assert 4 / 16 < slow.left < 0.5  # keys and values are still computed for all
    assert not decide(1e15, 1e6).compact
    assert not decide(1e6, 1e12, overhead=1.0).compact
    assert decide(1e6, 1e12, overhead=1.0, compaction="always").compact
    assert not CompactionPolicy(program, plan, TIDEConfig(compaction="never")).possible


def test_compaction_waits_for_the_threshold(model):
    """A few exits are not worth gathering rows for."""
    ids = torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    tide_compile.attach(model, synthetic_routers(model, ids, {0: 0.2}))
    for threshold, made in ((0.25, False), (0.15, True)):
        options = {**COMPACT, "compaction_threshold": threshold, "lowering": "eager"}
        compiled = torch.compile(model, backend="tide", options=options)
        with torch.no_grad(), tide_compile.record_exits() as stats:
            compiled(ids, use_cache=False)
        assert bool(stats.decisions) == made
