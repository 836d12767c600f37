"""Attention mass of keys as its formula."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lcore.reference.attention import masked_scores, visible


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
    reduction: Literal["sum", "max"] = "sum",
) -> Tensor:
    """What lcore.key_mass computes, with its arguments and its formula, every step in q's dtype.

    Differentiable in q, k and lse, any number of times. Allocates seq_q x seq_k.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    window = (window_size[0], 0 if causal else window_size[1])
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return _mass(q, k, lse, window, scale, softcap, alibi_slopes, reduction)

    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    masses = []
    for i in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        slopes = alibi_slopes[i] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        one = (q[rows][None], k[keys][None], lse[None, :, rows])
        masses.append(_mass(*one, window, scale, softcap, slopes, reduction)[0])
    loose = k.shape[0] - ends_k[-1]  # tokens behind the last sequence belong to none
    return torch.cat([*masses, lse.new_zeros((k.shape[1], loose))], dim=-1)


def _mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    window: tuple[int, int],
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    reduction: str,
) -> Tensor:
    scores = masked_scores(q, k, window, scale, softcap, alibi_slopes)
    # Chosen, not computed: neither what is hidden nor a row of lse -inf counts, whatever stands there.
    counts = visible(q, k, window)[0] & ~lse.isneginf()[..., None]
    weights = torch.where(counts, torch.exp(torch.where(counts, scores - lse[..., None], 0.0)), 0.0)
    # (batch, kv_heads, rows, keys)
    weights = weights.unflatten(1, (k.shape[2], q.shape[2] // k.shape[2])).flatten(2, 3)
    if reduction == "sum":
        return weights.sum(dim=2)
    return torch.cat([weights, weights.new_zeros((*weights.shape[:2], 1, weights.shape[3]))], dim=2).amax(dim=2)
