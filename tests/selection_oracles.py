"""Selections as their papers write them: plain torch in float64, one row at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quest_pages(q: Tensor, k: Tensor, size: int, budget: int, sinks: int, recent: int) -> tuple[list[int], Tensor]:
    """Full pages that a kv head reads, and the scores of all (group, pages), for q (new, group, dim), k (tokens, dim).

    The pages with the greatest bound for any query and head; the first, the last and those of the queries always.
    """
    full = len(k) // size
    bounds = torch.full((q.shape[1], full), -math.inf, dtype=torch.float64)
    for p in range(full):
        page = k[p * size : (p + 1) * size]
        products = torch.maximum(q * outward(page.amin(0), -1), q * outward(page.amax(0), 1))
        products = products.sum(-1) / math.sqrt(q.shape[-1])
        bounds[:, p] = products.amax(0)
    return best_pages(bounds.amax(0), len(k), len(q), size, budget, sinks, recent), bounds


def outward(x: Tensor, sign: int) -> Tensor:
    """Rounded to bfloat16, up for sign 1 and down for -1."""
    rounded = x.bfloat16()
    beyond = torch.nextafter(rounded, torch.full_like(rounded, sign * math.inf))
    return torch.where((rounded.double() - x) * sign >= 0, rounded, beyond).double()


def best_pages(scores: Tensor, tokens: int, new: int, size: int, budget: int, sinks: int, recent: int) -> list[int]:
    full = tokens // size
    always = {*range(min(sinks, full)), *range(max(0, full - recent), full), *range((tokens - new) // size, full)}
    order = sorted(set(range(full)) - always, key=lambda p: (-float(scores[p]), p))
    return sorted(always | set(order[: max(0, budget - len(always))]))


def tokens_of(pages: list[int], tokens: int, size: int) -> list[int]:
    """Indices of the keys in these pages and in the tail."""
    return [t for p in pages for t in range(p * size, (p + 1) * size)] + list(range(tokens // size * size, tokens))


def weights(q: Tensor, k: Tensor, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """Attention (new, group, tokens) of causal queries at the end; sinks (group,) take a part of it."""
    scores = torch.einsum("igd,td->igt", q, k) / math.sqrt(q.shape[-1])
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    hidden = torch.arange(len(k)) > len(k) - len(q) + torch.arange(len(q))[:, None]
    scores = scores.masked_fill(hidden[:, None], -math.inf)
    sink = torch.full((q.shape[1],), -math.inf) if sinks is None else sinks
    return torch.cat([scores, sink.double()[:, None].expand(*scores.shape[:2], 1)], -1).softmax(-1)[..., :-1]


def infllm_scores(q: Tensor, k: Tensor, mass: Tensor, size: int, representatives: int) -> Tensor:
    """(pages,): the mean query of a group times the keys of each page that got most attention."""
    mean = q.mean((0, 1))
    scores = []
    for p in range(len(k) // size):
        page, got = k[p * size : (p + 1) * size], mass[p * size : (p + 1) * size]
        best = page[got.topk(representatives).indices].sum(0) if got.any() else page.mean(0) * representatives
        scores.append(mean @ best.bfloat16().double())
    return torch.stack(scores)
