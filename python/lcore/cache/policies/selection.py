"""Choosing the best of many keys."""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = 1e30  # a page's sum of such scores is still finite


def finite(scores: Tensor) -> Tensor:
    """Scores as finite float32; NaN is the lowest."""
    return torch.nan_to_num(scores.float(), nan=-_LARGEST, posinf=_LARGEST, neginf=-_LARGEST).clamp(-_LARGEST, _LARGEST)


def rank(scores: Tensor, valid: Tensor, protected: Tensor) -> Tensor:
    """Scores with protected entries above all others and invalid ones below."""
    return scores.masked_fill(protected, torch.inf).masked_fill(~valid, -torch.inf)


def keep_best(ranked: Tensor, count: Tensor) -> Tensor:
    """Mask of the count[...] largest of ranked[..., :]; of equal ones the first."""
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.arange(ranked.shape[-1]) < count[..., None]
    return torch.zeros_like(chosen).scatter(-1, order, chosen)
