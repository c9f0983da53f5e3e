"""Videos through a cluster, token for token what ``generate`` says of transformers' own frames.

Without a GPU, where there is torchvision, it runs on the CPU: pytest -m gpu tests/gpu/test_videos.py
"""

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
from tests.support.checkpoints import model_config, tiny_checkpoint
from tests.support.cluster import EPD, GUARD_SECONDS, Answer, Cluster, Part, data_url, free_port
from tests.support.reference import picture_bytes
from tests.support.videos import chosen_frames, promised, video_bytes

pytest.importorskip("torchvision", reason="transformers' video processors need torchvision")

pytestmark = pytest.mark.gpu

ON_ONE_GPU = """
model: {{path: {model}, name: tiny}}
gateway: {{port: ${{EPDCTL_PORT}}}}
stages:
  encoder: {{gpus: [0], share: 0.3, http: {{port: {port}}}}}
  prefill: {{gpus: [0], share: 0.3, chunk_tokens: {chunk}, kv_tokens: 16384}}
  decode: {{gpus: [0], share: 0.3, kv_tokens: 16384}}
"""
ON_CPUS = EPD.replace("{{dp: 2}}", "{{dp: 2, http: {{port: {port}}}}}")


def one(seed: int) -> list[Part]:
    return ["Look: ", video_bytes(seed), " and tell."]


def half_a_minute(seed: int) -> list[Part]:
    return [video_bytes(seed, 300, 10, (64, 64)), "What comes last?"]


def between_pictures(seed: int) -> list[Part]:
    film = video_bytes(seed, 23, 24, (168, 112))
    return [picture_bytes(seed, 56, 84), "then", film, "then", picture_bytes(seed + 1, 84, 56), WORDS]


def two_of_other_rates(seed: int) -> list[Part]:
    return [video_bytes(seed, 61, 30), "or", video_bytes(seed + 1, 48, 24, (56, 56), "MP4 of old"), "?"]


CASES: list[Case] = [one, half_a_minute, between_pictures, two_of_other_rates]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory)


@pytest.fixture(scope="module")
def truth(model: Path) -> Truth:
    return Truth(model)


@pytest.fixture(scope="module")
def surface() -> int:
    """The port of the encoder's own HTTP surface."""
    return free_port()


@pytest.fixture(scope="module")
def cluster(model: Path, surface: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    form = ON_ONE_GPU if torch.cuda.is_available() else ON_CPUS
    topology = form.format(model=model, chunk=CHUNK, port=surface)
    yield from running(Cluster(tmp_path_factory.mktemp("v"), topology, name="videos"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [Cluster.ask, Cluster.ask_streaming], ids=["whole", "streamed"])
def test_equals_generate(
    cluster: Cluster, truth: Truth, case: Case, way: Callable[[Cluster, list[Part]], Answer]
) -> None:
    parts, answer = truth.of(case)
    assert way(cluster, parts) == answer


def test_eight_mixed_at_once(cluster: Cluster, truth: Truth) -> None:
    known = [truth.of(CASES[n % len(CASES)], 100 + 10 * n) for n in range(8)]
    with ThreadPoolExecutor(len(known)) as pool:
        answers = list(pool.map(cluster.ask, [parts for parts, _ in known]))
    assert answers == [answer for _, answer in known]


def test_a_change_of_one_frame_that_is_shown_shows(cluster: Cluster, truth: Truth) -> None:
    parts, answer = truth.of(one)
    assert cluster.ask([parts[0], video_bytes(77), parts[2]]).token_ids != answer.token_ids


def test_it_is_asked_from_the_shell(cluster: Cluster, truth: Truth) -> None:
    film = cluster.home / "film.mp4"
    film.write_bytes(video_bytes(3))
    answer = truth.generate([video_bytes(3), "What moves?"])
    said = cluster.run("ask", "What moves?", str(film), "--max-tokens", "24", "--cluster", cluster.name, check=True)
    assert said.stdout.strip() == answer.text.strip()


def test_a_video_that_breaks_off_is_a_400_and_harms_no_other(cluster: Cluster, truth: Truth) -> None:
    """Its header is whole: what is wrong with the rest only the encoder finds out."""
    film = video_bytes(1, 60, what="WebM")
    url = data_url(film[: len(film) // 2], "video/webm")
    body = cluster.body([]) | {
        "messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}]}]
    }
    reply = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=GUARD_SECONDS)
    assert reply.status_code == 400
    assert "damaged" in reply.json()["error"]["message"]
    parts, answer = truth.of(one)
    assert cluster.ask(parts) == answer


def test_the_encoders_own_surface_takes_videos_and_lists_of_frames(cluster: Cluster, surface: int, model: Path) -> None:
    files, medium = chosen_frames(4, 5)
    frames = "data:video/jpeg;base64," + ",".join(base64.b64encode(file).decode() for file in files)
    items = [data_url(video_bytes(1), "video/mp4"), frames]
    body = {"req_id": "a", "modality": "video", "mm_items": items, "deliver_to": "inline"}
    reply = httpx.post(f"http://127.0.0.1:{surface}/encode", json=body, timeout=GUARD_SECONDS)
    assert reply.status_code == 200, reply.text
    tower, made = load_tower(model_config(model), torch.device("cpu")), load(reply.content)
    for n, film in enumerate((video_bytes(1), medium)):
        (right,) = tower.encode([tower.prepare(film, promised(model, film))])
        assert float((made[str(n)] - right).norm() / right.norm()) < 2e-3  # a GPU's convolutions round to 10 bits
