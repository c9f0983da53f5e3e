"""Mixed requests while random ranks are killed: every answer is right or an explicit 5xx, and nothing stays held.

The short form is part of every run; ten minutes of it are under ``scripts/test --all``.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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


class Soak:
    """Clients that ask what has a known answer, until told to stop."""

    def __init__(self, cluster: Cluster, known: list[tuple[list[Part], Answer]]) -> None:
        self.cluster = cluster
        self.known = known
        self.stop = threading.Event()
        self.codes: Counter[int] = Counter()

    def client(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self.stop.is_set():
            parts, answer = chance.choice(self.known)
            reply = httpx.post(
                f"{self.cluster.url}/v1/chat/completions", json=self.cluster.body(parts), timeout=GUARD_SECONDS
            )
            self.codes[reply.status_code] += 1
            if reply.status_code == 200:
                assert parse(reply.json()) == answer, "another answer than the right one"
            else:
                assert reply.status_code in (502, 503), reply.text

    def kill_one(self, name: str) -> None:
        before = self.cluster.rank(name)
        os.kill(before["pid"], signal.SIGKILL)
        self.cluster.wait_ready(name, incarnation=before["incarnation"] + 1)


def idle(rank: RankStatus) -> bool:
    return rank.state is RankState.READY and (rank.inflight, rank.leases, rank.held_pages) == (0, 0, 0)


def soak(cluster: Cluster, known: list[tuple[list[Part], Answer]], seconds: float) -> Counter[int]:
    test, chance = Soak(cluster, known), random.Random(1)
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(test.client, seed) for seed in range(CLIENTS)]
        try:
            while time.monotonic() < until and not any(client.done() for client in clients):
                test.kill_one(chance.choice(MORTAL))
        finally:
            test.stop.set()
        for client in clients:
            client.result()
    for name in HOLDERS:
        cluster.wait(name, idle)
    parts, answer = known[0]
    assert cluster.ask(parts) == answer
    return test.codes


@pytest.mark.parametrize(
    "seconds", [pytest.param(60, id="short"), pytest.param(600, id="long", marks=pytest.mark.soak)]
)
def test_nothing_is_wrong_and_nothing_is_held(
    tmp_path: Path, epd_topology: str, checkpoint: Path, seconds: int
) -> None:
    truth = Truth(checkpoint)
    known = [truth.of(case, seed) for case, seed in MIXED[:5]]
    topology = epd_topology.replace("maximum: 1}", "maximum: 1, budget: 100000}")
    cluster = Cluster(tmp_path, topology, name="soak")
    with no_leaks(cluster.env):
        cluster.up()
        try:
            assert cluster.rank("prefill/0")["transfer"] == "shm"
            codes = soak(cluster, known, seconds)
        finally:
            cluster.down()
    assert codes[200], codes
    print(f"answers by status: {dict(codes)}")
