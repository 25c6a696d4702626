"""Statistics of a call, of a thread and of an engine."""

import threading

import pytest

import tide_compile
from tests.support.models import FEW, GENERATE, HIDDEN, LAYERS, SETTINGS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, exit_threshold

DEPTH = FEW  # of the fixtures' model: what a thread counts does not hang on it


@pytest.fixture
def engine():
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    return TIDE(tiny("rmsnorm-rope-gqa"), bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))


def test_threads_have_their_own_statistics(model, bank):
    engine = TIDE(model, bank, TIDEConfig(exit_threshold=0.0, **SETTINGS))
    engine(prompt(1)[0])
    totals = []

    def work(batch):
        with tide_compile.record_exits() as stats:
            engine(prompt(batch)[0])
        totals.append(stats.total_tokens)

    threads = [threading.Thread(target=work, args=(1,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert totals == [9, 9, 9]


def test_summary():
    """The reference's lines, then depth."""
    stats = tide_compile.ExitStats()
    stats.add(32, {7: 23, 11: 31, 15: 18}, 28)
    assert stats.summary().splitlines() == [
        "Total tokens: 100, Exited: 72 (72.0%)",
        "  Layer 7: 23 exits (23.0%)",
        "  Layer 11: 31 exits (31.0%)",
        "  Layer 15: 18 exits (18.0%)",
        "  Ran all layers: 28",
        "  Mean depth: 17.4 of 32 layers, 45.6% saved",
    ]
    assert tide_compile.ExitStats().summary().startswith("Total tokens: 0, Exited: 0 (0.0%)")


def test_stats_add_up(engine):
    """Calls, generate and different exits. Catches a call that is left out or counted twice, and padding."""
    assert engine.stats.total_tokens == engine.stats.calls == 0 and engine.stats.mean_depth == 0
    ids, mask = prompt(3)
    last = []
    for threshold in (0.0, 0.5, 1.0):
        with exit_threshold(threshold):
            engine.generate(ids, attention_mask=mask, **GENERATE)
            last.append(engine.last_stats)
            engine(ids, mask)
            last.append(engine.last_stats)
    stats = engine.stats
    assert stats.calls == 6 and stats.seconds > 0
    assert stats.total_tokens == sum(s.total_tokens for s in last)
    assert stats.remaining_tokens == sum(s.remaining_tokens for s in last) > 0
    for layer in range(LAYERS - 1):
        assert stats.exits_per_layer.get(layer, 0) == sum(s.exits_per_layer.get(layer, 0) for s in last)
    assert stats.layer_passes_run == sum(round(s.mean_depth * s.total_tokens) for s in last)
    assert stats.layer_passes_run + stats.layer_passes_saved == LAYERS * stats.total_tokens
    assert stats.layers_saved == pytest.approx(stats.layer_passes_saved / (LAYERS * stats.total_tokens))
    assert "Calls: 6, " in stats.summary()


def test_stats_are_a_copy(engine):
    """Catches statistics that change under the hands of their reader."""
    engine(prompt(1)[0])
    before = engine.stats
    kept = dict(before.exits_per_layer), before.total_tokens
    engine(prompt(1)[0])
    assert (before.exits_per_layer, before.total_tokens) == kept
    assert engine.stats.total_tokens == 2 * before.total_tokens


def test_a_call_that_fails_on_the_way(engine):
    """The tokens that were computed are counted. Catches work that nobody sees."""

    class Full(Exception):
        pass

    class Streamer:
        pieces = 0

        def put(self, value):
            self.pieces += 1
            if self.pieces > 2:  # the prompt, one token
                raise Full

    with pytest.raises(Full):
        engine.generate(prompt(1, 9)[0], streamer=Streamer(), **GENERATE)
    assert engine.stats.total_tokens == 9 + 1 and engine.stats.calls == 1
    with pytest.raises(ValueError):
        engine.generate(prompt(1)[0], max_new_tokens=-1)
    assert engine.stats.calls == 1
