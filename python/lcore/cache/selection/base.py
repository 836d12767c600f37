"""The interface of selections."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcore.cache.checks import check_int
from lcore.cache.layer_pages import LayerPages
from lcore.errors import message, require, require_type


class Selection:
    """Decides which full pages a query reads; `lcore.PagedCache(select=...)` keeps all of them.

    A page has a summary, made once when the page is full; a query scores the summaries, and each kv head reads the best
    of its pages, in their order, and its tail. A selection of one's own is a subclass with `summarize` and `scores`. An
    object holds settings only and may serve many caches.

    Args:
        budget: full pages that each kv head reads at most, sinks and recent ones among them: an integer. Or a fraction
            in (0, 1), where scores are upper bounds: pages are read, best first, until no head can have left more than
            this part of its attention mass unread.
        sinks, recent: the first and the last full pages of a slot that are always read.
        dense_layers: so many layers, from the first on, read everything.
        prefill: whether calls with more than one new token a row select as well, one set of pages for all of them.
            Pages that such a call's own tokens stand in are always read.
    """

    certified = False  # whether scores are upper bounds of those of the page's keys
    observes = False  # whether `LayerPages.mass` is kept, from queries up to `local_tokens` behind a key
    local_tokens = 0

    def __init__(
        self, budget: float, *, sinks: int = 1, recent: int = 1, dense_layers: int = 2, prefill: bool = False
    ) -> None:
        name = type(self).__name__
        rule = "be an integer >= 1" + (", or a fraction in (0, 1)" if self.certified else "")
        is_mass = isinstance(budget, float) and self.certified
        require_type(is_mass or isinstance(budget, int), name, "budget", rule, repr(budget))
        require(0 < budget < 1 if is_mass else budget >= 1, name, "budget", rule, budget)
        for argument, value in (("sinks", sinks), ("recent", recent), ("dense_layers", dense_layers)):
            check_int(name, argument, value, 0)
        require_type(isinstance(prefill, bool), name, "prefill", "be a bool", repr(prefill))
        rule = f"be >= sinks + recent = {sinks + recent}, which are always read"
        require(is_mass or budget >= sinks + recent, name, "budget", rule, budget)
        self.budget, self.sinks, self.recent = budget, sinks, recent
        self.dense_layers, self.prefill = dense_layers, prefill

    def summarize(self, pages: LayerPages, first: int, last: int) -> Tensor:
        """(batch, kv_heads, last - first, 2, head_dim) bfloat16: what is kept of full pages first .. last - 1."""
        raise NotImplementedError(f"lcore.{type(self).__name__}: a selection must define summarize(pages, first, last)")

    def scores(
        self, q: Tensor, summaries: Tensor, page_counts: Tensor, lengths: Tensor | None, softmax_scale: float
    ) -> Tensor:
        """(batch, heads or kv_heads, pages) float32: the larger, the sooner a page is read.

        Args:
            q: (batch, new, heads, head_dim), after RoPE and float32 where the cache holds keys before it, then maybe
                each row twice, once rounded to the cache's dtype. lengths: (batch,) its real rows, or None.
            summaries: (batch, kv_heads, pages, 2, head_dim); of each head only the first page_counts (batch, kv_heads)
                mean anything, the others must score -inf.
        """
        raise NotImplementedError(f"lcore.{type(self).__name__}: a selection must define scores(q, summaries, ...)")

    def selects(self, layer: int, new: int) -> bool:
        """Whether a call with so many new tokens a row reads a part of this layer."""
        return layer >= self.dense_layers and (new == 1 or (self.prefill and new > 1))

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


def check_selection(function: str, select: Any, rope: object = None, page_size: int = 64) -> None:
    """None, or a selection that fits the pages of a cache."""
    if select is None:
        return
    if not isinstance(select, Selection):
        raise TypeError(message(function, "select", "be an lcore.selection.Selection or None", repr(select)))
    rule = "be a multiple of 16 for a selection with rope, which rotates whole vectors of a page's keys"
    require(rope is None or page_size % 16 == 0, function, "page_size", rule, page_size)
