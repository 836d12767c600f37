"""Quest: pages by the bounds of their keys."""

from __future__ import annotations

from torch import Tensor

from lcore.cache.layer_pages import LayerPages
from lcore.cache.selection.base import Selection
from lcore.ops.page_bounds import page_scores


class Quest(Selection):
    """Query-aware pages (Tang et al. 2024, Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference).

    Formula: u_p = softmax_scale * sum_c max(q_c least_pc, q_c greatest_pc), with the least and the greatest value of
        each key channel in page p; heads that share a kv head read the pages that are best for any of them

    u_p is an upper bound of the scores in the page, so that it also bounds the attention mass of what is not read:
        with the log-sum-exp L over the keys read, D = sum over pages not read of page_size exp(u_p - L), at most
        D / (1 + D) of the mass is missing. `PagedCache.dropped_mass` tells it for every head and query.

    Args: as `Selection`; budget may be a mass.
    """

    certified = True

    def summarize(self, pages: LayerPages, first: int, last: int) -> Tensor:
        return pages.bounds(first, last)

    def scores(
        self, q: Tensor, summaries: Tensor, page_counts: Tensor, lengths: Tensor | None, softmax_scale: float
    ) -> Tensor:
        return page_scores(q, summaries, page_counts, lengths, softmax_scale=softmax_scale, per_head=True)
