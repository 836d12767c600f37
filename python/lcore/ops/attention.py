"""Blockwise exact attention."""

from __future__ import annotations

import itertools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_kernel, check_number, check_tensor, has_values, require, require_type

_NAME = "attention"
_MAX_HEAD_DIM = 512


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
    _check(q, k, v, window_size, softmax_scale, softcap)
    _check_heads(q, alibi_slopes, sinks)
    _check_packing(q, k, alibi_slopes, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if sinks is not None:
        sinks = sinks.to(_lse_dtype(q)).contiguous()
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


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def check_scores(name: str, window_size: Any, softmax_scale: float | None, softcap: float) -> None:
    """The scalar arguments that dense and paged attention share."""
    rule = "be two integers >= -1"
    require_type(isinstance(window_size, (tuple, list)), name, "window_size", rule, window_size)
    require_type(all(isinstance(w, int) for w in window_size), name, "window_size", rule, window_size)
    require(len(window_size) == 2 and min(window_size) >= -1, name, "window_size", rule, window_size)
    if softmax_scale is not None:
        check_number(name, "softmax_scale", softmax_scale)
    check_number(name, "softcap", softcap, least=0)


def _check(q: Tensor, k: Tensor, v: Tensor, window_size: Any, softmax_scale: float | None, softcap: float) -> None:
    check_tensor(_NAME, "q", q)
    require(q.dim() in (3, 4), _NAME, "q", "have 4 dimensions (3 with cu_seqlens)", f"{q.dim()}: {tuple(q.shape)}")
    check_kernel(_NAME, q)
    dense = q.dim() == 4
    lead: tuple[Any, ...] = (q.shape[0], "*") if dense else ("*",)
    names = "batch, seq" if dense else "tokens"
    check_tensor(_NAME, "k", k, dtypes=(q.dtype,), device=q.device, shape=(*lead, "*", q.shape[-1]),
                 names=f"{names}, kv_heads, head_dim")  # fmt: skip
    check_tensor(_NAME, "v", v, dtypes=(q.dtype,), device=q.device, shape=(*k.shape[:-1], "*"),
                 names=f"{names}, kv_heads, head_dim_v")  # fmt: skip
    heads, kv_heads = q.shape[-2], k.shape[-2]
    fits = kv_heads > 0 and heads % kv_heads == 0
    require(fits, _NAME, "q", lambda: f"have heads a multiple of kv_heads {kv_heads}", heads)
    for argument, dim in (("head_dim", q.shape[-1]), ("head_dim_v", v.shape[-1])):
        require(1 <= dim <= _MAX_HEAD_DIM, _NAME, argument, f"lie in [1, {_MAX_HEAD_DIM}]", dim)
    check_scores(_NAME, window_size, softmax_scale, softcap)


def _check_heads(q: Tensor, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    heads = q.shape[-2]
    if alibi_slopes is not None:
        check_tensor(_NAME, "alibi_slopes", alibi_slopes, dtypes=(torch.float32,), device=q.device)
        fits = alibi_slopes.dim() in (1, 2) and alibi_slopes.shape[-1] == heads
        require(
            fits,
            _NAME,
            "alibi_slopes",
            lambda: f"have shape (heads,) or (batch, heads) with heads {heads}",
            tuple(alibi_slopes.shape),
        )
        if alibi_slopes.requires_grad:
            raise NotImplementedError(
                "lcore.attention: no gradient for alibi_slopes; pass alibi_slopes.detach(), or learn sinks instead"
            )
    if sinks is not None:
        check_tensor(_NAME, "sinks", sinks, device=q.device, shape=(heads,), names="heads")


def _check_packing(
    q: Tensor,
    k: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> None:
    require(
        (cu_seqlens_q is None) == (cu_seqlens_k is None),
        _NAME,
        "cu_seqlens_q and cu_seqlens_k",
        "be given together",
        "only one of them",
    )
    packed = cu_seqlens_q is not None
    rule = "have 3 dimensions (tokens, heads, head_dim) with cu_seqlens" if packed else "have 4 dimensions"
    require(q.dim() == (3 if packed else 4), _NAME, "q", rule, tuple(q.shape))
    sequences = q.shape[0]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _check_offsets("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q, "max_seqlen_q")
        _check_offsets("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k, "max_seqlen_k")
        sequences = cu_seqlens_q.shape[0] - 1
        fits = cu_seqlens_k.shape == cu_seqlens_q.shape
        require(
            fits,
            _NAME,
            "cu_seqlens_k",
            lambda: f"have as many entries as cu_seqlens_q, {sequences + 1}",
            cu_seqlens_k.shape[0],
        )
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        fits = alibi_slopes.shape[0] == sequences
        require(
            fits,
            _NAME,
            "alibi_slopes",
            lambda: f"have one row for each of {sequences} sequences",
            alibi_slopes.shape[0],
        )


def _check_offsets(argument: str, cu: Tensor, x: Tensor, longest: int | None, longest_name: str) -> None:
    check_tensor(_NAME, argument, cu, dtypes=(torch.int32,), device=x.device, shape=("*",), names="sequences + 1")
    require(cu.shape[0] >= 1, _NAME, argument, "have at least one entry", 0)
    require(cu.is_contiguous(), _NAME, argument, "be contiguous", f"strides {cu.stride()}")
    if not has_values(cu):
        return
    offsets = cu.tolist()
    require(offsets[0] == 0, _NAME, argument, "begin with 0", offsets[0])
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    if lengths:
        fall = next((i for i, n in enumerate(lengths) if n < 0), None)
        require(fall is None, _NAME, argument, "never fall", f"{offsets[fall or 0 : (fall or 0) + 2]} at {fall}")
        require(offsets[-1] <= x.shape[0], _NAME, argument, f"end within {x.shape[0]} tokens", offsets[-1])
    if longest is not None:
        rule = f"be at least the longest sequence, {max(lengths, default=0)}"
        require(longest >= max(lengths, default=0), _NAME, longest_name, rule, longest)
