"""What can go wrong with a rank, its guard or the daemon, and the state each of it ends in."""

from __future__ import annotations

import os
import signal

import psutil
import pytest

from epdctl.topology.plan import RestartMode, RestartPolicy
from epdctl.wire.control import RankState
from epdctl.wire.lifecycle import FatalKind
from tests.lifecycle.conftest import Begin
from tests.support.leaks import wait_gone
from tests.support.scripted import Cluster, shorter
from tests.support.scripted_rank import Script

READY, FAILED = RankState.READY, RankState.FAILED

FAMILY = {"encoder/0": Script(grandchild=True), "encoder/1": Script()}


def family(cluster: Cluster, rank: str = "encoder/0") -> list[int]:
    """The rank, its guard, and the grandchild that left its session."""
    pid = cluster.rank(rank).pid
    assert pid is not None
    return [pid, psutil.Process(pid).ppid(), *(fact.pid for fact in cluster.facts(rank, "grandchild"))]


def test_a_killed_rank_is_ready_again_and_the_others_never_notice(begin: Begin) -> None:
    cluster = begin(FAMILY)
    cluster.until_ready()
    first = family(cluster)
    assert len(first) == 3
    cluster.kill("encoder/0")
    again = cluster.until_rank("encoder/0", READY, incarnation=2)
    wait_gone(first)
    assert again.restarts == 1
    assert "SIGKILL" in again.reason
    assert again.pid not in first
    other = cluster.rank("encoder/1")
    assert (other.state, other.incarnation, other.restarts) == (READY, 1, 0)


def test_a_killed_guard_takes_its_rank_along_and_both_come_again(begin: Begin) -> None:
    cluster = begin(FAMILY)
    cluster.until_ready()
    rank, guard, grandchild = family(cluster)
    os.kill(guard, signal.SIGKILL)
    again = cluster.until_rank("encoder/0", READY, incarnation=2)
    wait_gone([rank, guard, grandchild])
    assert "guard" in again.reason
    assert cluster.rank("encoder/1").incarnation == 1


def test_nothing_outlives_a_killed_daemon_and_the_cluster_starts_again_at_once(begin: Begin) -> None:
    cluster = begin(FAMILY)
    cluster.until_ready()
    pids = family(cluster) + family(cluster, "encoder/1")
    run = cluster.state.run
    os.kill(cluster.daemon.pid, signal.SIGKILL)
    assert cluster.wait() == -signal.SIGKILL
    again = begin(FAMILY)
    again.until_ready()
    wait_gone(pids)
    assert again.state.run != run


def test_what_a_daemon_and_its_guards_leave_when_killed_together_is_swept(begin: Begin) -> None:
    cluster = begin(FAMILY)
    cluster.until_ready()
    rank, guard, grandchild = family(cluster)
    other_guard = family(cluster, "encoder/1")[1]
    for pid in (cluster.daemon.pid, guard, other_guard):
        os.kill(pid, signal.SIGSTOP)  # so that neither outlives the other to clean up
    for pid in (cluster.daemon.pid, guard, other_guard):
        os.kill(pid, signal.SIGKILL)
    cluster.wait()
    assert psutil.pid_exists(grandchild)
    begin(FAMILY).until_ready()
    wait_gone([rank, grandchild])


def test_a_checkpoint_that_cannot_be_loaded_fails_at_once_with_reason_and_log(begin: Begin) -> None:
    broken = Script(
        say=["reading /models/nothing", "Traceback: no such file"],
        fatal="/models/nothing has no config.json",
        kind=FatalKind.CHECKPOINT,
        restartable=False,
    )
    cluster = begin({"prefill/0": broken, "decode/0": Script()})
    failed = cluster.until_rank("prefill/0", FAILED)
    assert "checkpoint: /models/nothing has no config.json" in failed.reason
    assert failed.log_tail == ["reading /models/nothing", "Traceback: no such file"]
    assert (failed.incarnation, failed.restarts, failed.pid) == (1, 0, None)
    cluster.until_rank("decode/0", READY, incarnation=1)
    assert cluster.client.health().verdict == "unhealthy"


def test_a_rank_in_backoff_says_when_its_next_try_is(begin: Begin) -> None:
    cluster = begin({"decode/0": Script()}, restart=RestartPolicy(initial=90.0, maximum=90.0, jitter=0.0))
    assert cluster.until_rank("decode/0", READY).next_try_s is None
    cluster.kill("decode/0")
    waiting = cluster.until_rank("decode/0", RankState.BACKOFF)
    assert waiting.next_try_s is not None
    assert 0.0 <= waiting.next_try_s <= 90.0
    assert "; next try in " in cluster.client.health().problems[0].text


def test_a_fault_at_load_that_may_pass_is_tried_again(begin: Begin) -> None:
    cluster = begin({"prefill/0": [Script(fatal="out of memory", kind=FatalKind.MEMORY), Script()]})
    again = cluster.until_rank("prefill/0", READY, incarnation=2)
    assert "memory: out of memory" in again.reason


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (Script(exit_at_load=7), "exited with status 7"),
        (Script(kill_at_load=True), "killed by SIGKILL"),
        (Script(exit_when_ready=0), "exited with status 0"),
        (Script(fatal="it broke"), "it broke"),
    ],
)
def test_a_rank_that_never_gets_going_spends_its_budget_and_says_why(begin: Begin, script: Script, words: str) -> None:
    cluster = begin({"decode/0": script}, restart=RestartPolicy(initial=0.01, maximum=0.02, budget=2))
    failed = cluster.until_rank("decode/0", FAILED)
    assert words in failed.reason
    assert "gave up after 2 restarts" in failed.reason
    assert (failed.incarnation, failed.restarts) == (3, 2)


def test_a_clean_exit_under_on_failure_leaves_the_rank_stopped(begin: Begin) -> None:
    policy = RestartPolicy(mode=RestartMode.ON_FAILURE)
    cluster = begin({"decode/0": Script(exit_when_ready=0)}, restart=policy)
    assert "exited with status 0" in cluster.until_rank("decode/0", RankState.STOPPED, incarnation=1).reason


def test_a_hang_at_load_meets_the_start_deadline_and_the_budget(begin: Begin) -> None:
    stuck = Script(loading=(3, 12), hang_at_load=True)
    policy = RestartPolicy(initial=0.01, maximum=0.02, budget=1)
    cluster = begin({"prefill/0": stuck}, restart=policy, deadlines=shorter(start=1.0))
    failed = cluster.until_rank("prefill/0", FAILED)
    assert "not ready within 1 s" in failed.reason
    assert failed.incarnation == 2


def test_loading_is_shown_while_it_lasts(begin: Begin) -> None:
    cluster = begin({"prefill/0": Script(loading=(3, 12), hang_at_load=True)})
    cluster.until(lambda status: status.ranks[0].reason == "loading weights 3/12")


def test_a_rank_that_ignores_sigterm_is_killed(begin: Begin) -> None:
    cluster = begin({"decode/0": Script(ignore_term=True)}, deadlines=shorter(kill=0.3))
    cluster.until_ready()
    events = cluster.down()
    last = [event for event in events if event.state is RankState.STOPPED][-1]
    assert "ignored SIGTERM" in last.text


def test_a_rank_that_falls_silent_is_withdrawn_then_killed_and_restarted(begin: Begin) -> None:
    scripts = {"decode/0": [Script(no_beats=True), Script()], "prefill/0": Script()}
    cluster = begin(scripts, deadlines=shorter(unhealthy=1.0, dead=2.0))
    again = cluster.until_rank("decode/0", READY, incarnation=2)
    assert "no heartbeat" in again.reason
    states = [event.state for event in cluster.events("state") if event.rank == "decode/0"]
    assert states.index(RankState.UNHEALTHY) < states.index(RankState.STOPPING)


def test_a_rank_that_calls_itself_unhealthy_is_not_routed_to(begin: Begin) -> None:
    cluster = begin({"encoder/0": Script(unhealthy="the canary was wrong"), "prefill/0": Script()})
    sick = cluster.until_rank("encoder/0", RankState.UNHEALTHY)
    assert sick.reason == "the canary was wrong"
    cluster.until_rank("prefill/0", READY)
    assert cluster.client.health().verdict == "unhealthy"


def test_a_rank_that_beats_while_its_work_stands_still_is_killed_and_restarted(begin: Begin) -> None:
    scripts = {"encoder/0": [Script(standstill=61.0), Script()], "encoder/1": Script(standstill=59.0)}
    cluster = begin(scripts, deadlines=shorter(stuck=60.0))
    again = cluster.until_rank("encoder/0", READY, incarnation=2)
    assert again.reason.startswith("ready; last restart: its work has stood still for 61 s (raise deadlines.stuck")
    assert cluster.rank("encoder/1").incarnation == 1


def test_a_rank_that_stays_unhealthy_is_killed_and_restarted(begin: Begin) -> None:
    scripts = {"encoder/0": [Script(unhealthy="the canary was wrong"), Script()], "encoder/1": Script()}
    cluster = begin(scripts, deadlines=shorter(stuck=0.3))
    again = cluster.until_rank("encoder/0", READY, incarnation=2)
    assert again.reason == "ready; last restart: the canary was wrong; it was unhealthy for 0.3 s (deadlines.stuck)"
    assert cluster.rank("encoder/1").incarnation == 1


def test_a_rank_that_does_not_read_is_killed_rather_than_buffered_for(begin: Begin) -> None:
    """Each restart of the other one tells everybody two tables with its very long endpoint: seven of them are more
    than may lie unread, and the few that a slow reader has before it are not."""
    cluster = begin({"encoder/0": [Script(deaf=True), Script()], "encoder/1": Script(endpoint_bytes=250_000)})
    cluster.until_ready()
    for incarnation in (2, 3, 4):
        cluster.client.restart(["encoder/1"])
        cluster.until_rank("encoder/1", READY, incarnation)
    again = cluster.until_rank("encoder/0", READY, incarnation=2)
    assert "messages unread" in again.reason
    assert [event.rank for event in cluster.events("deaf")] == ["encoder/0"]


GANG = ("prefill/0.0", "prefill/0.1")


def test_a_gang_dies_and_starts_together_and_nobody_else_with_it(begin: Begin) -> None:
    cluster = begin({name: Script() for name in (*GANG, "decode/0")}, gang=GANG)
    cluster.until_ready()
    cluster.kill(GANG[0])
    for name in GANG:
        cluster.until_rank(name, READY, incarnation=2)
    assert "prefill/0.0" in cluster.rank(GANG[1]).reason
    assert cluster.rank("decode/0").incarnation == 1
    cluster.client.restart([GANG[1]])
    for name in GANG:
        again = cluster.until_rank(name, READY, incarnation=3)
        assert again.reason == "ready; last restart: restart asked for"


def test_frames_that_are_not_messages_are_dropped_and_the_rank_goes_on(begin: Begin) -> None:
    cluster = begin({"decode/0": Script(bad_frames=10_000)})
    ready = cluster.until_rank("decode/0", READY)
    assert ready.incarnation == 1
    assert "dropped a frame of decode/0" in cluster.state.daemon_log.read_text()


def test_a_rank_with_the_wrong_token_is_not_let_in(begin: Begin) -> None:
    policy = RestartPolicy(mode=RestartMode.NEVER)
    cluster = begin({"decode/0": Script(wrong_token=True)}, restart=policy)
    cluster.until_rank("decode/0", FAILED)
    assert "wrong token" in cluster.state.daemon_log.read_text()
