"""A model that hears, through the whole cluster: what ``generate`` says, token by token, about the same sound."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load

from epdctl.engine.loading import load_tower
from tests.e2e.conftest import CHUNK, running
from tests.e2e.test_parity import WORDS, Case, Truth
from tests.engine.harness import media_item
from tests.support.checkpoints import model_config, tiny_checkpoint
from tests.support.cluster import EPD, GUARD_SECONDS, MONO, Answer, Cluster, Part, data_url, free_port
from tests.support.sounds import as_file, noise, sound_bytes


def no_clip(seed: int) -> list[Part]:
    return [f"What would you say to friend number {seed}?"]


def one(seed: int) -> list[Part]:
    return ["Listen: ", sound_bytes(seed, 1.1), " and tell."]


def five(seed: int) -> list[Part]:
    clips = [as_file(noise(seed + n, 0.4 + 0.3 * n, rate), rate) for n, rate in enumerate((8_000, 16_000, 44_100) * 2)]
    return [part for n, clip in enumerate(clips[:5]) for part in (f"{n} then ", clip)]


def beyond_the_chunk(seed: int) -> list[Part]:
    """Of the prompt; and of what the model hears: four seconds."""
    clip = sound_bytes(seed, 6.0)
    return [WORDS * 8, clip, WORDS * 4]


CASES: list[Case] = [no_clip, one, five, beyond_the_chunk]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory, family="qwen2_audio")


@pytest.fixture(scope="module")
def truth(model: Path) -> Truth:
    return Truth(model)


@pytest.fixture(scope="module")
def surface() -> int:
    """The port of the encoder's own HTTP surface."""
    return free_port()


@pytest.fixture(scope="module")
def split(model: Path, surface: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    topology = EPD.replace("{{dp: 2}}", "{{dp: 2, http: {{port: {port}}}}}").format(
        model=model, chunk=CHUNK, port=surface
    )
    yield from running(Cluster(tmp_path_factory.mktemp("s"), topology, name="sounds"))


@pytest.fixture(scope="module")
def mono(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running(Cluster(tmp_path_factory.mktemp("m"), MONO.format(model=model, chunk=CHUNK), name="mono-sounds"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [Cluster.ask, Cluster.ask_streaming], ids=["whole", "streamed"])
def test_equals_generate(
    split: Cluster, truth: Truth, case: Case, way: Callable[[Cluster, list[Part]], Answer]
) -> None:
    parts, answer = truth.of(case)
    assert way(split, parts) == answer


def test_twelve_mixed_at_once(split: Cluster, truth: Truth) -> None:
    known = [truth.of(CASES[n % len(CASES)], 100 + 10 * n) for n in range(12)]
    with ThreadPoolExecutor(len(known)) as pool:
        answers = list(pool.map(split.ask, [parts for parts, _ in known]))
    assert answers == [answer for _, answer in known]


def test_a_swap_of_clips_shows_through_the_cluster(split: Cluster, truth: Truth) -> None:
    parts, answer = truth.of(five)
    swapped = [*parts]
    swapped[1], swapped[7] = parts[7], parts[1]
    assert split.ask(swapped).token_ids != answer.token_ids


def test_it_is_asked_from_the_shell_and_examined_with_sound(split: Cluster, truth: Truth) -> None:
    clip = split.home / "clip.wav"
    clip.write_bytes(sound_bytes(3, 1.1))
    answer = truth.generate([sound_bytes(3, 1.1), "What is that?"])
    said = split.run("ask", "What is that?", str(clip), "--max-tokens", "24", "--cluster", split.name, check=True)
    assert said.stdout.strip() == answer.text.strip()
    examined = split.run("health", "--deep", "--cluster", split.name)
    assert (examined.returncode, examined.stdout.split()[0]) == (0, "healthy"), examined.stdout


def test_a_clip_that_breaks_off_is_a_400_and_harms_no_other(split: Cluster, truth: Truth) -> None:
    """Its header is whole: what is wrong with the rest only the encoder finds out."""
    torn = as_file(noise(1, 2.0, 44_100), 44_100, "FLAC")[:40_000]
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(torn).decode(), "format": "flac"}}
    body = split.body([]) | {"messages": [{"role": "user", "content": [part]}]}
    reply = httpx.post(f"{split.url}/v1/chat/completions", json=body, timeout=GUARD_SECONDS)
    assert reply.status_code == 400
    assert "damaged" in reply.json()["error"]["message"]
    parts, answer = truth.of(one)
    assert split.ask(parts) == answer


def test_the_encoders_own_surface_takes_sound(split: Cluster, surface: int, model: Path) -> None:
    url, clips = f"http://127.0.0.1:{surface}", [sound_bytes(1, 0.5), sound_bytes(2, 1.5)]
    items = [data_url(clip, "audio/wav") for clip in clips]
    body = {"req_id": "a", "modality": "audio", "mm_items": items, "deliver_to": "inline"}
    reply = httpx.post(f"{url}/encode", json=body, timeout=GUARD_SECONDS)
    assert reply.status_code == 200, reply.text
    tower = load_tower(model_config(model), torch.device("cpu"))
    made = load(reply.content)
    for n, clip in enumerate(clips):
        (right,) = tower.encode([tower.prepare(clip, media_item(model, clip, n, len(clips)))])
        torch.testing.assert_close(made[str(n)], right, atol=1e-5, rtol=1e-5)
    refused = httpx.post(f"{url}/encode", json=body | {"modality": "image"}, timeout=GUARD_SECONDS)
    assert (refused.status_code, refused.json()["param"]) == (400, "modality")
    assert "this model takes audio" in refused.json()["message"]
    proof = httpx.get(f"{url}/health_generate", timeout=GUARD_SECONDS)
    assert (proof.status_code, proof.json()["encode"]) == (200, "fine")


@pytest.mark.parametrize("case", CASES)
def test_all_stages_in_one_process_equal_generate(mono: Cluster, truth: Truth, case: Case) -> None:
    parts, answer = truth.of(case)
    assert mono.ask(parts) == answer
