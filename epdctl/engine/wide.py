"""Models of 16-bit weights that add up in float32.

Weights, the factors of matrix products, attention and KV pages stay in 16 bits; what the layers of a stack add to, the
results of the products that are added to it, and the logits keep float32's digits. Of what separates a 16-bit answer
from the float32 one, rounding that sum after each of its additions is the largest part, and it costs little to avoid.

It fits any stack whose layers are ``x + f(norm(x))``: torch adds float32 and 16 bits in float32 by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from epdctl.errors import LoadError
from epdctl.wire.config import ModelConfig

__all__ = ["WideEmbedding", "WideLinear", "WideNorm", "product", "sums_are_wide", "widen"]

INNER = 2  # times its input: a product that gives more feeds an MLP's gate, which float32 would not make nearer


def sums_are_wide(model: ModelConfig) -> bool:
    """Raises LoadError."""
    if model.residual not in ("float32", "dtype"):
        raise LoadError(f"no residual {model.residual!r}", hint="residual: float32 or dtype")
    return model.residual == "float32" and model.dtype in ("bfloat16", "float16")


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x`` [..., in], rounded to the format of ``weight`` [out, in], times its transpose: [..., out] float32.

    On a CPU torch has products of 16-bit factors in their own format only, so the result is rounded once there.
    """
    x = x.to(weight.dtype)
    if weight.is_cuda:
        rows = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=torch.float32)
        return rows.view(*x.shape[:-1], weight.shape[0])
    return functional.linear(x, weight).float()


class WideLinear(nn.Module):
    """``inner``, with its result in float32."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.weight = inner.weight
        self.bias: torch.Tensor | None
        self.register_buffer("bias", _float(inner.bias), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = product(x, self.weight)
        return found if self.bias is None else found.add_(self.bias)


class WideEmbedding(nn.Module):
    """``inner``, with its result in float32: what a stack begins to add to."""

    def __init__(self, inner: nn.Embedding) -> None:
        super().__init__()
        self.weight = inner.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, self.weight).float()


class WideNorm(nn.Module):
    """The RMSNorm ``inner``, from float32 to its weight's format: computed in float32, rounded once."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.weight = inner.weight
        self.eps = float(inner.variance_epsilon)
        self._wide: torch.Tensor
        self.register_buffer("_wide", _float(inner.weight), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = functional.rms_norm(x.float(), self.weight.shape, self._wide, self.eps)
        return found.to(self.weight.dtype)


def widen(module: Any) -> None:
    """In place. ``module``: a model of transformers with a language half and its head, loaded in 16 bits."""
    text = module.model.language_model
    hidden = int(module.config.get_text_config().hidden_size)
    for name, part in list(text.named_modules()):
        if (wider := _wider(part, hidden)) is not None:
            text.set_submodule(name, wider)
    module.lm_head = WideLinear(module.lm_head)


def _wider(part: nn.Module, hidden: int) -> nn.Module | None:
    if isinstance(part, nn.Embedding):
        return WideEmbedding(part)
    if isinstance(part, nn.Linear) and part.out_features <= INNER * part.in_features:
        return WideLinear(part)
    if _norms(part, hidden):
        return WideNorm(part)
    return None


def _norms(part: Any, width: int) -> bool:
    """Norms of a head, which is narrower, stay as they are: what they give is turned in float32."""
    return "RMSNorm" in type(part).__name__ and tuple(part.weight.shape) == (width,)


def _float(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else parameter.detach().float()
