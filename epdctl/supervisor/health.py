"""Is the cluster healthy? From what the ranks say of themselves, and, asked deeply, from a real answer."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec

from epdctl.errors import RankError
from epdctl.families import modalities_of
from epdctl.families.samples import MEDIA_TYPES, SAMPLES, marked
from epdctl.ids import TOWER_STAGES, Modality, RankName, Stage
from epdctl.supervisor.proofs import Finding
from epdctl.topology.plan import Plan
from epdctl.wire.control import HealthReply, Problem, RankState, RankStatus

__all__ = [
    "CANARY",
    "DEGRADED",
    "HEALTHY",
    "UNHEALTHY",
    "Canary",
    "Prove",
    "ask",
    "deep",
    "find_canary",
    "question",
    "seeing",
    "verdict",
]

HEALTHY, DEGRADED, UNHEALTHY = "healthy", "degraded", "unhealthy"

Prove = Callable[[float], Awaitable[Sequence[Finding]]]  # of every rank that has a tower, within so many seconds

_TOKENS = 4
_CANARY_TOKENS = 32
CANARY = "canary.json"
_MAX_ANSWER = 500  # characters of an error body worth showing


def verdict(ranks: Sequence[RankStatus]) -> HealthReply:
    """``degraded``: some rank does not serve, yet every stage has one that does."""
    problems = [Problem(rank=rank.rank, text=_why(rank)) for rank in ranks if not _serves(rank)]
    serving = {rank.stage for rank in ranks if _serves(rank)}
    missing = sorted({rank.stage for rank in ranks} - serving)
    problems += [Problem(rank=None, text=f"no {stage} rank is ready") for stage in missing]
    if missing or not ranks:
        return HealthReply(verdict=UNHEALTHY, problems=problems)
    return HealthReply(verdict=DEGRADED if problems else HEALTHY, problems=problems)


def _why(rank: RankStatus) -> str:
    again = "" if rank.next_try_s is None else f"; next try in {rank.next_try_s:.1f} s"
    return f"{rank.state}: {rank.reason}{again}"


def seeing(ranks: Sequence[RankStatus]) -> list[RankName]:
    """Those that serve and have a tower, which only they themselves can prove one by one."""
    return [rank.rank for rank in ranks if rank.stage in TOWER_STAGES and _serves(rank)]


async def deep(plan: Plan, verdict: Callable[[], HealthReply], budget_s: float, prove: Prove) -> HealthReply:
    """A real request through every stage, the ranks' ``verdict`` after it, since it may wait for one that comes back,
    and a proof of every tower: the request reaches one of each stage, and only values that a rank knows tell whether a
    model sees that has no answer of its own.

    The failure of either is ``unhealthy`` whatever ranks say; a tower that is silent leaves less than ``healthy``.
    Encoders that stand alone, without a gateway, are proved and not asked.
    """
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        asking = group.create_task(_timed(plan, budget_s))
        await asyncio.wait([asking], timeout=budget_s / 2)  # first: a rank that is found unfit gives up what it has
        shallow = verdict()
        findings = await prove(max(0.0, budget_s - (time.monotonic() - began)))
    answer = asking.result()
    problems = [*shallow.problems, *(Problem(rank=finding.rank, text=finding.text) for finding in findings)]
    if isinstance(answer, RankError):
        return HealthReply(verdict=UNHEALTHY, problems=[*problems, Problem(rank=None, text=answer.message)])
    unfit = any(finding.unfit for finding in findings)
    less = UNHEALTHY if unfit or shallow.verdict == UNHEALTHY else DEGRADED
    return HealthReply(verdict=less if findings else shallow.verdict, problems=problems, deep_seconds=answer)


async def _timed(plan: Plan, budget_s: float) -> float | RankError | None:
    """How long the real request took, or what was wrong with its answer; None where there is nobody to answer."""
    if plan.gateway_url is None and _tower(plan) is not None:
        return None
    began = time.monotonic()
    try:
        await ask(plan, budget_s)
    except RankError as error:
        return error
    return time.monotonic() - began


async def ask(plan: Plan, budget_s: float) -> None:
    """One short greedy completion through the gateway. Raises RankError with what is wrong about the answer."""
    import httpx  # a quarter of the daemon's import time, and only deep checks need it

    url, canary = plan.gateway_url, find_canary(plan)
    if url is None:
        raise RankError("the cluster has no gateway to ask")
    try:
        async with (
            asyncio.timeout(budget_s),
            httpx.AsyncClient(timeout=None, trust_env=False, headers=_key(plan)) as client,
        ):
            response = await client.post(f"{url}/v1/chat/completions", json=question(plan, canary))
    except TimeoutError as error:
        raise RankError(f"the real request had no answer within {budget_s:g} s") from error
    except httpx.HTTPError as error:
        raise RankError(f"the real request did not get through: {str(error) or type(error).__name__}") from error
    said = _judge(response.status_code, response.content)
    if canary is not None and said.strip() != canary.answer:
        raise RankError(f"the real request was answered wrongly: expected {canary.answer!r}, got {said!r}")


def _key(plan: Plan) -> dict[str, str]:
    keys = [rank.config.gateway.api_key for rank in plan.ranks if rank.stage is Stage.GATEWAY]
    key = keys[0] if keys else None
    return {"authorization": f"Bearer {key.reveal()}"} if key is not None else {}


class Canary(msgspec.Struct, frozen=True):
    """A question with a known answer, as ``canary.json`` beside a checkpoint's weights."""

    pictures: list[str]  # PNG files, in base64
    prompt: str
    answer: str
    sounds: list[str] = []  # WAV files, in base64

    @property
    def parts(self) -> list[dict[str, object]]:
        """Raises RankError for what is no such file."""
        known = ((Modality.IMAGE, self.pictures), (Modality.AUDIO, self.sounds))
        try:
            return [_part(modality, base64.b64decode(each)) for modality, files in known for each in files]
        except ValueError as error:
            raise RankError(f"{CANARY} holds something that cannot be asked about: {error}") from error


def find_canary(plan: Plan) -> Canary | None:
    """What the checkpoint itself says it must answer; None when it says nothing, or when no rank sees."""
    directory = next((rank.config.model.path for rank in plan.ranks), None)
    if directory is None or _tower(plan) is None:
        return None
    try:
        return msgspec.json.decode(Path(directory, CANARY).read_bytes(), type=Canary)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise RankError(f"{Path(directory, CANARY)} cannot be read: {error}") from error


def question(plan: Plan, canary: Canary | None = None) -> dict[str, object]:
    """The body of the request: a medium too, where some rank has the tower."""
    content = _media(plan) if canary is None else canary.parts
    content.append({"type": "text", "text": canary.prompt if canary is not None else "What is this?"})
    return {
        "model": next((rank.config.model.name for rank in plan.ranks), ""),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": _TOKENS if canary is None else _CANARY_TOKENS,
        "temperature": 0,
        "ignore_eos": canary is None,
    }


def _media(plan: Plan) -> list[dict[str, object]]:
    """The smallest medium that the model takes, where some rank takes any."""
    if (tower := _tower(plan)) is None:
        return []
    modality = modalities_of(tower)[0]
    return [_part(modality, SAMPLES[modality])]


def _part(modality: Modality, file: bytes) -> dict[str, object]:
    """In bytes that nobody has seen before: encoders remember what they saw, and this is to be looked at."""
    kind = f"{modality}_url"
    encoded = base64.b64encode(marked(file, secrets.token_hex(16))).decode()
    return {"type": kind, kind: {"url": f"data:{MEDIA_TYPES[modality]};base64,{encoded}"}}


def _tower(plan: Plan) -> str | None:
    """The family of the model, where some rank has its tower."""
    towers = (rank for rank in plan.ranks if rank.stage in TOWER_STAGES)
    return next((rank.config.model.family for rank in towers), None)


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    """What a right answer has, of all it may have."""

    usage: _Usage
    choices: list[_Choice]


def _judge(status: int, body: bytes) -> str:
    """The text of the answer. Raises RankError when it is none."""
    if status != 200:
        text = body.decode(errors="replace")[:_MAX_ANSWER]
        raise RankError(f"the real request was answered with HTTP {status}: {text}")
    try:
        answer = msgspec.json.decode(body, type=_Answer)
    except msgspec.DecodeError as error:
        raise RankError(f"the real request was answered with something else than a completion: {error}") from error
    if answer.usage.completion_tokens < 1:
        raise RankError("the real request was answered without a single token")
    if not answer.choices or answer.choices[0].finish_reason is None:
        raise RankError("the real request was answered without a finish_reason")
    return answer.choices[0].message.content


def _serves(rank: RankStatus) -> bool:
    return rank.state is RankState.READY
