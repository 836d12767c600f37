"""The selective scan of Mamba, step by step as its formula."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What lcore.selective_scan computes, with its arguments, in float32 (float64 when u is); differentiable."""
    if cu_seqlens is not None:
        arguments = (D, z, delta_bias, delta_softplus)
        out, final_state = _packed(u, delta, A, B, C, *arguments, initial_state, cu_seqlens.tolist())
        return (out, final_state) if return_final_state else out
    work = torch.promote_types(u.dtype, torch.float32)
    batch, dim, steps = u.shape
    u_wide, A = u.to(work), A.to(work)
    B, C = (_per_channel(x.to(work), dim) for x in (B, C))
    step = delta.to(work)
    if delta_bias is not None:
        step = step + delta_bias.to(work)[:, None]
    if delta_softplus:
        step = functional.softplus(step)
    h = u_wide.new_zeros((batch, dim, A.shape[1])) if initial_state is None else initial_state.to(work)
    outputs = []
    for t in range(steps):
        d = step[:, :, t, None]
        h = torch.exp(d * A) * h + d * u_wide[:, :, t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(u_wide)
    if D is not None:
        y = y + D.to(work)[:, None] * u_wide
    if z is not None:
        y = y * functional.silu(z.to(work))
    out = y.to(u.dtype)
    return (out, h) if return_final_state else out


def _per_channel(x: Tensor, dim: int) -> Tensor:
    """(batch, dim, states, len) from one of each group."""
    x = x if x.dim() == 4 else x.unsqueeze(1)
    return x.repeat_interleave(dim // x.shape[1], dim=1)


def _packed(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None, offsets: list[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every sequence by itself."""
    outs, states = [], []
    for i, (begin, end) in enumerate(itertools.pairwise(offsets)):
        cut: list[Any] = [None if x is None else x[..., begin:end] for x in (u, delta, B, C, z)]
        state = None if initial_state is None else initial_state[i : i + 1]
        out, state = selective_scan(cut[0], cut[1], A, cut[2], cut[3], D, cut[4], delta_bias, delta_softplus,
                                    initial_state=state, return_final_state=True)  # fmt: skip
        outs.append(out)
        states.append(state)
    outs.append(torch.zeros_like(u[..., offsets[-1] :]))
    empty = A.new_zeros((0, *A.shape), dtype=torch.promote_types(u.dtype, torch.float32))
    return torch.cat(outs, dim=-1), torch.cat(states) if states else empty
