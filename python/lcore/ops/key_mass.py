"""Attention mass of every key, from a known LSE."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_tensor, require
from lcore.ops.attention_checks import (
    check_packing,
    check_queries_and_keys,
    check_scores,
    check_sizes,
    check_slopes,
    lse_dtype,
)
from lcore.ops.no_gradient import not_differentiable

_NAME = "key_mass"
Reduction = Literal["sum", "max"]


def key_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    reduction: Reduction = "sum",
) -> Tensor:
    """How much attention every key receives from the given queries; nothing of size seq x seq is allocated.

    Formula: mass_j = sum, over the query heads that share the kv head and over the queries i that see key j, of
        e^(s_ij - lse_i), with s_ij as in `lcore.attention`; reduction="max": the largest of these weights.
        Without sinks, and with the lse of all keys, the sum over j is the number of (query, head) that see a key.

    Args:
        q: (batch, seq_q, heads, head_dim), or packed (tokens_q, heads, head_dim) with cu_seqlens: all queries of a
            sequence, its last ones, or the last one; query i of n stands at key position i + m - n.
        k: (batch, seq_k, kv_heads, head_dim) or packed, q's dtype, any strides; heads is a multiple of kv_heads.
        lse: what `lcore.attention` returned for these queries, (batch, heads, seq_q) or (heads, tokens_q), float32
            (float64 for float64 inputs). Sinks are in it already. A query whose lse is -inf counts nowhere. An lse
            over other keys than these gives weights relative to those, above 1 too.
        causal, window_size, softmax_scale, softcap, alibi_slopes, cu_seqlens_q, cu_seqlens_k: as `lcore.attention`.
        reduction: "sum", or "max". The mean over the heads of a group is the sum divided by heads / kv_heads.

    Returns:
        (batch, kv_heads, seq_k) or (kv_heads, tokens_k), float32 (float64 for float64 inputs); 0 for keys that no
        query sees, and for tokens behind the last packed sequence.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        No gradients: the result never requires grad, whatever the inputs do. What a query may not see never reaches
        it: a NaN counts only where it is seen. Adds in float32 within a tile of rows and in float64 beyond. The bits do
        not depend on the batch or on the number of threads.

    Source: Zhang et al. 2023, H2O, arXiv:2306.14048 (sum over all queries); Li et al. 2024, SnapKV,
        arXiv:2404.14469 (a window of queries); Oren et al. 2024, TOVA, arXiv:2401.06104 (the last one); Kim et al.
        2025, KVzip, arXiv:2505.23416 (maximum).
    """
    check_queries_and_keys(_NAME, q, k)
    check_sizes(_NAME, q, k, head_dim=q.shape[-1])
    names = "batch, heads, seq_q" if q.dim() == 4 else "heads, tokens_q"
    shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    check_tensor(_NAME, "lse", lse, dtypes=(lse_dtype(q),), device=q.device, shape=shape, names=names)
    check_scores(_NAME, window_size, softmax_scale, softcap)
    if alibi_slopes is not None:
        check_slopes(_NAME, q, alibi_slopes)
    check_packing(_NAME, q, k, alibi_slopes, cu_seqlens_q, cu_seqlens_k)
    check_reduction(_NAME, reduction)
    return torch.ops.lcore.key_mass(
        q,
        k,
        lse.contiguous(),
        causal,
        list(window_size),
        softmax_scale,
        softcap,
        None if alibi_slopes is None else alibi_slopes.contiguous(),
        cu_seqlens_q,
        cu_seqlens_k,
        reduction,
    )


def check_reduction(name: str, reduction: Any) -> None:
    require(reduction in ("sum", "max"), name, "reduction", 'be "sum" or "max"', repr(reduction))


@torch.library.register_fake("lcore::key_mass")
def _fake(q: Tensor, k: Tensor, lse: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return lse.new_empty((*k.shape[:-3], k.shape[-2], k.shape[-3]))


@torch.library.register_fake("lcore::key_mass_paged")
def _paged_fake(q: Tensor, pool: Tensor, page_table: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    lse, _, width = args[11:14]
    return lse.new_empty((*page_table.shape[:2], width))


not_differentiable("key_mass")
not_differentiable("key_mass_paged")
