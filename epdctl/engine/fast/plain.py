"""The steps of a fast tower in plain torch: what the kernels must compute, on any device. The truth of their tests."""

from __future__ import annotations

import itertools

import torch
from torch.nn import functional

from epdctl.engine.fast.ops import Angles, Places, Runs, Values
from epdctl.engine.fast.parts import Norm

__all__ = ["PlainOps"]


class PlainOps:
    """Implements ops.Ops."""

    def norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """In the format of the norm's weight, whatever that of ``x``."""
        wide = x.float()
        if norm.centred:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
        return (wide if norm.bias is None else wide + norm.bias.float()).to(norm.weight.dtype)

    def add_norm(self, x: torch.Tensor, delta: torch.Tensor, norm: Norm) -> torch.Tensor:
        """``x`` += ``delta`` in place; what is normed is the sum before it is rounded to x's format."""
        wide = x.float() + delta.float()
        x.copy_(wide)
        return self.norm(wide, norm)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, 2 · n] to [rows, n]: silu of the left half times the right."""
        gate, up = x.float().chunk(2, dim=-1)
        return (functional.silu(gate) * up).to(x.dtype)

    def rotate(self, qkv: torch.Tensor, angles: Angles) -> None:
        """[patches, 3, heads, head_dim]: queries and keys are turned in place."""
        left, right = qkv[:, :2].float().chunk(2, dim=-1)
        cos, sin = angles.cos[:, None, None], angles.sin[:, None, None]
        qkv[:, :2] = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(qkv.dtype)

    def windows(self, qkv: torch.Tensor, angles: Angles, runs: Runs, scale: float) -> torch.Tensor:
        """Rotation and attention in one, for runs of at most MAX_WINDOW patches: [patches, heads · head_dim]."""
        turned = qkv.clone()
        self.rotate(turned, angles)
        return self.attend(turned, runs, scale)

    def attend(self, qkv: torch.Tensor, runs: Runs, scale: float) -> torch.Tensor:
        """Attention within each run, over rotated queries and keys: [patches, heads · head_dim]."""
        parts = []
        ends = runs.borders.tolist()
        for start, end in itertools.pairwise(ends):
            query, key, value = qkv[start:end].permute(1, 2, 0, 3).unsqueeze(1)
            found = functional.scaled_dot_product_attention(query, key, value, scale=scale)
            parts.append(found[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)

    def cut(self, pixels: torch.Tensor, places: Places, values: Values) -> torch.Tensor:
        """Patches out of 8-bit pictures, one behind the other in 1-D ``pixels``, rows of RGB.

        [patches, 3 · frames · side · side], channel by channel; every frame of a still picture is the same.
        """
        within = torch.arange(values.side, device=pixels.device)
        first = places.starts[:, None, None] + within[:, None] * places.strides[:, None, None] + within * 3
        channels = [values.table[channel][pixels[first + channel].int()] for channel in range(3)]
        patches = torch.stack(channels, 1)[:, :, None].expand(-1, -1, values.frames, -1, -1)
        return patches.flatten(1).to(values.dtype)
