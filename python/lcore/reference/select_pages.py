"""The best pages of each kv head, as their formula."""

from __future__ import annotations

import torch
from torch import Tensor


def select_pages(
    scores: Tensor, ranked: Tensor, read: Tensor, *, sinks: int = 0, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """What lcore.select_pages computes, with its arguments; unread in the dtype of scores."""
    batch, heads, _ = scores.shape
    kv_heads = ranked.shape[1]
    scores = scores.where(~scores.isnan(), torch.inf)
    width = int(read.max()) if width is None else width
    chosen = torch.full((batch, kv_heads, width), -1, dtype=torch.int32)
    unread = torch.full((batch, heads), -torch.inf, dtype=scores.dtype)
    group = heads // kv_heads
    for b in range(batch):
        for g in range(kv_heads):
            own = scores[b, g * group : (g + 1) * group, : int(ranked[b, g])]
            best = own.amax(0).tolist()
            order = sorted(range(own.shape[1]), key=lambda p: (p >= sinks, -best[p], p))
            picked = sorted(order[: int(read[b, g])])
            chosen[b, g, : len(picked)] = torch.tensor(picked, dtype=torch.int32)
            rest = [p for p in range(own.shape[1]) if p not in picked]
            if rest:
                unread[b, g * group : (g + 1) * group] = own[:, rest].logsumexp(1)
    return chosen, unread
