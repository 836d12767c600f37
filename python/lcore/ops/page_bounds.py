"""Bounds of pages of keys, and upper bounds of the scores in a page from them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_kernel, check_number, check_tensor, dtype_name, has_values, require, require_type
from lcore.ops.no_gradient import not_differentiable

_KEY_TYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND_TYPES = (torch.bfloat16, torch.float32)


def page_bounds(k: Tensor, page_size: int, *, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The least and the greatest value of each key channel in each full page of page_size tokens.

    Formula: bounds[b, h, p, 0, c] = min_j k[b, j, h, c] and bounds[b, h, p, 1, c] = max_j k[b, j, h, c] over the tokens
        j of page p, those from p * page_size to (p + 1) * page_size - 1.

    Args:
        k: (batch, seq, kv_heads, head_dim), float32, float16 or bfloat16, any strides, as attention reads it (after
            RoPE).
        page_size: tokens a page.
        dtype: of the result, bfloat16 or float32. As bfloat16 the minimum is rounded down and the maximum up, so that
            they stay bounds; of bfloat16 keys both are exact.

    Returns:
        (batch, kv_heads, seq // page_size, 2, head_dim), dtype. NaN where a key of the page is NaN.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        No gradients: the result never requires grad. `PagedCache.page_bounds` does the same for the pages of a cache.

    Source: Tang et al. 2024, Quest, arXiv:2406.10774.
    """
    name = "page_bounds"
    check_tensor(name, "k", k, dtypes=_KEY_TYPES, shape=("*",) * 4, names="batch, seq, kv_heads, head_dim")
    check_kernel(name, k)
    check_bound_type(name, dtype)
    rule = "be a positive integer"
    require_type(isinstance(page_size, (int, torch.SymInt)), name, "page_size", rule, page_size)
    require(0 < page_size <= 2**31 - 1, name, "page_size", rule, page_size)
    return torch.ops.lcore.page_bounds(k, page_size, dtype_name(dtype))


def page_scores(
    q: Tensor,
    bounds: Tensor,
    page_counts: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    per_head: bool = False,
) -> Tensor:
    """Upper bounds of the scores that queries have with the keys of each page.

    Formula: u_p = max, over the queries and over the query heads that share the kv head, of
        softmax_scale * sum_c max(q_c * least_pc, q_c * greatest_pc). No key of page p has a greater score than u_p, in
        exact arithmetic: every step of the kernel rounds upward. With a softcap the bound of a score is
        softcap * tanh(u_p / softcap); ALiBi with slopes >= 0 only lowers scores.

    Args:
        q: (batch, seq_q, heads, head_dim), float32, float16 or bfloat16, any strides; one or a few queries.
        bounds: (batch, kv_heads, pages, 2, head_dim), bfloat16 or float32, from `page_bounds`; heads is a multiple of
            kv_heads. May be a view of some pages of a larger tensor.
        page_counts: (batch, kv_heads) int32, pages of each head: `cache.lengths(layer) // cache.page_size`. Bounds of
            pages behind them are not read.
        lengths: (batch,) int64, real queries of rows that are padded on the right.
        softmax_scale: default 1 / sqrt(head_dim).
        per_head: one bound for each query head instead of one for those that share a kv head.

    Returns:
        (batch, kv_heads, pages), or (batch, heads, pages) with per_head, float32. -inf for pages that a head does not
        have and where no query looks. +inf where nothing is known, because a key or a query is NaN, or infinite times
        0: such a page must be read.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        No gradients: the result never requires grad. The bits do not depend on the batch or on the number of threads.

    Source: Tang et al. 2024, Quest, arXiv:2406.10774; the maximum over a group of heads instead of their mean
        makes it a bound for grouped-query attention.
    """
    name = "page_scores"
    check_tensor(name, "q", q, dtypes=_KEY_TYPES, shape=("*",) * 4, names="batch, seq_q, heads, head_dim")
    check_kernel(name, q)
    shape = (q.shape[0], "*", "*", 2, q.shape[3])
    check_tensor(name, "bounds", bounds, dtypes=BOUND_TYPES, device=q.device, shape=shape,
                 names="batch, kv_heads, pages, 2, head_dim")  # fmt: skip
    heads, kv_heads = q.shape[2], bounds.shape[1]
    fits = kv_heads > 0 and heads % kv_heads == 0
    require(fits, name, "q", lambda: f"have heads a multiple of kv_heads {kv_heads}", heads)
    if page_counts is not None:
        check_tensor(name, "page_counts", page_counts, dtypes=(torch.int32,), device=q.device,
                     shape=(q.shape[0], kv_heads), names="batch, kv_heads")  # fmt: skip
        page_counts = page_counts.contiguous()
    if lengths is not None:
        check_tensor(name, "lengths", lengths, dtypes=(torch.int64,), device=q.device, shape=(q.shape[0],),
                     names="batch")  # fmt: skip
        lengths = lengths.contiguous()
        if has_values(lengths) and lengths.numel():
            inside = int(lengths.min()) >= 0 and int(lengths.max()) <= q.shape[1]
            require(inside, name, "lengths", f"lie in [0, {q.shape[1]}]", lengths.tolist())
    if softmax_scale is not None:
        check_number(name, "softmax_scale", softmax_scale)
    if bounds.stride(4) != 1 or bounds.stride(3) != q.shape[3]:
        bounds = bounds.contiguous()
    return torch.ops.lcore.page_scores(q, bounds, page_counts, lengths, softmax_scale, per_head)


def check_bound_type(name: str, dtype: Any) -> None:
    require_type(dtype in BOUND_TYPES, name, "dtype", "be bfloat16 or float32", dtype)


@torch.library.register_fake("lcore::page_bounds")
def _bounds_fake(k: Tensor, page_size: int, dtype: str = "bfloat16") -> Tensor:
    shape = (k.shape[0], k.shape[2], k.shape[1] // page_size, 2, k.shape[3])
    return k.new_empty(shape, dtype=getattr(torch, dtype))


@torch.library.register_fake("lcore::page_bounds_paged")
def _paged_fake(
    pool: Tensor, page_table: Tensor, kv_lengths: Tensor, tail_k: Tensor, tail_v: Tensor, *args: Any, **rope: Any
) -> Tensor:
    _, _, _, first, last, dtype = args[:6]
    return tail_k.new_empty((*tail_k.shape[:2], last - first, 2, tail_k.shape[3]), dtype=getattr(torch, dtype))


@torch.library.register_fake("lcore::page_scores")
def _scores_fake(
    q: Tensor,
    bounds: Tensor,
    page_counts: Tensor | None = None,
    lengths: Tensor | None = None,
    softmax_scale: float | None = None,
    per_head: bool = False,
) -> Tensor:
    shape = (q.shape[0], q.shape[2] if per_head else bounds.shape[1], bounds.shape[2])
    return q.new_empty(shape, dtype=torch.float32)


not_differentiable("page_bounds")
not_differentiable("page_bounds_paged")
not_differentiable("page_scores")
