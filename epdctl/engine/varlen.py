"""Attention of a tower over packed media: one kernel call for all of them, where torch has one."""

from __future__ import annotations

import torch

from epdctl.errors import LoadError

__all__ = ["VARLEN", "packed_attention", "tower_attention", "varlen_attention"]

SPLIT = "epdctl_flash_split"
VARLEN = "epdctl_flash_varlen"  # with "flash" in it: that word makes transformers' towers pass the borders


def tower_attention(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name for transformers of what the plan chose: ``auto``, ``sdpa`` or ``varlen``. Raises LoadError."""
    possible = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    match choice:
        case "sdpa":
            return "sdpa"
        case "auto":
            return _register() if possible else "sdpa"
        case "varlen" if possible:
            return _register()
        case "varlen":
            raise LoadError(f"varlen attention needs a GPU and 16-bit numbers, not {device} and {dtype}")
        case _:
            raise LoadError(f"no attention {choice!r}", hint="attention: auto, sdpa or varlen")


def packed_attention(choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """As ``tower_attention``, for a tower whose modules do not cut up what is packed themselves."""
    found = tower_attention(choice, device, dtype)
    if found != "sdpa":
        return found
    from transformers import AttentionInterface

    AttentionInterface.register(SPLIT, _split_attention)
    return SPLIT


def _split_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface, as below: one call of torch's own for each of those that are packed."""
    borders, scale = kwargs["cu_seq_lens_q"], kwargs["scaling"]
    assert isinstance(borders, torch.Tensor)
    assert isinstance(scale, float)
    lengths = borders.diff().tolist()
    queries, keys, values = (torch.split(states, lengths, dim=2) for states in (query, key, value))
    attend = torch.nn.functional.scaled_dot_product_attention
    outputs = [attend(*each, scale=scale) for each in zip(queries, keys, values, strict=True)]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, patches, head_dim] in, [1, patches, heads, head_dim] out."""
    from torch.nn.attention.varlen import varlen_attn

    borders, longest, scale = kwargs["cu_seq_lens_q"], kwargs["max_length_q"], kwargs["scaling"]
    assert isinstance(borders, torch.Tensor)
    assert isinstance(scale, float)
    query, key, value = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
    output = varlen_attn(query, key, value, borders, borders, int(longest), int(longest), scale=scale)  # type: ignore[call-overload]
    assert isinstance(output, torch.Tensor)
    return output.unsqueeze(0), None


def _register() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    return VARLEN
