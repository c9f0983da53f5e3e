"""A real gateway on a real port, in front of scripted ranks, all in one event loop."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from PIL import Image
from tokenizers import Tokenizer

from epdctl.gateway.service import GatewayService
from epdctl.ids import Incarnation, RankName, RunId, Stage
from epdctl.wire.config import GatewayConfig, Limits, ModelConfig, RankConfig, RankSpec
from tests.support.fake_ranks import GUARD_SECONDS, FakeCluster
from tests.unit.gateway.model_files import write_model_files

EPD = ("encoder/0", "encoder-router/0", "prefill/0", "decode/0")
LANGUAGE = ("encoder/0", "encoder-router/0", "language/0")
MONO = ("mono/0",)
MODEL = "tiny"


def spec(directory: Path, limits: Limits, port: int = 0, stages: Sequence[Stage] = ()) -> RankSpec:
    return RankSpec(
        run=RunId("run"),
        cluster="test",
        incarnation=Incarnation(1),
        token="secret",
        supervisor=str(directory / "none"),
        sockets=str(directory),
        config=RankConfig(
            rank=RankName("gateway/0"),
            stage=Stage.GATEWAY,
            service="epdctl.gateway.service:GatewayService",
            model=ModelConfig(path=str(directory), name=MODEL, family="qwen2_5_vl"),
            limits=limits,
            gateway=GatewayConfig(port=port, stages=list(stages)),
        ),
    )


def picture(width: int = 56, height: int = 56, colour: str = "red", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, form)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def ask(content: object = "what is this?", **fields: Any) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 12,
        "temperature": 0,
        **fields,
    }


def events(text: str) -> list[Any]:
    """The data of a finished SSE stream; [DONE] as it is."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in found]


def streamed_text(chunks: Sequence[Any]) -> str:
    return "".join(
        chunk["choices"][0]["delta"].get("content", "")
        for chunk in chunks
        if chunk != "[DONE]" and chunk.get("choices")
    )


@dataclass
class House:
    """What a test plays with."""

    service: GatewayService
    cluster: FakeCluster
    http: httpx.AsyncClient
    tokenizer: Tokenizer

    async def chat(self, **request: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json=request)

    async def text(self, **request: Any) -> str:
        response = await self.chat(**request)
        assert response.status_code == 200, response.text
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    async def open_requests(self, count: int) -> None:
        """Waits until so many requests are open."""
        async with asyncio.timeout(GUARD_SECONDS):
            while f"epdctl_requests_in_flight {count}.0" not in (await self.http.get("/metrics")).text:
                pass

    async def holds(self, nbytes: int) -> None:
        """Waits until open requests hold so many bytes."""
        async with asyncio.timeout(GUARD_SECONDS):
            while self.service._door.held_bytes != nbytes:
                await self.http.get("/health")

    async def idle(self) -> None:
        """Waits until no request is open, then holds the gateway to its counts."""
        async with asyncio.timeout(GUARD_SECONDS):
            await self.service._door.idle.wait()
        self.service.check()


@asynccontextmanager
async def house(*ranks: str, stages: Sequence[Stage] = (), **limits: Any) -> AsyncIterator[House]:
    """``stages``: of the plan, as far as the gateway is told."""
    defects: list[dict[str, Any]] = []  # what a callback raised; the loop would only log it
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))
    with tempfile.TemporaryDirectory(prefix="epd") as name:  # short: socket paths end at 107 bytes
        directory = Path(name)
        tokenizer = write_model_files(directory)
        service = GatewayService(spec(directory, msgspec.structs.replace(Limits(), **limits), stages=stages))
        endpoints = await service.start(lambda *_: None)
        assert endpoints.http is not None
        words = [tokenizer.encode(word).ids[0] for word in (*"abcdefghijklmnopqrstuvwxyz", " ")]
        cluster = FakeCluster(directory, words, service.peers_changed)
        cluster.up(*ranks)
        async with httpx.AsyncClient(base_url=endpoints.http, timeout=GUARD_SECONDS, trust_env=False) as http:
            try:
                yield House(service, cluster, http, tokenizer)
            finally:
                await service.close()
                cluster.close()
        service.check()
    assert not defects, defects
