"""A client of the gateway's HTTP API, as small as one question needs it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from epdctl.errors import DeadlineExceeded, RankError, Unreachable, UserError
from epdctl.families.samples import MEDIA_TYPES
from epdctl.ids import Modality

__all__ = ["Gateway", "Said", "by_name", "medium", "words"]

Part = Mapping[str, Any]
_PLACE = re.compile(r"messages\[\d+\]\.content\[(\d+)\](?:\.\w+)*")  # the files come first, in their order
_DATA = b"data: "
_DONE = b"[DONE]"
_ENDS = {  # any other: a picture
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus"), Modality.AUDIO),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"), Modality.VIDEO),
}


def words(text: str) -> Part:
    return {"type": "text", "text": text}


def medium(path: Path) -> Part:
    """The file as it is: what it holds is found out by the gateway, what it is for by its name's end. Raises
    UserError."""
    try:
        encoded = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}", hint="name files of pictures, sound or video after the question"
        ) from error
    modality = _ENDS.get(path.suffix.lower(), Modality.IMAGE)
    kind = f"{modality}_url"
    return {"type": kind, kind: {"url": f"data:{MEDIA_TYPES[modality]};base64,{encoded}"}}


@contextmanager
def by_name(files: Sequence[Path]) -> Iterator[None]:
    """A refusal within it names a file where the gateway, which knows no names, told its place in the request."""

    def name(place: re.Match[str]) -> str:
        number = int(place[1])
        return str(files[number]) if number < len(files) else "the question"

    try:
        yield
    except RankError as error:
        raise RankError(_PLACE.sub(name, error.message), hint=error.hint) from error


@dataclass(frozen=True, slots=True)
class Said:
    """Some of an answer. ``reason``: why it ends here, if it does."""

    text: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class Gateway:
    """``seconds``: the longest silence that is waited through. Every method raises Unreachable, DeadlineExceeded, and
    RankError with the gateway's own words for what it refuses."""

    url: str
    key: str | None
    seconds: float

    def whole(self, body: Mapping[str, Any]) -> str:
        """The JSON of the whole answer."""
        with self._speaking() as client:
            reply = client.post("/v1/chat/completions", json=self._named(client, body))
            _refused(reply.status_code, reply.content)
            return json.dumps(reply.json(), ensure_ascii=False)

    def pieces(self, body: Mapping[str, Any]) -> Iterator[Said]:
        """The answer as it comes."""
        with self._speaking() as client:
            asked = {**self._named(client, body), "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=asked) as reply:
                if reply.status_code != httpx.codes.OK:
                    _refused(reply.status_code, reply.read())
                for line in _lines(reply.iter_raw()):
                    if line.startswith(_DATA) and line != _DATA + _DONE:
                        yield _said(json.loads(line.removeprefix(_DATA)))

    def _named(self, client: httpx.Client, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """With the one model that is served."""
        reply = client.get("/v1/models")
        _refused(reply.status_code, reply.content)
        return {"model": reply.json()["data"][0]["id"], **body}

    @contextmanager
    def _speaking(self) -> Iterator[httpx.Client]:
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            with httpx.Client(base_url=self.url, headers=headers, timeout=self.seconds, trust_env=False) as client:
                yield client
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"the gateway at {self.url} said nothing for {self.seconds:g} s") from error
        except httpx.HTTPError as error:
            raise Unreachable(
                f"the gateway at {self.url} cannot be reached: {error}", hint="`epdctl status` shows how it is"
            ) from error


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Ended by a line feed and by nothing else: JSON may hold what Unicode calls an end of line."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def _said(chunk: Mapping[str, Any]) -> Said:
    if "error" in chunk:
        raise RankError(f"the answer broke off: {chunk['error']['message']}")
    text = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
    return Said(text, next((choice["finish_reason"] for choice in chunk["choices"] if choice["finish_reason"]), None))


def _refused(status: int, content: bytes) -> None:
    if status == httpx.codes.OK:
        return
    try:
        text = json.loads(content)["error"]["message"]
    except (ValueError, LookupError, TypeError):
        text = content.decode(errors="replace")[:500]
    hint = "set EPDCTL_API_KEY to the gateway's key" if status == httpx.codes.UNAUTHORIZED else None
    raise RankError(f"the gateway refused with HTTP {status}: {text}", hint=hint)
