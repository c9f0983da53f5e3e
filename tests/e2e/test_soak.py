"""Mixed requests while random ranks are killed and clients leave: every answer is right, or a 5xx that a kill explains;
no rank goes that was not killed, and nothing stays held.

The short form is part of every run; ten minutes of it, a third over each transport, are under ``scripts/test --all``.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from epdctl.wire.control import RankState, RankStatus
from tests.e2e.test_parity import MIXED, Truth
from tests.support.cluster import GUARD_SECONDS, Answer, Cluster, Part, parse
from tests.support.leaks import no_leaks

MORTAL = ["encoder/0", "encoder/1", "prefill/0", "decode/0", "encoder-router/0"]
HOLDERS = ["prefill/0", "decode/0"]
CLIENTS = 3
PEACE = 6  # right answers between two kills
SEED = 12  # the ranks that hold memory go first
PATIENCE = (0.01, 0.6)  # seconds after which a client leaves that has no answer yet: at any point of a request's life


@dataclass(frozen=True)
class Span:
    """Of time.monotonic."""

    began: float
    ended: float

    def meets(self, other: Span) -> bool:
        return self.began <= other.ended and other.began <= self.ended


class Soak:
    """Clients that ask what has a known answer, until told to stop."""

    def __init__(self, cluster: Cluster, known: list[tuple[list[Part], Answer]]) -> None:
        self.cluster = cluster
        self.known = known
        self.stop = threading.Event()
        self.whole = threading.Event()  # nobody has been killed, or is back
        self.whole.set()
        self.codes: Counter[int] = Counter()
        self.left = 0
        self.failures: list[tuple[Span, str]] = []
        self.outages: list[Span] = []
        self.kills: Counter[str] = Counter()
        self._news = threading.Condition()

    def client(self, seed: int) -> None:
        self._ask_on(random.Random(seed), lambda _: GUARD_SECONDS)

    def leaver(self, seed: int) -> None:
        self._ask_on(random.Random(seed), lambda chance: chance.uniform(*PATIENCE))

    def _ask_on(self, chance: random.Random, patience: Callable[[random.Random], float]) -> None:
        while not self.stop.is_set():
            parts, answer = chance.choice(self.known)
            body, began, seconds = self.cluster.body(parts), time.monotonic(), patience(chance)
            try:
                reply = httpx.post(f"{self.cluster.url}/v1/chat/completions", json=body, timeout=seconds)
            except httpx.TimeoutException:
                assert seconds < GUARD_SECONDS, "no answer"
                self.left += 1
                continue
            self._answered(reply, answer, Span(began, time.monotonic()))

    def _answered(self, reply: httpx.Response, answer: Answer, span: Span) -> None:
        if reply.status_code == 200:
            assert parse(reply.json()) == answer, "another answer than the right one"
        else:
            assert reply.status_code in (502, 503), reply.text
            self.failures.append((span, reply.text))
        with self._news:
            self.codes[reply.status_code] += 1
            self._news.notify_all()
        if reply.status_code != 200:
            self.whole.wait(GUARD_SECONDS)

    def kill_one(self, name: str) -> None:
        before, (parts, answer) = self.cluster.rank(name), self.known[0]
        self.whole.clear()
        began = time.monotonic()
        self.kills[name] += 1
        try:
            os.kill(before["pid"], signal.SIGKILL)
            self.cluster.wait_ready(name, incarnation=before["incarnation"] + 1)
            assert self.cluster.ask(parts) == answer
        finally:
            self.outages.append(Span(began, time.monotonic()))
            self.whole.set()

    def peace(self, over: Callable[[], bool]) -> None:
        """Some more right answers, or ``over``."""
        with self._news:
            goal = self.codes[200] + PEACE
            self._news.wait_for(lambda: self.codes[200] >= goal or over(), GUARD_SECONDS)
            assert self.codes[200] >= goal or over(), "nobody is answered any more"

    @property
    def unexplained(self) -> list[str]:
        """Failures of requests that met no kill."""
        return [text for span, text in self.failures if not any(span.meets(outage) for outage in self.outages)]


def idle(rank: RankStatus) -> bool:
    return rank.state is RankState.READY and (rank.inflight, rank.leases, rank.held_pages) == (0, 0, 0)


def _by_lot(chance: random.Random) -> Iterator[str]:
    """Each once before any comes again."""
    while True:
        yield from chance.sample(MORTAL, len(MORTAL))


def soak(cluster: Cluster, known: list[tuple[list[Part], Answer]], seconds: float) -> Soak:
    test, next_one = Soak(cluster, known), _by_lot(random.Random(SEED))
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        clients = [pool.submit(test.client, seed) for seed in range(CLIENTS)] + [pool.submit(test.leaver, CLIENTS)]

        def failed() -> bool:
            return any(client.done() for client in clients)

        try:
            while time.monotonic() < until and not failed():
                test.kill_one(next(next_one))
                test.peace(failed)
        finally:
            test.stop.set()
        for client in clients:
            client.result()
    for name in HOLDERS:
        cluster.wait(name, idle)
    parts, answer = known[0]
    assert cluster.ask(parts) == answer
    return test


OVER = {"shm": "{backend: shm}", "zmq": "{backend: zmq}", "mooncake": "{backend: mooncake, protocol: tcp}"}


@pytest.mark.parametrize(
    ("backend", "seconds"),
    [pytest.param("shm", 60, id="short"), *[pytest.param(one, 200, id=one, marks=pytest.mark.soak) for one in OVER]],
)
def test_nothing_is_wrong_and_nothing_is_held(
    tmp_path: Path, epd_topology: str, checkpoint: Path, backend: str, seconds: int
) -> None:
    if backend == "mooncake":
        pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    truth = Truth(checkpoint)
    known = [truth.of(case, seed) for case, seed in MIXED[:5]]
    topology = epd_topology.replace("maximum: 1}", "maximum: 1, budget: 100000}")
    cluster = Cluster(tmp_path, f"{topology}\ntransfer: {OVER[backend]}\n", name=f"soak-{backend}")
    with no_leaks(cluster.env):
        cluster.up()
        try:
            assert cluster.rank("prefill/0")["transfer"].startswith(backend)
            test = soak(cluster, known, seconds)
            print(f"answers by status: {dict(test.codes)}, left: {test.left}, killed: {dict(test.kills)}")
            assert test.unexplained == []
            assert test.left
            lives = {rank["rank"]: rank["incarnation"] for rank in cluster.status()["ranks"]}
            assert lives == {name: 1 + test.kills[name] for name in lives}, "a rank went that nobody killed"
        finally:
            cluster.down()
