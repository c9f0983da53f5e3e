"""A real cluster, driven the way a person drives it: the ``epdctl`` command, a topology file, HTTP."""

from __future__ import annotations

import atexit
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from epdctl.control.cluster import find_cluster
from epdctl.wire.control import RankState, RankStatus

GUARD_SECONDS = 180.0  # against hanging for ever; no test measures it


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def data_url(picture: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


Part = str | bytes  # text, or a medium's file: WAV, MP4, or else a picture


def content(parts: Sequence[Part]) -> list[dict[str, Any]]:
    return [_as_sent(part) for part in parts]


def _as_sent(part: Part) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if part[:4] == b"RIFF":
        return {"type": "input_audio", "input_audio": {"data": base64.b64encode(part).decode(), "format": "wav"}}
    if part[4:8] == b"ftyp":
        return {"type": "video_url", "video_url": {"url": data_url(part, "video/mp4")}}
    return {"type": "image_url", "image_url": {"url": data_url(part)}}


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    token_ids: tuple[int, ...]  # without the end token


@dataclass
class Cluster:
    """One cluster in directories of its own, so that tests never see each other's."""

    home: Path
    topology: str
    name: str = "test"
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.home.mkdir(parents=True, exist_ok=True)
        self.file = self.home / "epdctl.yaml"
        self.file.write_text(self.topology)
        self.runtime = Path(tempfile.mkdtemp(prefix="epd"))  # short: it holds unix sockets
        atexit.register(shutil.rmtree, self.runtime, ignore_errors=True)
        self.env = os.environ | {
            "EPDCTL_RUNTIME_DIR": str(self.runtime),
            "EPDCTL_STATE_DIR": str(self.home / "state"),
            "EPDCTL_PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
        }
        self.env.pop("EPDCTL_CLUSTER", None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, *words: str, check: bool = False, seconds: float = GUARD_SECONDS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "epdctl", *words],
            env=self.env, cwd=self.home, capture_output=True, text=True, timeout=seconds, check=check,
        )  # fmt: skip

    def up(self) -> None:
        result = self.run("up", "-d", "--name", self.name, "--wait-timeout", "150")
        assert result.returncode == 0, result.stderr

    def down(self) -> None:
        result = self.run("down", "--cluster", self.name)
        assert result.returncode == 0, result.stderr

    def status(self) -> dict[str, Any]:
        result = self.run("status", "--json", "--cluster", self.name)
        assert result.returncode == 0, result.stderr
        return dict(json.loads(result.stdout))

    def rank(self, name: str) -> dict[str, Any]:
        return next(rank for rank in self.status()["ranks"] if rank["rank"] == name)

    def wait(self, name: str, until: Callable[[RankStatus], bool]) -> RankStatus:
        """Follow the daemon's own pushes until ``until`` holds of rank ``name``."""
        with closing(find_cluster(self.name, self.env).client.watch()) as pushes:
            for status in pushes:
                for rank in status.ranks:
                    if rank.rank == name and until(rank):
                        return rank
        raise AssertionError(f"the daemon left before {name} came so far")

    def wait_ready(self, name: str, *, incarnation: int) -> dict[str, Any]:
        self.wait(name, lambda rank: rank.state is RankState.READY and rank.incarnation >= incarnation)
        return self.rank(name)

    def body(self, parts: Sequence[Part], **options: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "return_token_ids": True} | options
        return {"model": "tiny", "messages": [{"role": "user", "content": content(parts)}]} | settings

    def ask(self, parts: Sequence[Part], **options: Any) -> Answer:
        reply = httpx.post(f"{self.url}/v1/chat/completions", json=self.body(parts, **options), timeout=GUARD_SECONDS)
        assert reply.status_code == 200, reply.text
        return parse(reply.json())

    def stream(self, parts: Sequence[Part], **options: Any) -> Iterator[dict[str, Any]]:
        body = self.body(parts, stream=True, stream_options={"include_usage": True}, **options)
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=body, timeout=GUARD_SECONDS) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line.removeprefix("data: "))

    def ask_streaming(self, parts: Sequence[Part], **options: Any) -> Answer:
        text, reason, usage = "", "", {"prompt_tokens": -1, "completion_tokens": -1}
        ids: list[int] = []
        for chunk in self.stream(parts, **options):
            assert "error" not in chunk, chunk
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                reason = choice["finish_reason"] or reason
                ids += choice.get("token_ids") or []
        return Answer(text, reason, usage["prompt_tokens"], usage["completion_tokens"], tuple(ids))


def parse(reply: dict[str, Any]) -> Answer:
    choice, usage = reply["choices"][0], reply["usage"]
    return Answer(
        choice["message"]["content"],
        choice["finish_reason"],
        usage["prompt_tokens"],
        usage["completion_tokens"],
        tuple(choice["token_ids"]),
    )


EPD = """
model: {{path: {model}, name: tiny}}
gateway: {{port: ${{EPDCTL_PORT}}}}
stages:
  encoder: {{dp: 2}}
  prefill: {{chunk_tokens: {chunk}, kv_tokens: 16384}}
  decode: {{kv_tokens: 16384}}
restart: {{initial: 0.1, maximum: 1}}
limits: {{wait_seconds: 3m}}
"""

TRIO = """
model: {{path: {model}, name: tiny}}
gateway: {{port: ${{EPDCTL_PORT}}}}
stages:
  encoder: {{dp: 1}}
  prefill: {{chunk_tokens: {chunk}, kv_tokens: 16384}}
  decode: {{kv_tokens: 16384}}
limits: {{wait_seconds: 3m}}
"""

PAIRS = """
model: {{path: {model}, name: tiny}}
gateway: {{port: ${{EPDCTL_PORT}}}}
stages:
  encoder: {{dp: 1}}
  prefill: {{chunk_tokens: {chunk}, kv_tokens: 16384}}
  decode: {{dp: 2, kv_tokens: 16384}}
limits: {{wait_seconds: 3m}}
deadlines: {{heartbeat: 0.3, unhealthy: 3, dead: 3m, drain: 2m}}
"""

LANGUAGE = """
model: {{path: {model}, name: tiny}}
gateway: {{port: ${{EPDCTL_PORT}}}}
stages:
  encoder: {{dp: 1}}
  language: {{chunk_tokens: {chunk}, kv_tokens: 16384}}
"""

MONO = """
model: {{path: {model}, name: tiny}}
gateway: {{port: ${{EPDCTL_PORT}}}}
stages:
  mono: {{chunk_tokens: {chunk}, kv_tokens: 16384}}
restart: {{initial: 0.1, maximum: 1}}
limits: {{wait_seconds: 3m}}
"""
