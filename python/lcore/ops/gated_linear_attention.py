"""Linear attention with decay: GLA, RetNet, lightning attention, HGRN2."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from lcore.ops._linear_attention import composite
from lcore.ops.linear_attention_checks import (
    check_decay,
    check_scale,
    check_state,
    check_tokens,
    check_update,
)

_NAME = "gated_linear_attention"
_UPDATE = "gated_linear_attention_update"


@overload
def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float | None = None, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A state of one matrix a head that decays and takes in a token at a time, computed by chunks of 64 tokens.

    Formula: S_t = diag(e^g_t) S_(t-1) + k_t v_t^T; out_t = scale q_t^T S_t, which sees token t itself.

    Args:
        q, k: (batch, len, heads, key_dim), or packed (tokens, heads, key_dim) with cu_seqlens; float32, float64,
            float16 or bfloat16, any strides.
        v: (batch, len, heads_v, value_dim) or packed, their dtype; heads_v is a multiple of heads, and head h reads
            q and k of head h // (heads_v / heads). key_dim and value_dim up to 512.
        g: log-decay, 0 or below (above it the state grows): for each token and head (batch, len, heads_v); for each
            key channel too (batch, len, heads_v, key_dim); or constant (heads_v,), as in RetNet and lightning
            attention. Packed tensors have tokens in place of batch, len. Any dtype (float64 with float64 alone).
        scale: default 1 / sqrt(key_dim).
        initial_state: (sequences, heads_v, key_dim, value_dim), float32 (float64 for float64 inputs); default 0.
        cu_seqlens: int32 (sequences + 1,) token offsets of packed sequences, from 0, never falling.
        return_final_state: also return the state behind the last token.

    Returns:
        out: v's shape and dtype; and with return_final_state
        final_state: shaped as initial_state. That of a sequence without tokens is its initial state. Tokens behind the
        last packed sequence get out 0 and gradients 0.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for q, k, v, g and initial_state, through out and through final_state; no double backward. The
        backward computes states again: it keeps one for each of 64 chunks, and one for each 4096 tokens. Accumulates in
        float32. The bits depend neither on the batch nor on the number of threads, nor on where a text is cut, if that
        is at multiples of 64 tokens and the state is handed over. Nothing is divided by a decay: e^g = 0 is as good as
        any. A token never reaches those before it, whatever it holds.

    Source: Yang et al. 2023, Gated Linear Attention, arXiv:2312.06635; Sun et al. 2023, RetNet, arXiv:2307.08621; Qin
        et al. 2024, Lightning Attention-2, arXiv:2401.04658.
    """
    sequences = check_tokens(_NAME, q, k, v, cu_seqlens)
    check_decay(_NAME, g, q, v, "batch, len, " if cu_seqlens is None else "tokens, ")
    check_scale(_NAME, scale)
    if initial_state is not None:
        shape = (sequences, v.shape[-2], q.shape[-1], v.shape[-1])
        check_state(_NAME, "initial_state", initial_state, q, shape, "sequences, heads_v, key_dim, value_dim")
    out, state = torch.ops.lcore.gated_linear_attention(q, k, v, g, scale, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def default_scale(scale: float | None, q: Tensor) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


@composite(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor g, float? scale=None, Tensor? initial_state=None, Tensor? cu_seqlens=None)"
    " -> (Tensor out, Tensor final_state)",
)
def _gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if g.dim() == 1:
        g = g.expand(v.shape[:-1])
    state = None if initial_state is None else initial_state.contiguous()
    return torch.ops.lcore._linear_attention(q, k, v, g, default_scale(scale, q), state, cu_seqlens)


def gated_linear_attention_update(
    state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `gated_linear_attention` for each row of a batch; its state is updated in place.

    Formula: state <- diag(e^g) state + k v^T; out = scale q^T state.

    Args:
        state: (slots, heads_v, key_dim, value_dim), contiguous float32 (float64 for float64 inputs), written.
        q, k: (batch, heads, key_dim); v: (batch, heads_v, value_dim), as `gated_linear_attention`, any strides.
        g: (heads_v,), (batch, heads_v) or (batch, heads_v, key_dim).
        scale: default 1 / sqrt(key_dim).
        state_indices: (batch,) int64, the slot of each row; a negative one: the row has no state, its out is 0.
            Default: as many slots as rows, in order.

    Returns:
        out: v's shape and dtype.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: no gradients. Reads and writes the state once.

    Source: as `gated_linear_attention`.
    """
    check_update(_UPDATE, state, q, k, v, state_indices)
    check_decay(_UPDATE, g, q, v, "batch, ")
    check_scale(_UPDATE, scale)
    return torch.ops.lcore.gated_linear_attention_update(state, q, k, v, g, scale, state_indices)


@composite(
    _UPDATE,
    "(Tensor(a!) state, Tensor q, Tensor k, Tensor v, Tensor g, float? scale=None, Tensor? state_indices=None)"
    " -> Tensor",
)
def _update(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if g.dim() == 1:
        g = g.expand(v.shape[:-1])
    return torch.ops.lcore._linear_attention_update(state, q, k, v, g, default_scale(scale, q), state_indices)
