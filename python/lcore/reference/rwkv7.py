"""The recurrence of RWKV-7, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from lcore.reference.gated_linear_attention import each_sequence


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What lcore.rwkv7 computes, with its arguments, in float32 (float64 when r is)."""
    work = torch.promote_types(r.dtype, torch.float32)
    heads, dims = v.shape[-2], (r.shape[-1], v.shape[-1])

    def run(state: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b = rows
        outs = []
        for t in range(r.shape[1]):
            found = a[:, t, :, None] @ state
            state = torch.exp(w[:, t, ..., None]) * state + b[:, t, ..., None] * found
            state = state + k[:, t, ..., None] * v[:, t, :, None]
            outs.append(scale * (r[:, t, :, None] @ state)[..., 0, :])
        return (torch.stack(outs, 1) if outs else v.new_zeros(v.shape)), state

    rows = [x.to(work) for x in (r, w, k, v, a, b)]
    out, state = each_sequence(run, rows, initial_state, (heads, *dims), cu_seqlens)
    return (out.to(v.dtype), state) if return_final_state else out.to(v.dtype)
