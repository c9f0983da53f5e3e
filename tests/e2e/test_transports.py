"""The same tokens whichever way embeddings and KV pages travel through the cluster, and the same care for a rank that
is killed with requests in flight. Other clusters here use shm.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.test_kill import kill_with_requests_in_flight
from tests.e2e.test_parity import Truth, beyond_the_chunk, eight, no_picture, three_sizes
from tests.e2e.test_soak import HOLDERS, idle
from tests.support.cluster import Cluster
from tests.support.leaks import marked_processes, no_leaks
from tests.support.listeners import OPEN, exposed, listeners
from tests.support.rude_writers import of_another_cluster, without_end

CASES = [eight, beyond_the_chunk, three_sizes, no_picture]


@pytest.fixture(scope="module")
def truth(checkpoint: Path) -> Truth:
    return Truth(checkpoint)


@pytest.mark.parametrize(
    ("transfer", "says"),
    [
        ("{backend: zmq, checksum: true}", "zmq"),
        ("{backend: mooncake, protocol: tcp}", "mooncake tcp, "),
    ],
    ids=["zmq", "mooncake"],
)
def test_the_same_tokens_over_every_transport(
    tmp_path: Path, epd_topology: str, truth: Truth, transfer: str, says: str
) -> None:
    if says.startswith("mooncake"):
        pytest.importorskip("mooncake.engine", reason="Mooncake is an extra")
    known = [truth.of(case) for case in CASES]
    cluster = Cluster(tmp_path, f"{epd_topology}\ntransfer: {transfer}\n", name=says.split()[0])
    with no_leaks(cluster.env):
        cluster.up()
        try:
            for rank in cluster.status()["ranks"]:
                model = rank["stage"] in ("encoder", "prefill", "decode")
                assert (rank["transfer"] or "").startswith(says) if model else rank["transfer"] is None
            with ThreadPoolExecutor(len(known)) as pool:
                answers = list(pool.map(cluster.ask, [parts for parts, _ in known]))
            assert answers == [answer for _, answer in known]
            _reached_from_this_host_alone(cluster, engines=says.startswith("mooncake"))
            _strangers_are_refused(cluster, one_sided=says.startswith("mooncake"))
            kill_with_requests_in_flight(cluster, "prefill/0")  # embeddings come to it, and KV goes from it
            for holder in HOLDERS:
                cluster.wait(holder, idle)
        finally:
            cluster.down()


def _strangers_are_refused(cluster: Cluster, *, one_sided: bool) -> None:
    for rank in HOLDERS:
        endpoint = cluster.rank(rank)["endpoints"]["transfer"]
        assert of_another_cluster(endpoint, one_sided=one_sided) == "refused: token"
        assert without_end(endpoint) == "hung up on"


def _reached_from_this_host_alone(cluster: Cluster, *, engines: bool) -> None:
    """Every listener of every process is bound to the loopback, but Mooncake's, which are tied to it; and the ranks
    that have them say nothing of open ports."""
    found = listeners([int(one.partition(":")[0]) for one in marked_processes(cluster.env)])
    assert ("127.0.0.1", cluster.port) in found
    assert list(exposed(found)) == []
    models = {rank["pid"] for rank in cluster.status()["ranks"] if rank["transfer"]}
    wide = {one: pid for one, pid in found.items() if one[0] != "127.0.0.1"}
    assert all(address in OPEN for address, _ in wide)
    assert set(wide.values()) == (models if engines else set())
    assert not any("open to other" in (rank["transfer"] or "") for rank in cluster.status()["ranks"])
