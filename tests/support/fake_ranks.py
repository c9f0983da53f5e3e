"""Scripted prefill, decode, language, mono and router ranks that speak the real protocol over real ipc sockets.

Their model is arithmetic: the next token follows from everything before it and from the pictures' bytes, so that a
resumed answer can be compared with an undisturbed one. The handoff between prefill and decode stays in memory.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from epdctl.errors import PeerGone
from epdctl.ids import Incarnation, RankName, RequestId, Room, Stage
from epdctl.wire.encode import (
    CLIENT_TO_ROUTER,
    ROUTER_TO_CLIENT,
    CancelEncode,
    Encode,
    Encoded,
    EncodeFailed,
    FailureKind,
)
from epdctl.wire.lifecycle import Endpoints, Peer
from epdctl.wire.message import Codec, Message
from epdctl.wire.serve import (
    RANK_TO_GATEWAY,
    TO_DECODE,
    TO_LANGUAGE,
    TO_PREFILL,
    Abort,
    Decode,
    Failed,
    Finished,
    FinishReason,
    Generate,
    Granted,
    Likelihood,
    Prefill,
    PromptItem,
    RankRef,
    RankToGateway,
    Sampling,
    Token,
    Usage,
)
from epdctl.wire.sockets import Inbox, Sender
from epdctl.wire.transfer import Extent, PoolAddress, RemoteLease

__all__ = ["Answering", "FakeCluster", "FakeMono", "FakeRank", "FakeRouter", "Script", "answer"]

GUARD_SECONDS = 60.0  # only against hanging
M = TypeVar("M")


@dataclass
class Script:
    """How a rank behaves. Read at every message, so it may be changed on the way."""

    fail: FailureKind | None = None  # answer requests with this
    fail_item: int | None = None  # of a router that fails: this item alone
    mute: bool = False  # take requests and say nothing
    stop_after: int | None = None  # tokens of one attempt; then nothing more is said
    end_after: int | None = None  # the model ends its answer by itself, with so many tokens in all
    double: bool = False  # say every token twice
    skip: int | None = None  # this token of an attempt gets lost
    unlikely: bool = False  # what it says is not among the likeliest
    leaving: bool = False  # it finishes what it has; told to others at the next ``publish``
    lost: list[RankRef] = field(default_factory=list)  # of a router that fails: the encoders it lost an item with


def next_token(tokens: Sequence[int], pictures: Sequence[str], vocabulary: Sequence[int]) -> int:
    digest = hashlib.sha256(repr((list(tokens), list(pictures))).encode()).digest()
    return vocabulary[int.from_bytes(digest[:4], "big") % len(vocabulary)]


def answer(tokens: Sequence[int], pictures: Sequence[str], count: int, vocabulary: Sequence[int]) -> list[int]:
    """What an undisturbed cluster answers: ``count`` tokens."""
    known = list(tokens)
    for _ in range(count):
        known.append(next_token(known, pictures, vocabulary))
    return known[len(tokens) :]


@dataclass
class Job:
    """One attempt, as the rank that answers it knows it."""

    request: RequestId
    attempt: int
    sampling: Sampling
    sender: Sender
    tokens: list[int] = field(default_factory=list)
    items: Sequence[PromptItem] = ()
    pictures: dict[int, str] = field(default_factory=dict)
    prompt_tokens: int = 0
    said: int = 0
    over: bool = False


class FakeRank:
    """One rank: an inbox, what it heard, and a script."""

    purpose = ""

    def __init__(self, cluster: FakeCluster, rank: RankName, incarnation: int, codec: Codec[Any]) -> None:
        self.cluster = cluster
        self.rank = rank
        self.incarnation = Incarnation(incarnation)
        self.script = Script()
        self.heard: list[Message] = []
        self.senders: list[Sender] = []  # of each message heard
        self.stopped: list[Job] = []
        self.changed = asyncio.Event()
        endpoint = f"ipc://{cluster.directory}/{rank.file_stem}.{incarnation}{self.purpose}"
        self.inbox: Inbox[Any] = Inbox(endpoint, codec, self._receive)

    @property
    def peer(self) -> Peer:
        endpoints = Endpoints(inbox=self.inbox.endpoint)
        return Peer(rank=self.rank, stage=self.rank.stage, incarnation=self.incarnation, endpoints=endpoints)

    def close(self) -> None:
        self.inbox.close()

    async def hears(self, kind: type[M], count: int = 1) -> list[M]:
        """Waits until ``count`` messages of this kind have come."""
        async with asyncio.timeout(GUARD_SECONDS):
            while len(found := self.all(kind)) < count:
                self.changed.clear()
                await self.changed.wait()
        return found

    def all(self, kind: type[M]) -> list[M]:
        return [message for message in self.heard if isinstance(message, kind)]

    def _receive(self, sender: Sender, message: Message, frames: list[memoryview]) -> None:
        self.heard.append(message)
        self.senders.append(sender)
        self.changed.set()
        self.on(sender, message, frames)

    def on(self, sender: Sender, message: Message, frames: list[memoryview]) -> None:
        raise NotImplementedError

    def say(self, to: Sender, message: RankToGateway) -> None:
        try:
            self.inbox.reply(to, message, RANK_TO_GATEWAY)
        except PeerGone:
            return  # the gateway has closed its link


class FakeEncoder(FakeRank):
    """Only to be in the table: the fake router encodes by itself."""

    def on(self, sender: Sender, message: Message, frames: list[memoryview]) -> None:
        raise AssertionError(f"nobody speaks to an encoder here: {message}")


class FakeRouter(FakeRank):
    def on(self, sender: Sender, message: Message, frames: list[memoryview]) -> None:
        if isinstance(message, CancelEncode) or self.script.mute:
            return
        assert isinstance(message, Encode)
        if self.script.fail is not None and self.script.fail_item in (None, message.item.index):
            self._reply(
                sender,
                EncodeFailed(
                    request=message.request,
                    attempt=message.attempt,
                    index=message.item.index,
                    kind=self.script.fail,
                    text="as the script says",
                    lost=self.script.lost,
                ),
            )
            return
        self.cluster.pictures.append(bytes(frames[0]))
        self.cluster.landed(message, hashlib.sha256(frames[0]).hexdigest())
        self._reply(
            sender,
            Encoded(
                request=message.request,
                attempt=message.attempt,
                index=message.item.index,
                by=RankName("encoder/0"),
                incarnation=Incarnation(1),
            ),
        )

    def _reply(self, to: Sender, message: Encoded | EncodeFailed) -> None:
        try:
            self.inbox.reply(to, message, ROUTER_TO_CLIENT)
        except PeerGone:
            return


class Granting(FakeRank):
    """Ranks that take prompts: prefill and language."""

    def grant(self, job: Job) -> None:
        slots = [
            RemoteLease(
                pool=PoolAddress(
                    owner=self.rank, incarnation=self.incarnation, pool="embeddings", backend="memory", endpoint="none"
                ),
                lease=item.index,
                generation=job.attempt,
                extents=[Extent(offset=0, nbytes=item.rows)],
            )
            for item in job.items
        ]
        self.say(
            job.sender,
            Granted(request=job.request, attempt=job.attempt, slots=slots, notify=self.inbox.endpoint),
        )

    def refused(self, message: Prefill | Generate | Decode, sender: Sender) -> bool:
        if self.script.fail is not None:
            self.say(
                sender,
                Failed(
                    request=message.request, attempt=message.attempt, kind=self.script.fail, text="as the script says"
                ),
            )
        return self.script.fail is not None or self.script.mute


class Answering(Granting):
    """Ranks that stream tokens: decode and language."""

    def stream(self, job: Job) -> None:
        """One token a turn of the loop, so that whatever else happens can come between."""
        if job.over or self.inbox.closed:
            return
        if self.script.stop_after == job.said:
            self.stopped.append(job)
            self.changed.set()
            return
        if job.said == job.sampling.max_tokens:
            self.finish(job, FinishReason.LENGTH)
            return
        if self.script.end_after == self.cluster.answered(job):
            self.finish(job, FinishReason.STOP)
            return
        token = next_token(job.tokens, [job.pictures[item.index] for item in job.items], self.cluster.vocabulary)
        job.tokens.append(token)
        message = Token(
            request=job.request,
            attempt=job.attempt,
            index=job.said,
            token=token,
            likelihood=self.likelihood(job, token),
        )
        if self.script.skip != job.said:
            self.say(job.sender, message)
        if self.script.double:
            self.say(job.sender, message)
        job.said += 1
        asyncio.get_running_loop().call_soon(self.stream, job)

    def likelihood(self, job: Job, token: int) -> Likelihood | None:
        """The later a token, the less likely; and the alternatives are its neighbours."""
        if job.sampling.logprobs is None:
            return None
        best, first = -0.1 - len(job.tokens), int(self.script.unlikely)
        top = [(token + first + step, best - step) for step in range(job.sampling.logprobs)]
        return Likelihood(logprob=best - first * job.sampling.logprobs, top=top)

    async def reaches(self, tokens: int) -> None:
        """Waits until a job has stopped at ``stop_after``."""
        async with asyncio.timeout(GUARD_SECONDS):
            while not any(job.said == tokens for job in self.stopped):
                self.changed.clear()
                await self.changed.wait()

    def go_on(self) -> None:
        """Say the rest of what ``stop_after`` held back."""
        self.script.stop_after = None
        while self.stopped:
            self.stream(self.stopped.pop())

    def finish(self, job: Job, reason: FinishReason) -> None:
        job.over = True
        ended = reason is FinishReason.STOP
        usage = Usage(prompt_tokens=job.prompt_tokens, completion_tokens=job.said + ended)
        self.say(job.sender, Finished(request=job.request, attempt=job.attempt, reason=reason, usage=usage))


class FakePrefill(Granting):
    def on(self, sender: Sender, message: Message, frames: list[memoryview]) -> None:
        if isinstance(message, Abort):
            return
        assert isinstance(message, Prefill)
        if self.refused(message, sender):
            return
        job = Job(message.request, message.attempt, message.sampling, sender, list(message.tokens), message.items)
        self.cluster.prefilling(message.room, job)
        self.grant(job)


class FakeDecode(Answering):
    def on(self, sender: Sender, message: Message, frames: list[memoryview]) -> None:
        if isinstance(message, Abort):
            self.cluster.over(message)
            return
        assert isinstance(message, Decode)
        if self.refused(message, sender):
            return
        job = Job(message.request, message.attempt, message.sampling, sender, prompt_tokens=message.prompt_tokens)
        self.cluster.decoding(message.room, job, self)


class FakeLanguage(Answering):
    def on(self, sender: Sender, message: Message, frames: list[memoryview]) -> None:
        if isinstance(message, Abort):
            self.cluster.over(message)
            return
        assert isinstance(message, Generate)
        if self.refused(message, sender):
            return
        job = Job(message.request, message.attempt, message.sampling, sender, list(message.tokens), message.items)
        job.prompt_tokens = len(message.tokens)
        self.cluster.generating(job, self)
        self.grant(job)


class FakeOwnRouter(FakeRouter):
    purpose = ".encode"


class FakeMono(FakeLanguage):
    """A language rank with a router of its own behind a second inbox."""

    def __init__(self, cluster: FakeCluster, rank: RankName, incarnation: int, codec: Codec[Any]) -> None:
        super().__init__(cluster, rank, incarnation, codec)
        self.router = FakeOwnRouter(cluster, rank, incarnation, CLIENT_TO_ROUTER)

    @property
    def peer(self) -> Peer:
        endpoints = Endpoints(inbox=self.inbox.endpoint, encode=self.router.inbox.endpoint)
        return Peer(rank=self.rank, stage=self.rank.stage, incarnation=self.incarnation, endpoints=endpoints)

    def close(self) -> None:
        super().close()
        self.router.close()


CODECS: dict[Stage, tuple[type[FakeRank], Codec[Any]]] = {
    Stage.ENCODER: (FakeEncoder, CLIENT_TO_ROUTER),
    Stage.ENCODER_ROUTER: (FakeRouter, CLIENT_TO_ROUTER),
    Stage.PREFILL: (FakePrefill, TO_PREFILL),
    Stage.DECODE: (FakeDecode, TO_DECODE),
    Stage.LANGUAGE: (FakeLanguage, TO_LANGUAGE),
    Stage.MONO: (FakeMono, TO_LANGUAGE),
}


class FakeCluster:
    """Ranks by name, the table of them, and the memory they share. Used inside one running event loop."""

    def __init__(self, directory: Path, vocabulary: Sequence[int], tell: Callable[[Sequence[Peer]], None]) -> None:
        self.directory = directory
        self.vocabulary = vocabulary
        self.ranks: dict[RankName, FakeRank] = {}
        self.pictures: list[bytes] = []
        self._tell = tell
        self._incarnations: dict[RankName, int] = {}
        self._prompts: dict[Room, Job] = {}
        self._exits: dict[Room, tuple[Job, Answering]] = {}
        self._jobs: dict[tuple[str, int], Job] = {}
        self._landed: dict[tuple[str, int], dict[int, str]] = {}  # hashes of pictures, whether the job is there or not
        self._starts: dict[tuple[str, int], Callable[[], None]] = {}
        self._first_prompt: dict[str, int] = {}

    # -- what tests do --

    def up(self, *names: str) -> list[FakeRank]:
        """Start ranks (again) and publish them."""
        made = []
        for name in map(RankName, names):
            kind, codec = CODECS[name.stage]
            self._incarnations[name] = self._incarnations.get(name, 0) + 1
            self.ranks[name] = kind(self, name, self._incarnations[name], codec)
            made.append(self.ranks[name])
        self.publish()
        return made

    def kill(self, name: str) -> None:
        self.ranks.pop(RankName(name)).close()
        self.publish()

    def publish(self) -> None:
        ranks = self.ranks.values()
        self._tell([msgspec.structs.replace(rank.peer, accepting=not rank.script.leaving) for rank in ranks])

    def close(self) -> None:
        for rank in self.ranks.values():
            rank.close()

    def waiting(self, room: Room) -> Job:
        """What a decode rank has for a room whose prompt has not come."""
        return self._exits[room][0]

    def __getitem__(self, name: str) -> FakeRank:
        return self.ranks[RankName(name)]

    # -- what ranks do --

    def prefilling(self, room: Room, job: Job) -> None:
        self._prompts[room] = job
        self._meet(room)

    def decoding(self, room: Room, job: Job, rank: Answering) -> None:
        self._exits[room] = job, rank
        self._meet(room)

    def generating(self, job: Job, rank: Answering) -> None:
        self._wait_for_pictures(job, lambda: rank.stream(job))

    def landed(self, message: Encode, digest: str) -> None:
        key = (message.request, message.attempt)
        self._landed.setdefault(key, {})[message.item.index] = digest
        self._go(key)

    def over(self, message: Abort) -> None:
        job = self._jobs.get((message.request, message.attempt))
        if job is not None:
            job.over = True

    def answered(self, job: Job) -> int:
        """Tokens of the whole answer so far, earlier attempts included."""
        return len(job.tokens) - self._first_prompt[job.request]

    def _meet(self, room: Room) -> None:
        if room not in self._prompts or room not in self._exits:
            return
        prompt, (job, rank) = self._prompts.pop(room), self._exits.pop(room)
        assert job.prompt_tokens == len(prompt.tokens)
        job.tokens, job.items = prompt.tokens, prompt.items
        self._wait_for_pictures(job, lambda: rank.stream(job))

    def _wait_for_pictures(self, job: Job, start: Callable[[], None]) -> None:
        key = (job.request, job.attempt)
        self._first_prompt.setdefault(job.request, len(job.tokens))
        self._jobs[key], self._starts[key] = job, start
        self._go(key)

    def _go(self, key: tuple[str, int]) -> None:
        job = self._jobs.get(key)
        if job is not None and len(self._landed.get(key, {})) == len(job.items):
            job.pictures = self._landed.get(key, {})
            asyncio.get_running_loop().call_soon(self._starts[key])
