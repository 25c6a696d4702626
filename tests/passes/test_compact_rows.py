"""Leaving out rows that have exited changes nothing but the time: compact equals masked equals the eager reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache, StoppingCriteria

import tide_compile
from tests.families.configs import build
from tests.support.compare import assert_close, check, threshold_between
from tests.support.graphs import capture, decode_graph, passes
from tests.support.graphs import settings as plan_settings
from tests.support.models import CACHES, CONFIGS, GENERATE, HIDDEN, LAYERS, VOCABULARY, prompt, shortcuts, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, synthetic_routers
from tide_compile.errors import ConfigError
from tide_compile.passes.graph.cost import Device
from tide_compile.runtime.compaction_policy import CompactionPolicy

CHOSEN = {"min_layers": 1, "checkpoint_interval": 1, "compaction": "always", "compaction_threshold": 0.0}
CASES = st.fixed_dictionaries(
    {
        "name": st.sampled_from(list(CONFIGS)),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16]),
        "cache": st.sampled_from(CACHES),
        "strategy": st.sampled_from(["propagate", "shortcut", "zero_pad"]),
        "batch": st.integers(1, 5),
        "length": st.integers(1, 20),
        "padding": st.sampled_from(["none", "left", "right"]),
        "layer": st.integers(0, LAYERS - 2),
        "left": st.sampled_from(["none", "one", "half", "all but one", "all"]),
        "seed": st.integers(0, 1000),
    }
)


@torch.no_grad()
def run(model, call, ids, mask, cache):
    """Logits of a prompt and, where that makes sense, of two tokens after it, [T, V] each, without padding."""
    extra = {
        "none": lambda: {"use_cache": False},
        "dynamic": lambda: {"past_key_values": DynamicCache(config=model.config)},
        "static": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=32)},
    }[cache]()
    logits = [call(ids, attention_mask=mask, **extra).logits[mask.bool()]]
    for _ in range(2 if cache != "none" and mask[:, -1].all() else 0):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        logits.append(call(ids[:, :1], attention_mask=mask, **extra).logits[:, 0])
    return logits


def sweep(case):
    torch._dynamo.reset()
    model = tiny(case["name"], case["dtype"])
    generator = torch.Generator().manual_seed(case["seed"])
    ids = torch.randint(3, VOCABULARY, (case["batch"], case["length"]), generator=generator)
    mask = torch.ones_like(ids)
    for row in mask[:-1]:  # the last row has none
        count = int(torch.randint(0, case["length"], (), generator=generator))
        if case["padding"] == "left":
            row[:count] = 0
        elif case["padding"] == "right" and count:
            row[-count:] = 0
    tokens = int(mask.sum())
    share = {"none": 0, "one": 1 / tokens, "half": 0.5, "all but one": 1 - 1 / tokens, "all": 1}[case["left"]]
    bank = synthetic_routers(model, ids, {case["layer"]: share}, attention_mask=mask, seed=case["seed"])
    bank.shortcuts = shortcuts()
    common = {"lowering": "eager", "kv_cache_strategy": case["strategy"]}
    with tide_compile.eager_reference(model, bank, TIDEConfig(**CHOSEN, **common)) as reference:
        want = run(model, model, ids, mask, case["cache"])
    for compaction in ("always", "never"):
        torch._dynamo.reset()
        options = {"router": bank, **CHOSEN, **common, "compaction": compaction}
        compiled = torch.compile(model, backend="tide", options=options)
        with tide_compile.record_exits(per_token=True) as stats:
            got = run(model, compiled, ids, mask, case["cache"])
        for ours, theirs in zip(stats.exit_layers, reference.exit_layers, strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs)


relaxed = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(case=CASES)
@settings(relaxed, max_examples=3)
def test_compact_equals_masked_equals_reference(case):
    """Catches a row gathered along the wrong dimension, a size that was not replaced, a state scattered back
    wrongly."""
    sweep(case)


@pytest.mark.slow
@given(case=CASES)
@settings(relaxed, max_examples=200)
def test_compact_equals_masked_equals_reference_in_many_cases(case):
    sweep(case)


@pytest.mark.slow  # test_lowering.py compiles rows that are left out, too
@pytest.mark.parametrize(("cache", "batch"), [("static", 1), ("static", 4), ("none", 4)])
def test_inductor(cache, batch):
    """Catches what only compiled code gets wrong, and that the compact form is not reached."""
    model, bank = tiny("rmsnorm-rope-gqa", layers=3), RouterBank.untrained(HIDDEN, 3, bottleneck_dim=16)
    threshold = threshold_between(model, bank, 0.6, cache, batch, **CHOSEN)
    stats = check(model, bank, cache, batch, threshold, **CHOSEN)
    assert any(d.compact and d.kept < d.rows for d in stats.decisions.values())


def test_number_of_rows_does_not_recompile(model):
    """Prompts of which other numbers of rows leave run the code that is there."""
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="tide", options={**CHOSEN, "min_layers": 2})
    kept = set()
    for share in (0.2, 0.9, 0.5, 0.7):
        tide_compile.attach(model, synthetic_routers(model, ids, {1: share}))
        allowed = torch._dynamo.config.patch(error_on_recompile=bool(kept))
        with allowed, torch.no_grad(), tide_compile.record_exits() as stats:
            compiled(ids, use_cache=False)
        kept |= {d.kept for d in stats.decisions.values()}
    assert len(kept) == 4


@pytest.mark.parametrize("family", ["mixtral", pytest.param("mamba", marks=pytest.mark.slow)])
def test_mixtures_of_experts_and_recurrent_layers_are_masked(family):
    """Catches a rule that takes an operator for one that treats rows alike, whose padding or neighbours matter."""
    (gm,) = capture(build(family), prompt(2)[0], use_cache=False)
    program, _ = passes(gm, plan_settings((0,)))
    assert not any(name.endswith(".compact") for name in program.pieces)
    assert "segment_1.masked" in program.pieces


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
        return CompactionPolicy(program, plan, TIDEConfig(**chosen)).decide("segment_1", rows, active)

    slow = decide(1e6, 1e12)
    assert slow.compact and slow.compact_seconds < slow.masked_seconds and "4 of 16 rows" in str(slow)
    assert 4 / 16 < slow.left < 0.5  # keys and values are still computed for all
    assert not decide(1e15, 1e6).compact
    assert not decide(1e6, 1e12, overhead=1.0).compact
    assert decide(1e6, 1e12, overhead=1.0, compaction="always").compact
    assert not CompactionPolicy(program, plan, TIDEConfig(compaction="never")).possible


@pytest.mark.parametrize(("batch", "wish", "compact"), [(4, "auto", False), (5, "auto", True), (4, "always", True)])
def test_few_rows_are_masked(batch, wish, compact):
    """Catches a decoding step that is compacted into products that are slower than those of all of its rows."""
    program, _ = passes(decode_graph(batch), plan_settings((0,), compaction=wish))
    assert ("segment_1.compact" in program.pieces) == compact


def test_compaction_waits_for_the_threshold(model):
    """A few exits are not worth gathering rows for."""
    ids = torch.randint(3, VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    tide_compile.attach(model, synthetic_routers(model, ids, {0: 0.2}))
    for threshold, made in ((0.25, False), (0.15, True)):
        options = {**CHOSEN, "compaction_threshold": threshold, "lowering": "eager"}
        compiled = torch.compile(model, backend="tide", options=options)
        with torch.no_grad(), tide_compile.record_exits() as stats:
            compiled(ids, use_cache=False)
        assert bool(stats.decisions) == made


def test_synthetic_shares_are_exact(model):
    """Shares are of the tokens that reach a checkpoint, padding not counted."""
    ids, mask = prompt(4, 12)
    bank = synthetic_routers(model, ids, {0: 0.25, 2: 0.5}, attention_mask=mask)
    options = {"router": bank, **CHOSEN, "lowering": "eager"}
    compiled = torch.compile(model, backend="tide", options=options)
    with torch.no_grad(), tide_compile.record_exits() as stats:
        compiled(ids, attention_mask=mask, use_cache=False)
    first = round(0.25 * mask.sum().item())
    assert stats.exits_per_layer == {0: first, 2: round(0.5 * (mask.sum().item() - first))}
    again = synthetic_routers(model, ids, {0: 0.25, 2: 0.5}, attention_mask=mask)
    assert torch.equal(again.routers[2].up.weight, bank.routers[2].up.weight)
    with pytest.raises(ConfigError, match="shares from 0 to 1"):
        synthetic_routers(model, ids, {0: 1.5})


class _EndsAfter(StoppingCriteria):
    """Sequence i ends when it is ``lengths[i]`` tokens long."""

    def __init__(self, lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("name", [pytest.param("rmsnorm-rope-gqa", marks=pytest.mark.slow), "sliding-window"])
def test_finished_sequences_do_not_count(name):
    """A sequence that has ended is padding: it neither holds the others at full depth nor changes their text."""
    model = tiny(name)
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    chosen = {"exit_threshold": 0.0, "min_layers": 2, "checkpoint_interval": 1, "lowering": "eager"}
    engine = TIDE(model, bank, TIDEConfig(**chosen))
    ids, mask = prompt(3, 6)
    asked = {**GENERATE, "eos_token_id": None, "max_new_tokens": 8, "attention_mask": mask}
    whole = engine.generate(ids, **asked)
    everything = engine.last_stats.total_tokens
    ended = engine.generate(ids, **asked, stopping_criteria=[_EndsAfter([8, 99, 99])])
    assert everything == mask.sum() + 3 * 7
    assert engine.last_stats.total_tokens == mask.sum() + 2 * 7 + 1  # the first sequence ran its first new token only
    assert torch.equal(ended[1:], whole[1:])
    again = engine.generate(ids, **asked)
    assert torch.equal(again, whole)
