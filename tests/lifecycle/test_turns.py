"""The daemon's turns with a launcher that only pretends: orders of events that real processes show once in a while."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from epdctl.control.paths import RunState
from epdctl.errors import UserError
from epdctl.ids import Incarnation, RankName, RunId
from epdctl.launch.base import Command, Exit
from epdctl.supervisor.daemon import Daemon
from epdctl.supervisor.member import RankStream
from epdctl.supervisor.rundir import claim
from epdctl.supervisor.states.events import Timer, TimerFired
from epdctl.topology.plan import Plan
from epdctl.wire.config import RankSpec
from epdctl.wire.control import RankState, StartCaptures
from epdctl.wire.lifecycle import (
    SPEC,
    CaptureWritten,
    Drained,
    Endpoints,
    Facts,
    Fatal,
    FatalKind,
    Heartbeat,
    Hello,
    PeersChanged,
    Ready,
    SupervisorToRank,
    Unfit,
)
from epdctl.wire.message import PROTOCOL
from tests.support.scripted import scripted_plan
from tests.support.scripted_rank import Script

DECODE = RankName("decode/0")


class Pretended:
    """A process that is not there."""

    pid = None

    def __init__(self, command: Command, ended: Callable[[Exit], None]) -> None:
        self.spec: RankSpec = SPEC.decode(command.spec)
        self.command = command
        self.ended = ended
        self.signals: list[signal.Signals] = []

    def signal(self, number: signal.Signals) -> None:
        self.signals.append(number)


class Launcher:
    def __init__(self) -> None:
        self.launched: list[Pretended] = []

    def launch(self, command: Command, ended: Callable[[Exit], None]) -> Pretended:
        self.launched.append(Pretended(command, ended))
        return self.launched[-1]

    async def close(self) -> None:
        pass


class Ear:
    """A rank's connection that takes everything."""

    backlog = 0

    def __init__(self) -> None:
        self.heard: list[SupervisorToRank] = []

    def post(self, message: SupervisorToRank) -> None:
        self.heard.append(message)


class Scene:
    """A daemon whose ranks are moved by hand."""

    def __init__(self, plan: Plan, place: dict[str, str]) -> None:
        self.launcher = Launcher()
        state = RunState(Path(place["EPDCTL_STATE_DIR"]) / plan.cluster / "run")
        rundir = claim(state, plan.cluster, place, lambda run: None, [rank.rank for rank in plan.ranks])
        self.daemon = Daemon(plan, rundir, self.launcher)
        self.daemon.start()

    def hello(self, process: Pretended, **changes: Any) -> Hello:
        spec = process.spec
        fields = {"run": spec.run, "rank": spec.rank, "incarnation": spec.incarnation, "token": spec.token}
        return Hello(**{"protocol": PROTOCOL, "pid": 1, **fields, **changes})

    def connect(self, process: Pretended) -> Hello:
        hello = self.hello(process)
        assert self.greet(hello) is None
        return hello

    def greet(self, hello: Hello) -> str | None:
        return self.daemon.greet(hello, cast("RankStream", Ear()))

    def state(self, rank: str = DECODE) -> RankState:
        return self.daemon.members[RankName(rank)].rank.state

    def close(self) -> None:
        self.daemon.events.close()
        self.daemon.rundir.release()


def play(place: dict[str, str], act: Callable[[Scene], Coroutine[Any, Any, None]], *ranks: str) -> None:
    async def run() -> None:
        scene = Scene(scripted_plan({rank: Script() for rank in ranks or (DECODE,)}), place)
        try:
            await act(scene)
        finally:
            scene.close()

    asyncio.run(run())


def test_last_words_read_after_the_end_of_the_process_still_decide(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        process = scene.launcher.launched[0]
        hello = scene.connect(process)
        process.ended(Exit(1))
        scene.daemon.hear(hello, Fatal(kind=FatalKind.CHECKPOINT, text="no such file", restartable=False))
        scene.daemon.hung_up(hello)
        assert scene.state() is RankState.FAILED
        assert len(scene.launcher.launched) == 1
        assert "no such file" in scene.daemon.status().ranks[0].reason

    play(place, act)


def test_a_process_that_ended_before_it_was_let_in_may_still_say_why(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        process = scene.launcher.launched[0]
        process.ended(Exit(1))
        hello = scene.connect(process)
        scene.daemon.hear(hello, Fatal(kind=FatalKind.CONFIG, text="bad share", restartable=False))
        scene.daemon.hung_up(hello)
        assert scene.daemon.status().ranks[0].reason.endswith("config: bad share")

    play(place, act)


def test_only_the_incarnation_that_is_expected_is_let_in(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        process = scene.launcher.launched[0]
        strangers: list[tuple[dict[str, Any], str]] = [
            ({"token": "0" * 64}, "token"),
            ({"token": ""}, "token"),
            ({"protocol": PROTOCOL + 1}, "protocol"),
            ({"run": RunId("other")}, "not of this cluster"),
            ({"rank": RankName("decode/1")}, "not of this cluster"),
            ({"incarnation": Incarnation(2)}, "incarnation"),
        ]
        for changes, why in strangers:
            assert why in (scene.greet(scene.hello(process, **changes)) or "let in")
        scene.connect(process)
        assert "incarnation" in (scene.greet(scene.hello(process)) or "let in"), "nor the same one twice"

    play(place, act)


def test_what_cannot_happen_is_noted_and_changes_nothing(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        hello = scene.connect(scene.launcher.launched[0])
        for _ in range(2):
            scene.daemon.hear(hello, Ready(endpoints=Endpoints()))
        assert scene.state() is RankState.READY
        assert [event.kind for event in scene.daemon.events.since(0)].count("illegal") == 1

    play(place, act)


def test_a_rank_that_differs_from_one_that_serves_is_told_so_and_is_not_ready(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        first, second = scene.launcher.launched
        scene.daemon.hear(scene.connect(first), Ready(endpoints=Endpoints(), facts=Facts(transformers="5.17.0")))
        hello = scene.connect(second)
        scene.daemon.hear(hello, Ready(endpoints=Endpoints(), facts=Facts(transformers="5.23.0")))
        assert scene.state("decode/1") is RankState.STARTING
        life = scene.daemon.members[RankName("decode/1")].life
        assert life is not None
        told = cast("Ear", life.stream).heard[-1]
        assert isinstance(told, Unfit)
        assert "transformers is 5.23.0 on decode/1 and 5.17.0 on decode/0" in told.text
        scene.daemon.hear(hello, Fatal(kind=FatalKind.INCOMPATIBLE, text=told.text, restartable=False))
        second.ended(Exit(85))
        scene.daemon.hung_up(hello)
        assert scene.state("decode/1") is RankState.FAILED
        assert "5.17.0 on decode/0" in scene.daemon.status().ranks[1].reason
        assert scene.state() is RankState.READY

    play(place, act, DECODE, "decode/1")


def test_a_rank_gets_its_spec_and_the_mark_of_its_run(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        process, directory = scene.launcher.launched[0], scene.daemon.rundir.directory
        assert process.command.env["EPDCTL_RUN"] == process.spec.run == "run"
        assert process.command.log.name == "decode-0.1.log"
        assert (process.spec.supervisor, process.spec.sockets) == (str(directory.ranks), str(directory.sockets))
        assert len(bytes.fromhex(process.spec.token)) == 32

    play(place, act)


def test_while_the_gateway_drains_nothing_new_is_started_and_nothing_restarted(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        gateway, decode = scene.launcher.launched
        scene.daemon.hear(scene.connect(gateway), Ready(endpoints=Endpoints()))
        scene.daemon.stop()
        assert scene.state("gateway/0") is RankState.DRAINING
        assert scene.state() is RankState.STARTING
        with pytest.raises(UserError, match="going down"):
            scene.daemon.restart([DECODE])
        assert decode.signals == []
        gateway.ended(Exit(0))
        scene.daemon.hung_up(scene.hello(gateway))
        assert decode.signals == [signal.SIGTERM]
        assert not scene.daemon.settled.is_set()

    play(place, act, "gateway/0", DECODE)


def test_a_rank_that_records_may_be_silent_for_as_long_as_writing_takes(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        (process,) = scene.launcher.launched
        hello = scene.connect(process)
        scene.daemon.hear(hello, Ready(endpoints=Endpoints()))

        def silence() -> float:
            """Seconds from a heartbeat to the verdict that the rank is dead."""
            scene.daemon.hear(hello, Heartbeat())
            return scene.daemon.members[DECODE].timers[Timer.DEAD].when() - asyncio.get_running_loop().time()

        usual = silence()
        reply = scene.daemon.captures.start(StartCaptures(), [DECODE])
        assert silence() > usual + 60
        scene.daemon.hear(hello, CaptureWritten(capture=reply.capture, path="/trace"))
        assert silence() < usual + 60

    play(place, act)


def told(scene: Scene, rank: str = DECODE) -> PeersChanged:
    """The last table that a rank was sent."""
    ear = cast("Ear", scene.daemon.members[RankName(rank)].stream)
    return [message for message in ear.heard if isinstance(message, PeersChanged)][-1]


def test_a_rank_that_comes_back_comes_back_as_another_peer(place: dict[str, str]) -> None:
    """Whoever had given it up, and it itself, can tell that it had been away."""

    async def act(scene: Scene) -> None:
        hello = scene.connect(scene.launcher.launched[0])
        scene.daemon.hear(hello, Ready(endpoints=Endpoints(inbox="i")))
        (before,) = told(scene).peers
        scene.daemon.hear(hello, Heartbeat(unhealthy="for a moment"))
        assert told(scene).peers == []
        assert [(each.died, each.hopeless) for each in told(scene).absent] == [(False, None)]
        scene.daemon.hear(hello, Heartbeat())
        (after,) = told(scene).peers
        assert (after.incarnation, after.endpoints) == (before.incarnation, before.endpoints)
        assert after != before

    play(place, act)


def test_a_draining_rank_stays_in_the_table_and_takes_nothing_new(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        hello = scene.connect(scene.launcher.launched[0])
        scene.daemon.hear(hello, Ready(endpoints=Endpoints(inbox="i")))
        (before,) = told(scene).peers
        scene.daemon.restart([DECODE])
        (leaving,) = told(scene).peers
        assert leaving == before
        assert (before.accepting, leaving.accepting) == (True, False)
        scene.daemon.hear(hello, Drained())
        assert told(scene).peers == []
        assert [each.died for each in told(scene).absent] == [False], "it left in order"

    play(place, act)


def test_a_death_is_told_and_so_is_that_nobody_will_start_it_again(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        decode, gateway = scene.launcher.launched
        scene.connect(gateway)
        hello = scene.connect(decode)
        scene.daemon.hear(hello, Ready(endpoints=Endpoints()))
        decode.ended(Exit(-9))
        scene.daemon.hung_up(hello)
        (gone,) = [each for each in told(scene, "gateway/0").absent if each.rank == DECODE]
        assert (gone.incarnation, gone.died, gone.hopeless) == (1, True, None)
        scene.daemon.post(DECODE, TimerFired(Timer.BACKOFF, Incarnation(1)))
        again = scene.launcher.launched[-1]
        hello = scene.connect(again)
        scene.daemon.hear(hello, Fatal(kind=FatalKind.CHECKPOINT, text="no such file", restartable=False))
        again.ended(Exit(1))
        scene.daemon.hung_up(hello)
        (gone,) = [each for each in told(scene, "gateway/0").absent if each.rank == DECODE]
        assert gone.hopeless is not None
        assert "no such file" in gone.hopeless

    play(place, act, DECODE, "gateway/0")


def test_a_stop_ends_a_restart_that_waits_for_its_turn(place: dict[str, str]) -> None:
    async def act(scene: Scene) -> None:
        hellos = {hello.rank: hello for hello in map(scene.connect, scene.launcher.launched)}
        for hello in hellos.values():
            scene.daemon.hear(hello, Ready(endpoints=Endpoints()))
        scene.daemon.restart(list(scene.daemon.members))
        scene.daemon.stop()
        scene.daemon.hear(hellos[RankName("gateway/0")], Drained())
        assert scene.state() is RankState.READY, "it is not asked to start anew, and not to stop before its turn"

    play(place, act, DECODE, "gateway/0")


def test_a_restart_of_everything_goes_front_to_back(place: dict[str, str]) -> None:
    front = ("gateway/0", "encoder-router/0")

    async def act(scene: Scene) -> None:
        hellos = {hello.rank: hello for hello in map(scene.connect, scene.launcher.launched)}
        for hello in hellos.values():
            scene.daemon.hear(hello, Ready(endpoints=Endpoints()))
        assert set(scene.daemon.restart(list(scene.daemon.members))) == set(scene.daemon.members)
        for number, name in enumerate(front):
            states = [scene.state(rank) for rank in (*front, DECODE)]
            assert states[number:] == [RankState.DRAINING, *[RankState.READY] * (2 - number)]
            scene.daemon.hear(hellos[RankName(name)], Drained())
            assert scene.state(name) is RankState.STOPPING
        assert scene.state() is RankState.DRAINING

    play(place, act, DECODE, *front)
