"""Whether the encoder serves, by what the surface says of it and of each rank."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from epdctl.encoder.canary import Canary
from epdctl.encoder.dispatch import RankKey
from epdctl.encoder.jobs import Jobs
from epdctl.encoder.proof import BUSY, FINE, Prober, norm_of
from epdctl.encoder.verdict import Roster, judge
from epdctl.encoder.worker import EncoderService
from epdctl.engine.api import Prepared
from epdctl.ids import Incarnation, Modality, RankName, RequestId, Stage
from epdctl.rank.service import HearsAbsent
from epdctl.wire.config import EncoderConfig, Limits
from epdctl.wire.encode import Encode, EncodeItem, ItemEncoded, MediaItem, Prove, Proved
from epdctl.wire.lifecycle import Absent
from epdctl.wire.transfer import TensorSpec
from tests.support.towers import CANARY_SEED, WIDTH, embedding, picture
from tests.unit.encoder.site import ROWS, PictureTower, Site, at_site, held
from tests.unit.encoder.test_services import Gate, World, in_world, turns_until


def test_health_counts_the_ranks_of_the_plan_and_proves_it_with_a_picture(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        reply = await site.http.get("/health")
        assert (reply.status_code, reply.json()["status"]) == (503, "unhealthy")
        assert (await site.http.get("/health_generate")).status_code == 503
        tower = PictureTower()
        await site.encoder(0, tower)
        reply = await site.http.get("/health")
        assert (reply.status_code, reply.json()["status"], reply.json()["serving"]) == (200, "degraded", "1 of 2")
        assert [rank["state"] for rank in reply.json()["ranks"]] == ["ready", "not serving"]
        await site.encoder(1)
        assert (await site.http.get("/health")).json()["status"] == "healthy"
        storm = await asyncio.gather(*(site.http.get("/health_generate") for _ in range(20)))
        assert {(reply.status_code, reply.json()["encode"]) for reply in storm} == {(200, FINE)}
        del site.world.peers["encoder/1"]
        site.world.tell()
        tower.encode = lambda batch: [torch.full((item.rows, WIDTH), torch.nan) for item in batch]  # type: ignore[method-assign]
        reply = await site.http.get("/health_generate")
        assert reply.status_code == 503
        assert "its embedding is not finite" in reply.json()["encode"]
        assert "has norm nan" in reply.json()["proofs"]["encoder/0"]

    at_site(sockets, tmp_path, test)


def partly_spoilt(batch: Sequence[Prepared]) -> list[torch.Tensor]:
    seeds = [int(item.pixels[0, 0]) for item in batch]
    made = [embedding(item.rows, seed) for item, seed in zip(batch, seeds, strict=True)]
    for each, seed in zip(made, seeds, strict=True):
        each[-1, -1] = math.inf if seed == 66 else each[-1, -1]
    return made


def test_an_embedding_that_is_not_finite_goes_to_nobody(sockets: Path, tmp_path: Path) -> None:
    """A rank that always had work gave nan to everybody, and was never asked for its canary."""

    async def test(site: Site) -> None:
        tower = PictureTower()
        await site.encoder(tower=tower)
        tower.encode = partly_spoilt  # type: ignore[method-assign]
        replies = await asyncio.gather(*(site.encode(seed, deliver_to="inline") for seed in (5, 66, 7)))
        assert [reply.status_code for reply in replies] == [200, 502, 200]
        assert "not finite" in replies[1].json()["message"]
        encoder = site.world.services["encoder/0"]
        assert isinstance(encoder, EncoderService)
        assert (encoder._here.forward.made, encoder._here.forward.spoilt) == (1 + 2, 1), "with the canary of the start"
        assert encoder.pulse().unhealthy is None

    at_site(sockets, tmp_path, test)


def blind(batch: Sequence[Prepared]) -> list[torch.Tensor]:
    return [torch.zeros(item.rows, WIDTH) for item in batch]


def test_every_rank_is_proved_and_one_that_is_blind_is_named(sockets: Path, tmp_path: Path) -> None:
    """The probe went to whichever rank had least to do, and the others were never looked at."""

    async def test(site: Site) -> None:
        towers = [PictureTower(), PictureTower()]
        for number, tower in enumerate(towers):
            await site.encoder(number, tower)
        reply = await site.http.get("/health_generate")
        assert (reply.status_code, reply.json()["status"]) == (200, "healthy")
        assert reply.json()["proofs"] == {"encoder/0": "fine", "encoder/1": "fine"}
        towers[1].encode = blind  # type: ignore[method-assign]
        for _ in range(2):  # wherever the item went that goes the way of all items
            reply = await site.http.get("/health_generate")
            assert (reply.status_code, reply.json()["status"], reply.json()["serving"]) == (200, "degraded", "1 of 2")
            assert [rank["state"] for rank in reply.json()["ranks"]] == ["ready", "unfit"]
            assert "has norm 0; at the start it was" in reply.json()["proofs"]["encoder/1"]
        towers[0].encode = blind  # type: ignore[method-assign]
        reply = await site.http.get("/health_generate")
        assert (reply.status_code, reply.json()["status"]) == (503, "unhealthy")

    at_site(sockets, tmp_path, test)


def test_a_crowd_is_no_illness_while_its_items_get_done(sockets: Path, tmp_path: Path) -> None:
    """22 of 30 probes of an encoder that had all hands full were 503; so were those whose proofs came before anything
    else that was made."""

    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(tower=tower)
        running = [asyncio.ensure_future(site.encode(seed, deliver_to="inline")) for seed in (1, 2)]
        await turns_until(lambda: site.world.services["encoder-router/0"].pulse().inflight == 2)
        probing = asyncio.ensure_future(site.http.get("/health_generate"))
        await turns_until(lambda: 'epdctl_encoder_items_total{end="full"} 1.0' in site.surface._meters.text().decode())
        prober = site.surface._prober
        ((rank, (number, proof)),) = prober._asked.items()
        prober.proved(rank, Proved(number=number, fault=None))
        await turns_until(lambda: not prober._asked and proof.done())
        gate.open.set()
        reply = await probing
        assert (reply.status_code, reply.json()["encode"]) == (200, BUSY), reply.text
        assert reply.json()["proofs"] == {"encoder/0": "fine"}
        assert [(await one).status_code for one in running] == [200, 200]

    at_site(sockets, tmp_path, test, limits=Limits(inflight=1, queue=1))


def test_a_crowd_of_which_nothing_gets_done_is_an_illness(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(tower=tower)
        running = [asyncio.ensure_future(site.encode(seed, deliver_to="inline")) for seed in (1, 2)]
        await turns_until(lambda: site.world.services["encoder-router/0"].pulse().inflight == 2)
        reply = await site.http.get("/health_generate")
        assert (reply.status_code, reply.json()["status"]) == (503, "unhealthy")
        assert "was not encoded: 1 pictures are waiting" in reply.json()["encode"]
        assert "did not answer within 0.1 s" in reply.json()["proofs"]["encoder/0"]
        gate.open.set()
        assert [(await one).status_code for one in running] == [200, 200]

    at_site(sockets, tmp_path, test, limits=Limits(inflight=1, queue=1), canary_deadline=0.1)


def test_a_rank_that_leaves_is_not_waited_for(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        gate, tower = held(site)
        await site.encoder(0, tower)
        await site.encoder(1)
        running = asyncio.ensure_future(site.encode(1, deliver_to="inline"))
        await gate.began.count(1)  # on encoder/0, whose canary has to wait
        probing = asyncio.ensure_future(site.http.get("/health_generate"))
        await turns_until(lambda: bool(site.surface._prober._asked))
        del site.world.peers["encoder/0"]
        site.world.tell()
        reply = await probing
        assert (reply.status_code, reply.json()["status"]) == (200, "degraded")
        assert reply.json()["proofs"] == {"encoder/1": "fine"}
        gate.open.set()
        assert (await running).status_code == 200

    at_site(sockets, tmp_path, test)


def test_a_rank_that_drains_is_not_counted_among_those_that_serve(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        for number in range(2):
            await site.encoder(number)
        peer = site.world.peers["encoder/1"]
        site.world.peers["encoder/1"] = msgspec.structs.replace(peer, accepting=False)
        site.world.tell()
        reply = await site.http.get("/health")
        assert (reply.status_code, reply.json()["serving"]) == (200, "1 of 2")
        assert [rank["state"] for rank in reply.json()["ranks"]] == ["ready", "draining"]
        del site.world.peers["encoder/1"]
        router = site.world.services["encoder-router/0"]
        assert isinstance(router, HearsAbsent)
        gone = Absent(rank=peer.rank, stage=peer.stage, incarnation=peer.incarnation, reason="failed: no memory")
        router.absent_changed([gone])
        site.world.tell()
        assert (await site.http.get("/health")).json()["ranks"][1]["reason"] == "failed: no memory"

    at_site(sockets, tmp_path, test)


def test_the_canary_waits_for_one_batch_and_not_for_all_that_wait(sockets: Path) -> None:
    async def test(world: World) -> None:
        gate = Gate()
        tower = gate.tower()
        encoder = await world.encoder(tower, encoder=EncoderConfig(batch_patches=4 * ROWS))
        router, answers = world.as_router()
        for number in range(4):
            job = Encode(
                request=RequestId(f"{number}"),
                attempt=1,
                item=MediaItem(
                    index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 2, 2 * ROWS], rows=ROWS
                ),
                slot=None,
                notify="",
                budget_s=300.0,
            )
            router.send(EncodeItem(dispatch=number, job=job), [picture(ROWS, number)])
        await gate.began.count(1)
        await turns_until(lambda: encoder._here.forward.waiting == 3)
        before: list[int] = []

        def canary() -> torch.Tensor:
            before.append(len(tower.batches))
            return embedding(1, CANARY_SEED)

        tower.canary = canary
        proving = asyncio.ensure_future(encoder.prove())
        await turns_until(lambda: encoder._here.forward.waiting == 4)
        gate.open.set()
        assert (await proving).fault is None
        assert before == [1]
        await answers.until(lambda seen: sum(isinstance(one, ItemEncoded) for one in seen) == 4)

    in_world(sockets, test)


def test_strictly_one_dead_rank_is_a_503_that_still_says_who_serves(sockets: Path, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await site.encoder()
        reply = await site.http.get("/health")
        assert (reply.status_code, reply.json()["status"], reply.json()["serving"]) == (503, "degraded", "1 of 2")

    at_site(sockets, tmp_path, test, strict=True)


class NoRanks:
    def open_ranks(self) -> list[RankKey]:
        return []

    def tell(self, rank: RankKey, message: Prove) -> None:
        raise AssertionError("there is none")


def test_a_storm_of_probes_is_one_probe(sockets: Path) -> None:
    async def test(world: World) -> None:
        _, _, _ = await world.router()
        gate = Gate()
        await world.encoder(gate.tower())
        jobs = Jobs(str(world.peers["encoder-router/0"].endpoints.inbox), 1 << 20)
        world.stack.callback(jobs.close)
        item = MediaItem(index=0, modality=Modality.IMAGE, content_hash="", of=1, grid=[1, 2, 2 * ROWS], rows=ROWS)
        prober = Prober(NoRanks(), jobs, Canary(picture(ROWS, 3), item), 60.0)
        asking = [asyncio.ensure_future(prober.outcome()) for _ in range(9)]
        await gate.began.count(1)
        assert len(jobs) == 1
        gate.open.set()
        assert {outcome.encode for outcome in await asyncio.gather(*asking)} == {FINE}
        assert len(gate.began.seen) == 1
        assert len(jobs) == 0

    in_world(sockets, test)


def key(number: int) -> RankKey:
    return RankKey(RankName(f"encoder/{number}"), Incarnation(1))


def ready(*numbers: int) -> Roster:
    return Roster([(key(number), number) for number in numbers])


@pytest.mark.parametrize(
    ("planned", "there", "strict", "word", "status"),
    [
        (2, (0, 1), False, "healthy", 200),
        (2, (0, 1), True, "healthy", 200),
        (3, (0, 2), False, "degraded", 200),
        (3, (0, 2), True, "degraded", 503),
        (2, (), False, "unhealthy", 503),
        (0, (), False, "unhealthy", 503),
        (1, (0, 1), False, "healthy", 200),
    ],
)
def test_the_verdict(planned: int, there: tuple[int, ...], strict: bool, word: str, status: int) -> None:
    verdict = judge(planned, ready(*there), strict=strict)
    assert (verdict.word, verdict.status) == (word, status)
    assert len(verdict.ranks) == max(planned, len(there))


def test_a_rank_that_drains_or_is_unfit_does_not_serve_and_a_missing_one_has_its_reason() -> None:
    why = "unhealthy: the test item's embedding has norm 0"
    absent = [
        Absent(rank=RankName("encoder/3"), stage=Stage.ENCODER, incarnation=Incarnation(2), reason=why),
        Absent(rank=RankName("decode/0"), stage=Stage.DECODE, incarnation=Incarnation(1), reason="failed: no memory"),
    ]
    roster = Roster([(key(0), 1), (key(1), 2), (key(2), 0)], resting=[key(1)], absent=absent)
    verdict = judge(5, roster, strict=False, faults={RankName("encoder/2"): "norm 0"})
    assert (verdict.word, verdict.as_json()["serving"]) == ("degraded", "1 of 5")
    assert [(rank.state, rank.reason) for rank in verdict.ranks] == [
        ("ready", None),
        ("draining", "it finishes what it has"),
        ("unfit", "norm 0"),
        ("not serving", why),
        ("not serving", None),
    ]
    assert judge(1, Roster([(key(0), 1)], resting=[key(0)]), strict=False).status == 503


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_norm_is_the_same_from_bytes(dtype: str) -> None:
    tensor = torch.arange(12, dtype=getattr(torch, dtype))
    spec = TensorSpec(dtype=dtype, shape=[12], nbytes=tensor.nbytes)
    assert norm_of(memoryview(bytes(tensor.view(torch.uint8).numpy())), spec) == float(tensor.double().norm())
    assert norm_of(memoryview(b"12"), msgspec.structs.replace(spec, dtype="int8")) != 0.0
