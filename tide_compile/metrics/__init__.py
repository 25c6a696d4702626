"""Metrics: an engine's statistics as Prometheus counters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from operator import attrgetter
from weakref import WeakKeyDictionary

from tide_compile.errors import ConfigError, MissingExtraError
from tide_compile.generation.engine import TIDE

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingExtraError("metrics need prometheus_client: pip install 'tide-compile[metrics]'") from error


_COUNTERS = (
    ("tokens", "Tokens that went through the model, of prompts and generated", attrgetter("total_tokens")),
    ("full_depth_tokens", "Tokens that ran all layers", attrgetter("remaining_tokens")),
    ("layer_passes_run", "Layers run, summed over tokens", attrgetter("layer_passes_run")),
    ("layer_passes_saved", "Layers skipped, summed over tokens", attrgetter("layer_passes_saved")),
    ("calls", "Calls of the engine and of generate", attrgetter("calls")),
    ("call_seconds", "Seconds in these calls, without waiting for one another", attrgetter("seconds")),
)
_numbers: WeakKeyDictionary[TIDE, str] = WeakKeyDictionary()
_next = itertools.count(1)


class EngineCollector(Collector):
    """The counters of an engine, read when Prometheus asks: ``REGISTRY.register(EngineCollector(engine))``.

    Layers are numbered from 0, as in ``exits_per_layer``. Padding and what ``warmup`` runs are not counted. Several
    engines have the same metrics, told apart by the label ``engine``: ``add`` them to one collector, which lists each
    metric once, as OpenMetrics asks. A registry takes a collector for each, too, and lists the metrics of one after
    those of the other; Prometheus reads that.

    Args:
        engine: whose counters these are.
        name: value of the label; default: a number, by the order in which engines came to a collector.
    """

    def __init__(self, engine: TIDE, name: str | None = None) -> None:
        self._engines: dict[str, TIDE] = {}
        self.add(engine, name)

    def add(self, engine: TIDE, name: str | None = None) -> None:
        """One more. Raises ConfigError if there is another engine of this name."""
        name = name or _number(engine)
        if self._engines.setdefault(name, engine) is not engine:
            raise ConfigError(f"there is an engine {name!r} already: give this one another name.")

    def describe(self) -> list[Metric]:
        """None: what is described may be in a registry once, and each engine has it."""
        return []

    def collect(self) -> Iterator[Metric]:
        read = {name: engine.stats for name, engine in self._engines.items()}
        exits = CounterMetricFamily(
            "tide_exits", "Tokens that left early, by the layer they left after", labels=["engine", "layer"]
        )
        layers = GaugeMetricFamily("tide_layers", "Layers of the model; 0 before the first call", labels=["engine"])
        for name, stats in read.items():
            layers.add_metric([name], stats.num_layers)
            for layer, count in sorted(stats.exits_per_layer.items()):
                exits.add_metric([name, str(layer)], count)
        yield from (exits, layers)
        for metric, text, value in _COUNTERS:
            counter = CounterMetricFamily(f"tide_{metric}", text, labels=["engine"])
            for name, stats in read.items():
                counter.add_metric([name], value(stats))
            yield counter


def prometheus_text(engine: TIDE, name: str | None = None) -> str:
    """The counters of an engine in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, name))
    return generate_latest(registry).decode()


def _number(engine: TIDE) -> str:
    if engine not in _numbers:
        _numbers[engine] = str(next(_next))
    return _numbers[engine]
