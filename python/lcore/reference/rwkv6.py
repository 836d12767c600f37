"""The recurrence of RWKV-6, token by token."""

from __future__ import annotations

from torch import Tensor

from lcore.reference.gated_linear_attention import recurrence


def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What lcore.rwkv6 computes, with its arguments, in float32 (float64 when r is)."""
    out, state = recurrence(r, k, v, g, None, scale, initial_state, cu_seqlens, u)
    return (out, state) if return_final_state else out
