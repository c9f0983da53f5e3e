"""``kill -9`` of any one process: it comes back, the others serve on, and no request is lost or wrong."""

from __future__ import annotations

import os
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from epdctl.wire.control import RankState
from tests.support.cluster import GUARD_SECONDS, Cluster, Part, parse
from tests.support.leaks import no_leaks
from tests.support.reference import picture_bytes

PARTS: list[Part] = ["Compare ", picture_bytes(11, 64, 64), " with ", picture_bytes(12, 84, 56), "."]
MODEL_RANKS = ["encoder/0", "encoder/1", "prefill/0", "decode/0", "encoder-router/0"]


def inflight(cluster: Cluster) -> int:
    for line in httpx.get(f"{cluster.url}/metrics", timeout=GUARD_SECONDS).text.splitlines():
        if line.startswith("epdctl_requests_in_flight "):
            return int(float(line.split()[1]))
    raise AssertionError("no such metric")


def post(cluster: Cluster) -> httpx.Response:
    body = cluster.body(PARTS)
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=GUARD_SECONDS)


@pytest.mark.parametrize("rank", MODEL_RANKS)
def test_a_killed_rank_comes_back_and_no_request_is_lost(epd: Cluster, rank: str) -> None:
    kill_with_requests_in_flight(epd, rank)


def test_the_only_rank_with_a_model_is_killed_and_no_request_is_lost(mono: Cluster) -> None:
    """Nobody is left to serve: the requests wait for its next process, or are told to come again."""
    kill_with_requests_in_flight(mono, "mono/0")


def kill_with_requests_in_flight(cluster: Cluster, rank: str) -> None:
    expected = cluster.ask(PARTS)
    before = cluster.rank(rank)
    os.kill(before["pid"], signal.SIGSTOP)  # holds what it has in flight, so that the kill surely meets some
    with ThreadPoolExecutor(4) as pool:
        replies: list[Future[httpx.Response]] = [pool.submit(post, cluster) for _ in range(4)]
        while inflight(cluster) < 4 and not any(reply.done() for reply in replies):
            pass
        os.kill(before["pid"], signal.SIGKILL)
        for reply in [future.result() for future in replies]:
            assert reply.status_code in (200, 502, 503), reply.text
            if reply.status_code == 200:
                assert parse(reply.json()) == expected
    after = cluster.wait_ready(rank, incarnation=before["incarnation"] + 1)
    assert after["incarnation"] == before["incarnation"] + 1
    assert after["restarts"] == before["restarts"] + 1
    assert cluster.ask(PARTS) == expected


@pytest.mark.parametrize(("name", "rank"), [("epd", "decode/0"), ("mono", "mono/0")])
def test_a_stream_goes_on_after_its_rank_was_killed(request: pytest.FixtureRequest, name: str, rank: str) -> None:
    cluster: Cluster = request.getfixturevalue(name)
    options = {"max_tokens": 48, "ignore_eos": True}
    expected = cluster.ask(PARTS, **options)
    before = cluster.rank(rank)
    chunks = cluster.stream(PARTS, **options)
    ids: list[int] = []
    for chunk in chunks:
        if not ids and any(choice.get("token_ids") for choice in chunk["choices"]):
            os.kill(before["pid"], signal.SIGKILL)
        assert "error" not in chunk
        ids += [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]
    assert tuple(ids) == expected.token_ids
    cluster.wait_ready(rank, incarnation=before["incarnation"] + 1)


def test_a_rank_that_stood_still_for_long_goes_on_with_nothing_of_before(pairs: Cluster) -> None:
    """It was given up meanwhile; all that it still held, or finds in its sockets, is over."""
    expected = pairs.ask(PARTS)
    before = pairs.rank("decode/0")
    os.kill(before["pid"], signal.SIGSTOP)
    with ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(post, pairs) for _ in range(6)]
        pairs.wait("decode/0", lambda rank: rank.state is RankState.UNHEALTHY)
        for reply in [future.result() for future in replies]:
            assert reply.status_code == 200, reply.text
            assert parse(reply.json()) == expected
    os.kill(before["pid"], signal.SIGCONT)
    after = pairs.wait_ready("decode/0", incarnation=before["incarnation"])
    assert (after["pid"], after["restarts"]) == (before["pid"], before["restarts"])
    for rank in ("decode/0", "decode/1", "prefill/0", "encoder/0", "encoder-router/0"):
        pairs.wait(rank, lambda status: status.inflight == 0)
    for _ in range(2):  # one for each decode rank
        assert pairs.ask(PARTS) == expected


def test_a_restarted_rank_finishes_the_answers_it_is_at(pairs: Cluster) -> None:
    options = {"max_tokens": 1500, "ignore_eos": True}
    streams = [pairs.stream(PARTS, **options) for _ in range(2)]  # one on each decode rank
    firsts = [next(stream) for stream in streams]
    assert all(first["choices"] for first in firsts)
    before = pairs.rank("decode/0")
    with ThreadPoolExecutor(1) as pool:
        restarting = pool.submit(pairs.run, "restart", "decode/0", "--cluster", pairs.name)
        pairs.wait("decode/0", lambda rank: rank.state is RankState.DRAINING)
        for stream in streams:
            chunks = list(stream)
            assert not any("error" in chunk for chunk in chunks)
            assert {chunk["resumes"] for chunk in chunks} == {0}
        assert restarting.result().returncode == 0
    pairs.wait_ready("decode/0", incarnation=before["incarnation"] + 1)


def test_a_killed_gateway_comes_back(epd: Cluster) -> None:
    expected = epd.ask(PARTS)
    before = epd.rank("gateway/0")
    chunks = epd.stream(PARTS, max_tokens=48, ignore_eos=True)
    next(chunks)
    os.kill(before["pid"], signal.SIGKILL)
    with pytest.raises(httpx.TransportError):
        list(chunks)
    epd.wait_ready("gateway/0", incarnation=before["incarnation"] + 1)
    assert epd.ask(PARTS) == expected


def test_a_killed_guard_takes_its_rank_along_and_both_come_back(epd: Cluster) -> None:
    expected = epd.ask(PARTS)
    before = epd.rank("decode/0")
    process = psutil.Process(before["pid"])
    guard = process.parent()
    assert guard is not None
    guard.kill()
    after = epd.wait_ready("decode/0", incarnation=before["incarnation"] + 1)
    assert not process.is_running()
    assert after["restarts"] == before["restarts"] + 1
    assert epd.ask(PARTS) == expected


def test_a_killed_daemon_leaves_nothing_and_up_works_again(tmp_path: Path, epd_topology: str) -> None:
    cluster = Cluster(tmp_path, epd_topology, name="daemonkill")
    with no_leaks(cluster.env):
        kill_the_daemon(cluster)
        cluster.up()
        assert cluster.ask(["Hello"], max_tokens=2).completion_tokens > 0
        cluster.down()


def kill_the_daemon(cluster: Cluster) -> None:
    """Return when nothing that it had started is there any more."""
    cluster.up()
    ranks = [psutil.Process(rank["pid"]) for rank in cluster.status()["ranks"]]
    guards = [rank.parent() for rank in ranks]
    daemon = guards[0].parent() if guards[0] else None
    assert daemon is not None
    daemon.kill()
    _, alive = psutil.wait_procs([*ranks, *[guard for guard in guards if guard]], timeout=GUARD_SECONDS)
    assert not alive
