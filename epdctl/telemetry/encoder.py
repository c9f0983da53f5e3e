"""What the encoder's router counts, as Prometheus metrics in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

__all__ = ["EncoderMeters"]


class EncoderMeters:
    """``pending`` (by rank), ``waiting``, ``held`` (bytes) and ``dropped`` (by why) are read when somebody asks for the
    metrics."""

    def __init__(
        self,
        *,
        pending: Callable[[], Mapping[str, int]],
        waiting: Callable[[], float],
        held: Callable[[], float],
        dropped: Callable[[], Mapping[str, int]],
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Pending(pending))
        self.registry.register(_Dropped(dropped))
        Gauge("epdctl_encoder_waiting", "Items no rank has room for yet", registry=self.registry).set_function(waiting)
        Gauge("epdctl_encoder_held_bytes", "Embeddings on their way to readers", registry=self.registry).set_function(
            held
        )
        self.items = self._counter("epdctl_encoder_items", "Items by how they ended", "end")
        self.sources = self._counter(
            "epdctl_encoder_embeddings", "Embeddings by where they came from: made, shared or cached", "rank", "source"
        )
        self.cache_bytes = Gauge(
            "epdctl_encoder_cache_bytes", "What each rank remembers", ["rank"], registry=self.registry
        )
        self.requests = self._counter(
            "epdctl_encoder_http_requests", "HTTP requests by path and status", "path", "status"
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)


class _Pending(Collector):
    """Ranks come and go, and so do their lines."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily("epdctl_encoder_pending", "Items each ready rank works on", labels=["rank"])
        for rank, pending in self._read().items():
            family.add_metric([rank], pending)
        return [family]


class _Dropped(Collector):
    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> list[CounterMetricFamily]:
        text = "Messages that were dropped: late for an item that is over, or unreadable"
        family = CounterMetricFamily("epdctl_encoder_dropped", text, labels=["why"])
        for why, count in self._read().items():
            family.add_metric([why], count)
        return [family]
