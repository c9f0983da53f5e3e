"""A canary is the same every time, and its order shows."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from epdctl.bench.shapes.canary import canary, main


def test_it_never_changes() -> None:
    assert canary() == canary()


def test_its_answer_is_what_it_shows_in_order() -> None:
    two, eight = canary(), canary(8)
    assert two.answer == "1 red, 2 blue"
    assert eight.answer.startswith("1 red, 2 blue, 3 yellow, 4 green")
    assert eight.pictures[:2] == two.pictures
    assert len(set(eight.pictures)) == 8


@pytest.mark.parametrize("pictures", [0, 1, 9])
def test_no_order_no_canary(pictures: int) -> None:
    with pytest.raises(ValueError, match=f"not {pictures}"):
        canary(pictures)


def test_it_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--pictures", "3"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["answer"] == canary(3).answer
    assert printed["prompt"] == canary(3).prompt
    for text in printed["pictures"]:
        with Image.open(io.BytesIO(base64.b64decode(text))) as picture:
            assert picture.size == (48, 48)
