"""Merging attention over disjoint sets of keys, as its formula."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """What lcore.merge_states computes, in the dtype of lse; differentiable in all four, any number of times.

    Formula: lse = ln(e^lse_a + e^lse_b); out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b.
    Where both lse are the same infinity, -inf with -inf gives (0, -inf), +inf with +inf gives the mean of the outputs,
    and no gradient reaches them.
    """
    tie = (lse_a == lse_b) & lse_a.isinf()
    a, b = torch.where(tie, 0.0, lse_a), torch.where(tie, 0.0, lse_b)  # keeps inf - inf out of the graph
    neutral = tie & lse_a.isneginf()
    weight_a = torch.where(neutral, 0.0, torch.sigmoid(a - b)).transpose(-1, -2)[..., None]
    weight_b = torch.where(neutral, 0.0, torch.sigmoid(b - a)).transpose(-1, -2)[..., None]
    out = weight_a * out_a.to(lse_a.dtype) + weight_b * out_b.to(lse_b.dtype)
    infinite = torch.where(neutral, -math.inf, math.inf)
    return out.to(out_a.dtype), torch.where(tie, infinite, torch.logaddexp(a, b))
