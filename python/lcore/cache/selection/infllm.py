"""InfLLM: pages by a few of their keys that the text itself has looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore.cache.checks import check_int
from lcore.cache.layer_pages import LayerPages
from lcore.cache.selection.base import Selection
from lcore.ops.page_bounds import page_scores


class InfLLM(Selection):
    """Block representatives (Xiao et al. 2024, InfLLM: Training-Free Long-Context Extrapolation for LLMs with an
    Efficient Context Memory).

    Formula: representatives of a page are its `representatives` keys that got most attention from the tokens up to
        local_tokens behind them; score = qbar . (sum of the representatives), with the mean qbar of the call's queries
        and of the heads that share the kv head. A page without observed attention, as after loading a file, is
        represented by the mean of its keys, times `representatives`.

    The score is linear in the representatives, so that only their sum is kept. Keys keep the positions of the text.

    Args:
        representatives: keys that stand for a page.
        local_tokens: how far behind a key the queries are that choose it. Pages are summarized, and can stay unread,
            once they are `recent` pages old: for the paper's rule recent * page_size >= local_tokens.
        Others: as `Selection`; budget is a number of pages.
    """

    observes = True

    def __init__(
        self,
        budget: float,
        *,
        representatives: int = 4,
        local_tokens: int = 4096,
        sinks: int = 2,
        recent: int = 64,
        dense_layers: int = 0,
        prefill: bool = True,
        **options: Any,
    ) -> None:
        check_int("InfLLM", "representatives", representatives, 1)
        check_int("InfLLM", "local_tokens", local_tokens, 1)
        super().__init__(budget, sinks=sinks, recent=recent, dense_layers=dense_layers, prefill=prefill, **options)
        self.representatives, self.local_tokens = representatives, local_tokens

    def summarize(self, pages: LayerPages, first: int, last: int) -> Tensor:
        k, mass = pages.keys(first, last), pages.mass(first, last)
        count = min(self.representatives, pages.page_size)
        chosen = mass.topk(count, dim=-1).indices
        best = k.gather(-2, chosen[..., None].expand(*chosen.shape, k.shape[-1])).sum(-2)
        unseen = (mass.amax(-1) == 0)[..., None]
        best = torch.where(unseen, k.mean(-2) * count, best)
        return best.bfloat16()[..., None, :].expand(*best.shape[:-1], 2, best.shape[-1])

    def scores(
        self, q: Tensor, summaries: Tensor, page_counts: Tensor, lengths: Tensor | None, softmax_scale: float
    ) -> Tensor:
        # With the least equal to the greatest, the bound of page_scores is the product itself.
        return page_scores(self._mean(q, lengths, summaries.shape[1]), summaries, page_counts)

    def _mean(self, q: Tensor, lengths: Tensor | None, kv_heads: int) -> Tensor:
        """(batch, 1, kv_heads, head_dim) float32: the mean over real rows and the heads of a group."""
        by_head = q.float().unflatten(2, (kv_heads, -1)).mean(3)
        if lengths is None:
            return by_head.mean(1, keepdim=True)
        real = torch.arange(q.shape[1]) < lengths[:, None]
        total = by_head.masked_fill(~real[..., None, None], 0).sum(1, keepdim=True)
        return total / lengths.clamp(min=1)[:, None, None, None]
