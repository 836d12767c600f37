"""Short causal convolutions along a sequence, as their formula."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What lcore.causal_conv1d computes, with its arguments, in float32 (float64 when x is); differentiable."""
    if cu_seqlens is None:
        out, final_state = _one(x, weight, bias, activation, initial_state)
        return (out, final_state) if return_final_state else out
    outs, states = [], [x.new_zeros((0, x.shape[1], weight.shape[1] - 1))]
    offsets = cu_seqlens.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
        state = None if initial_state is None else initial_state[i : i + 1]
        out, state = _one(x[..., begin:end], weight, bias, activation, state)
        outs.append(out)
        states.append(state)
    outs.append(torch.zeros_like(x[..., offsets[-1] :]))
    out, final_state = torch.cat(outs, dim=-1), torch.cat(states)
    return (out, final_state) if return_final_state else out


def _one(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    work = torch.promote_types(x.dtype, torch.float32)
    width, steps = weight.shape[1], x.shape[-1]
    if state is None:
        state = x.new_zeros((*x.shape[:2], width - 1))
    seen = torch.cat([state, x], dim=-1)
    wide, weight = seen.to(work), weight.to(work)
    total = sum(weight[:, w, None] * wide[..., w : w + steps] for w in range(width))
    assert isinstance(total, Tensor)
    if bias is not None:
        total = total + bias.to(work)[:, None]
    out = total if activation is None else functional.silu(total)
    return out.to(x.dtype), seen[..., steps:]
