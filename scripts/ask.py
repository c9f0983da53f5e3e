"""Draw a few pictures, ask a running cluster about them, and print what was drawn beside the answers: ``ask.py URL``.

Exits 1 when an answer is missing, and, with ``--right``, when one is wrong.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import sys
from collections.abc import Iterator

import httpx

from epdctl.bench.shapes.draw import png
from epdctl.bench.shapes.questions import Question, Task, ask
from epdctl.bench.shapes.scenes import TRAINED, Composer

TIMEOUT_SECONDS = 120.0
SIZES = ((64, 64), (80, 48))


def questions(seed: int) -> list[Question]:
    composer = Composer(TRAINED, seed)
    return [
        ask(Task.COLOUR, composer, SIZES),
        ask(Task.SHAPE, composer, SIZES),
        ask(Task.PLACE, composer, SIZES),
        ask(Task.COLOURS, composer, SIZES),
    ]


def body(model: str, question: Question) -> dict[str, object]:
    urls = (f"data:image/png;base64,{base64.b64encode(png(scene)).decode()}" for scene in question.scenes)
    content: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question.prompt})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 32,
        "temperature": 0,
        "stream": True,
    }


def answer(client: httpx.Client, model: str, question: Question) -> Iterator[str]:
    """The pieces of the answer, as they come."""
    with client.stream("POST", "/v1/chat/completions", json=body(model, question)) as reply:
        if reply.status_code != 200:
            raise SystemExit(reply.read().decode())
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise SystemExit(str(chunk["error"]))
                yield from (choice["delta"].get("content") or "" for choice in chunk["choices"])


def main(url: str, seed: int, *, right: bool) -> int:
    missing = wrong = 0
    with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for question in questions(seed):
            said = ""
            count = len(question.scenes)
            print(f"{count} picture{'s' * (count > 1)}, {question.prompt}  →  ", end="", flush=True)
            for piece in answer(client, model, question):
                said += piece
                print(piece, end="", flush=True)
            print(f"   (drawn: {question.answer})")
            missing += not said
            wrong += said.strip() != question.answer
    return int(missing > 0 or (right and wrong > 0))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="http://127.0.0.1:8000")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    parser.add_argument("--right", action="store_true", help="exit 1 when an answer is wrong")
    given = parser.parse_args()
    sys.exit(main(given.url, given.seed, right=given.right))
