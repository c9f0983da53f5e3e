"""A cluster's whole life with a real daemon and real children: start, commands, captures, logs, events, end."""

from __future__ import annotations

import os
import signal
import socket
import stat
from pathlib import Path

import msgspec
import pytest

from epdctl.control.cluster import find_cluster, last_run, list_clusters
from epdctl.control.handover import CUT_LOOSE
from epdctl.control.logfiles import log_files
from epdctl.errors import AlreadyRunning, NotRunning, SelectorError, UserError
from epdctl.wire.control import CaptureReply, Event, FollowLogs, RankState
from tests.lifecycle.conftest import Begin
from tests.support.leaks import marked_processes
from tests.support.scripted_rank import Script

READY, STOPPED = RankState.READY, RankState.STOPPED

ALL = {name: Script() for name in ("gateway/0", "encoder-router/0", "encoder/0", "encoder/1", "prefill/0", "decode/0")}
ONE = {"decode/0": Script()}


def test_every_rank_becomes_ready_and_all_of_them_go_down(begin: Begin) -> None:
    cluster = begin(ALL)
    status = cluster.until_ready()
    assert [rank.rank for rank in status.ranks] == list(ALL)
    assert {(rank.incarnation, rank.restarts) for rank in status.ranks} == {(1, 0)}
    assert all(rank.pid and rank.rss_bytes and rank.endpoints.inbox for rank in status.ranks)
    assert cluster.client.health().verdict == "healthy"
    events = cluster.down()
    first, second = events[:2]
    assert (first.kind, first.text, second.rank, second.state) == ("command", "down", "gateway/0", RankState.DRAINING)
    assert events[-1].kind == "down"
    assert {event.rank for event in events if event.state is STOPPED} == set(ALL)
    assert "WARNING" not in cluster.state.daemon_log.read_text(), "nothing happened that was not asked for"


def test_when_down_returns_nothing_is_left_and_the_name_is_free(begin: Begin, place: dict[str, str]) -> None:
    cluster = begin(ONE)
    cluster.until_ready()
    assert marked_processes(place), "or the next line would prove nothing"
    list(cluster.client.down())
    assert marked_processes(place) == []
    assert not cluster.daemon.cluster.directory.path.exists()
    with pytest.raises(NotRunning):
        cluster.client.status()
    begin(ONE).until_ready()


def test_the_sockets_and_the_run_directory_are_for_their_owner_alone(begin: Begin) -> None:
    directory = begin(ONE).daemon.cluster.directory
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (directory.path, *directory.path.iterdir())}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}
    assert "token" not in directory.record.read_text()


def test_the_gateway_drains_before_the_others_are_told(begin: Begin) -> None:
    cluster = begin({"gateway/0": Script(drain_beats=3), "decode/0": Script()})
    cluster.until_ready()
    moves = [(str(event.rank), event.state) for event in cluster.down() if event.kind == "state"]
    assert moves.index(("gateway/0", STOPPED)) < moves.index(("decode/0", RankState.DRAINING))
    assert [fact.name for fact in cluster.facts("gateway/0") if fact.name.startswith("drain")] == ["drain", "drained"]


def test_the_encoders_drain_after_their_router(begin: Begin) -> None:
    """They drained together: what waited at the router could go nowhere, and held everybody up for the whole drain."""
    cluster = begin({"encoder-router/0": Script(drain_beats=3), "encoder/0": Script()})
    cluster.until_ready()
    moves = [(str(event.rank), event.state) for event in cluster.down() if event.kind == "state"]
    assert moves.index(("encoder-router/0", STOPPED)) < moves.index(("encoder/0", RankState.DRAINING))


def test_a_forced_down_asks_nobody_to_drain(begin: Begin) -> None:
    cluster = begin({"gateway/0": Script(drain_beats=10**9), "decode/0": Script(ignore_term=True)})
    cluster.until_ready()
    cluster.down(force=True)
    assert cluster.facts("gateway/0", "drain") == []


def test_force_overtakes_a_drain_that_does_not_end(begin: Begin) -> None:
    cluster = begin({"gateway/0": Script(drain_beats=10**9)})
    cluster.until_ready()
    os.kill(cluster.daemon.pid, signal.SIGTERM)
    cluster.until_rank("gateway/0", RankState.DRAINING)
    cluster.down(force=True)


def test_sigterm_drains_and_stops(begin: Begin) -> None:
    cluster = begin(ONE)
    cluster.until_ready()
    os.kill(cluster.daemon.pid, signal.SIGTERM)
    assert cluster.wait() == 0
    assert len(cluster.facts("decode/0", "drained")) == 1


def test_the_end_of_the_lifeline_drains_and_stops(begin: Begin) -> None:
    ours, theirs = os.pipe()
    cluster = begin(ONE, lifeline=ours)
    os.close(ours)
    cluster.until_ready()
    os.close(theirs)
    assert cluster.wait() == 0
    assert len(cluster.facts("decode/0", "drained")) == 1


def test_a_lifeline_that_was_cut_loose_ends_nothing(begin: Begin) -> None:
    ours, theirs = os.pipe()
    cluster = begin(ONE, lifeline=ours)
    os.write(theirs, CUT_LOOSE)
    os.close(theirs)
    cluster.until_ready()
    assert os.read(ours, 1) == b"", "the daemon did not take what cuts it loose"
    os.close(ours)
    assert not cluster.client.status().stopping
    list(cluster.client.down())


def test_a_second_daemon_of_the_name_is_refused_and_the_first_goes_on(begin: Begin, place: dict[str, str]) -> None:
    first = begin(ONE)
    first.until_ready()
    with pytest.raises(AlreadyRunning, match="already up"):
        begin(ONE)
    other = begin(ONE, cluster="other")
    other.until_ready()
    assert first.rank("decode/0").incarnation == 1
    assert [cluster.name for cluster in list_clusters(place)] == ["other", "scripted"]
    with pytest.raises(SelectorError, match="other, scripted"):
        find_cluster(None, place)
    assert find_cluster(None, {**place, "EPDCTL_CLUSTER": "other"}).record.run == other.state.run


def test_a_name_that_makes_socket_paths_too_long_is_refused_before_anything_starts(
    begin: Begin, place: dict[str, str]
) -> None:
    place["EPDCTL_RUNTIME_DIR"] += "/" + "deep" * 20
    with pytest.raises(UserError, match="107") as refused:
        begin(ONE)
    assert refused.value.hint is not None
    assert "EPDCTL_RUNTIME_DIR" in refused.value.hint


def test_restart_drains_first_and_counts_as_one(begin: Begin) -> None:
    cluster = begin({"encoder/0": Script(), "encoder/1": Script(), "prefill/0": Script()})
    cluster.until_ready()
    assert cluster.client.restart(["encoder"]).ranks == ["encoder/0", "encoder/1"]
    again = cluster.until_rank("encoder/1", READY, incarnation=2)
    cluster.until_rank("encoder/0", READY, incarnation=2)
    assert (again.restarts, again.restarts_asked) == (0, 1)
    assert again.reason == "ready; last restart: restart asked for"
    assert [fact.incarnation for fact in cluster.facts("encoder/0", "drained")] == [1]
    assert cluster.rank("prefill/0").incarnation == 1
    with pytest.raises(UserError, match="encodr") as refused:
        cluster.client.restart(["encodr/0"])
    assert refused.value.hint == "did you mean encoder/0?"


def test_every_rank_is_told_who_is_routable_and_who_no_longer_is(begin: Begin) -> None:
    cluster = begin({"decode/0": Script(), "encoder/0": Script()})
    cluster.until_ready()
    cluster.kill("encoder/0")
    cluster.until_rank("encoder/0", READY, incarnation=2)
    cluster.down()
    told = [fact.text for fact in cluster.facts("decode/0", "peers")]
    tables = [set(text.partition(":")[2].split(",")) for text in told]
    both = tables.index({"decode/0", "encoder/0"})
    assert {"decode/0"} in tables[both:]
    second = [fact.text for fact in cluster.facts("encoder/0", "peers") if fact.incarnation == 2]
    assert second[0].endswith(":decode/0"), "a newcomer is told at once"
    versions = [int(text.partition(":")[0]) for text in told]
    assert versions == sorted(set(versions))


# --- logs and events ---


def test_logs_are_kept_by_incarnation(begin: Begin, place: dict[str, str]) -> None:
    scripts = [Script(say=["first", "one"]), Script(say=["second", "two"])]
    cluster = begin({"decode/0": scripts, "prefill/0": Script(say=["prefill"])})
    cluster.until_ready()
    with pytest.raises(UserError, match="no rank here has"):
        cluster.lines(previous=True)
    cluster.kill("decode/0")
    cluster.until_rank("decode/0", READY, incarnation=2)
    assert cluster.lines("decode/0") == [(2, "second"), (2, "two")]
    assert cluster.lines("decode/0", tail=1) == [(2, "two")]
    assert cluster.lines("decode/0", previous=True) == [(1, "first"), (1, "one")]
    assert cluster.lines() == [(2, "second"), (2, "two"), (1, "prefill")]
    cluster.down()
    names = [(file.rank, file.incarnation) for file in log_files(last_run("scripted", place).logs)]
    assert names == [("daemon", 1), ("decode/0", 1), ("decode/0", 2), ("prefill/0", 1)]


def test_the_daemon_s_own_log_is_read_by_name_and_by_nothing_else(begin: Begin) -> None:
    cluster = begin({"decode/0": Script(say=["first"])})
    cluster.until_ready()
    ours = cluster.lines("daemon")
    assert "decode/0: starting → ready" in ours[-1][1]
    assert cluster.lines("daemon", tail=1) == ours[-1:]
    assert cluster.lines("daemon", "decode") == [*ours, (1, "first")]
    assert cluster.lines() == cluster.lines("all") == [(1, "first")]
    with pytest.raises(UserError, match="only once"):
        cluster.lines("daemon", previous=True)
    followed = iter(cluster.client.logs(FollowLogs(ranks=["daemon"], tail=1, follow=True)))
    assert next(followed).text == ours[-1][1]
    cluster.down()
    assert any("decode/0: ready → draining" in line.text for line in followed)


def test_following_logs_goes_on_with_the_next_incarnation_until_the_cluster_ends(begin: Begin) -> None:
    cluster = begin({"decode/0": [Script(say=["first"]), Script(say=["second"])]})
    cluster.until_ready()
    lines = iter(cluster.client.logs(FollowLogs(follow=True)))
    assert next(lines).text == "first"
    cluster.kill("decode/0")
    assert next(lines).text == "second"
    cluster.down()
    assert list(lines) == []


def test_events_are_in_the_file_and_on_the_socket_in_the_order_they_happened(begin: Begin) -> None:
    cluster = begin(ONE)
    cluster.until_ready()
    heard = list(cluster.client.events())
    assert [event.state for event in heard if event.kind == "state"] == [
        RankState.WAITING,
        RankState.STARTING,
        READY,
    ]
    assert list(cluster.client.events(tail=1)) == heard[-1:]
    followed = cluster.client.events(follow=True)
    assert next(followed) == heard[0]
    cluster.down()
    rest = list(followed)
    assert rest[: len(heard) - 1] == heard[1:]
    assert rest[-1].kind == "down"
    written = [msgspec.json.decode(line) for line in cluster.state.events.read_bytes().splitlines()]
    assert [event["kind"] for event in written][: len(heard)] == [event.kind for event in heard]
    times = [event["at"] for event in written]
    assert times == sorted(times)
    assert written[-1]["kind"] == "down"


def test_five_runs_are_kept(begin: Begin, place: dict[str, str]) -> None:
    runs = []
    for _ in range(7):
        cluster = begin({})
        runs.append(cluster.state.run)
        cluster.down()
    kept = os.listdir(cluster.state.path.parent)
    assert sorted(kept) == sorted(runs[-5:])


# --- captures ---


def results(reply: CaptureReply) -> dict[str, str | None]:
    return {str(result.rank): result.error for result in reply.results}


def test_a_capture_accounts_for_every_rank_one_that_dies_in_it_included(begin: Begin) -> None:
    scripts = {
        "gateway/0": Script(),
        "encoder/0": Script(),
        "prefill/0": [Script(die_in_capture=True), Script()],
        "decode/0": Script(capture_error="the profiler is busy"),
    }
    cluster = begin(scripts)
    cluster.until_ready()
    cluster.client.start_captures(steps=3)
    reply = cluster.client.stop_captures()
    assert results(reply) == {
        "gateway/0": None,
        "encoder/0": None,
        "prefill/0": "died while it was recording",
        "decode/0": "the profiler is busy",
    }
    paths = [result.path for result in reply.results if result.path is not None]
    assert paths == [str(cluster.state.captures / reply.capture / "encoder-0.1.trace.json")]
    assert os.path.getsize(paths[0]) > 0


def test_a_capture_without_steps_lasts_until_it_is_stopped(begin: Begin) -> None:
    cluster = begin({"encoder/0": Script(), "prefill/0": Script(fatal="no", restartable=False)})
    cluster.until_rank("encoder/0", READY)
    cluster.until_rank("prefill/0", RankState.FAILED)
    with pytest.raises(UserError, match="no capture"):
        cluster.client.stop_captures()
    folder = str(cluster.facts_dir / "traces")
    begun = cluster.client.start_captures(output=folder)
    assert results(begun) == {"encoder/0": None, "prefill/0": "is not running"}
    with pytest.raises(UserError, match="already"):
        cluster.client.start_captures()
    assert not os.path.exists(f"{folder}/encoder-0.1.trace.json")
    assert results(cluster.client.stop_captures()) == results(begun)
    assert os.path.exists(f"{folder}/encoder-0.1.trace.json")
    assert sorted(os.listdir(folder)) == ["encoder-0.1.trace.json", "trace.json.gz"]


def test_a_capture_of_ranks_by_name_leaves_the_others_alone(begin: Begin) -> None:
    cluster = begin({"gateway/0": Script(), "encoder/0": Script(), "encoder/1": Script()})
    cluster.until_ready()
    cluster.client.start_captures(["gateway/0", "encoder/1"], steps=1)
    reply = cluster.client.stop_captures()
    assert results(reply) == {"gateway/0": None, "encoder/1": None}
    with pytest.raises(UserError, match="absolute"):
        cluster.client.start_captures(output="here")


# --- strangers ---


def test_noise_on_either_socket_is_dropped_and_the_cluster_goes_on(begin: Begin) -> None:
    cluster = begin(ONE)
    cluster.until_ready()
    directory = cluster.daemon.cluster.directory
    for path in (directory.ranks, directory.control):
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\4\xc1\xc1\xc1\xc1", b"\0", b"\xff" * 64):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(path))
                stranger.sendall(noise)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(4096):
                    pass
    assert cluster.rank("decode/0").incarnation == 1
    assert "did not begin with Hello" in cluster.state.daemon_log.read_text()


def test_an_event_is_heard_by_whoever_follows(begin: Begin) -> None:
    cluster = begin(ONE)

    def ready(event: Event) -> bool:
        return event.state is READY

    assert cluster.until_event(ready).rank == "decode/0"


def test_a_state_directory_that_cannot_be_made_is_named_with_its_variable(
    begin: Begin, place: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    place["EPDCTL_STATE_DIR"] = str(tmp_path / "file" / "below")
    with pytest.raises(UserError) as caught:
        begin(ONE)
    assert str(tmp_path / "file") in caught.value.message
    assert "EPDCTL_STATE_DIR" in (caught.value.hint or "")


def test_a_runtime_directory_that_cannot_be_made_is_named_with_its_variable(
    begin: Begin, place: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "f").write_text("")
    os.symlink(tmp_path / "f", link := f"{place['EPDCTL_RUNTIME_DIR']}/l")
    place["EPDCTL_RUNTIME_DIR"] = f"{link}/r"
    with pytest.raises(UserError, match=r"cannot make .*sockets"):
        begin(ONE)
