"""Is the cluster healthy? From what the ranks say of themselves, and, asked deeply, from a real answer."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from epdctl.errors import RankError
from epdctl.families import modalities_of
from epdctl.families.samples import MEDIA_TYPES, SAMPLES
from epdctl.ids import Modality, Stage
from epdctl.topology.plan import Plan
from epdctl.wire.control import HealthReply, Problem, RankState, RankStatus

__all__ = ["CANARY", "DEGRADED", "HEALTHY", "UNHEALTHY", "Canary", "ask", "deep", "find_canary", "question", "verdict"]

HEALTHY, DEGRADED, UNHEALTHY = "healthy", "degraded", "unhealthy"

_TOKENS = 4
_CANARY_TOKENS = 32
CANARY = "canary.json"
_MAX_ANSWER = 500  # characters of an error body worth showing


def verdict(ranks: Sequence[RankStatus]) -> HealthReply:
    """``degraded``: some rank does not serve, yet every stage has one that does."""
    problems = [Problem(rank=rank.rank, text=f"{rank.state}: {rank.reason}") for rank in ranks if not _serves(rank)]
    serving = {rank.stage for rank in ranks if _serves(rank)}
    missing = sorted({rank.stage for rank in ranks} - serving)
    problems += [Problem(rank=None, text=f"no {stage} rank is ready") for stage in missing]
    if missing or not ranks:
        return HealthReply(verdict=UNHEALTHY, problems=problems)
    return HealthReply(verdict=DEGRADED if problems else HEALTHY, problems=problems)


async def deep(plan: Plan, shallow: HealthReply, budget_s: float) -> HealthReply:
    """The shallow verdict, and a real request through every stage; its failure is ``unhealthy`` whatever ranks say."""
    began = time.monotonic()
    try:
        await ask(plan, budget_s)
    except RankError as error:
        problem = Problem(rank=None, text=error.message)
        return HealthReply(verdict=UNHEALTHY, problems=[*shallow.problems, problem])
    return HealthReply(verdict=shallow.verdict, problems=shallow.problems, deep_seconds=time.monotonic() - began)


async def ask(plan: Plan, budget_s: float) -> None:
    """One short greedy completion through the gateway. Raises RankError with what is wrong about the answer."""
    import httpx  # a quarter of the daemon's import time, and only deep checks need it

    url, canary = plan.gateway_url, find_canary(plan)
    if url is None:
        raise RankError("the cluster has no gateway to ask")
    try:
        async with httpx.AsyncClient(timeout=budget_s, trust_env=False, headers=_key(plan)) as client:
            response = await client.post(f"{url}/v1/chat/completions", json=question(plan, canary))
    except httpx.TimeoutException as error:
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
        known = ((Modality.IMAGE, self.pictures), (Modality.AUDIO, self.sounds))
        return [_part(modality, each) for modality, files in known for each in files]


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
    return [_part(modality, base64.b64encode(SAMPLES[modality]).decode())]


def _part(modality: Modality, encoded: str) -> dict[str, object]:
    kind = f"{modality}_url"
    return {"type": kind, kind: {"url": f"data:{MEDIA_TYPES[modality]};base64,{encoded}"}}


def _tower(plan: Plan) -> str | None:
    """The family of the model, where some rank has its tower."""
    towers = (rank for rank in plan.ranks if rank.stage in (Stage.ENCODER, Stage.MONO))
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
