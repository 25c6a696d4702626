"""An engine's cumulative statistics in their Prometheus form."""

import re
import threading
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.models import GENERATE, HIDDEN, LAYERS, SETTINGS, prompt, tiny
from tide_compile import TIDE, RouterBank, TIDEConfig, exit_threshold
from tide_compile.errors import ConfigError
from tide_compile.metrics import EngineCollector, prometheus_text
from tide_compile.runtime.exit_stats import Totals


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
    return labelled(prometheus_text(engine, "tiny"), "tiny")


def labelled(text, engine):
    """Samples of one engine, by name and the other labels."""
    found = [s for family in text_string_to_metric_families(text) for s in family.samples]
    mine = [(s.name, s.labels | {"engine": None}, s.value) for s in found if s.labels["engine"] == engine]
    return {(name, *filter(None, labels.values())): value for name, labels, value in mine}


def test_warmup_is_not_counted(engine):
    """Catches counters that begin with what nobody has asked for."""
    engine.warmup()
    assert engine.stats.calls == 0 and samples(engine)["tide_tokens_total",] == 0
    engine.generate(prompt(1)[0], **GENERATE)
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


@pytest.mark.parametrize("how", ["one collector", "two collectors"])
def test_engines_have_metrics_of_their_own(how):
    """In one registry, by the name given or a number that stays. Catches a registry that refuses the second one, series
    that appear twice, counters of the other engine, and a metric that one collector lists twice."""
    engines = [TIDE(tiny("rmsnorm-rope-gqa"), config=TIDEConfig(exit_threshold=1.0, lowering="eager")) for _ in "ab"]
    registry = CollectorRegistry(auto_describe=True)
    first = EngineCollector(engines[0], "a")
    registry.register(first)
    if how == "one collector":
        first.add(engines[1], "b")
        with pytest.raises(ConfigError, match="'b' already"):
            first.add(engines[0], "b")
    else:
        registry.register(EngineCollector(engines[1], "b"))
    for engine, length in zip(engines, (3, 5), strict=True):
        engine(prompt(1)[0][:, :length])
    text = generate_latest(registry).decode()
    series = [line.rsplit(" ", 1)[0] for line in text.splitlines() if line[0] != "#"]
    assert len(series) == len(set(series)) and text.count("# TYPE tide_tokens_total") == 1 + (how != "one collector")
    assert [labelled(text, name)["tide_tokens_total",] for name in "ab"] == [3, 5]
    numbers = [re.search(r'engine="(\d+)"', prometheus_text(engine))[1] for engine in (*engines, *engines)]
    assert numbers[:2] == numbers[2:] and numbers[0] != numbers[1]


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
