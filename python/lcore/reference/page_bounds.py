"""Bounds of pages of keys, and of the scores in a page, as their formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def page_bounds(k: Tensor, page_size: int) -> Tensor:
    """What lcore.page_bounds computes, in k's dtype: (batch, kv_heads, seq // page_size, 2, head_dim)."""
    pages = k[:, : k.shape[1] // page_size * page_size].unflatten(1, (-1, page_size)).permute(0, 3, 1, 2, 4)
    return torch.stack([pages.amin(dim=3), pages.amax(dim=3)], dim=3)


def page_scores(
    q: Tensor,
    bounds: Tensor,
    page_counts: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    softmax_scale: float | None = None,
    per_head: bool = False,
) -> Tensor:
    """What lcore.page_scores computes, with its arguments, every step in q's dtype, rounding to nearest."""
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    kv_heads, pages = bounds.shape[1], bounds.shape[2]
    group = q.shape[2] // kv_heads
    per_kv_head = (q * scale).unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)[..., None, :]
    least, greatest = bounds.to(q.dtype)[:, :, None, None].unbind(dim=5)  # (batch, kv_heads, 1, 1, pages, head_dim)
    scores = torch.maximum(per_kv_head * least, per_kv_head * greatest).sum(dim=-1)
    scores = scores.where(~scores.isnan(), math.inf)  # (batch, kv_heads, group, seq_q, pages)
    if lengths is not None:
        real = torch.arange(q.shape[1]) < lengths[:, None]
        scores = scores.where(real[:, None, None, :, None], -math.inf)
    if page_counts is not None:
        held = torch.arange(pages) < page_counts[..., None]
        scores = scores.where(held[:, :, None, None], -math.inf)
    scores = scores.amax(dim=3)
    return scores.flatten(1, 2) if per_head else scores.amax(dim=2)
