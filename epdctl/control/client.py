"""The CLI's side of the control socket. Synchronous; every wait has a deadline except following, which is the wish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from epdctl.control.paths import ClusterDir, Holder, RunState
from epdctl.errors import (
    AlreadyRunning,
    DeadlineExceeded,
    EpdError,
    NotRunning,
    PlacementError,
    RankError,
    SelectorError,
    Unreachable,
    UserError,
    WireError,
)
from epdctl.wire.control import (
    COMMAND,
    REPLY,
    Accepted,
    CaptureReply,
    Command,
    Done,
    Down,
    Event,
    Feed,
    FollowLogs,
    GetEvents,
    GetHealth,
    GetStatus,
    HealthReply,
    LogLine,
    Question,
    Refused,
    Reply,
    Restart,
    StartCaptures,
    StatusReply,
    StopCaptures,
    Watch,
    reply_of,
)
from epdctl.wire.message import Message
from epdctl.wire.stream import Stream, connect

__all__ = ["Client", "refused_error"]

ANSWER_SECONDS = 5.0  # the daemon answers at once: one that does not hangs
CAPTURE_SECONDS = 420.0  # above the daemon's own deadlines for recording and writing
PATIENCE_SECONDS = 10.0  # for the first word of a daemon that is to stop
FORCE_SECONDS = 3.0
SLACK_SECONDS = 15.0  # beyond a rank's own deadlines, between two events of a cluster that is going down
EXIT_SECONDS = 10.0  # from the last word of the daemon to the end of its process

R = TypeVar("R")
_GENERAL: tuple[type[EpdError], ...] = (UserError, NotRunning, Unreachable, RankError, DeadlineExceeded)
_BY_STATUS: dict[int, type[EpdError]] = {error.exit_status: error for error in _GENERAL}
_NAMED: tuple[type[EpdError], ...] = (*_GENERAL, SelectorError, AlreadyRunning, PlacementError)
_BY_NAME: dict[str, type[EpdError]] = {error.__name__: error for error in _NAMED}


def refused_error(refused: Refused) -> EpdError:
    """The error that the daemon met, with its exit status and hint."""
    kind = _BY_NAME.get(refused.kind) or _BY_STATUS.get(refused.exit_status, EpdError)
    return kind(refused.text, hint=refused.hint)


@dataclass(frozen=True, slots=True)
class Client:
    """Talks to the daemon whose control socket is at ``path``; a connection per call.

    Every method raises NotRunning when nobody listens, Unreachable when the daemon does not answer or breaks off,
    and the error that the daemon refused with.
    """

    path: Path

    def status(self, seconds: float | None = None) -> StatusReply:
        return self.ask(GetStatus(), seconds)

    def health(self, deep: bool = False, budget_s: float = 30.0) -> HealthReply:
        """Within ``budget_s``; a daemon that hangs shows sooner. A deep look may take all of it, and a little more."""
        soon = min(budget_s, ANSWER_SECONDS)
        if not deep:
            return self.ask(GetHealth(budget_s=budget_s), soon)
        self.status(soon)
        return self.ask(GetHealth(deep=True, budget_s=budget_s), budget_s + ANSWER_SECONDS)

    def restart(self, ranks: Sequence[str]) -> Accepted:
        return self.ask(Restart(ranks=list(ranks)))

    def start_captures(
        self, ranks: Sequence[str] = (), steps: int | None = None, output: str | None = None
    ) -> CaptureReply:
        return self.ask(StartCaptures(ranks=list(ranks), steps=steps, output=output))

    def stop_captures(self) -> CaptureReply:
        self.status()  # writing takes minutes, and one that hangs is not waited for
        return self.ask(StopCaptures(), CAPTURE_SECONDS)

    def watch(self) -> Generator[StatusReply, None, None]:
        """The status now and on every change, until the cluster is gone or the iterator is closed."""
        return self.follow(Watch(), None)

    def events(self, follow: bool = False, tail: int | None = None) -> Generator[Event, None, None]:
        return self.follow(GetEvents(follow=follow, tail=tail), None if follow else ANSWER_SECONDS)

    def logs(self, command: FollowLogs) -> Generator[LogLine, None, None]:
        return self.follow(command, None if command.follow else ANSWER_SECONDS)

    def first_word(self, force: bool) -> StatusReply:
        """The status before a ``down``. A daemon that does not say it will not stop anything either, and a person who
        wants it by force need not be sure."""
        return self.status(FORCE_SECONDS if force else PATIENCE_SECONDS)

    def down(self, drain_s: float | None = None, force: bool = False) -> Generator[Event, None, None]:
        """Events until the cluster has stopped. Ends when the daemon's process and its run directory are gone.

        Closing the iterator early does not call the command back.
        """
        holder = self._directory.holder()
        yield from self.follow(Down(drain_s=drain_s, force=force), self._longest_silence(drain_s, force))
        if holder is not None:
            _await_exit(holder)

    @property
    def _directory(self) -> ClusterDir:
        return ClusterDir(self.path.parent)

    def _longest_silence(self, drain_s: float | None, force: bool) -> float:
        """Seconds between two events of a stop whose ranks keep no deadline, if the daemon does its part."""
        record = self._directory.read_record()
        drain, kill = (record.drain_s, record.kill_s) if record is not None else (0.0, 0.0)
        waits = 0.0 if force else drain if drain_s is None else drain_s
        return max(waits, kill) + SLACK_SECONDS

    def ask(self, question: Question[R], seconds: float | None = None) -> R:
        """The one reply, within ``seconds`` (ANSWER_SECONDS by default)."""
        for reply in self._replies(question, seconds or ANSWER_SECONDS):
            return _checked(question, reply)
        raise self._unreachable(f"closed the connection before it answered {_name(question)}")

    def follow(self, feed: Feed[R], seconds: float | None) -> Generator[R, None, None]:
        """The replies, each within ``seconds`` of the one before; None: however long it takes."""
        for reply in self._replies(feed, seconds):
            if isinstance(reply, Done):
                return
            yield _checked(feed, reply)
        raise self._unreachable("ended in the middle of its answer")

    def _replies(self, command: Message, seconds: float | None) -> Generator[Reply, None, None]:
        """Raises what a Refused stands for."""
        with asyncio.Runner() as runner:
            stream = runner.run(self._connect())
            try:
                self._run(runner, stream.send(cast("Command", command)))
                while (reply := self._run(runner, self._receive(stream, seconds))) is not None:
                    if isinstance(reply, Refused):
                        raise refused_error(reply)
                    yield reply
            finally:
                stream.abort()
                runner.run(stream.close())

    async def _connect(self) -> Stream[Reply, Command]:
        try:
            return await connect(self.path, REPLY, COMMAND)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise NotRunning(f"no cluster answers at {self.path}", hint="start one with: epdctl up FILE") from error
        except (DeadlineExceeded, OSError) as error:
            raise self._unreachable(f"cannot be talked to: {error}") from error

    async def _receive(self, stream: Stream[Reply, Command], seconds: float | None) -> Reply | None:
        try:
            async with asyncio.timeout(seconds):
                return await stream.receive()
        except TimeoutError:
            raise self._unreachable(f"has not answered for {seconds:g} s") from None

    def _run(self, runner: asyncio.Runner, step: Coroutine[object, object, R]) -> R:
        try:
            return runner.run(step)
        except WireError as error:
            raise self._unreachable(f"does not answer: {error.message}") from error

    def _unreachable(self, what: str) -> Unreachable:
        record = self._directory.read_record()
        if record is None:
            return Unreachable(f"the daemon at {self.path} {what}", hint="`epdctl doctor` shows what is left of it")
        name, log = self._directory.name, RunState(Path(record.state_dir)).daemon_log
        return Unreachable(
            f"the daemon of {name} (pid {record.pid}) {what}; its log is {log}",
            hint=f"`epdctl down --force --cluster {name}` ends it from outside, and its ranks with it",
        )


def _checked(command: Question[R] | Feed[R], reply: Reply) -> R:
    if isinstance(reply, reply_of(command)):
        return reply
    raise EpdError(f"the daemon answered {_name(command)} with {_name(reply)}")


def _name(message: Message) -> str:
    return type(message).__name__


def _await_exit(holder: Holder) -> None:
    """Wait for the end of a process that has said its last word: soon, so a short poll is enough."""
    deadline = time.monotonic() + EXIT_SECONDS
    while holder.alive:
        if time.monotonic() > deadline:
            raise Unreachable(
                f"the daemon (pid {holder.pid}) said it was done and did not exit", hint=f"kill -9 {holder.pid}"
            )
        time.sleep(0.01)
