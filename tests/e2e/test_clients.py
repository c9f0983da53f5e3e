"""One guarded cluster and everybody who may call: clients we did not write, bad requests, clients that hang up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from huggingface_hub import InferenceClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionTokenLogprob

from epdctl.wire.control import RankState, RankStatus
from tests.e2e.conftest import CHUNK, running
from tests.support.cluster import Cluster, Part, content, data_url
from tests.support.openapi import Described, one_node_changed
from tests.support.reference import picture_bytes, reference_generate

KEY = "a-key-for-tests-0123456789"
TOPOLOGY = """
model: {{path: {model}, name: tiny}}
gateway:
  port: ${{EPDCTL_PORT}}
  api_key: ${{EPDCTL_API_KEY}}
  media_hosts: ["127.0.0.1:{elsewhere}", "localhost:{elsewhere}"]
  media_timeout: 500ms
stages:
  encoder: {{dp: 1}}
  prefill: {{chunk_tokens: {chunk}, kv_tokens: 16384}}
  decode: {{kv_tokens: 16384}}
limits: {{max_context: 4096, max_body_bytes: 2MiB, max_pixels: 1000000, max_media: 8}}
restart: {{initial: 0.1, maximum: 1}}
"""
RED = picture_bytes(5, 56, 84)


def drawn(seed: int) -> bytes:
    """A picture that no encoder has seen, unless it has seen this one."""
    return picture_bytes(1000 + seed, 56, 56 + 28 * (seed % 3))


def drawn_at(path: str) -> bytes | None:
    found = re.fullmatch(r"/drawn/(\d+)\.png", path)
    return None if found is None else drawn(int(found[1]))


class Elsewhere(BaseHTTPRequestHandler):
    """Another host: pictures, a detour to a private place, a picture that is too large, and one that never comes."""

    def do_GET(self) -> None:
        if self.path == "/slow":
            self.connection.recv(1)  # until the other end gives up
            return
        if self.path == "/detour":
            self.send_response(302)
            self.send_header("location", "http://169.254.169.254/latest/meta-data")
            self.end_headers()
            return
        body = drawn_at(self.path) or {"/red.png": RED, "/large": b"x" * (3 << 20)}.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever asked has left
            self.wfile.write(body or b"")

    def log_message(self, *_: object) -> None:
        """The test's output is enough."""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, elsewhere: int) -> Iterator[Cluster]:
    topology = TOPOLOGY.format(model=checkpoint, chunk=CHUNK, elsewhere=elsewhere)
    made = Cluster(tmp_path_factory.mktemp("c"), topology, name="clients")
    made.env["EPDCTL_API_KEY"] = KEY
    yield from running(made)


@pytest.fixture(scope="module")
def http(cluster: Cluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120) as client:
        yield client


def idle(rank: RankStatus) -> bool:
    return not (rank.inflight or rank.leases or rank.held_pages)


def comes_to_rest(cluster: Cluster) -> None:
    """Every rank says of itself that nothing is in flight, that no lease and no page is held, and that its invariants
    hold: it looks when it becomes idle, and is unhealthy otherwise."""
    for rank in cluster.status()["ranks"]:
        cluster.wait(rank["rank"], idle)
    assert {rank["reason"] for rank in cluster.status()["ranks"] if rank["state"] != RankState.READY} == set()


def ask(parts: object = "what is this?", **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": parts}]
    return {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0, **fields}


def image_part(url: object) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def image(url: object) -> dict[str, Any]:
    return ask([image_part(url)])


# -- clients that we did not write --


@pytest.fixture(scope="module")
def official(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def messages(*parts: str | bytes) -> list[ChatCompletionMessageParam]:
    found: Any = [{"role": "user", "content": content(parts)}]
    typed: list[ChatCompletionMessageParam] = found
    return typed


def test_the_official_client_whole_and_streamed_with_pictures_and_logprobs(official: openai.OpenAI) -> None:
    assert [model.id for model in official.models.list()] == ["tiny"]
    asked = messages("Look at ", RED, " and tell.")
    options: dict[str, Any] = {"model": "tiny", "messages": asked, "max_tokens": 12, "temperature": 0}
    whole = official.chat.completions.create(**options, logprobs=True, top_logprobs=3)
    choice = whole.choices[0]
    assert choice.message.content
    assert whole.usage is not None
    assert choice.logprobs is not None
    tokens = choice.logprobs.content or []
    assert 0 < len(tokens) <= whole.usage.completion_tokens
    for token in tokens:
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)  # greedy: the likeliest was taken
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
    text, usage = "", None
    told: list[ChatCompletionTokenLogprob] = []
    for chunk in official.chat.completions.create(
        **options, logprobs=True, top_logprobs=3, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for each in chunk.choices:
            text += each.delta.content or ""
            told += (each.logprobs.content or []) if each.logprobs else []
    assert (text, usage) == (choice.message.content, whole.usage)
    assert [(each.token, each.logprob) for each in told] == [(each.token, each.logprob) for each in tokens]


def test_the_official_client_in_turns_and_in_plain_text(official: openai.OpenAI) -> None:
    turns: Any = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": content([RED, "first"])},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": content(["and ", picture_bytes(6, 56, 56)])},
    ]
    one = official.chat.completions.create(model="tiny", messages=turns, max_tokens=6, seed=3, presence_penalty=1.0)
    two = official.chat.completions.create(model="tiny", messages=turns, max_tokens=6, seed=3, presence_penalty=1.0)
    assert one.choices[0].message == two.choices[0].message
    plain = official.completions.create(model="tiny", prompt="Once upon", max_tokens=6, temperature=0, logprobs=2)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None
    assert len(logprobs.tokens or []) == len(logprobs.text_offset or []) > 0
    streamed = official.completions.create(model="tiny", prompt="Once upon", max_tokens=6, temperature=0, stream=True)
    assert "".join(choice.text for chunk in streamed for choice in chunk.choices) == plain.choices[0].text


def test_the_official_client_understands_what_is_refused(official: openai.OpenAI, cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        official.chat.completions.create(model="tiny", messages=messages("x"), n=2)
    assert bad.value.param == "n"
    with pytest.raises(openai.NotFoundError) as unknown:
        official.chat.completions.create(model="gpt-4o", messages=messages("x"))
    assert unknown.value.code == "model_not_found"
    stranger = official.with_options(api_key="another-key-of-the-same-kind")
    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"
    assert httpx.get(f"{cluster.url}/health").status_code == 200  # open to all, as load balancers need it


def test_the_client_of_transformers_chat(cluster: Cluster) -> None:
    """huggingface_hub's, which `transformers chat` is made of."""
    client = InferenceClient(base_url=f"{cluster.url}/v1", api_key=KEY, timeout=120)
    asked: Any = messages(RED, "What is this?")
    whole = client.chat_completion(asked, model="tiny", max_tokens=8, temperature=0.0, logprobs=True, top_logprobs=1)
    streamed = client.chat_completion(asked, model="tiny", max_tokens=8, temperature=0.0, stream=True)
    text = "".join(choice.delta.content or "" for chunk in streamed for choice in chunk.choices)
    assert text == whole.choices[0].message.content


@pytest.mark.parametrize("way", ["whole", "streamed"])
def test_penalties_and_logprobs_are_those_of_generate(checkpoint: Path, http: httpx.Client, way: str) -> None:
    """Over prefill and decode, with a picture in the prompt, which a penalty reads on the decode rank too."""
    parts: list[Part] = ["Look at ", RED, " and tell."]
    told = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    options = {"repetition_penalty": 1.4, "min_new_tokens": 20}
    truth = reference_generate(checkpoint, [{"role": "user", "content": told}], [RED], 24, **options)
    plain = reference_generate(checkpoint, [{"role": "user", "content": told}], [RED], 24)
    assert truth.answer != plain.answer
    asked = {"repetition_penalty": 1.4, "min_tokens": 20, "logprobs": True, "top_logprobs": 5, "return_token_ids": True}
    body = ask(content(parts), **asked) | {"max_tokens": 24, "stream": way == "streamed"}
    reply = http.post("/v1/chat/completions", json=body)
    if way == "whole":
        choices = reply.json()["choices"]
    else:
        lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n")]
        choices = [choice for line in lines if line.startswith("{") for choice in json.loads(line)["choices"]]
    ids = [token for choice in choices for token in choice.get("token_ids") or []]
    likely = [each for choice in choices for each in (choice["logprobs"] or {"content": []})["content"]]
    assert ids == truth.answer[: len(ids)]
    assert len(ids) == len(likely) >= 20
    expected = truth.logits.log_softmax(-1)
    for place, (token, each) in enumerate(zip(ids, likely, strict=True)):
        assert each["logprob"] == pytest.approx(float(expected[place, token]), abs=1e-4)
        best = expected[place].topk(5).values.tolist()
        assert [top["logprob"] for top in each["top_logprobs"]] == pytest.approx(best, abs=1e-4)


def test_ask_from_the_shell(cluster: Cluster, tmp_path: Path, http: httpx.Client) -> None:
    (tmp_path / "a.png").write_bytes(RED)
    (tmp_path / "b.png").write_bytes(picture_bytes(7, 56, 56))
    words = ("ask", "What is this?", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--max-tokens", "8")
    said = cluster.run(*words, "--cluster", cluster.name)
    assert said.returncode == 0, said.stderr
    whole = cluster.run(*words, "--cluster", cluster.name, "--json")
    reply = json.loads(whole.stdout)
    assert said.stdout.strip() == reply["choices"][0]["message"]["content"].strip()
    same = http.post(
        "/v1/chat/completions", json=ask(content([RED, picture_bytes(7, 56, 56), "What is this?"]), max_tokens=8)
    )
    assert same.json()["choices"][0]["message"] == reply["choices"][0]["message"]
    missing = cluster.run("ask", "x", str(tmp_path / "none.png"), "--cluster", cluster.name)
    assert (missing.returncode, "none.png cannot be read" in missing.stderr) == (2, True)


def test_ask_names_the_file_that_only_the_encoder_finds_damaged(cluster: Cluster, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole.png", tmp_path / "half.png"
    whole.write_bytes(RED)
    torn = picture_bytes(7, 56, 56)
    half.write_bytes(torn[: len(torn) // 2])
    said = cluster.run("ask", "What is this?", str(whole), str(half), "--cluster", cluster.name)
    assert (said.returncode, said.stdout) == (1, "")
    assert f"HTTP 400: {half}: not a picture we can read" in said.stderr


def test_the_key_is_nowhere_to_be_read_and_the_daemon_knows_it(cluster: Cluster) -> None:
    for words in (
        ("plan", "--json"),
        ("plan",),
        ("status", "--json"),
        ("logs", "--cluster", cluster.name),
        ("events",),
    ):
        result = cluster.run(*words)
        assert KEY not in result.stdout + result.stderr, words
    deep = cluster.run("health", "--deep", "--cluster", cluster.name)
    assert deep.returncode == 0, deep.stdout + deep.stderr


# -- bad requests --


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def bomb() -> bytes:
    """A text of 64 MB in 64 kB, before a picture of a reasonable size whose pixels go on and on."""
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(64 << 20)))
    return png(56, 56, text, chunk(b"IDAT", zlib.compress(bytes(32 << 20))[:2000]))


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x00\x00\x00,\0\0\0\0" + struct.pack("<HH", width, height)


Bad = Callable[[int], tuple[object, int]]  # the other host's port → body, status


def chat(status: int = 400, **fields: Any) -> Bad:
    return lambda _: (ask(**fields), status)


def seen(url: object, status: int = 400) -> Bad:
    return lambda _: (image(url), status)


BAD: dict[str, Bad] = {
    "no JSON": lambda _: (b"{", 400),
    "not UTF-8": lambda _: (b'{"model": "\xff"}', 400),
    "deep JSON": lambda _: (b"[" * 100_000, 400),
    "a list": lambda _: ([], 400),
    "no messages": lambda _: ({"model": "tiny"}, 400),
    "null messages": lambda _: ({"model": "tiny", "messages": None}, 400),
    "a number within": lambda _: ({"model": "tiny", "messages": [5]}, 400),
    "a list as role": lambda _: ({"model": "tiny", "messages": [{"role": ["user"], "content": "x"}]}, 400),
    "an object as text": chat(parts=[{"type": "text", "text": {}}]),
    "a list as URL": seen(["x"]),
    "an image without URL": chat(parts=[{"type": "image_url", "image_url": {}}]),
    "negative max_tokens": chat(max_tokens=-1),
    "max_tokens as text": chat(max_tokens="4"),
    "an endless answer": chat(max_tokens=10**9),
    "too hot": chat(temperature=99),
    "nan": lambda _: (json.dumps(ask(temperature=float("nan"))).encode(), 400),
    "unknown model": chat(status=404, model="gpt-4o"),
    "two answers": chat(n=2),
    "tools": chat(tools=[{"type": "function", "function": {"name": "f"}}]),
    "a schema": chat(response_format={"type": "json_schema", "json_schema": {}}),
    "21 alternatives": chat(logprobs=True, top_logprobs=21),
    "a bias for no token": chat(logit_bias={"99999999": 1}),
    "a body over the limit": lambda _: (b" " * (3 << 20), 413),
    "a long prompt": chat(parts="word " * 6000),
    "broken base64": seen("data:image/png;base64,@@@"),
    "an empty picture": seen("data:image/png;base64,"),
    "a text as picture": seen(data_url(b"hello there")),
    "a truncated header": seen(data_url(RED[:20])),
    "a truncated PNG": seen(data_url(RED[: len(RED) // 2])),
    "a corrupt PNG": seen(data_url(RED[:60] + bytes(40) + RED[100:])),
    "50,000 x 50,000": seen(data_url(png(50_000, 50_000, chunk(b"IDAT", b"")))),
    "a large GIF": seen(data_url(gif(60_000, 60_000))),
    "a bomb": seen(data_url(bomb())),
    "an SVG": seen(data_url(b'<svg xmlns="http://www.w3.org/2000/svg"/>', "image/svg+xml")),
    "a ribbon": seen(data_url(picture_bytes(1, 4000, 4))),
    "a text as video": chat(parts=[{"type": "video_url", "video_url": {"url": data_url(b"hello there", "video/mp4")}}]),
    "nine pictures": chat(parts=[{"type": "image_url", "image_url": {"url": data_url(RED)}}] * 9),
    "a local file": seen("file:///etc/passwd"),
    "a host that is not allowed": seen("https://example.com/a.png"),
    "a private address": seen("http://169.254.169.254/latest/meta-data"),
    "our own ports": seen("http://127.0.0.1:1/a.png"),
    "a name for loopback": lambda port: (image(f"http://localhost:{port}/red.png"), 400),
    "a redirect to a private address": lambda port: (image(f"http://127.0.0.1:{port}/detour"), 400),
    "a slow host": lambda port: (image(f"http://127.0.0.1:{port}/slow"), 400),
    "too much from another host": lambda port: (image(f"http://127.0.0.1:{port}/large"), 400),
    "nothing at another host": lambda port: (image(f"http://127.0.0.1:{port}/none"), 400),
    "a forged picture": chat(parts="look: <|image_pad|>"),
}


def resident(cluster: Cluster) -> int:
    return sum(psutil.Process(rank["pid"]).memory_info().rss for rank in cluster.status()["ranks"])


def test_bad_requests_are_refused_with_a_reason_and_harm_nothing(
    cluster: Cluster, http: httpx.Client, elsewhere: int
) -> None:
    fine = image(f"http://127.0.0.1:{elsewhere}/red.png")
    expected = http.post("/v1/chat/completions", json=fine).json()["choices"][0]["message"]
    refuse_all(http, elsewhere)  # once, so that what is loaded only then is there
    before, pids = resident(cluster), [rank["pid"] for rank in cluster.status()["ranks"]]
    refuse_all(http, elsewhere)
    assert len(BAD) >= 40
    comes_to_rest(cluster)
    assert http.post("/v1/chat/completions", json=fine).json()["choices"][0]["message"] == expected
    assert [rank["pid"] for rank in cluster.status()["ranks"]] == pids
    assert "epdctl_media_bytes 0.0" in http.get("/metrics").text
    assert resident(cluster) - before < 48 << 20, "a picture of 50,000 x 50,000 alone would be 7 GB"


def refuse_all(http: httpx.Client, elsewhere: int) -> None:
    for name, bad in BAD.items():
        body, status = bad(elsewhere)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        reply = http.post("/v1/chat/completions", content=raw)
        assert reply.status_code == status, (name, reply.status_code, reply.text)
        error = reply.json()["error"]
        assert len(error["message"]) > 5, name
        assert error["type"] == "invalid_request_error", name


# -- anything at all --


def damaged(data: bytes, draw: st.DrawFn) -> bytes:
    """Cut off, or with a byte changed."""
    at = draw(st.integers(0, len(data) - 1))
    return data[:at] if draw(st.booleans()) else data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]


@st.composite
def picture_urls(draw: st.DrawFn, elsewhere: int) -> str:
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP"]))
    data = picture_bytes(draw(st.integers(0, 3)), draw(st.integers(28, 112)), draw(st.integers(28, 112)), kind)
    there = f"http://127.0.0.1:{elsewhere}/"
    match draw(st.sampled_from(["whole", "whole", "damaged", "cut base64", "fetched", "not fetched", "text"])):
        case "whole":
            return data_url(data)
        case "damaged":
            return data_url(damaged(data, draw))
        case "cut base64":
            return data_url(data)[: draw(st.integers(0, 200))]
        case "fetched":
            return f"{there}drawn/{draw(st.integers(0, 3))}.png"
        case "not fetched":
            strange = st.sampled_from(["large", "none", "detour", "drawn/0.png#x", "?", "\u2028", "%00"])
            return draw(st.sampled_from([there, "http://localhost/", "https://[::1]/", "file:///"])) + draw(strange)
    return draw(st.text(max_size=20))


def described(http: httpx.Client, elsewhere: int) -> Described:
    """What a schema does not say: the model's name, what a URL is, and that answers should be short. Most parts are
    words and pictures, which is what this model takes."""
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    known = Described(schemas, {"ImageUrl.url": picture_urls(elsewhere)})
    picture, words = known.of("ImagePart"), known.of("TextPart")
    text, parts = st.text(max_size=12), st.lists(st.one_of(picture, words, picture), min_size=1, max_size=3)
    lengths = {f"{name}.max_tokens": st.integers(1, 4) for name in ("ChatRequest", "TextRequest")}
    models = {f"{name}.model": st.just("tiny") for name in ("ChatRequest", "TextRequest")}
    contents = st.one_of(parts, known.field("UserMessage", "content"), parts, text)
    prompts = st.one_of(st.text(min_size=1, max_size=12), known.field("TextRequest", "prompt"))
    said = {"UserMessage.content": contents, "TextRequest.prompt": prompts}
    speakers = Described(schemas, {**known.instead, **said})
    turns = st.lists(
        st.one_of(*map(speakers.of, ("UserMessage", "SystemMessage", "UserMessage", "AssistantMessage"))),
        min_size=1,
        max_size=3,
    )
    return Described(schemas, {**speakers.instead, **lengths, **models, "ChatRequest.messages": turns})


def attack(http: httpx.Client, elsewhere: int, **options: Any) -> Counter[str]:
    """Requests as the OpenAPI description has them, whole or with one node changed. What became of them."""
    fates: Counter[str] = Counter()
    values = described(http, elsewhere)
    chats, texts = values.of("ChatRequest"), values.of("TextRequest")
    requests = st.one_of(
        st.tuples(st.just("/v1/chat/completions"), chats),
        st.tuples(st.just("/v1/chat/completions"), one_node_changed(chats)),
        st.tuples(st.just("/v1/completions"), st.one_of(texts, one_node_changed(texts))),
    )

    @settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, **options)
    @given(requests)
    def send(request: tuple[str, Any]) -> None:
        path, body = request
        reply = http.post(path, content=json.dumps(body).encode())
        assert reply.status_code < 500, (body, reply.text)
        if reply.status_code != 200:
            assert reply.json()["error"]["message"], body
        else:
            assert '"error"' not in reply.text[:10], body
        fates[f"{path}: {'answered' if reply.status_code == 200 else 'refused'}"] += 1
        fates["a picture was seen"] += reply.status_code == 200 and '"image_url"' in json.dumps(body)

    send()
    return fates


def test_nothing_that_is_sent_is_a_500(cluster: Cluster, http: httpx.Client, elsewhere: int) -> None:
    fates = attack(http, elsewhere, max_examples=150, derandomize=True)
    assert min(fates.values()) >= 5, f"too few of a kind: {fates}"
    comes_to_rest(cluster)


@pytest.mark.soak
def test_nothing_new_that_is_sent_is_a_500(cluster: Cluster, http: httpx.Client, elsewhere: int) -> None:
    """Other examples each time."""
    attack(http, elsewhere, max_examples=3000, print_blob=True)
    comes_to_rest(cluster)


# -- clients that hang up --


def descriptors(cluster: Cluster) -> dict[str, int]:
    return {rank["rank"]: psutil.Process(rank["pid"]).num_fds() for rank in cluster.status()["ranks"]}


def question_of(draw: random.Random, elsewhere: int) -> list[dict[str, Any]]:
    """Pictures that are new to the tower, sent along or fetched, and words for one chunk of prefill or for several."""
    sent = [image_part(data_url(drawn(draw.randrange(1 << 20)))) for _ in range(draw.choice([0, 1, 1, 2]))]
    fetched = [
        image_part(f"http://127.0.0.1:{elsewhere}/drawn/{draw.randrange(1 << 20)}.png")
        for _ in range(draw.choice([0, 0, 1]))
    ]
    return [*sent, *fetched, *content(["tell me everything " * draw.choice([1, 1, CHUNK // 4])])]


async def hang_up_in_the_middle(cluster: Cluster, seed: int, elsewhere: int) -> None:
    """Write some of a request, read some of the answer, and go; where, the seed says."""
    draw = random.Random(seed)
    parts = question_of(draw, elsewhere)
    body = json.dumps(ask(parts, max_tokens=40, ignore_eos=True, stream=draw.random() < 0.7)).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        "host: x",
        f"authorization: Bearer {KEY}",
        f"content-length: {len(body)}",
    )
    raw = "\r\n".join([*head, "", ""]).encode() + body
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
    try:
        whole = draw.random() < 0.8
        writer.write(raw if whole else raw[: draw.randrange(len(raw))])
        await writer.drain()
        if whole:
            for _ in range(draw.choice([0, 0, 1, 2, 5, 20])):
                if not await reader.read(1 + draw.randrange(200)):
                    break
        if draw.random() < 0.3:
            writer.transport.abort()  # a reset, and no farewell
    finally:
        writer.close()


def made(http: httpx.Client) -> float:
    """Embeddings that the tower has made."""
    found = re.findall(
        r'^epdctl_rank_embeddings_total\{.*source="made".*\} (\S+)$', http.get("/metrics").text, re.MULTILINE
    )
    return sum(map(float, found))


def test_three_hundred_clients_hang_up_and_leave_nothing(cluster: Cluster, http: httpx.Client, elsewhere: int) -> None:
    expected = http.post("/v1/chat/completions", json=ask(content([RED, "x"]))).json()["choices"][0]["message"]
    comes_to_rest(cluster)
    before, made_before = descriptors(cluster), made(http)

    async def everybody() -> None:
        turns = asyncio.Semaphore(24)

        async def one(seed: int) -> None:
            async with turns:
                await hang_up_in_the_middle(cluster, seed, elsewhere)

        await asyncio.gather(*(one(seed) for seed in range(300)))

    asyncio.run(everybody())
    comes_to_rest(cluster)
    assert made(http) - made_before >= 100, "they left before the tower was at work"
    metrics = http.get("/metrics").text
    assert "epdctl_requests_in_flight 0.0" in metrics
    assert "epdctl_media_bytes 0.0" in metrics
    for rank, count in descriptors(cluster).items():
        assert count <= before[rank] + 3, f"{rank} holds {count} descriptors, and held {before[rank]}"
    assert http.post("/v1/chat/completions", json=ask(content([RED, "x"]))).json()["choices"][0]["message"] == expected
