"""Ask a running cluster about two small pictures and print the answer as it comes: ``ask.py URL``."""

from __future__ import annotations

import base64
import io
import json
import random
import sys

import httpx
from PIL import Image, ImageDraw

TIMEOUT_SECONDS = 120.0


def picture(width: int, height: int, colour: str, shape: str) -> str:
    """A data: URL of a PNG with one shape on white."""
    image = Image.new("RGB", (width, height), "white")
    shift = random.randrange(8)  # a picture that the encoders have not seen
    box = (width // 4 + shift, height // 4, 3 * width // 4, 3 * height // 4)
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def question(model: str) -> dict[str, object]:
    pictures = [picture(140, 112, "red", "circle"), picture(84, 168, "blue", "square")]
    content: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content.append({"type": "text", "text": "What is different between these two pictures?"})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 24,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def main(url: str) -> int:
    with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        chunks, usage = 0, None
        with client.stream("POST", "/v1/chat/completions", json=question(model)) as reply:
            if reply.status_code != 200:
                print(reply.read().decode(), file=sys.stderr)
                return 1
            for line in reply.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    print(f"\n{chunk['error']}", file=sys.stderr)
                    return 1
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
                    chunks += 1
    print(f"\n\n({chunks} chunks; {json.dumps(usage)})")
    return 0 if usage and usage["completion_tokens"] > 0 else 1


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} http://127.0.0.1:8000")
    sys.exit(main(sys.argv[1]))
