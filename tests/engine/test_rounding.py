"""How far 16-bit answers are from float32's, held against transformers' own 16-bit answers: 28 layers, pictures.

The GPU's kernels are stood in for by plain steps; what they compute is the same. Products of 16-bit factors in float32
are a GPU's too: here they are made of the factors, widened, which is exact.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from epdctl.bench.blueprints import CheckpointSize
from epdctl.bench.checkpoints import make_checkpoint
from epdctl.bench.firsts import LIKELIEST, Prompt, Truth, best_of, distance, picture
from epdctl.engine import wide
from epdctl.engine.api import NewSequence, Tower
from epdctl.engine.fast import parts
from epdctl.engine.fast import tower as fast
from epdctl.engine.fast.plain import PlainOps
from epdctl.engine.loading import load_language, load_tower
from epdctl.errors import LoadError
from epdctl.wire.serve import Sampling
from tests.engine.harness import Recorder, Run, encoded, media_item, placed
from tests.support.checkpoints import every_family, model_config

CPU = torch.device("cpu")
DEEP = CheckpointSize(1024, 256, 704, 28, 2, 1, 160, 428, 16, 2, 112, "bfloat16", 28 * 28 * 64)
SIDES = ((112, 112), (140, 84), (84, 168))
PROMPTS = 9
CLEAR = (1, 2, 4)  # in so narrow a model single prompts go either way by chance; in these it leaves no doubt
Row = dict[int, float]  # log-probabilities of the likeliest tokens


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("deep"), DEEP)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(x.to(weight.dtype).float(), weight.float())

    monkeypatch.setattr(fast, "kernels_for", lambda device, dtype: PlainOps())
    monkeypatch.setattr(wide, "product", product)
    monkeypatch.setattr(parts, "product", product)


def asked(number: int) -> Prompt:
    pictures = (picture(10 * number + each, *SIDES[(number + each) % 3]) for each in range(1 + number % 3))
    return Prompt(tuple(pictures), f"What is in picture {1 + number % 3}? Answer with a number.")


def ours(deep: Path, truth: Truth, prompts: list[Prompt]) -> list[Row]:
    model = model_config(deep, dtype="bfloat16")
    tower, run = load_tower(model, CPU), Run.make(load_language(model, CPU))
    return [_row(deep, truth, prompt, tower, run) for prompt in prompts]


def _row(deep: Path, truth: Truth, prompt: Prompt, tower: Tower, run: Run) -> Row:
    files, tokens = prompt.pictures, truth.inputs(prompt)["input_ids"][0].tolist()
    media = [media_item(deep, file, index, len(files)) for index, file in enumerate(files)]
    new = NewSequence(
        id="only",
        tokens=tokens,
        items=placed(deep, tokens, media),
        embeddings=encoded(tower, files, media),
        sampling=Sampling(max_tokens=1, logprobs=LIKELIEST),
        pages=range(run.allocator.total),
        max_new_tokens=1,
    )
    run.engine.admit(new)
    (advance,) = run.engine.step()
    assert advance.likelihood is not None
    return dict(advance.likelihood.top)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_answers_are_nearer_to_float32_than_transformers_own(deep: Path) -> None:
    truth, prompts = Truth(deep, "cpu"), [asked(number) for number in range(PROMPTS)]
    theirs = [best_of(row) for row in truth.rows(prompts)]
    truth.widen()
    exact = truth.rows(prompts)

    def off(rows: list[Row]) -> list[float]:
        return [distance(row, right)["mean"] for row, right in zip(rows, exact, strict=True)]

    due, found = off(theirs), off(ours(deep, truth, prompts))
    assert all(found[number] <= due[number] for number in CLEAR)
    assert statistics.mean(found) < 0.8 * statistics.mean(due)


@every_family
def test_in_float32_nothing_changes(checkpoint: Path) -> None:
    tokens = [*range(40)]
    one, other = (
        Run.make(load_language(model_config(checkpoint, residual=residual), CPU)) for residual in ("float32", "dtype")
    )
    assert torch.equal(_logits(one, tokens), _logits(other, tokens))


@every_family
@pytest.mark.usefixtures("as_on_a_gpu")
def test_every_familys_language_half_is_nearer_to_float32(checkpoint: Path) -> None:
    """The same 16-bit weights in all three."""
    narrow: Any = load_language(model_config(checkpoint, dtype="bfloat16", residual="dtype"), CPU)
    exact = copy.deepcopy(narrow)
    exact.module.float()
    found = load_language(model_config(checkpoint, dtype="bfloat16"), CPU)
    due, near, far = (_logits(Run.make(each), [*range(40)]) for each in (exact, found, narrow))
    assert near.dtype == torch.float32
    assert float((near - due).norm()) < 0.9 * float((far - due).norm())


def _logits(run: Run, tokens: list[int]) -> torch.Tensor:
    recorder = run.engine.language = Recorder(run.engine.language)
    for token in range(1, len(tokens)):
        run.engine.admit(
            NewSequence(
                id=str(token),
                tokens=tokens[:token],
                sampling=Sampling(max_tokens=1),
                pages=range(3 * token, 3 * token + 3),
                max_new_tokens=1,
            )
        )
    while run.engine.has_work:
        run.engine.step()
    return torch.cat(recorder.logits)


def test_a_residual_that_does_not_exist_is_refused(deep: Path) -> None:
    with pytest.raises(LoadError, match="no residual 'bfloat16'"):
        load_language(model_config(deep, residual="bfloat16"), CPU)
