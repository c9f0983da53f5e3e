"""What the gateway counts, as Prometheus metrics in a registry of its own. Knows nothing of requests or ranks."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE", "GatewayMeters"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

FIRST_TOKEN_BUCKETS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 25, 50, 100)
LATENCY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class GatewayMeters:
    """``inflight`` and ``media_bytes`` are read when somebody asks for the metrics."""

    def __init__(self, *, inflight: Callable[[], float], media_bytes: Callable[[], float]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, that nobody asks for
        self.registry = CollectorRegistry()
        self._gauge("epdctl_requests_in_flight", "Chat requests between first byte and last", inflight)
        self._gauge("epdctl_media_bytes", "Bytes of bodies and media held for open requests", media_bytes)
        self.requests = self._counter("epdctl_requests", "Chat requests by the status they ended with", "status")
        self.prompt_tokens = self._counter("epdctl_prompt_tokens", "Prompt tokens of answered requests")
        self.completion_tokens = self._counter("epdctl_completion_tokens", "Tokens of answers")
        self.media = self._counter("epdctl_media", "Media of accepted requests", "modality")
        self.attempts = self._counter("epdctl_attempts", "Times a request was given to ranks")
        self.lost = self._counter("epdctl_attempts_lost", "Attempts that ended with the loss of a rank", "stage")
        self.given_up = self._counter("epdctl_requests_given_up", "Requests that ranks died with, again and again")
        self.resumed = self._counter("epdctl_resumes", "Attempts that went on from tokens already received")
        self.late = self._counter("epdctl_late_messages", "Messages dropped because their attempt was over")
        self.first_token = self._histogram(
            "epdctl_time_to_first_token_seconds",
            "From the request's first byte to its first token",
            FIRST_TOKEN_BUCKETS,
        )
        self.latency = self._histogram(
            "epdctl_request_seconds", "From the request's first byte to its last token", LATENCY_BUCKETS
        )

    def text(self) -> bytes:
        """The exposition format, as ``CONTENT_TYPE`` says."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)
