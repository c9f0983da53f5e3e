"""Videos of Qwen2.5-VL: token for token what ``generate`` answers, and the frames that transformers would show it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from epdctl.engine.api import LanguageModel, Prepared, Tower
from epdctl.engine.families.videos import Videos, _shown
from epdctl.engine.fast import tower as fast
from epdctl.engine.fast.plain import PlainOps
from epdctl.engine.loading import load_tower
from epdctl.errors import RequestError
from epdctl.families import open_family, videos
from epdctl.families.base import PictureHeader, Prompt, VideoHeader
from epdctl.families.frames import pack
from epdctl.families.qwen2_5_vl import Qwen25VL
from epdctl.families.videos import opened
from epdctl.ids import Modality
from epdctl.rank.headers import read_header
from epdctl.wire.config import Limits
from epdctl.wire.encode import MediaItem
from epdctl.wire.serve import Sampling
from tests.engine.harness import Question, Run, ask, media_item
from tests.support.checkpoints import model_config
from tests.support.reference import SMALLEST_GAP, Reference, picture_bytes
from tests.support.videos import chosen_frames, coded, decoded, promised, video_bytes

CPU = torch.device("cpu")
TOKENS = 16


@pytest.fixture(autouse=True)
def _all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no processor needs no torchvision either."""
    monkeypatch.setattr(videos, "missing", list)


@dataclass(frozen=True)
class Seen:
    """A prompt, and for each of its items the patches that a processor would make."""

    prompt: Prompt
    patches: tuple[torch.Tensor, ...]

    @property
    def prepared(self) -> list[Prepared]:
        return [
            Prepared(grid=tuple(item.grid), rows=item.rows, patches=len(some), pixels=some)  # type: ignore[arg-type]
            for item, some in zip(self.prompt.items, self.patches, strict=True)
        ]


def film(frames: int, rate: float = 10.0, width: int = 112, height: int = 84) -> VideoHeader:
    return VideoHeader(frames, rate, width, height)


PICTURE = PictureHeader(56, 84)
KINDS: dict[str, Sequence[PictureHeader | VideoHeader]] = {
    "one": [film(30)],
    "long": [film(200, 30.0, 168, 112)],
    "between pictures": [PICTURE, film(23), PICTURE],
    "two with a picture": [film(17, 24.0), PICTURE, film(61, 30000 / 1001)],
}


def seen(directory: Path, media: Sequence[PictureHeader | VideoHeader], seed: int) -> Seen:
    family: Any = open_family(directory)
    spans = [family.span(each, 1) for each in media]
    tokens = [5 + seed % 40, 6]
    for each in media:
        tokens += [7, family.tokens[each.modality], 8, 20 + seed % 7]
    draw = torch.Generator().manual_seed(seed)
    patches = [torch.randn(int(np.prod(span.grid)), 3 * 2 * 14 * 14, generator=draw) for span in spans]
    return Seen(family.expand(tokens, spans), tuple(patches))


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()


def inputs(subject: Seen) -> dict[str, torch.Tensor]:
    """As transformers' processor would give them."""
    found: dict[str, Any] = {"input_ids": torch.tensor([subject.prompt.tokens])}
    found["mm_token_type_ids"] = torch.zeros_like(found["input_ids"], dtype=torch.int32)
    for number, (kind, pixels, grid) in enumerate(
        [("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")], 1
    ):
        places = [n for n, item in enumerate(subject.prompt.items) if item.modality == kind]
        if places:
            found[pixels] = torch.cat([subject.patches[n] for n in places])
            found[grid] = torch.tensor([subject.prompt.items[n].grid for n in places])
        for item in (subject.prompt.items[n] for n in places):
            found["mm_token_type_ids"][0, item.offset : item.offset + item.rows] = number
    found["second_per_grid_ts"] = [item.seconds for item in subject.prompt.items if item.modality == "video"]
    return found


def answered(whole: Any, given: dict[str, Any], prompt: list[int]) -> Reference | None:
    """None where the two best logits come too near each other."""
    with torch.no_grad():
        output = whole.generate(
            **given,
            attention_mask=torch.ones_like(given["input_ids"]),
            max_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack(output.logits)[:, 0]
    best = logits.topk(2).values
    gap = float((best[:, 0] - best[:, 1]).min())
    if gap < SMALLEST_GAP:
        return None
    return Reference(prompt, output.sequences[0, len(prompt) :].tolist(), logits, gap, "")


def question(directory: Path, tower: Tower, whole: Any, name: str) -> Question:
    """Of the first seed whose answer is beyond rounding."""
    for seed in range(20):
        subject = seen(directory, KINDS[name], seed)
        reference = answered(whole, inputs(subject), subject.prompt.tokens)
        if reference is not None:
            embeddings = dict(enumerate(tower.encode(subject.prepared)))
            stops = list(open_family(directory).end_token_ids)
            sampling = Sampling(max_tokens=TOKENS, stop_token_ids=stops)
            return Question(reference, subject.prompt.tokens, subject.prompt.items, embeddings, sampling, TOKENS)
    raise AssertionError("20 seeds, and the reference is tied in each")


@pytest.mark.parametrize("name", KINDS)
def test_the_answer_is_that_of_generate(
    name: str, checkpoint: Path, tower: Tower, language: LanguageModel, whole: Any
) -> None:
    asked = question(checkpoint, tower, whole, name)
    assert ask(language, asked) == asked.reference.answer
    assert ask(language, asked, chunk_tokens=13) == asked.reference.answer


def test_many_at_once(checkpoint: Path, tower: Tower, language: LanguageModel, whole: Any) -> None:
    asked = {name: question(checkpoint, tower, whole, name) for name in KINDS}
    run = Run.make(language, chunk_tokens=48, max_batch=3)
    for name, each in asked.items():
        run.admit(name, each)
        run.step()
    run.finish()
    assert run.answers == {name: each.reference.answer for name, each in asked.items()}


@pytest.mark.parametrize("name", KINDS)
def test_positions_are_the_whole_models(name: str, checkpoint: Path, language: LanguageModel, whole: Any) -> None:
    subject = seen(checkpoint, KINDS[name], 1)
    given = {key: value for key, value in inputs(subject).items() if not key.startswith("pixel")}
    due, _ = whole.model.get_rope_index(**given)
    found, delta = language.positions(subject.prompt.tokens, subject.prompt.items)
    assert torch.equal(found, due[:, 0])
    assert len(subject.prompt.tokens) + delta == int(due[0, 0, -1]) + 1


def test_time_goes_on_within_a_video_and_faster_where_it_shows_less(checkpoint: Path, language: LanguageModel) -> None:
    def steps(seconds: float) -> list[int]:
        (item,) = (prompt := seen(checkpoint, [film(60)], 1).prompt).items
        times = language.positions(prompt.tokens, [item_with(item, seconds)])[0][0]
        return sorted({int(time) for time in times[item.offset : item.offset + item.rows]})

    def item_with(item: Any, seconds: float) -> Any:
        return type(item)(**{name: getattr(item, name) for name in item.__struct_fields__} | {"seconds": seconds})

    slow, fast = steps(1.0), steps(3.0)
    assert len(slow) == len(fast) == 6
    assert (fast[-1] - fast[0]) == 3 * (slow[-1] - slow[0]) > 0


# -- the tower --


def test_a_videos_rows_are_the_whole_models_beside_pictures_too(checkpoint: Path, tower: Tower, whole: Any) -> None:
    subject = seen(checkpoint, KINDS["between pictures"], 3)
    found = tower.encode(subject.prepared)
    with torch.no_grad():
        (due,) = whole.model.get_video_features(
            subject.patches[1], torch.tensor([subject.prompt.items[1].grid])
        ).pooler_output
    assert found[1].shape == (subject.prompt.items[1].rows, tower.width)
    torch.testing.assert_close(found[1], due, atol=1e-5, rtol=1e-5)


def test_8_bit_pictures_and_videos_share_a_batch(
    checkpoint: Path, tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the optimized tower, to which pictures come as pixels and videos as patches."""
    monkeypatch.setattr(fast, "kernels_for", lambda device, dtype: PlainOps())
    quick = load_tower(model_config(checkpoint), CPU)
    file = picture_bytes(1, 140, 84)
    item = media_item(checkpoint, file, 0, 1)
    (film_before, film_after) = seen(checkpoint, [film(30), film(24, 24.0, 168, 112)], 4).prepared
    found = quick.encode([film_before, quick.prepare(file, item), film_after])
    due = tower.encode([film_before, tower.prepare(file, item), film_after])
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


# -- the frames --


@pytest.mark.parametrize("what", ["MP4", "WebM", "AVI"])
@pytest.mark.parametrize("places", [[0, 7, 15, 22], [*range(30)], [29], [3, 3, 4]])
def test_the_frames_that_are_asked_for_are_shown(what: str, places: list[int]) -> None:
    file = video_bytes(1, what=what)
    with opened(file) as video:
        shown = list(_shown(video, places))
    assert np.array_equal(np.stack(shown), decoded(file)[places])


@pytest.mark.parametrize("turn", [90, 180, 270])
def test_a_video_that_lies_on_its_side_is_shown_upright(turn: int) -> None:
    draw = np.random.default_rng(1).integers(0, 256, (6, 4, 8, 3), dtype=np.uint8)
    file = coded(draw.repeat(12, axis=1).repeat(12, axis=2), 5, turn=turn)
    with opened(file) as video:
        shown = np.stack(list(_shown(video, [0, 5])))
        assert shown.shape[1:3] == (video.header.height, video.header.width)
    assert np.array_equal(shown, np.rot90(decoded(file)[[0, 5]], turn // 90, axes=(1, 2)))


def test_a_header_may_promise_a_few_frames_too_many_and_no_more() -> None:
    file, last = video_bytes(1), decoded(video_bytes(1))[-1]
    with opened(file) as video:
        frames = list(_shown(replace(video, header=film(32)), [0, 16, 29, 31]))
    assert [np.array_equal(frame, last) for frame in frames] == [False, False, True, True]
    with opened(file) as video, pytest.raises(ValueError, match="ends after 30 of 40 frames: it is damaged"):
        list(_shown(replace(video, header=film(40)), [0, 39]))
    with opened(file) as video, pytest.raises(ValueError, match="another size than its header says"):
        list(_shown(replace(video, header=film(30, width=56)), [0]))


def test_an_encoder_that_lacks_what_videos_need_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(videos, "missing", lambda: ["torchvision"])
    tower = load_tower(model_config(checkpoint), CPU)
    item = MediaItem(index=0, modality=Modality.VIDEO, content_hash="", of=1, grid=[3, 6, 8], rows=36)
    with pytest.raises(RequestError, match=r"videos need .*pip install 'epdctl\[video\]'") as caught:
        tower.prepare(video_bytes(1), item)
    assert caught.value.status == 400


def test_a_processor_that_does_not_load_costs_videos_alone(
    checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a torchvision that was built for another torch."""
    import transformers.models.qwen2_vl as package

    monkeypatch.setitem(package.__dict__, "video_processing_qwen2_vl", None)
    monkeypatch.setitem(__import__("sys").modules, f"{package.__name__}.video_processing_qwen2_vl", None)
    family = Qwen25VL(checkpoint)
    subject = Videos(model_config(checkpoint), family)
    assert any("videos are not served" in message for message in caplog.messages)
    with pytest.raises(RequestError, match=r"videos are not served here: .*cannot be loaded"):
        subject.prepare(video_bytes(1), promised(checkpoint, video_bytes(1)))


# -- with transformers' own processor, where there is torchvision --

needs_torchvision = partial(
    pytest.importorskip, "torchvision", reason="transformers' video processors need torchvision"
)


def library(directory: Path, file: bytes) -> tuple[Any, float]:
    """(processed, seconds per step), by transformers' own reader and processor."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.video_utils import read_video_pyav

    processor = Qwen2VLVideoProcessor.from_pretrained(directory)
    frames, told = read_video_pyav(io.BytesIO(file), partial(processor.sample_frames, fps=2))
    values = processor(videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)], return_tensors="pt")
    return values, 2 / told.sampled_fps


FILES = {
    "three seconds": ("MP4", 30, 10, (112, 84)),
    "of old": ("MP4 of old", 50, 25, (320, 240)),
    "a minute": ("QuickTime", 600, 10, (64, 64)),
    "less than half a second": ("MP4", 5, 30, (200, 120)),
    "beyond the largest": ("AVI", 48, 24, (640, 480)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_becomes_what_transformers_makes_of_it(name: str, checkpoint: Path) -> None:
    needs_torchvision()
    what, frames, rate, size = FILES[name]
    file = video_bytes(2, frames, rate, size, what)
    item = promised(checkpoint, file)
    prepared = Videos(model_config(checkpoint), Qwen25VL(checkpoint)).prepare(memoryview(file), item)
    values, seconds = library(checkpoint, file)
    assert [list(prepared.grid)] == values["video_grid_thw"].tolist()
    assert torch.equal(prepared.pixels, values["pixel_values_videos"])
    family = open_family(checkpoint)
    assert family.span(read_header(Modality.VIDEO, file, Limits()), 1).seconds == pytest.approx(seconds)


def test_chosen_frames_become_what_transformers_makes_of_them(checkpoint: Path) -> None:
    needs_torchvision()
    from PIL import Image
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    files, medium = chosen_frames(3, 13)
    prepared = Videos(model_config(checkpoint), Qwen25VL(checkpoint)).prepare(medium, promised(checkpoint, medium))
    frames = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])).permute(
        0, 3, 1, 2
    )
    values = Qwen2VLVideoProcessor.from_pretrained(checkpoint)(videos=[frames], return_tensors="pt")
    assert [list(prepared.grid)] == values["video_grid_thw"].tolist() == [[7, 6, 8]]
    assert torch.equal(prepared.pixels, values["pixel_values_videos"])
    half = Videos(model_config(checkpoint, dtype="bfloat16"), Qwen25VL(checkpoint))
    assert torch.equal(half.prepare(medium, promised(checkpoint, medium)).pixels, prepared.pixels.bfloat16())


def test_what_is_not_as_promised_or_breaks_off_is_a_400(checkpoint: Path) -> None:
    needs_torchvision()
    subject = Videos(model_config(checkpoint), Qwen25VL(checkpoint))
    file, other = video_bytes(1, what="WebM"), video_bytes(1, 50, 10, (56, 84))
    with pytest.raises(RequestError, match="was sized for") as caught:
        subject.prepare(file, promised(checkpoint, other))
    assert (caught.value.status, caught.value.code) == (400, "invalid_video")
    (narrow, _), (wide, even) = chosen_frames(1, 16, (56, 84)), chosen_frames(1, 16)
    for count in (3, 8):  # in one go through the processor, and in two
        with pytest.raises(RequestError, match="of several sizes"):
            subject.prepare(pack([*wide[:count], *narrow[count:]]), promised(checkpoint, even))
    with pytest.raises(RequestError, match="it is damaged"):
        subject.prepare(file[: len(file) // 2], promised(checkpoint, file))
