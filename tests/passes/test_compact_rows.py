"""Leaving out rows that have exited changes nothing but the time: compact equals masked equals the eager reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import tide_compile
from tests.families.configs import build
from tests.support.compare import assert_close, check, threshold_between
from tests.support.graphs import capture, decode_graph, passes
from tests.support.graphs import settings as plan_settings
from tests.support.models import CACHES, COMPACT, CONFIGS, HIDDEN, LAYERS, VOCABULARY, prompt, shortcuts, tiny
from tide_compile import RouterBank, TIDEConfig, synthetic_routers

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
    with tide_compile.eager_reference(model, bank, TIDEConfig(**COMPACT, **common)) as reference:
        want = run(model, model, ids, mask, case["cache"])
    for compaction in ("always", "never"):
        torch._dynamo.reset()
        options = {"router": bank, **COMPACT, **common, "compaction": compaction}
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


@pytest.mark.slow  # generation/test_warmup.py compiles rows that are left out, too
@pytest.mark.parametrize(("cache", "batch"), [("static", 1), ("static", 4), ("none", 4)])
def test_inductor(cache, batch):
    """Catches what only compiled code gets wrong, and that the compact form is not reached."""
    model, bank = tiny("rmsnorm-rope-gqa", layers=3), RouterBank.untrained(HIDDEN, 3, bottleneck_dim=16)
    threshold = threshold_between(model, bank, 0.6, cache, batch, **COMPACT)
    stats = check(model, bank, cache, batch, threshold, **COMPACT)
    assert any(d.compact and d.kept < d.rows for d in stats.decisions.values())


def test_number_of_rows_does_not_recompile(model):
    """Prompts of which other numbers of rows leave run the code that is there."""
    ids = torch.randint(3, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(model, backend="tide", options={**COMPACT, "min_layers": 2})
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
    assert not any(segment.compact for segment in program.segments)
    assert program.segments[1].masked is not None


@pytest.mark.parametrize(("batch", "wish", "compact"), [(4, "auto", False), (5, "auto", True), (4, "always", True)])
def test_few_rows_are_masked(batch, wish, compact):
    """Catches a decoding step that is compacted into products that are slower than those of all of its rows."""
    program, _ = passes(decode_graph(batch), plan_settings((0,), compaction=wish))
    assert (program.segments[1].compact is not None) == compact
