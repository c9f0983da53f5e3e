"""A rank that cannot reach the memory it is to write to ends, with what to write in its file."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from epdctl.encoder import worker
from epdctl.encoder.worker import EncoderService
from epdctl.errors import OutOfReach, PeerGone, TransferError, UserError
from epdctl.ids import Incarnation, RankName, Stage
from epdctl.prefill import service as prefill
from epdctl.prefill.service import PrefillService
from epdctl.rank.fatal import fatal
from epdctl.rank.greeting import greet
from epdctl.rank.peers import Changes
from epdctl.wire.lifecycle import Endpoints, FatalKind, Peer
from tests.support.ranks import make_peer, make_spec, run


class Known:
    """A transport that greets; ``error``: instead."""

    def __init__(self, error: Exception | None = None) -> None:
        self.greeted: list[str] = []
        self.error = error

    async def greet(self, endpoint: str) -> None:
        self.greeted.append(endpoint)
        if self.error is not None:
            raise self.error


def peer(transfer: str | None) -> Peer:
    return Peer(
        rank=RankName("decode/0"),
        stage=Stage.DECODE,
        incarnation=Incarnation(1),
        endpoints=Endpoints(transfer=transfer),
    )


@pytest.mark.parametrize(("transfer", "greeted"), [("ipc:///there", ["ipc:///there"]), (None, [])])
def test_whoever_has_a_transport_is_greeted(transfer: str | None, greeted: list[str]) -> None:
    transport: Any = Known()
    run(greet(transport, peer(transfer)))
    assert transport.greeted == greeted


@pytest.mark.parametrize("error", [PeerGone("it was withdrawn"), TransferError("it belongs to another cluster")])
def test_what_else_goes_wrong_is_noted_and_left_to_the_first_write(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    transport: Any = Known(error)
    with caplog.at_level(logging.WARNING):
        run(greet(transport, peer("ipc:///there")))
    assert f"decode/0 was not greeted: {error}" in caplog.text


def test_prefill_greets_decode_ranks_and_encoders_greet_readers(sockets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greeted: list[str] = []

    async def note(_: object, peer: Peer) -> None:
        greeted.append(peer.rank)

    monkeypatch.setattr(prefill, "greet", note)
    monkeypatch.setattr(worker, "greet", note)
    names = ["gateway/0", "encoder-router/0", "encoder/1", "prefill/0", "decode/0", "language/0"]
    joined = tuple(make_peer(name) for name in names)

    async def work() -> None:
        service = PrefillService(make_spec("prefill/1", sockets))
        service._machine = SimpleNamespace(transport=None)  # type: ignore[assignment]
        service._peers(joined, Changes(joined=joined))
        encoder = EncoderService(make_spec("encoder/0", sockets))
        encoder._loaded = SimpleNamespace(transport=None)  # type: ignore[assignment]
        encoder.peers_changed(joined)
        await asyncio.sleep(0)
        service._machine = encoder._loaded = None
        await service.close()
        await encoder.close()

    run(work())
    assert greeted == ["decode/0", "prefill/0", "language/0"]


def test_memory_out_of_reach_is_the_plans_fault_and_no_restart_helps() -> None:
    transport: Any = Known(OutOfReach("the memory behind ipc:///there: no peer access"))
    with pytest.raises(UserError, match=r"decode/0 cannot be written to: .* no peer access") as caught:
        run(greet(transport, peer("ipc:///there")))
    last = fatal(caught.value, serving=True)
    assert (last.kind, last.restartable) == (FatalKind.CONFIG, False)
    assert "write transfer.backend: zmq" in last.text
