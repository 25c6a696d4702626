"""Cumulative statistics of an engine, and their Prometheus form."""

import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.models import GENERATE, HIDDEN, LAYERS, SETTINGS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, exit_threshold
from tide_compile.metrics import prometheus_text
from tide_compile.runtime.exit_stats import Totals


@pytest.fixture(autouse=True)
def fresh():
    """In the place of conftest's: one compiled engine serves the module."""


@pytest.fixture(scope="module")
def compiled():
    bank = RouterBank.untrained(HIDDEN, LAYERS, bottleneck_dim=16)
    return TIDE(tiny("rmsnorm-rope-gqa"), bank, TIDEConfig(exit_threshold=0.5, **SETTINGS))


@pytest.fixture
def engine(compiled):
    """As new: nothing is counted yet."""
    compiled._totals = Totals()
    return compiled


def samples(engine):
    families = text_string_to_metric_families(prometheus_text(engine))
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


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


def test_warmup_is_not_counted(engine):
    engine.warmup()
    assert engine.stats.calls == 0 and samples(engine)["tide_tokens_total",] == 0
    engine.generate(prompt(1)[0], **GENERATE)
    assert engine.stats.calls == 1


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


def test_prometheus(engine):
    """Every counter equals the statistics, exits by layer. Catches a counter under the wrong name."""
    engine.generate(prompt(2)[0], **GENERATE)
    with exit_threshold(1.0):
        engine(prompt(1)[0])
    stats, found = engine.stats, samples(engine)
    assert found.pop(("tide_call_seconds_total",)) == pytest.approx(stats.seconds)
    exits = {("tide_exits_total", str(layer)): n for layer, n in stats.exits_per_layer.items()}
    assert exits and found == exits | {
        ("tide_tokens_total",): stats.total_tokens,
        ("tide_full_depth_tokens_total",): stats.remaining_tokens,
        ("tide_layer_passes_run_total",): stats.layer_passes_run,
        ("tide_layer_passes_saved_total",): stats.layer_passes_saved,
        ("tide_calls_total",): 2,
        ("tide_layers",): LAYERS,
    }


def test_read_while_others_count(engine):
    """Tokens and exits of one reading belong together. Catches counters that are read in between two additions."""
    ids = prompt(1)[0]
    engine.generate(ids, **GENERATE)
    one = engine.last_stats.total_tokens
    done, wrong = threading.Event(), []

    def read():
        while not done.is_set():
            found = samples(engine)
            exits = sum(n for (name, *_), n in found.items() if name == "tide_exits_total")
            tokens = found["tide_tokens_total",]
            if exits + found["tide_full_depth_tokens_total",] != tokens or tokens != one * found["tide_calls_total",]:
                wrong.append(found)
            time.sleep(0.001)  # the others need the interpreter too

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=lambda: engine.generate(ids, **GENERATE)) for _ in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not wrong and engine.stats.calls == 9
