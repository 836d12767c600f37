"""The gated delta rule: DeltaNet, Gated DeltaNet, and with a decay for each channel Kimi Delta Attention."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore.errors import check_tensor
from lcore.ops._linear_attention import composite
from lcore.ops.gated_linear_attention import default_scale
from lcore.ops.linear_attention_checks import check_decay, check_scale, check_state, check_tokens, check_update
from lcore.ops.recurrent_checks import dtypes_beside

_NAME = "gated_delta_rule"
_UPDATE = "gated_delta_rule_update"


@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, scale: float | None = None,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


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
    """A decaying state that corrects what it holds under a key, by chunks of 64 tokens.

    Formula: S <- diag(e^g_t) S_(t-1); S_t = S + beta_t k_t (v_t - S^T k_t)^T; out_t = scale q_t^T S_t.
        g = 0 is DeltaNet; g for each head Gated DeltaNet; g for each key channel Kimi Delta Attention.

    Args:
        q, k, v, g, scale, initial_state, cu_seqlens, return_final_state: as `lcore.gated_linear_attention`. Keys are
            taken as they are: normalise them first, or the state may grow without bound.
        beta: strength of writing, (batch, len, heads_v) or packed (tokens, heads_v), from 0 to 1, or to 2 for negative
            eigenvalues; any dtype (float64 with float64 alone).

    Returns:
        out: v's shape and dtype; and with return_final_state the state, as `lcore.gated_linear_attention`.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for q, k, v, g, beta and initial_state, through out and through final_state; no double backward. In a
        chunk a unit lower triangular system is solved by substitution, in float32: no inverse is formed. Otherwise as
        `lcore.gated_linear_attention`.

    Source: Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464; Yang et al. 2024, DeltaNet, arXiv:2406.06484;
        Kimi Team 2025, Kimi Linear, arXiv:2510.26692.
    """
    sequences = check_tokens(_NAME, q, k, v, cu_seqlens)
    lead = "batch, len, " if cu_seqlens is None else "tokens, "
    check_decay(_NAME, g, q, v, lead)
    _check_beta(_NAME, beta, q, v, lead)
    check_scale(_NAME, scale)
    if initial_state is not None:
        shape = (sequences, v.shape[-2], q.shape[-1], v.shape[-1])
        check_state(_NAME, "initial_state", initial_state, q, shape, "sequences, heads_v, key_dim, value_dim")
    out, state = torch.ops.lcore.gated_delta_rule(q, k, v, g, beta, scale, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def _check_beta(name: str, beta: Any, q: Tensor, v: Tensor, lead: str) -> None:
    check_tensor(name, "beta", beta, dtypes=dtypes_beside(q), device=q.device, shape=v.shape[:-1],
                 names=f"{lead}heads_v")  # fmt: skip


@composite(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float? scale=None, Tensor? initial_state=None,"
    " Tensor? cu_seqlens=None) -> (Tensor out, Tensor final_state)",
)
def _gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if g.dim() == 1:
        g = g.expand(v.shape[:-1])
    state = None if initial_state is None else initial_state.contiguous()
    return torch.ops.lcore._linear_attention(q, k, v, g, default_scale(scale, q), state, cu_seqlens, beta)


def gated_delta_rule_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `gated_delta_rule` for each row of a batch; its state is updated in place.

    Formula: S = diag(e^g) state; state <- S + beta k (v - S^T k)^T; out = scale q^T state.

    Args:
        state, q, k, v, g, scale, state_indices: as `lcore.gated_linear_attention_update`.
        beta: (batch, heads_v).

    Returns:
        out: v's shape and dtype.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: no gradients.

    Source: as `gated_delta_rule`.
    """
    check_update(_UPDATE, state, q, k, v, state_indices)
    check_decay(_UPDATE, g, q, v, "batch, ")
    _check_beta(_UPDATE, beta, q, v, "batch, ")
    check_scale(_UPDATE, scale)
    return torch.ops.lcore.gated_delta_rule_update(state, q, k, v, g, beta, scale, state_indices)


@composite(
    _UPDATE,
    "(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float? scale=None,"
    " Tensor? state_indices=None) -> Tensor",
)
def _update(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if g.dim() == 1:
        g = g.expand(v.shape[:-1])
    return torch.ops.lcore._linear_attention_update(state, q, k, v, g, default_scale(scale, q), state_indices, beta)
