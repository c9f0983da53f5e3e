"""Every rank of the cluster in Prometheus' terms, made anew at each scrape from what the supervisor knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from epdctl.wire.lifecycle import Heartbeat, RankFigures

__all__ = ["rank_text"]

LABELS = ("stage", "rank")

Read = Callable[[Heartbeat], int | None]  # None: this rank has no such thing

# name, help, a counter?, where in a heartbeat
OF_BEATS: Sequence[tuple[str, str, bool, Read]] = (
    ("in_flight", "Requests or items that the rank works on", False, lambda beat: beat.inflight),
    ("waiting", "Those of them that wait for memory, for a batch or for a rank", False, lambda beat: beat.waiting),
    ("completed", "Work done by the present process: steps, items or requests", True, lambda beat: beat.completed),
    ("leases", "Leases on memory that peers write to", False, lambda beat: beat.leases),
    ("kv_pages", "Pages of the KV pool", False, lambda beat: beat.total_pages or None),
    ("kv_pages_free", "Pages of it that nobody holds", False, lambda beat: _free_pages(beat)),
    ("cache_bytes", "Embeddings that an encoder remembers", False, lambda beat: _kept_bytes(beat)),
    ("prepared_bytes", "Media prepared for an encoder's tower", False, lambda beat: _prepared_bytes(beat)),
    ("unreadable", "Messages an encoder dropped: nobody can read them", True, lambda beat: _unreadable(beat)),
)

RESTARTS: Sequence[tuple[str, str, Callable[[RankFigures], int]]] = (
    ("restarts", "Restarts that a fault made necessary", lambda rank: rank.restarts),
    ("restarts_asked", "All other restarts: somebody asked for them", lambda rank: rank.restarts_asked),
)


def _kept_bytes(beat: Heartbeat) -> int | None:
    return None if beat.embeddings is None else beat.embeddings.kept_bytes


def _prepared_bytes(beat: Heartbeat) -> int | None:
    return None if beat.embeddings is None else beat.embeddings.prepared_bytes


def _unreadable(beat: Heartbeat) -> int | None:
    return None if beat.embeddings is None else beat.embeddings.unreadable


def _free_pages(beat: Heartbeat) -> int | None:
    return beat.free_pages if beat.total_pages else None


def rank_text(figures: Sequence[RankFigures] | None) -> bytes:
    """The exposition format. ``figures``: None when the supervisor did not answer; then it says that alone."""
    registry = CollectorRegistry()
    registry.register(_Ranks(figures))
    return generate_latest(registry)


class _Ranks(Collector):
    def __init__(self, figures: Sequence[RankFigures] | None) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        answered = GaugeMetricFamily("epdctl_supervisor_up", "1 when the supervisor told what follows")
        answered.add_metric([], int(self._figures is not None))
        yield answered
        if self._figures is not None:
            yield from _families(self._figures)


def _families(ranks: Sequence[RankFigures]) -> Iterator[Metric]:
    yield _family("ready", "1 when requests may come to the rank", ranks, lambda rank: int(rank.ready))
    yield _family("resident_bytes", "Resident memory of its process", ranks, lambda rank: rank.rss_bytes)
    for name, text, restarts in RESTARTS:
        yield _family(name, text, ranks, restarts, counter=True)
    for name, text, counter, read in OF_BEATS:
        yield _family(name, text, ranks, _from_beat(read), counter=counter)
    yield _embeddings(ranks)


def _from_beat(read: Read) -> Callable[[RankFigures], int | None]:
    return lambda rank: None if rank.beat is None else read(rank.beat)


def _family(
    name: str,
    text: str,
    ranks: Sequence[RankFigures],
    read: Callable[[RankFigures], int | None],
    *,
    counter: bool = False,
) -> Metric:
    kind = CounterMetricFamily if counter else GaugeMetricFamily
    family = kind(f"epdctl_rank_{name}", text, labels=LABELS)
    for rank in ranks:
        if (value := read(rank)) is not None:
            family.add_metric([rank.stage.value, str(rank.rank)], value)
    return family


def _embeddings(ranks: Sequence[RankFigures]) -> Metric:
    text = "Embeddings by where they came from: made, shared with one in flight, or cached"
    family = CounterMetricFamily("epdctl_rank_embeddings", text, labels=(*LABELS, "source"))
    for rank in ranks:
        counts = None if rank.beat is None else rank.beat.embeddings
        if counts is not None:
            for source, value in (("made", counts.made), ("shared", counts.shared), ("cached", counts.cached)):
                family.add_metric([rank.stage.value, str(rank.rank), source], value)
    return family
