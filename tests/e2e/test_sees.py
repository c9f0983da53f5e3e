"""The shipped model sees through a cluster what it sees alone; a cluster that shows it something else is found out."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from epdctl.adapters import make_plan
from epdctl.bench.clusters import await_ready
from epdctl.bench.clusters import running as started
from epdctl.bench.shapes.draw import png
from epdctl.bench.shapes.model import DIRECTORY
from epdctl.bench.shapes.questions import Question, Task, ask
from epdctl.bench.shapes.reader import Reader
from epdctl.bench.shapes.scenes import TRAINED, UNSEEN, Composer
from epdctl.control.client import Client
from epdctl.ids import Stage
from epdctl.topology.plan import PlannedRank
from tests.e2e.conftest import running
from tests.support.cluster import GUARD_SECONDS, Answer, Cluster, Part, parse
from tests.support.faulty import marked
from tests.support.leaks import no_leaks
from tests.support.swaps import Swap, mixed, swap

PROFILE = Path(__file__).parents[2] / "profiles" / "cpu-demo.yaml"
MODEL = "shapes-vl"
SEED = 4_000_037  # neither training's nor the examination's
AT_ONCE = 16
BATCH = 50
FEW, MANY = 40, 200
LEARNT = [(Task.COLOUR, 1), (Task.PLACE, 1), (Task.SHAPE, 1), (Task.COUNT, 1), (Task.COLOURS, 4), (Task.COLOURS, 8)]
LEARNT += [(Task.WHICH, 4), (Task.SAME, 2), (Task.SHAPES, 4)]
ORDERED = [(Task.COLOURS, 2), (Task.COLOURS, 4), (Task.COLOURS, 8), (Task.SHAPES, 4), (Task.WHICH, 4)]
COLOURS = 8  # there are

# The rank's own canary, which compares norms, is made to wait: here the answer alone has to tell.
FAULTY = """
model: {path: shapes-vl}
gateway:
  port: ${EPDCTL_PORT}
stages:
  mono: {gpus: none, kv_tokens: 16384, canary: 1h}
"""


def new(task: Task, composer: Composer, pictures: int) -> Question:
    """Each of its pictures has a size of its own."""
    return ask(task, composer, [composer.size() for _ in range(pictures)])


def parts(question: Question) -> list[Part]:
    return [*map(png, question.scenes), question.prompt]


def to_be_swapped(made: Swap) -> list[Part]:
    pictures = [png(scene) for scene in made.asked.scenes]
    for place in (made.i, made.j):
        pictures[place] = marked(pictures[place])
    return [*pictures, made.asked.prompt]


def ask_all(cluster: Cluster, questions: Sequence[Question]) -> list[Answer]:
    return send_all(cluster, list(map(parts, questions)))


def send_all(cluster: Cluster, requests: Sequence[list[Part]]) -> list[Answer]:
    """AT_ONCE under way at any time; the answers in the order of the requests."""

    def answer(client: httpx.Client, request: list[Part]) -> Answer:
        body = cluster.body(request, model=MODEL, max_tokens=32)
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        return parse(reply.json())

    with httpx.Client(base_url=cluster.url, timeout=GUARD_SECONDS) as client, ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(partial(answer, client), requests))


@contextmanager
def faulty(home: Path, service: str) -> Iterator[tuple[Cluster, Client]]:
    """A cluster of one mono rank, whose process runs ``service`` of the faulty ones."""
    cluster = Cluster(home, FAULTY, name=service)
    plan = make_plan(cluster.file, environ=cluster.env, name=service)

    def replaced(rank: PlannedRank) -> PlannedRank:
        config = msgspec.structs.replace(rank.config, service=f"tests.support.faulty:{service}")
        return dataclasses.replace(rank, config=config) if rank.stage is Stage.MONO else rank

    plan = dataclasses.replace(plan, ranks=tuple(map(replaced, plan.ranks)))
    with no_leaks(cluster.env), started(plan, cluster.env) as daemon:
        await_ready(daemon.cluster.client)
        yield cluster, daemon.cluster.client


def problems(client: Client) -> str:
    """Of a cluster that is unhealthy by its answer alone."""
    assert client.health().verdict == "healthy"
    reply = client.health(deep=True, budget_s=GUARD_SECONDS)
    assert reply.verdict == "unhealthy"
    return " ".join(problem.text for problem in reply.problems)


def test_pictures_that_changed_places_in_transit_are_answered_so_and_found(tmp_path: Path) -> None:
    """Any two: of each question those at i and j, whose swap changes what is right. Of sizes that were held out: of
    these the model itself gets nearly all right, so that what is wrong is the transit's doing."""
    composer = Composer(UNSEEN, SEED)
    with faulty(tmp_path, "swapping") as (cluster, client):
        assert "expected '1 red, 2 blue', got '1 blue, 2 red'" in problems(client)
        for task, pictures in ORDERED:
            swaps = [swap(task, composer, mixed(composer, pictures)) for _ in range(FEW)]
            answers = send_all(cluster, list(map(to_be_swapped, swaps)))
            right = [answer.text == made.answer for answer, made in zip(answers, swaps, strict=True)]
            assert sum(right) >= 0.95 * FEW, (task, pictures, sum(right))


def test_a_tower_that_says_nothing_leaves_guesses_and_is_found(tmp_path: Path) -> None:
    composer = Composer(TRAINED, SEED)
    asked = [new(Task.COLOUR, composer, 1) for _ in range(FEW)]
    with faulty(tmp_path, "blind") as (cluster, client):
        answers = ask_all(cluster, asked)  # first: once it is found out, it is left out
        assert "expected '1 red, 2 blue', got '" in problems(client)
    right = sum(answer.text == question.answer for answer, question in zip(answers, asked, strict=True))
    chance = 1 / COLOURS
    assert right / FEW == pytest.approx(chance, abs=3 * math.sqrt(chance * (1 - chance) / FEW))


@pytest.fixture(scope="module")
def sees(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running(Cluster(tmp_path_factory.mktemp("s"), PROFILE.read_text(), name="sees"))


def test_every_answer_is_the_one_that_transformers_gives(sees: Cluster) -> None:
    composer = Composer(UNSEEN, SEED)
    questions = [new(task, composer, count) for task, count in (LEARNT * MANY)[:MANY]]
    answers = ask_all(sees, questions)
    reader = Reader(DIRECTORY)
    wanted = [tokens for start in range(0, MANY, BATCH) for tokens in reader.tokens(questions[start : start + BATCH])]
    assert [list(answer.token_ids) for answer in answers] == wanted
    assert [answer.text for answer in answers] == [reader.tokenizer.decode(tokens) for tokens in wanted]
    assert {answer.finish_reason for answer in answers} == {"stop"}
    done = [rank["completed"] for rank in sees.status()["ranks"] if rank["stage"] == "encoder"]
    assert len(done) == 2
    assert all(done), "both encoders had a part in it"


def test_one_scrape_shows_every_rank(sees: Cluster) -> None:
    composer = Composer(TRAINED, SEED)
    question = new(Task.COLOUR, composer, 1)
    ranks = {(rank["rank"], rank["stage"]) for rank in sees.status()["ranks"]}
    before = cached(scraped(sees))
    ask_all(sees, [question, question])
    deadline = time.monotonic() + GUARD_SECONDS
    while cached(found := scraped(sees)) == before:  # heartbeats bring it
        assert time.monotonic() < deadline, "the second one's embedding was not remembered"
    assert {(labels["rank"], labels["stage"]): ready for labels, ready in found["epdctl_rank_ready"]} == dict.fromkeys(
        ranks, 1
    )
    assert {labels["rank"] for labels, _ in found["epdctl_rank_kv_pages_free"]} == {"prefill/0", "decode/0"}
    assert {(labels["rank"], labels["stage"]) for labels, _ in found["epdctl_rank_in_flight"]} == ranks
    assert sum(value for _, value in found["epdctl_rank_cache_bytes"]) > 0
    assert found["epdctl_supervisor_up"] == [({}, 1)]


Samples = dict[str, list[tuple[dict[str, str], float]]]


def scraped(cluster: Cluster) -> Samples:
    text = httpx.get(f"{cluster.url}/metrics", timeout=GUARD_SECONDS).text
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def cached(found: Samples) -> float:
    """Embeddings that were not made again, or not twice."""
    return sum(value for labels, value in found["epdctl_rank_embeddings_total"] if labels["source"] != "made")


def test_a_cluster_that_answers_rightly_is_healthy(sees: Cluster) -> None:
    reply = sees.run("health", "--deep")
    assert (reply.returncode, reply.stdout.split()[0]) == (0, "healthy"), reply.stderr


def test_one_trace_shows_a_request_s_way_through_every_rank(sees: Cluster, tmp_path: Path) -> None:
    """Two pictures in one question: what led to what, from the gateway and back to it, with the work beneath."""
    composer = Composer(TRAINED, SEED)
    assert sees.run("profile", "start", "--output", str(tmp_path)).returncode == 0
    ask_all(sees, [new(Task.COLOURS, composer, 2)])
    stopped = sees.run("profile", "stop", "--json")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    reply = json.loads(stopped.stdout)
    assert all(rank["clock_uncertainty_us"] is not None for rank in reply["results"])
    trace = Trace.read(Path(reply["merged"]))
    (request,) = {event["args"]["request"] for event in trace.slices("hop")}

    told = [(trace.process(start), trace.process(end)) for start, end in trace.arrows]
    for step in [
        ("gateway/0", "decode/0"),
        ("decode/0", "prefill/0"),
        ("prefill/0", "encoder-router/0"),
        ("encoder-router/0", "encoder/0"),
        ("encoder-router/0", "encoder/1"),
        ("encoder/0", "prefill/0"),
        ("encoder/1", "prefill/0"),
        ("prefill/0", "decode/0"),
        ("decode/0", "gateway/0"),
    ]:
        assert step in told, (step, told)
    assert reply["arrows_backwards"] == 0  # by more than the clocks are known to be off

    for rank, hop in [
        ("encoder/0", "encoding"),
        ("encoder/1", "encoding"),
        ("prefill/0", "chunk"),
        ("decode/0", "step"),
    ]:
        during = [event for event in trace.slices("hop") if (trace.process(event), event["name"]) == (rank, hop)]
        assert {event["args"]["request"] for event in during} == {request}
        work = [event["ts"] for event in trace.slices("cpu_op") if trace.process(event) == rank]
        spans = [(event["ts"], event["ts"] + event["dur"]) for event in during]
        assert work, f"{rank} did nothing"
        inside = sum(any(began <= at <= ended for began, ended in spans) for at in work)
        # an encoder's canary may have run meanwhile, which is of no request
        assert inside > 0.25 * len(work), f"{rank}: {inside} of {len(work)} operators ran while it was {hop}"
    assert "USDT" not in sees.run("logs", "--tail", "1000").stdout


@dataclasses.dataclass
class Trace:
    """A merged trace, as whoever opens it sees it."""

    events: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Trace:
        with gzip.open(path) as file:
            return cls(json.load(file)["traceEvents"])

    def __post_init__(self) -> None:
        named = [event for event in self.events if event["name"] == "process_name"]
        self._names = {event["pid"]: event["args"]["name"] for event in named}

    def process(self, event: dict[str, Any]) -> str:
        return str(self._names[event["pid"]])

    def slices(self, category: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["ph"] == "X" and event["cat"] == category]

    @property
    def arrows(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        ends = {event["id"]: event for event in self.events if event["ph"] == "f"}
        return [(event, ends[event["id"]]) for event in self.events if event["ph"] == "s"]
