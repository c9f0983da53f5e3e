"""How large the pools of a plan are on machines that are made up: every figure adds up, and what cannot is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from epdctl.errors import PlacementError
from epdctl.topology.largest import Largest
from epdctl.topology.plan import Plan
from epdctl.topology.pools import CONTEXT_BYTES, GIB, RESERVE_BYTES, Sum
from epdctl.topology.weights import Weights
from tests.unit.topology.support import CHECKPOINT, machine, plan, rank

WEIGHTS = Weights(tower=676_000_000, language=7_615_000_000, kv=28_672, row=3584)  # as a 7B has them
LARGEST = Largest("a picture of 3584 x 3584 pixels", 16_384)
SEVEN = replace(CHECKPOINT, weights=WEIGHTS, largest=LARGEST)
GPU_BYTES = 141 << 30
HEAD = "model: {path: x}\n"


def made(text: str, gpus: int = 3) -> Plan:
    return plan(text, machine(gpus), checkpoint=SEVEN)


def refused(text: str, gpus: int = 3) -> str:
    with pytest.raises(PlacementError) as caught:
        made(text, gpus)
    return caught.value.message


def epd(encoder: str = "", prefill: str = "", decode: str = "") -> str:
    stages = f"encoder: {{{encoder}}}, prefill: {{{prefill}}}, decode: {{{decode}}}"
    return f"{HEAD}stages: {{{stages}}}\n"


def kv(found: Plan, name: str) -> int:
    return rank(found, name).config.engine.kv_tokens


def test_on_cpus_and_where_sizes_are_not_known_the_default_stands() -> None:
    assert kv(made(epd(), gpus=0), "decode/0") == 65_536
    assert kv(plan(epd(), machine(3)), "decode/0") == 65_536
    assert kv(plan(epd(decode="kv_tokens: 999999"), machine(3)), "decode/0") == 999_999 // 16 * 16


@pytest.mark.parametrize("share", [None, 0.5, 0.3])
def test_a_pool_that_nobody_sized_takes_what_the_share_leaves_to_the_page(share: float | None) -> None:
    found = made(epd(decode=f"share: {share}" if share else ""))
    tokens, bound = kv(found, "decode/0"), rank(found, "decode/0").config.memory_bytes
    budget = int(GPU_BYTES * (share or 1.0)) - CONTEXT_BYTES
    assert bound == (budget if share else 0)
    spent = 2 * WEIGHTS.language + max(RESERVE_BYTES, budget // 10) + tokens * WEIGHTS.kv * 2
    assert tokens % 16 == 0
    assert spent <= budget < spent + 16 * WEIGHTS.kv * 2 + 1
    (note,) = [one for one in found.notes if one.startswith("decode: kv_tokens")]
    assert note.startswith(f"decode: kv_tokens → {tokens} (of {budget / GIB:.1f} GiB less weights 14.2, embeddings 0.0")


def test_a_small_models_pool_is_no_larger_than_a_rank_can_use() -> None:
    small = replace(SEVEN, weights=replace(WEIGHTS, language=1_000_000, kv=128))
    text = epd() + "limits: {inflight: 3, max_context: 1000}\n"
    found = plan(text, machine(3), checkpoint=small)
    assert kv(found, "decode/0") == 3008  # whole pages of 16
    assert "decode: kv_tokens → 3008 (limits.inflight times max_context: more is never used)" in found.notes


def test_prefill_makes_room_for_embeddings_and_mono_for_both_halves() -> None:
    found = made(epd(prefill="share: 0.4", decode="share: 0.4"))
    token, page = WEIGHTS.kv * 2, 16
    fewer = -(-(256 << 20) // token)
    assert abs(kv(found, "decode/0") - kv(found, "prefill/0") - fewer) <= page
    mono = made(HEAD + "stages: {mono: {share: 0.4, cache: off}}")
    tower = -(-2 * WEIGHTS.tower // token)
    assert abs(kv(found, "prefill/0") - kv(mono, "mono/0") - tower) <= page


def test_what_was_said_stands_where_it_fits() -> None:
    found = made(epd(prefill="kv_tokens: 32768", decode="share: 0.4, kv_tokens: 131072"))
    assert (kv(found, "prefill/0"), kv(found, "decode/0")) == (32_768, 131_072)
    assert not [one for one in found.notes if "kv_tokens" in one]


def test_what_was_said_and_does_not_fit_is_refused_with_the_sum() -> None:
    said = refused(epd(decode="share: 0.15, kv_tokens: 131072"))
    assert said.startswith("test.yaml:2:")
    assert "131072 tokens take 7.0 GiB, and 3.5 GiB are left: 19.6 GiB less weights 14.2, embeddings 0.0" in said
    fitting = int(said.split("write kv_tokens: ")[1].split()[0])
    assert kv(made(epd(decode=f"share: 0.15, kv_tokens: {fitting}")), "decode/0") == fitting
    assert refused(epd(decode=f"share: 0.15, kv_tokens: {fitting + 16}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (epd(decode="share: 0.1"), "0 tokens of KV are left, and a request may need 16: 12.6 GiB less weights 14.2"),
        (epd(decode="share: 0.1, kv_tokens: 16"), "(give it a larger share, or a larger GPU)"),
        (epd(encoder="share: 0.02"), "stages.encoder.share: too little of a GPU: 1.3 GiB less weights 1.3"),
        (
            epd(decode="share: 0.13") + "limits: {max_context: 32768}",
            "tokens of KV are left, and a request may need 32768",
        ),
    ],
)
def test_a_share_that_holds_no_model_or_no_request_is_refused(text: str, words: str) -> None:
    assert words in refused(text)


def test_shares_of_one_gpu_bound_their_ranks_together() -> None:
    found = made(epd("share: 0.2", "share: 0.4, kv_tokens: 32768", "share: 0.4, kv_tokens: 131072"), gpus=1)
    bounds = [rank(found, name).config.memory_bytes for name in ("encoder/0", "prefill/0", "decode/0")]
    assert sum(bounds) + 3 * CONTEXT_BYTES <= GPU_BYTES


# -- one picture, and the pool for embeddings --


def pool(found: Plan) -> int:
    return rank(found, "prefill/0").config.transfer.embedding_bytes


def test_the_largest_picture_fits_the_pool_or_the_pool_grows() -> None:
    assert pool(made(epd())) == 256 << 20
    wide = replace(SEVEN, weights=replace(WEIGHTS, row=4 * 4096))
    grown = plan(epd(), machine(3), checkpoint=wide)
    assert pool(grown) == 16_384 * 4 * 4096 * 2
    why = "a picture of 3584 x 3584 pixels becomes 16384 embeddings of 32768 bytes"
    assert f"transfer: embedding_pool: 256MiB → 512MiB ({why})" in grown.notes


def test_a_pool_that_was_said_and_holds_no_picture_is_refused_with_both_figures() -> None:
    said = refused(epd() + "transfer: {embedding_pool: 64MiB}")
    assert said.startswith("test.yaml:3:")
    assert "transfer.embedding_pool: a pool of 67108864 bytes, but a picture of 3584 x 3584 pixels" in said
    assert "16384 embeddings of 7168 bytes: 117440512 bytes" in said
    assert "(write embedding_pool: 112MiB or more, or lower limits.max_pixels)" in said
    assert pool(made(epd() + "transfer: {embedding_pool: 112MiB}")) == 112 << 20


def test_no_more_of_a_picture_is_reckoned_than_a_prompt_may_hold() -> None:
    small = "limits: {max_context: 8192}\ntransfer: {embedding_pool: "
    assert "and 8192 of them fit a prompt: 58720256 bytes" in refused(epd() + small + "55MiB}")
    found = made(epd() + small + "56MiB}")
    refusal = "becomes 16384 tokens, beyond max_context 8192, and is refused"
    assert [one for one in found.notes if one.endswith(refusal)]


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "stages: {prefill: {}, decode: {}}\ntransfer: {embedding_pool: 1MiB}",  # nobody shows a picture
        epd() + "limits: {max_media: 0}\ntransfer: {embedding_pool: 1MiB}",
        HEAD + "stages: {encoder: {http: {port: 8100}}}\ntransfer: {embedding_pool: 1MiB}",  # its readers are not ours
    ],
)
def test_a_pool_that_no_picture_comes_to_may_be_small(text: str) -> None:
    assert {one.config.transfer.embedding_bytes for one in made(text).ranks} == {1 << 20}


def test_a_context_is_whole_pages() -> None:
    found = made(HEAD + "stages: {language: {kv_tokens: 1000, page_size: 64}}", gpus=0)
    assert rank(found, "gateway/0").config.limits.max_context == 960
    assert kv(found, "language/0") == 960


def test_a_sum_in_words() -> None:
    assert str(Sum(20 * GIB, 15 * GIB, GIB // 2)) == "20.0 GiB less weights 15.0, embeddings 0.5, computing 2.0"
