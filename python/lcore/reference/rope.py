"""Rotary position embedding, as its formula."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    """What lcore.rope computes, with its arguments: angles in float64, rotation in float32 (float64 when x is).

    Differentiable in x. An angle near a is right to about 1e-16 * |a|: 1e-9 at ten million tokens.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    angle = positions.to(torch.float64)[..., None] * inv_freq.to(torch.float64)  # ([batch,] seq, rotary_dim / 2)
    if inverse:
        angle = -angle
    cosine = (angle.cos() * attention_scaling).to(work)[..., None, :]
    sine = (angle.sin() * attention_scaling).to(work)[..., None, :]
    rotary, rest = x.to(work).tensor_split([2 * inv_freq.shape[0]], dim=-1)
    first, second = (rotary[..., 0::2], rotary[..., 1::2]) if interleaved else rotary.tensor_split(2, dim=-1)
    pair = (first * cosine - second * sine, second * cosine + first * sine)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1).to(x.dtype)
