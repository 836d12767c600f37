"""Argument checks that `attention` shares with the ops that compute the same scores; `name` is the op's."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from lcore.errors import check_kernel, check_number, check_tensor, has_values, require, require_type

_MAX_HEAD_DIM = 512


def check_queries_and_keys(name: str, q: Tensor, k: Tensor) -> None:
    """q (batch, seq, heads, head_dim) or packed, k with its batch, dtype, device and head_dim."""
    check_tensor(name, "q", q)
    require(q.dim() in (3, 4), name, "q", "have 4 dimensions (3 with cu_seqlens)", f"{q.dim()}: {tuple(q.shape)}")
    check_kernel(name, q)
    lead: tuple[Any, ...] = (q.shape[0], "*") if q.dim() == 4 else ("*",)
    check_tensor(name, "k", k, dtypes=(q.dtype,), device=q.device, shape=(*lead, "*", q.shape[-1]),
                 names=f"{token_names(q)}, kv_heads, head_dim")  # fmt: skip


def check_sizes(name: str, q: Tensor, k: Tensor, **head_dims: int) -> None:
    """Head counts that fit, and head sizes that the kernels have."""
    heads, kv_heads = q.shape[-2], k.shape[-2]
    fits = kv_heads > 0 and heads % kv_heads == 0
    require(fits, name, "q", lambda: f"have heads a multiple of kv_heads {kv_heads}", heads)
    for argument, dim in head_dims.items():
        require(1 <= dim <= _MAX_HEAD_DIM, name, argument, f"lie in [1, {_MAX_HEAD_DIM}]", dim)


def token_names(q: Tensor) -> str:
    """The leading dimensions of q in words."""
    return "batch, seq" if q.dim() == 4 else "tokens"


def lse_dtype(q: Tensor) -> torch.dtype:
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


def check_slopes(name: str, q: Tensor, alibi_slopes: Tensor) -> None:
    """float32 (heads,) or (batch, heads)."""
    heads = q.shape[-2]
    check_tensor(name, "alibi_slopes", alibi_slopes, dtypes=(torch.float32,), device=q.device)
    fits = alibi_slopes.dim() in (1, 2) and alibi_slopes.shape[-1] == heads
    require(
        fits,
        name,
        "alibi_slopes",
        lambda: f"have shape (heads,) or (batch, heads) with heads {heads}",
        tuple(alibi_slopes.shape),
    )


def check_packing(
    name: str,
    q: Tensor,
    k: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> None:
    """Offsets that come together with packed tensors, and one row of slopes for each sequence."""
    require(
        (cu_seqlens_q is None) == (cu_seqlens_k is None),
        name,
        "cu_seqlens_q and cu_seqlens_k",
        "be given together",
        "only one of them",
    )
    packed = cu_seqlens_q is not None
    rule = "have 3 dimensions (tokens, heads, head_dim) with cu_seqlens" if packed else "have 4 dimensions"
    require(q.dim() == (3 if packed else 4), name, "q", rule, tuple(q.shape))
    sequences = q.shape[0]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_offsets(name, "cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q, "max_seqlen_q")
        check_offsets(name, "cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k, "max_seqlen_k")
        sequences = cu_seqlens_q.shape[0] - 1
        fits = cu_seqlens_k.shape == cu_seqlens_q.shape
        require(
            fits,
            name,
            "cu_seqlens_k",
            lambda: f"have as many entries as cu_seqlens_q, {sequences + 1}",
            cu_seqlens_k.shape[0],
        )
    if alibi_slopes is not None and alibi_slopes.dim() == 2:
        fits = alibi_slopes.shape[0] == sequences
        require(
            fits,
            name,
            "alibi_slopes",
            lambda: f"have one row for each of {sequences} sequences",
            alibi_slopes.shape[0],
        )


def check_offsets(name: str, argument: str, cu: Tensor, x: Tensor, longest: int | None, longest_name: str) -> None:
    check_tensor(name, argument, cu, dtypes=(torch.int32,), device=x.device, shape=("*",), names="sequences + 1")
    require(cu.shape[0] >= 1, name, argument, "have at least one entry", 0)
    require(cu.is_contiguous(), name, argument, "be contiguous", f"strides {cu.stride()}")
    if not has_values(cu):
        return
    offsets = cu.tolist()
    require(offsets[0] == 0, name, argument, "begin with 0", offsets[0])
    lengths = [b - a for a, b in itertools.pairwise(offsets)]
    if lengths:
        fall = next((i for i, n in enumerate(lengths) if n < 0), None)
        require(fall is None, name, argument, "never fall", f"{offsets[fall or 0 : (fall or 0) + 2]} at {fall}")
        require(offsets[-1] <= x.shape[0], name, argument, f"end within {x.shape[0]} tokens", offsets[-1])
    if longest is not None:
        rule = f"be at least the longest sequence, {max(lengths, default=0)}"
        require(longest >= max(lengths, default=0), name, longest_name, rule, longest)
