"""What a tower is made of, taken from transformers' modules by what they have, with widths the GPU likes.

A row of bf16 whose length is no multiple of 16 bytes makes a matrix product three times slower on Hopper. Hidden widths
are padded with zeros here: silu(0) · 0 and gelu(0) are 0, and so is what the padded columns add.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from epdctl.engine.wide import product
from epdctl.errors import EpdError

__all__ = ["Block", "Linear", "Merger", "Mlp", "Norm", "Unsupported", "take_block", "take_linear", "take_merger"]

ALIGNMENT = 8  # values; 16 bytes of bf16

Act = Callable[[torch.Tensor], torch.Tensor]


class Unsupported(EpdError):
    """These modules are none that we know how to speed up."""


@dataclass(frozen=True, slots=True)
class Linear:
    """``weight``: [out, in]."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight, self.bias)

    def wide(self, x: torch.Tensor) -> torch.Tensor:
        """In float32, for weights of 16 bits."""
        found = product(x, self.weight)
        return found if self.bias is None else found.add_(self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """Over the last dimension; ``centred``: LayerNorm, else RMSNorm."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float
    centred: bool


@dataclass(frozen=True, slots=True)
class Mlp:
    """``gated``: ``first`` makes gate and up side by side, [2 · hidden]; ``act`` is SiLU then."""

    first: Linear
    second: Linear
    act: Act
    gated: bool


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: x += attention(norm1(x)); x += mlp(norm2(x))."""

    norm1: Norm
    qkv: Linear
    projection: Linear
    norm2: Norm
    mlp: Mlp
    heads: int
    scale: float

    @property
    def head_dim(self) -> int:
        return self.qkv.weight.shape[0] // (3 * self.heads)


@dataclass(frozen=True, slots=True)
class Merger:
    """``norm`` is over one patch, or over the patches of an embedding together where ``wide``."""

    norm: Norm
    wide: bool
    first: Linear
    act: Act
    second: Linear


def take_linear(module: Any) -> Linear:
    """A Linear, or a convolution whose kernel is its stride: both are one matrix product."""
    weight = module.weight.detach()
    return Linear(weight.reshape(weight.shape[0], -1), None if module.bias is None else module.bias.detach())


def take_block(module: Any) -> Block:
    """Raises Unsupported."""
    attention = _part(module, "attn")
    heads = int(_part(attention, "num_heads"))
    qkv = take_linear(_part(attention, "qkv"))
    if qkv.weight.shape[0] % (3 * heads):
        raise Unsupported(f"a fused qkv of {qkv.weight.shape[0]} rows for {heads} heads")
    return Block(
        norm1=_norm(_part(module, "norm1")),
        qkv=qkv,
        projection=take_linear(_part(attention, "proj")),
        norm2=_norm(_part(module, "norm2")),
        mlp=_mlp(_part(module, "mlp")),
        heads=heads,
        scale=float(_part(attention, "scaling")),
    )


def take_merger(module: Any) -> Merger:
    """Raises Unsupported."""
    norm = _norm(_part(module, "ln_q", "norm"))
    if hasattr(module, "mlp"):
        first, act, second = module.mlp
    else:
        first, act, second = (_part(module, name) for name in ("linear_fc1", "act_fn", "linear_fc2"))
    wide = norm.weight.shape[0] == first.weight.shape[1]
    return Merger(norm, wide, take_linear(first), act, take_linear(second))


def _norm(module: Any) -> Norm:
    if isinstance(module, nn.LayerNorm):
        return Norm(module.weight.detach(), module.bias.detach(), module.eps, centred=True)
    if "RMSNorm" in type(module).__name__:
        return Norm(module.weight.detach(), None, float(_part(module, "variance_epsilon", "eps")), centred=False)
    raise Unsupported(f"no way to fuse {type(module).__name__}")


def _mlp(module: Any) -> Mlp:
    if hasattr(module, "gate_proj"):
        if not isinstance(module.act_fn, nn.SiLU) and "SiLU" not in type(module.act_fn).__name__:
            raise Unsupported(f"a gated MLP with {type(module.act_fn).__name__}")
        gate, up, down = map(take_linear, (module.gate_proj, module.up_proj, module.down_proj))
        first, second = _beside(_padded(gate), _padded(up)), _padded_input(down)
        _lend(module.gate_proj, first.weight)
        _lend(module.up_proj, first.weight[len(first.weight) // 2 :])
        _lend(module.down_proj, second.weight)
        return Mlp(first, second, module.act_fn, gated=True)
    inner, outer = _part(module, "linear_fc1", "fc1"), _part(module, "linear_fc2", "fc2")
    first, second = _padded(take_linear(inner)), _padded_input(take_linear(outer))
    _lend(inner, first.weight)
    _lend(outer, second.weight)
    return Mlp(first, second, _part(module, "act_fn", "act"), gated=False)


def _lend(module: Any, weight: torch.Tensor) -> None:
    """The library's module looks into our padded weight from now on: no weight is in memory twice."""
    rows, columns = module.weight.shape
    module.weight.data = weight[:rows, :columns]


def _padded(linear: Linear) -> Linear:
    """More outputs, all zero, up to a multiple of ALIGNMENT."""
    missing = -linear.weight.shape[0] % ALIGNMENT
    bias = None if linear.bias is None else functional.pad(linear.bias, (0, missing))
    return Linear(functional.pad(linear.weight, (0, 0, 0, missing)), bias) if missing else linear


def _padded_input(linear: Linear) -> Linear:
    missing = -linear.weight.shape[1] % ALIGNMENT
    return Linear(functional.pad(linear.weight, (0, missing)), linear.bias) if missing else linear


def _beside(one: Linear, other: Linear) -> Linear:
    """Both in one product."""
    bias = None if one.bias is None or other.bias is None else torch.cat([one.bias, other.bias])
    return Linear(torch.cat([one.weight, other.weight]), bias)


def _part(module: Any, *names: str) -> Any:
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise Unsupported(f"{type(module).__name__} has no {' or '.join(names)}")
