"""First answers of a cluster with a checkpoint of random weights: how soon, and how far its probabilities are off.

As a command: ``python -m epdctl.bench.firsts CHECKPOINT OUTPUT.json TOPOLOGY…``, each TOPOLOGY ``FILE`` or
``FILE:GPUS``, with GPUS as in CUDA_VISIBLE_DEVICES. The last GPU then holds transformers, when no cluster does.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from epdctl.errors import EpdError

__all__ = ["Prompt", "measure"]

PORT = 8123
MODEL = "firsts"  # the name of the checkpoint's folder, which the cluster takes for the model's
TIMEOUT_SECONDS = 120.0
START_SECONDS = 150
TURNS = 5
TOKENS = 64
LIKELIEST = 20
SIDES = ((560, 560), (448, 336), (644, 364), (280, 504))  # multiples of 28: nobody has to scale them
COMPARED = 64
THEIRS = "transformers, bfloat16"
_fresh = count(1000)  # seeds of pictures that nobody has seen


@dataclass(frozen=True, slots=True)
class Prompt:
    pictures: tuple[bytes, ...]  # PNG files
    text: str

    @property
    def content(self) -> list[dict[str, Any]]:
        urls = (f"data:image/png;base64,{base64.b64encode(file).decode()}" for file in self.pictures)
        return [
            *({"type": "image_url", "image_url": {"url": url}} for url in urls),
            {"type": "text", "text": self.text},
        ]


@dataclass(frozen=True, slots=True)
class Answer:
    first_seconds: float
    seconds: float
    prompt_tokens: int
    tokens: tuple[int, ...]


def picture(seed: int, width: int, height: int) -> bytes:
    patches = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def eight() -> Prompt:
    return Prompt(tuple(picture(next(_fresh), 560, 560) for _ in range(8)), "Describe the difference between these.")


def compared() -> list[Prompt]:
    return [
        Prompt(
            tuple(picture(10 * number + each, *SIDES[(number + each) % len(SIDES)]) for each in range(1 + number % 3)),
            f"What is in picture {1 + number % 3}? Answer with a number.",
        )
        for number in range(COMPARED)
    ]


def body(prompt: Prompt, **options: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt.content}], "temperature": 0} | options


@contextmanager
def cluster(topology: str, checkpoint: Path, home: Path) -> Generator[float]:
    """Gives the seconds until every rank was ready."""
    file, _, gpus = topology.partition(":")
    home.mkdir(parents=True, exist_ok=True)
    places = {"EPDCTL_RUNTIME_DIR": str(home / "run"), "EPDCTL_STATE_DIR": str(home / "state")}
    env = dict(os.environ) | places | {"EPDCTL_MODEL": str(checkpoint), "EPDCTL_PORT": str(PORT)}
    env |= {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    name = Path(file).stem.replace(".", "-")
    epdctl = [sys.executable, "-m", "epdctl"]
    start = time.monotonic()
    up = ["up", "-d", file, "--name", name, "--wait-timeout", str(START_SECONDS)]
    subprocess.run([*epdctl, *up], env=env, check=True)
    try:
        yield time.monotonic() - start
        subprocess.run([*epdctl, "status", "--cluster", name], env=env, check=True)
    finally:
        subprocess.run([*epdctl, "down", "--cluster", name], env=env, check=False)


def ask(client: httpx.Client, prompt: Prompt) -> Answer:
    options = {
        "max_tokens": TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    start, first, usage, tokens = time.monotonic(), 0.0, dict[str, int](), list[int]()
    with client.stream("POST", "/v1/chat/completions", json=body(prompt, **options)) as reply:
        if reply.status_code != 200:
            raise EpdError(reply.read().decode())
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise EpdError(str(chunk["error"]))
                tokens += [token for choice in chunk["choices"] for token in choice.get("token_ids") or []]
                first = first or (time.monotonic() - start if tokens else 0.0)
                usage = chunk.get("usage") or usage
    return Answer(first, time.monotonic() - start, usage["prompt_tokens"], tuple(tokens))


def likeliest(client: httpx.Client, prompt: Prompt, ids: Mapping[str, int]) -> dict[int, float]:
    """Log-probability of each of the likeliest next tokens."""
    options = {"max_tokens": 1, "logprobs": True, "top_logprobs": LIKELIEST}
    reply = client.post("/v1/chat/completions", json=body(prompt, **options))
    if reply.status_code != 200:
        raise EpdError(reply.text)
    (token,) = reply.json()["choices"][0]["logprobs"]["content"]
    return {ids[each["token"]]: each["logprob"] for each in token["top_logprobs"]}


def spellings(checkpoint: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return {tokenizer.decode([token], skip_special_tokens=False): token for token in range(tokenizer.get_vocab_size())}


class Truth:
    """transformers by itself. ``rows``: log-probabilities [prompts, vocabulary], float32, on the CPU."""

    def __init__(self, checkpoint: Path, device: str) -> None:
        import torch
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.device = device
        loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.bfloat16)
        self.model: Any = loaded.eval().to(device)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self.processor: Any = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)

    def widen(self) -> None:
        """From now on in float32, with the same weights."""
        self.model = self.model.float()

    def rows(self, prompts: Sequence[Prompt]) -> Any:
        import torch

        with torch.inference_mode():
            return torch.stack([self._row(prompt) for prompt in prompts])

    def _row(self, prompt: Prompt) -> Any:
        inputs = {key: value.to(self.device) for key, value in self.inputs(prompt).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return self.model(**inputs, logits_to_keep=1).logits[0, -1].float().log_softmax(-1).cpu()

    def inputs(self, prompt: Prompt) -> dict[str, Any]:
        """Of the model, on the CPU, pixels in float32."""
        seen = [Image.open(io.BytesIO(file)).convert("RGB") for file in prompt.pictures]
        pixels = self.processor(images=seen, return_tensors="pt")
        text = self._text(prompt, (pixels["image_grid_thw"].prod(1) // self.processor.merge_size**2).tolist())
        words = self.tokenizer(text, return_tensors="pt")
        kinds = (words["input_ids"] == self.model.config.image_token_id).int()
        return {**words, **pixels, "mm_token_type_ids": kinds}

    def _text(self, prompt: Prompt, rows: Sequence[int]) -> str:
        messages = [{"role": "user", "content": prompt.content}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = text.split("<|image_pad|>")
        filled = [piece + "<|image_pad|>" * number for piece, number in zip(pieces[:-1], rows, strict=True)]
        return "".join([*filled, pieces[-1]])


def distance(row: Mapping[int, float], exact: Any) -> dict[str, float]:
    """Of log-probabilities from the exact ones of the same tokens."""
    off = [abs(logprob - float(exact[token])) for token, logprob in row.items()]
    best = max(row, key=lambda token: row[token])
    return {"mean": statistics.mean(off), "max": max(off), "same_best": float(best == int(exact.argmax()))}


def best_of(row: Any) -> dict[int, float]:
    values, tokens = row.topk(LIKELIEST)
    return dict(zip(tokens.tolist(), values.tolist(), strict=True))


def measure(checkpoint: Path, topologies: Sequence[str], output: Path) -> dict[str, Any]:
    """Writes ``output`` after every step, so that what was measured outlives a failure of the next."""
    report: dict[str, Any] = {"versions": versions(), "clusters": {}, "compared": {}}
    prompts, ids, rows = compared(), spellings(checkpoint), dict[str, list[dict[int, float]]]()
    for topology in topologies:
        try:
            with cluster(topology, checkpoint, checkpoint.parent / "home") as ready:
                found, rows[topology] = _asked(prompts, ids)
            report["clusters"][topology] = {"ready_seconds": ready} | found
        except (subprocess.CalledProcessError, httpx.HTTPError, EpdError) as error:
            report["clusters"][topology] = {"failed": str(error)}
        output.write_text(json.dumps(report, indent=1))
    report["compared"] = _compared(checkpoint, prompts, rows)
    output.write_text(json.dumps(report, indent=1))
    return report


def _asked(prompts: Sequence[Prompt], ids: Mapping[str, int]) -> tuple[dict[str, Any], list[dict[int, float]]]:
    with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=TIMEOUT_SECONDS) as client:
        cold, answers = ask(client, eight()), [ask(client, eight()) for _ in range(TURNS)]
        rows = [likeliest(client, prompt, ids) for prompt in prompts]
    return {"cold": asdict(cold), "answers": [asdict(answer) for answer in answers]}, rows


def _compared(
    checkpoint: Path, prompts: Sequence[Prompt], rows: Mapping[str, Sequence[Mapping[int, float]]]
) -> dict[str, list[dict[str, float]]]:
    import torch

    truth = Truth(checkpoint, f"cuda:{torch.cuda.device_count() - 1}" if torch.cuda.is_available() else "cpu")
    rounded = truth.rows(prompts)
    truth.widen()
    exact = truth.rows(prompts)
    theirs = {THEIRS: [best_of(row) for row in rounded]}
    return {
        who: [distance(row, right) for row, right in zip(each, exact, strict=True)]
        for who, each in {**theirs, **rows}.items()
    }


def versions() -> dict[str, Any]:
    gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False) if _has_gpus() else None
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "pyzmq")},
        "cores": os.cpu_count(),
        "gpus": [line.split(" (")[0] for line in gpus.stdout.splitlines()] if gpus else [],
    }


def _has_gpus() -> bool:
    return Path("/dev/nvidia0").exists()


def table(report: Mapping[str, Any]) -> str:
    lines = [
        "topology | ready s | very first answer s: first token, whole | first token ms, whole s, each token after the "
        "first ms: median | prompt tokens | tokens"
    ]
    lines += [f"{name} | {_speed(found)}" for name, found in report["clusters"].items()]
    return "\n".join([*lines, *_distances(report["compared"])])


def _speed(found: Mapping[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    answers, cold = found["answers"], found["cold"]
    first = statistics.median(each["first_seconds"] for each in answers)
    whole = statistics.median(each["seconds"] for each in answers)
    next_one = statistics.median(
        (each["seconds"] - each["first_seconds"]) / max(1, len(each["tokens"]) - 1) for each in answers
    )
    counts = sorted({len(each["tokens"]) for each in [cold, *answers]})
    return (
        f"{found['ready_seconds']:.1f} | {cold['first_seconds']:.3f}, {cold['seconds']:.2f} | "
        f"{1000 * first:.0f}, {whole:.3f}, {1000 * next_one:.2f} | {answers[0]['prompt_tokens']} | {counts}"
    )


def _distances(compared: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Of each: the first three prompts, all of them, and how many are nearer to float32 than transformers is."""
    lines = []
    for who, rows in compared.items():
        three = " ".join(f"{row['mean']:.4f}/{row['max']:.4f}" for row in rows[:3])
        mean, most = statistics.mean(row["mean"] for row in rows), max(row["max"] for row in rows)
        same, theirs = sum(row["same_best"] for row in rows), compared[THEIRS]
        nearer = sum(row["mean"] < other["mean"] for row, other in zip(rows, theirs, strict=True))
        counts = f"same best {same:.0f}, nearer {nearer} of {len(rows)}"
        lines.append(f"{who}: first three {three}; all {mean:.4f}/{most:.4f}; {counts}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m epdctl.bench.firsts", description="Ask a cluster first questions.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("topologies", nargs="+", metavar="TOPOLOGY")
    told = parser.parse_args()
    print(table(measure(told.checkpoint, told.topologies, told.output)))


if __name__ == "__main__":
    main()
