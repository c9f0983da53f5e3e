"""Who gets which GPU, thread and port on machines that are made up."""

from __future__ import annotations

import os
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epdctl.errors import PlacementError
from epdctl.ids import LocalGpu
from epdctl.topology.hardware import Hardware
from epdctl.topology.plan import RestartMode
from epdctl.topology.seating import seat, wishes_of
from tests.unit.topology.support import UUIDS, gpu, machine, plan, rank, seats

MODEL = "model: {path: x}\n"


def refused(text: str, hardware: Hardware, ports: dict[int, str] | None = None) -> list[str]:
    with pytest.raises(PlacementError) as caught:
        plan(text, hardware, ports)
    return caught.value.message.splitlines()


def test_ranks_are_replicas_times_dp_behind_gateway_and_router() -> None:
    made = plan(MODEL + "stages: {encoder: {replicas: 2, dp: 2}, prefill: {}, decode: {dp: 2}}", machine())
    assert [str(one.rank) for one in made.ranks] == [
        *("gateway/0", "encoder-router/0", "encoder/0", "encoder/1", "encoder/2", "encoder/3"),
        *("prefill/0", "decode/0", "decode/1"),
    ]
    assert rank(made, "gateway/0").config.gateway.answering == 2, "those of decode"


def test_without_encoder_there_is_no_router() -> None:
    made = plan(MODEL + "stages: {language: {}}", machine())
    assert [str(one.rank) for one in made.ranks] == ["gateway/0", "language/0"]
    assert made.gateway_url == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("stages", "noted"),
    [
        ("prefill: {}, decode: {}", True),
        ("language: {}", True),
        ("encoder: {}, language: {}", False),
        ("encoder: {}, prefill: {}, decode: {}", False),
        ("mono: {}", False),
        ("encoder: {http: {port: 8100}}", False),
    ],
)
def test_a_language_model_without_an_encoder_is_noted(stages: str, noted: bool) -> None:
    notes = plan(MODEL + f"stages: {{{stages}}}", machine()).notes
    assert ("no encoder stage: pictures, sound and video are refused" in notes) == noted


HTTP = "stages: {encoder: {replicas: 2, cache: off, http: {port: 8100, token_file: t.txt}}}"


def test_an_encoder_with_http_may_stand_alone_and_its_router_knows_what_is_behind_it() -> None:
    made = plan(MODEL + HTTP, machine())
    assert [str(one.rank) for one in made.ranks] == ["encoder-router/0", "encoder/0", "encoder/1"]
    assert made.gateway_url is None
    router = rank(made, "encoder-router/0").config.encoder
    assert (router.ranks, router.cache_bytes) == (2, 0)
    assert router.http is not None
    assert (router.http.host, router.http.port, router.http.strict) == ("127.0.0.1", 8100, False)
    assert router.http.token_file == os.path.abspath("t.txt")
    assert rank(made, "encoder/0").config.encoder.http is None
    assert refused(MODEL + HTTP, machine(), {8100: "in use by nginx (pid 7)"})[0].startswith("test.yaml:2:")


def test_auto_takes_free_gpus_in_order_around_named_ones() -> None:
    made = plan(MODEL + "stages: {encoder: {dp: 2, gpus: auto}, prefill: {gpus: [0]}, decode: {gpus: [2]}}", machine(4))
    assert seats(made) == {"encoder/0": "1", "encoder/1": "3", "prefill/0": "0", "decode/0": "2"}


def test_each_rank_counts_its_own_gpu_from_zero() -> None:
    made = plan(MODEL + f"stages: {{encoder: {{gpus: [{UUIDS[1]}]}}, language: {{gpus: [GPU-0000]}}}}", machine(2))
    encoder, language = rank(made, "encoder/0"), rank(made, "language/0")
    assert (encoder.gpus[0].uuid, language.gpus[0].uuid) == (UUIDS[1], UUIDS[0])
    assert encoder.config.devices == language.config.devices == [LocalGpu(0)]


def test_shares_put_ranks_on_one_gpu() -> None:
    text = "stages: {encoder: {share: 0.2}, prefill: {share: 0.4}, decode: {share: 0.4}}"
    made = plan(MODEL + text, machine(1))
    assert set(seats(made).values()) == {"0"}
    assert [rank(made, name).config.share for name in ("encoder/0", "prefill/0", "decode/0")] == [0.2, 0.4, 0.4]


def test_a_rank_without_share_never_joins_others() -> None:
    made = plan(MODEL + "stages: {encoder: {share: 0.5}, language: {gpus: auto}}", machine(2))
    assert seats(made) == {"encoder/0": "0", "language/0": "1"}


def test_one_gpu_for_all_ranks_of_a_stage() -> None:
    made = plan(MODEL + "stages: {encoder: {dp: 3, gpus: [1], share: 0.3}, language: {gpus: [0]}}", machine(2))
    assert seats(made) == {"encoder/0": "1", "encoder/1": "1", "encoder/2": "1", "language/0": "0"}


def test_nothing_said_means_cpu_on_a_machine_without_gpus_and_is_noted() -> None:
    made = plan(MODEL + "stages: {encoder: {}, language: {}}", machine(0))
    assert set(seats(made).values()) == {"cpu"}
    assert "encoder, language: gpus → none (this machine shows no GPU)" in made.notes
    made = plan(MODEL + "stages: {encoder: {}, language: {gpus: none}}", machine(3))
    assert seats(made) == {"encoder/0": "0", "language/0": "cpu"}
    assert "encoder: gpus → auto (3 visible)" in made.notes


REFUSALS = [
    (
        "double booking",
        "stages: {encoder: {gpus: [0]}, language: {gpus: [0], share: 0.5}}",
        machine(1),
        "test.yaml:2:50: stages.language.gpus[0]: GPU 0 is booked for encoder/0, language/0, "
        "but encoder gives no share "
        "(give each of these stages a share (together at most 1), or GPUs of their own)",
    ),
    (
        "shares above one",
        "stages: {encoder: {gpus: [0], share: 0.6}, language: {gpus: [0], share: 0.5}}",
        machine(1),
        "test.yaml:2:62: stages.language.gpus[0]: GPU 0 is booked for encoder/0, language/0, "
        "whose shares add up to 1.1 "
        "(lower the shares to at most 1 together)",
    ),
    (
        "an index that is not there",
        "stages: {language: {gpus: [4]}}",
        machine(2),
        "test.yaml:2:28: stages.language.gpus[0]: there is no GPU 4 (visible are: 0, 1)",
    ),
    (
        "a UUID with a slip",
        "stages: {language: {gpus: [GPU-11111111-0000-0000-0000-000000000001]}}",
        machine(2),
        "test.yaml:2:28: stages.language.gpus[0]: there is no GPU GPU-11111111-0000-0000-0000-000000000001 "
        f"(did you mean {UUIDS[1]}?)",
    ),
    (
        "a beginning that fits two",
        "stages: {language: {gpus: [GPU-aa]}}",
        Hardware((gpu(0, "GPU-aa1"), gpu(1, "GPU-aa2")), 4),
        "test.yaml:2:28: stages.language.gpus[0]: GPU-aa begins the UUID of several GPUs "
        "(write more of it: GPU-aa1, GPU-aa2)",
    ),
    (
        "the index of a split GPU",
        "stages: {language: {gpus: [0]}}",
        Hardware((gpu(0, "MIG-1", mig_parent="GPU-a"),), 4),
        "test.yaml:2:28: stages.language.gpus[0]: GPU 0 is split into MIG slices (name a slice: MIG-1)",
    ),
    (
        "a named GPU without any",
        "stages: {language: {gpus: [0]}}",
        machine(0),
        "test.yaml:2:28: stages.language.gpus[0]: GPU 0: this machine shows no GPU "
        "(write gpus: none, or see epdctl doctor)",
    ),
    (
        "auto without any",
        "stages: {language: {gpus: auto}}",
        machine(0),
        "test.yaml:2:27: stages.language.gpus: language wants a GPU, and this machine shows none "
        "(write gpus: none to run on the CPU, or see epdctl doctor)",
    ),
    (
        "a share without any",
        "stages: {language: {share: 0.5}}",
        machine(0),
        "test.yaml:2:10: stages.language.gpus: language wants a GPU, and this machine shows none "
        "(write gpus: none to run on the CPU, or see epdctl doctor)",
    ),
    (
        "too few",
        "stages: {encoder: {dp: 3}, language: {}}",
        machine(2),
        "test.yaml:2:10: stages.encoder.gpus: no GPU with room for encoder/2: 4 ranks want one, 2 are visible "
        "(use fewer ranks, let them share with share, or write gpus: none)",
    ),
]


@pytest.mark.parametrize(("stages", "hardware", "line"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_refusals_have_place_and_remedy(stages: str, hardware: Hardware, line: str) -> None:
    assert refused(MODEL + stages, hardware)[0] == line


def test_a_port_in_use_names_its_holder() -> None:
    lines = refused(
        MODEL + "gateway: {port: 8123}\nstages: {language: {}}", machine(), {8123: "in use by nginx (pid 7)"}
    )
    assert lines == [
        "test.yaml:2:17: gateway.port: port 8123 of 127.0.0.1 is in use by nginx (pid 7) "
        "(stop that, or choose another: in the file, or by the variable that it reads, such as EPDCTL_PORT)"
    ]


def test_an_encoder_by_itself_asks_for_no_gateways_port() -> None:
    alone = MODEL + "stages: {encoder: {http: {port: 8123}}}"
    plan(alone, machine(), {8000: "in use by nginx (pid 7)"})
    plan(alone.replace("8123", "8000"), machine())
    (line,) = refused(alone, machine(), {8123: "in use by nginx (pid 7)"})
    assert "stages.encoder.http.port: port 8123 of 127.0.0.1 is in use by nginx" in line


@pytest.mark.parametrize(("gpus", "dtype", "why"), [(0, "bfloat16", "the CPU"), (2, "float32", "dtype is float32")])
def test_varlen_attention_where_it_cannot_be(gpus: int, dtype: str, why: str) -> None:
    text = f"model: {{path: x, attention: varlen, dtype: {dtype}}}\nstages: {{encoder: {{}}, language: {{}}}}"
    (line,) = refused(text, machine(gpus))
    assert line.startswith("test.yaml:1:29: model.attention: varlen needs a GPU and 16-bit numbers, but ")
    assert why in line
    plan(text.replace(dtype, "bfloat16"), machine(2))


def test_all_that_fails_is_told_at_once() -> None:
    text = MODEL + "stages: {encoder: {dp: 2, gpus: [0, 7]}, prefill: {gpus: [0]}, decode: {gpus: auto}}"
    lines = refused(text, machine(1), {8000: "in use by nginx (pid 7)"})
    told = ("no GPU 7", "booked for encoder/0, prefill/0", "no GPU with room for decode/0", "port 8000")
    assert len(lines) == 4
    assert all(any(part in line for line in lines) for part in told)


def test_one_missing_gpu_named_for_three_ranks_is_one_complaint() -> None:
    assert len(refused(MODEL + "stages: {language: {dp: 3, gpus: [5], share: 0.3}}", machine(1))) == 1


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (4, 1), (8, 2), (64, 16)])
def test_cpu_threads_are_shared_out(cores: int, threads: int) -> None:
    made = plan(MODEL + "stages: {encoder: {dp: 2}, prefill: {}, decode: {}}", machine(0, cores))
    assert {one.config.threads for one in made.ranks if one.stage in ("encoder", "prefill", "decode")} == {threads}
    assert rank(made, "gateway/0").config.threads == 1


def test_more_threads_than_cores_are_noted() -> None:
    made = plan(MODEL + "stages: {encoder: {}, language: {threads: 8}}", machine(0, cores=4))
    assert "threads: 10 compute threads on 4 cores; steps will wait for each other" in made.notes


def test_numbers_and_choices_reach_the_ranks() -> None:
    text = MODEL + (
        "stages:\n  encoder: {batch_patches: 99, preprocess_threads: 3, prepared: 2GiB}\n"
        "  language: {kv_tokens: 640, max_batch: 5}\n"
        "limits: {queue: 7}\nrestart: {mode: never, budget: 1}\ndeadlines: {heartbeat: 250ms}\n"
        "transfer: {embedding_pool: 1MiB}\ngateway: {port: 8001}"
    )
    made = plan(text, machine())
    encoder, language = rank(made, "encoder/0").config, rank(made, "language/0").config
    assert (encoder.encoder.batch_patches, encoder.encoder.preprocess_threads) == (99, 3)
    assert encoder.encoder.prepared_bytes == 2 << 30
    assert (language.engine.kv_tokens, language.engine.max_batch) == (640, 5)
    assert language.transfer.backend == "shm"
    assert language.transfer.embedding_bytes == 1 << 20
    assert {(one.config.limits.queue, one.config.gateway.port, one.config.heartbeat_seconds) for one in made.ranks} == {
        (7, 8001, 0.25)
    }
    assert (made.restart.mode, made.restart.budget, made.deadlines.heartbeat) == (RestartMode.NEVER, 1, 0.25)


def test_the_default_context_gives_way_to_the_smallest_pool() -> None:
    made = plan(MODEL + "stages: {prefill: {kv_tokens: 4096}, decode: {kv_tokens: 8192}}", machine())
    assert {one.config.limits.max_context for one in made.ranks} == {4096}
    assert "limits: max_context: 32768 → 4096, what the smallest KV pool holds" in made.notes


@pytest.mark.parametrize(
    ("gpus", "said", "chosen"), [(1, "auto", "bfloat16"), (0, "auto", "float32"), (0, "float16", "float16")]
)
def test_dtype_is_pinned(gpus: int, said: str, chosen: str) -> None:
    made = plan(f"model: {{path: x, dtype: {said}}}\nstages: {{language: {{}}}}", machine(gpus))
    assert {one.config.model.dtype for one in made.ranks} == {chosen}
    assert (f"model: dtype: auto → {chosen}" in made.notes) == (said == "auto")


stage = st.fixed_dictionaries(
    {"dp": st.integers(1, 4)},
    optional={
        "share": st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.333, 0.5, 0.7, 1.0]),
        "gpus": st.one_of(st.just("auto"), st.just("none"), st.lists(st.integers(0, 4), min_size=1, max_size=4)),
    },
)


@settings(max_examples=300, deadline=None)
@given(encoder=stage, prefill=stage, decode=stage, gpus=st.integers(0, 4))
def test_no_gpu_is_ever_promised_twice(encoder: dict, prefill: dict, decode: dict, gpus: int) -> None:
    """Whatever is asked, what is granted adds up to at most one GPU, and is the same when asked again."""
    from epdctl.ids import Stage
    from epdctl.topology.schema import Stages

    written = Stages.model_validate({"encoder": encoder, "prefill": prefill, "decode": decode})
    wishes = [
        wish
        for name, section in written.present()
        if section.gpus != "none" and not (isinstance(section.gpus, tuple) and 1 < len(section.gpus) != section.ranks)
        for wish in wishes_of(Stage(name), section)
    ]
    hardware = machine(gpus)
    seating = seat(wishes, hardware.gpus)
    assert seat(wishes, hardware.gpus).seats == seating.seats
    if seating.complaints:
        return
    assert seating.seats.keys() == {wish.rank for wish in wishes}
    promised: defaultdict[str, list[float | None]] = defaultdict(list)
    for wish in wishes:
        promised[seating.seats[wish.rank].uuid].append(wish.share)
        assert wish.gpu is None or seating.seats[wish.rank].index == wish.gpu
    for shares in promised.values():
        assert len(shares) == 1 or sum(2.0 if share is None else share for share in shares) <= 1 + 1e-9


def test_mono_takes_the_settings_of_both_models_and_needs_no_router() -> None:
    mono = "{replicas: 2, threads: 3, batch_patches: 99, preprocess_threads: 5, kv_tokens: 640, chunk_tokens: 32}"
    made = plan(MODEL + f"stages: {{mono: {mono}}}", machine(gpus=2))
    assert seats(made) == {"mono/0": "0", "mono/1": "1"}
    assert {str(one.rank) for one in made.ranks} == {"gateway/0", "mono/0", "mono/1"}
    config = rank(made, "mono/1").config
    assert (config.threads, config.encoder.batch_patches, config.encoder.preprocess_threads) == (3, 99, 5)
    assert (config.engine.kv_tokens, config.engine.chunk_tokens, config.limits.max_context) == (640, 32, 640)
    assert config.transfer.backend == "memory"
    assert any(note.startswith("transfer: backend: auto → memory") for note in made.notes)


def test_varlen_attention_of_a_mono_rank_on_the_cpu() -> None:
    (line,) = refused("model: {path: x, attention: varlen, dtype: bfloat16}\nstages: {mono: {}}", machine())
    assert "but mono runs on the CPU" in line


def test_optimize_is_told_to_encoders() -> None:
    made = plan(MODEL + "stages: {encoder: {optimize: off}, language: {}}", machine())
    assert rank(made, "encoder/0").config.model.optimize == "off"
    assert (
        rank(plan(MODEL + "stages: {encoder: {}, language: {}}", machine()), "encoder/0").config.model.optimize
        == "auto"
    )
