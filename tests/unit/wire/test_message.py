"""A codec lets through what its union says, and nothing else."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from epdctl.errors import BadMessage
from epdctl.ids import Incarnation, RankName, RunId, Stage
from epdctl.wire.lifecycle import RANK_TO_SUPERVISOR, SPEC, Endpoints, Hello, Peer, Ready
from epdctl.wire.message import Codec, to_json
from epdctl.wire.transfer import RECEIVER_TO_WRITER, Landed, Rejected
from tests.support.ranks import make_spec

HELLO = Hello(run=RunId("ab"), rank=RankName("prefill/0.1"), incarnation=Incarnation(3), protocol=1, token="t", pid=7)


def test_a_message_comes_back_as_it_was_with_its_own_types() -> None:
    back = RANK_TO_SUPERVISOR.decode(RANK_TO_SUPERVISOR.encode(HELLO))
    assert back == HELLO
    assert isinstance(back, Hello)
    assert type(back.rank) is RankName
    assert back.rank.shard == 1


def test_a_spec_comes_back_whole() -> None:
    spec = make_spec("encoder/1", Path("/tmp/s"), incarnation=4, threads=3, devices=[0])
    assert SPEC.decode(SPEC.encode(spec)) == spec


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x93\x01\x02\x03",
        msgspec.msgpack.encode({"t": "Unheard"}),
        msgspec.msgpack.encode({"t": "Landed"}),  # a field is missing
        msgspec.msgpack.encode({"t": "Landed", "write": 1, "more": 2}),  # one too many
        msgspec.msgpack.encode({"t": "Landed", "write": "one"}),
        msgspec.msgpack.encode({"write": 1}),
        RECEIVER_TO_WRITER.encode(Landed(write=1))[:-1],
        b"\x91" * 100_000,
    ],
)
def test_anything_else_is_a_bad_message(frame: bytes) -> None:
    with pytest.raises(BadMessage):
        RECEIVER_TO_WRITER.decode(frame)


def test_a_rank_name_is_checked_on_the_way_in() -> None:
    frame = msgspec.msgpack.encode(
        {"t": "Hello", "run": "a", "rank": "../../etc", "incarnation": 1, "protocol": 1, "token": "", "pid": 1}
    )
    with pytest.raises(BadMessage, match="rank name"):
        RANK_TO_SUPERVISOR.decode(frame)


def test_the_limit_holds_both_ways() -> None:
    small: Codec[Landed | Rejected] = Codec(Landed | Rejected, limit=64)
    long = Rejected(write=1, kind="stale", text="x" * 64)
    with pytest.raises(BadMessage, match="limit is 64"):
        small.encode(long)
    with pytest.raises(BadMessage, match="limit is 64"):
        small.decode(RECEIVER_TO_WRITER.encode(long))


def test_another_sockets_message_is_refused() -> None:
    with pytest.raises(BadMessage):
        RANK_TO_SUPERVISOR.decode(RECEIVER_TO_WRITER.encode(Landed(write=1)))


def test_json_has_the_fields_and_no_tag() -> None:
    assert msgspec.json.decode(to_json(Ready(endpoints=Endpoints(inbox="i")))) == {
        "endpoints": {"inbox": "i", "transfer": None, "http": None, "encode": None},
        "facts": None,
        "transfer": None,
    }


def test_a_peer_is_the_same_until_it_comes_back_as_another() -> None:
    peer = Peer(rank=RankName("decode/0"), stage=Stage.DECODE, incarnation=Incarnation(1), endpoints=Endpoints())
    leaving, back = msgspec.structs.replace(peer, accepting=False), msgspec.structs.replace(peer, epoch=1)
    assert peer == leaving
    assert not peer != leaving  # noqa: SIM202 - it has two comparisons
    assert {peer: 1}[leaving] == 1
    assert peer != back
    assert not peer == back  # noqa: SIM201
