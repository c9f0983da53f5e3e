"""The model while it learns: its forward over pictures of several sizes, and heads that only help the tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from epdctl.bench.shapes.draw import Colour, Place, Shape
from epdctl.bench.shapes.lessons import IGNORED, MOST_CENTRES, Lesson, Sight
from epdctl.bench.shapes.scenes import COUNTS

__all__ = ["Score", "Student"]

SHAPE_WEIGHT = 2.0  # shapes are the slowest to be learnt
CENTRE_WEIGHT = 4.0  # most cells have none, and cost nothing once that is learnt
PER_CELL = [len(Colour) + 1, len(Shape), MOST_CENTRES + 1]  # what the heads tell of a token
EVEN = "shapes_flash_even"  # with "flash" in it: that word makes transformers' towers pass the borders


@dataclass(frozen=True, slots=True)
class Score:
    """``right``: the share of sequences, or of tokens for the tower, that are wholly right."""

    loss: torch.Tensor
    right: float


class Student(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        width = model.config.vision_config.out_hidden_size
        self.cells = nn.Linear(width, sum(PER_CELL))
        self.wholes = nn.Linear(width, len(COUNTS) + len(Place))
        self._image = int(model.config.image_token_id)
        _register()
        model.model.visual.config._attn_implementation = EVEN

    def see(self, sight: Sight) -> torch.Tensor:
        """[pictures, tokens, width]"""
        features = self.model.model.visual(sight.pixels, sight.grids).pooler_output
        return cast("torch.Tensor", features).view(len(sight.grids), -1, features.shape[-1])

    def describe(self, features: Sequence[torch.Tensor], sights: Sequence[Sight]) -> Score:
        """As ``_describe``: a mean, in which each picture counts the same."""
        shares = [len(sight.grids) / sum(len(each.grids) for each in sights) for sight in sights]
        scores = [self._describe(seen, sight) for seen, sight in zip(features, sights, strict=True)]
        loss = torch.stack([share * score.loss for share, score in zip(shares, scores, strict=True)]).sum()
        return Score(loss, sum(share * score.right for share, score in zip(shares, scores, strict=True)))

    def _describe(self, features: torch.Tensor, sight: Sight) -> Score:
        """How well the heads can tell from the tower's output what is where."""
        colours, shapes, centres = self.cells(features).split(PER_CELL, -1)
        counts, places = self.wholes(features.mean(1)).split([len(COUNTS), len(Place)], -1)
        losses = [
            cross_entropy(colours.flatten(0, 1), sight.colours.flatten(), ignore_index=IGNORED),
            SHAPE_WEIGHT * cross_entropy(shapes.flatten(0, 1), sight.shapes.flatten(), ignore_index=IGNORED),
            CENTRE_WEIGHT * cross_entropy(centres.flatten(0, 1), sight.centres.flatten()),
            cross_entropy(counts, sight.counts),
        ]
        if (sight.places != IGNORED).any():
            losses.append(cross_entropy(places, sight.places, ignore_index=IGNORED))
        there = sight.shapes != IGNORED
        right = (shapes.argmax(-1) == sight.shapes) & (colours.argmax(-1) == sight.colours)
        return Score(torch.stack(losses).sum(), float(right[there].float().mean()))

    def answer(self, features: Sequence[torch.Tensor], lesson: Lesson) -> Score:
        """``features``: of each of the lesson's sights. What is padded lies behind all that counts, and is not seen."""
        tokens, wanted = lesson.tokens[:, :-1], lesson.wanted[:, 1:]
        rows = torch.cat([each.flatten(0, 1) for each in features])
        embeds = self.model.get_input_embeddings()(tokens)
        embeds = embeds.index_put((tokens == self._image).nonzero(as_tuple=True), rows[lesson.shown])
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            position_ids=self._places(tokens, lesson.grids),
            attention_mask={"full_attention": None},
            use_cache=False,
        ).last_hidden_state
        counts = wanted != IGNORED
        logits = self.model.lm_head(hidden[counts])
        wrong = torch.zeros_like(counts)
        wrong[counts] = logits.argmax(-1) != wanted[counts]
        return Score(cross_entropy(logits, wanted[counts]), float((~wrong.any(1)).float().mean()))

    def _places(self, tokens: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """[3, sequences, length], the library's own."""
        kinds = (tokens == self._image).int()
        places, _ = self.model.model.get_rope_index(tokens, mm_token_type_ids=kinds, image_grid_thw=grids)
        return cast("torch.Tensor", places)


def _even_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, for pictures of one size: [1, heads, patches, head_dim] in, and
    [1, patches, heads, head_dim] out."""
    borders = kwargs["cu_seq_lens_q"]
    assert isinstance(borders, torch.Tensor)
    _, heads, length, width = query.shape
    query, key, value = (
        states[0].view(heads, len(borders) - 1, -1, width).transpose(0, 1) for states in (query, key, value)
    )
    seen = scaled_dot_product_attention(query, key, value)
    return seen.transpose(1, 2).reshape(1, length, heads, width), None


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(EVEN, _even_attention)
