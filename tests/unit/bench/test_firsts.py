"""What the comparison of first answers says of rows whose distances are known."""

import io
import math

import torch
from PIL import Image

from epdctl.bench.blueprints import SIZES
from epdctl.bench.firsts import Prompt, best_of, compared, distance, table


def test_a_row_is_no_distance_from_itself() -> None:
    exact = torch.arange(40.0).log_softmax(-1)
    assert distance(best_of(exact), exact) == {"mean": 0.0, "max": 0.0, "same_best": 1.0}


def test_the_distance_is_of_the_rows_own_tokens() -> None:
    exact = torch.tensor([0.5, 0.25, 0.25]).log()
    off = distance({1: math.log(0.5), 2: math.log(0.25)}, exact)
    assert math.isclose(off["max"], math.log(2), rel_tol=1e-6)
    assert math.isclose(off["mean"], math.log(2) / 2, rel_tol=1e-6)
    assert off["same_best"] == 0.0


def test_no_picture_of_the_compared_prompts_is_scaled() -> None:
    for prompt in compared():
        assert prompt.pictures
        for file in prompt.pictures:
            width, height = Image.open(io.BytesIO(file)).size
            assert width % 28 == height % 28 == 0
            assert width * height <= (SIZES["7b"].max_pixels or 0)


def test_pictures_come_before_the_words() -> None:
    kinds = [part["type"] for part in Prompt((b"a", b"b"), "what?").content]
    assert kinds == ["image_url", "image_url", "text"]


def test_a_cluster_that_did_not_come_up_is_in_the_table() -> None:
    assert "broken | no memory" in table({"clusters": {"broken": {"failed": "no memory"}}, "compared": {}})


def test_the_true_size_looks_at_whole_pictures_where_the_published_one_does() -> None:
    assert SIZES["7b"].full_attention == [7, 15, 23, 31]
    assert SIZES["7b"].mrope_section == [16, 24, 24]
    assert SIZES["tiny"].full_attention == [1]
