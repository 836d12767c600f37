"""The WKV of RWKV-4, token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from lcore.reference.gated_linear_attention import each_sequence


def rwkv4_wkv(
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What lcore.rwkv4_wkv computes, with its arguments, in float32 (float64 when k is)."""
    work = torch.promote_types(k.dtype, torch.float32)
    w, u = w.to(work), u.to(work)
    dim = k.shape[-1]
    if initial_state is None:
        sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        initial_state = k.new_zeros((sequences, 3, dim), dtype=work)
        initial_state[:, 2] = -1e38

    def run(state: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        aa, bb, pp = state.unbind(1)
        outs = []
        for t in range(k.shape[1]):
            kt, vt = k[:, t], v[:, t]
            top = torch.maximum(pp, u + kt)
            held, own = torch.exp(pp - top), torch.exp(u + kt - top)
            outs.append((held * aa + own * vt) / (held * bb + own))
            top = torch.maximum(pp + w, kt)
            held, own = torch.exp(pp + w - top), torch.exp(kt - top)
            aa, bb, pp = held * aa + own * vt, held * bb + own, top
        return (torch.stack(outs, 1) if outs else v.new_zeros(v.shape)), torch.stack([aa, bb, pp], 1)

    out, state = each_sequence(run, [k.to(work), v.to(work)], initial_state, (3, dim), cu_seqlens)
    return (out.to(v.dtype), state) if return_final_state else out.to(v.dtype)
