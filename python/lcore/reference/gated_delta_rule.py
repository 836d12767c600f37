"""The gated delta rule, token by token as its recurrence."""

from __future__ import annotations

from torch import Tensor

from lcore.reference.gated_linear_attention import recurrence


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What lcore.gated_delta_rule computes, with its arguments, in float32 (float64 when q is)."""
    out, state = recurrence(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out
