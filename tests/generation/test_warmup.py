"""After warmup nothing is left to compile."""

import logging

import torch

from tests.support.models import FEW, GENERATE, HIDDEN, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, eager_reference, exit_threshold, record_times, synthetic_routers
from tide_compile.passes.program import segment_name


def test_warmup_compiles_everything(caplog):
    """Catches a piece that is compiled while a user waits: after warmup neither Dynamo nor a piece has to be. And what
    only compiled code gets wrong when rows are left out: the text and the exits are the eager reference's."""
    ids, mask = prompt(4, padding=0)
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    bank = synthetic_routers(model, ids, {0: 0.5})
    config = TIDEConfig(min_layers=1, checkpoint_interval=1, compaction="always")
    engine = TIDE(model, bank, config)
    assert engine.warmup(batch_size=4) > 0
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    caplog.clear()
    with caplog.at_level(logging.INFO, "tide_compile"), record_times() as times:
        text = engine.generate(ids, attention_mask=mask, **GENERATE)
    with eager_reference(model, bank, config) as reference:
        assert torch.equal(text, model.generate(ids, attention_mask=mask, **GENERATE, cache_implementation="static"))
    left = torch.cat([layers.flatten() for layers in reference.exit_layers])
    assert engine.last_stats.exits_per_layer == {0: int((left == 0).sum())}
    assert any(d.compact and d.kept < d.rows for d in engine.last_stats.decisions.values())
    assert not [r for r in caplog.messages if "compiled" in r]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    ran = times.seconds
    assert (
        segment_name(1, "compact") in ran and len(ran["executor"]) == len(ran["epilogue"]) == GENERATE["max_new_tokens"]
    )
    assert all(s > 0 for seconds in ran.values() for s in seconds)


def test_an_end_token_does_not_end_the_warmup():
    """Catches decoding that is compiled by the first request, as the model answered the warm-up with its end."""
    model = tiny("rmsnorm-rope-gqa", layers=FEW)
    with torch.no_grad():
        first = int(model(torch.ones(1, 16, dtype=torch.long)).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [first]
    model.generation_config.do_sample, model.generation_config.num_beams = True, 3
    engine = TIDE(model, config=TIDEConfig(exit_threshold=1.0, lowering="eager"))
    engine.warmup()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    engine.generate(prompt(1)[0], max_new_tokens=5, num_beams=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_what_requests_may_ask_for_is_compiled(caplog):
    """Exits at every checkpoint, at some and at none, sampling, end tokens, shorter prompts. Catches what a request of
    the size that warm-up was told of still has to have compiled."""
    model = tiny("rmsnorm-rope-gqa", layers=3)
    config = TIDEConfig(min_layers=1, checkpoint_interval=1)
    engine = TIDE(model, RouterBank.untrained(HIDDEN, 3, bottleneck_dim=16), config)
    engine.warmup(batch_size=3, prompt_length=12, max_new_tokens=8)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    caplog.clear()
    ids, mask = prompt(3)
    with caplog.at_level(logging.INFO, "tide_compile"):
        for threshold in (0.0, 0.5, {0: 1.0, 1: 0.0}, 1.0):
            for chosen in ({"do_sample": True}, {"do_sample": False, "eos_token_id": list(range(1, 90))}):
                with exit_threshold(threshold):
                    engine.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **chosen)
        engine.generate(ids[:, -3:], attention_mask=mask[:, -3:], max_new_tokens=6, pad_token_id=0)
    assert not [r for r in caplog.messages if "compiled" in r]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
