"""Ranks that differ in what they must share are found before anybody is told of them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from epdctl.ids import RankName
from epdctl.supervisor.compatibility import misfit
from epdctl.wire.lifecycle import Facts

ENCODER, PREFILL = RankName("encoder/0"), RankName("prefill/0")
FACTS = Facts(
    protocol=1,
    transformers="5.17.0",
    checkpoint="aa",
    revision="main",
    image_processor="pil",
    dtype="bfloat16",
    width=3584,
    kv_pages="16 tokens x 28 layers x 4 heads x 128 of bfloat16",
    transport="mooncake nvlink",
)
OTHERS: dict[str, Any] = {
    "protocol": 2,
    "transformers": "5.23.0",
    "checkpoint": "bb",
    "revision": "other",
    "image_processor": "torchvision",
    "dtype": "float32",
    "width": 2048,
    "kv_pages": "32 tokens x 28 layers x 4 heads x 128 of bfloat16",
    "transport": "zmq",
}


@pytest.mark.parametrize("name", Facts.__struct_fields__)
def test_each_difference_names_both_ranks_and_both_values(name: str) -> None:
    other = msgspec.structs.replace(FACTS, **{name: OTHERS[name]})
    text = misfit(PREFILL, FACTS, [(ENCODER, other)])
    expected = f"{name} is {getattr(FACTS, name)} on prefill/0 and {OTHERS[name]} on encoder/0"
    assert text == f"prefill/0 and encoder/0 must not exchange data: {expected}"


def test_what_one_of_them_has_not_is_no_difference() -> None:
    assert misfit(PREFILL, FACTS, [(ENCODER, msgspec.structs.replace(FACTS, kv_pages=None)), (ENCODER, FACTS)]) is None


def test_all_differences_are_told_at_once() -> None:
    text = misfit(PREFILL, FACTS, [(ENCODER, Facts(**OTHERS))])
    assert text is not None
    assert text.count(" on encoder/0") == len(OTHERS)
