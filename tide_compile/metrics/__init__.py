"""Metrics: an engine's statistics as Prometheus counters."""

from __future__ import annotations

from collections.abc import Iterator

from tide_compile.errors import MissingExtraError
from tide_compile.generation.engine import TIDE

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingExtraError("metrics need prometheus_client: pip install 'tide-compile[metrics]'") from error


class EngineCollector(Collector):
    """The counters of one engine, read when Prometheus asks: ``REGISTRY.register(EngineCollector(engine))``.

    Layers are numbered from 0, as in ``exits_per_layer``. Padding and what ``warmup`` runs are not counted.
    """

    def __init__(self, engine: TIDE) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        exits = CounterMetricFamily(
            "tide_exits", "Tokens that left early, by the layer they left after", labels=["layer"]
        )
        for layer, count in sorted(stats.exits_per_layer.items()):
            exits.add_metric([str(layer)], count)
        yield exits
        for name, text, value in (
            ("tokens", "Tokens that went through the model, of prompts and generated", stats.total_tokens),
            ("full_depth_tokens", "Tokens that ran all layers", stats.remaining_tokens),
            ("layer_passes_run", "Layers run, summed over tokens", stats.layer_passes_run),
            ("layer_passes_saved", "Layers skipped, summed over tokens", stats.layer_passes_saved),
            ("calls", "Calls of the engine and of generate", stats.calls),
            ("call_seconds", "Seconds in these calls, without waiting for one another", stats.seconds),
        ):
            yield CounterMetricFamily(f"tide_{name}", text, value=value)
        yield GaugeMetricFamily("tide_layers", "Layers of the model; 0 before the first call", value=stats.num_layers)


def prometheus_text(engine: TIDE) -> str:
    """The counters of an engine in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine))
    return generate_latest(registry).decode()
