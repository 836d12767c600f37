"""Blockwise exact attention."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_tensor
from lcore.ops.attention_checks import (
    check_packing,
    check_queries_and_keys,
    check_scores,
    check_sizes,
    check_slopes,
    lse_dtype,
    token_names,
)

_NAME = "attention"


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query over the keys it may see, exact, in blocks; nothing of size seq x seq is allocated.

    Formula: with n queries and m keys, query i stands at key position p = i + m - n (bottom-right alignment) and sees
        the keys j with p - window_size[0] <= j <= p + window_size[1] (-1: no bound; causal: j <= p);
        s_ij = softmax_scale * q_i . k_j; softcap > 0: s <- softcap * tanh(s / softcap);
        s_ij <- s_ij - alibi_slope_h * |p - j|; lse_i = ln(sum_j e^s_ij + e^sink_h); out_i = sum_j e^(s_ij - lse_i) v_j.

    Args:
        q: (batch, seq_q, heads, head_dim), or packed (tokens_q, heads, head_dim) with cu_seqlens; float32, float64,
            float16 or bfloat16, any strides.
        k: (batch, seq_k, kv_heads, head_dim) or packed; heads is a multiple of kv_heads (grouped-query attention).
        v: (batch, seq_k, kv_heads, head_dim_v) or packed; head_dim and head_dim_v up to 512.
        causal: hide keys behind the query; the same as window_size[1] = 0.
        window_size: keys to the left and to the right of the query's own position that it sees, -1 for all.
        softmax_scale: default 1 / sqrt(head_dim).
        softcap: 0 for none.
        alibi_slopes: float32 (heads,) or (batch, heads).
        sinks: (heads,) one learned logit a head that takes part in the denominator only; -inf for none.
        cu_seqlens_q, cu_seqlens_k: int32 (sequences + 1,) token offsets of packed sequences, from 0, never falling.
        max_seqlen_q, max_seqlen_k: accepted for callers of other libraries; the kernels read the offsets.
        return_lse: also return lse.

    Returns:
        out: (batch, seq_q, heads, head_dim_v) or (tokens_q, heads, head_dim_v), q's dtype; and with return_lse
        lse: natural log, (batch, heads, seq_q) or (heads, tokens_q), float32 (float64 for float64 inputs).
        A row that sees no key: out 0, lse -inf (the sink's logit if there is one), gradients 0. Tokens behind the
        last packed sequence likewise.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for q, k, v, sinks, through out and through lse; not for alibi_slopes; no double backward.
        Accumulates in float32. A row's bits do not depend on the batch, the number of threads, or on how many other
        rows are computed beside it.

    Source: Dao et al. 2022, FlashAttention, arXiv:2205.14135, Algorithms 1 and 4; sinks: OpenAI 2025, gpt-oss.
    """
    check_queries_and_keys(_NAME, q, k)
    check_tensor(_NAME, "v", v, dtypes=(q.dtype,), device=q.device, shape=(*k.shape[:-1], "*"),
                 names=f"{token_names(q)}, kv_heads, head_dim_v")  # fmt: skip
    check_sizes(_NAME, q, k, head_dim=q.shape[-1], head_dim_v=v.shape[-1])
    check_scores(_NAME, window_size, softmax_scale, softcap)
    if alibi_slopes is not None:
        check_slopes(_NAME, q, alibi_slopes)
        if alibi_slopes.requires_grad:
            raise NotImplementedError(
                "lcore.attention: no gradient for alibi_slopes; pass alibi_slopes.detach(), or learn sinks instead"
            )
    if sinks is not None:
        check_tensor(_NAME, "sinks", sinks, device=q.device, shape=(q.shape[-2],), names="heads")
    check_packing(_NAME, q, k, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if sinks is not None:
        sinks = sinks.to(lse_dtype(q)).contiguous()
    out, lse = torch.ops.lcore.attention(
        q,
        k,
        v,
        causal,
        list(window_size),
        softmax_scale,
        softcap,
        None if alibi_slopes is None else alibi_slopes.contiguous(),
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
    )
    return (out, lse) if return_lse else out
