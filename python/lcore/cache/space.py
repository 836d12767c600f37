"""The room that a cache takes: reserved, cropped, evicted, given back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lcore.cache import room
from lcore.cache.checks import MAX_TOKENS, check_int, row_limits
from lcore.cache.cropping import crop
from lcore.cache.eviction import check_keep, check_pages, evict
from lcore.cache.handle import Handle


class Space(Handle):
    """The calls of `PagedCache` that only move tokens and pages."""

    batch_size: int

    def reserve(self, tokens: int | Tensor) -> None:
        """Makes room for every row to hold `tokens` tokens, one number or (batch,) integers, in one exact allocation.

        Forks draw on the same room. Raises MemoryError when it does not fit into max_bytes.
        """
        slots, function = self._open("PagedCache.reserve"), "PagedCache.reserve"
        room.reserve(function, slots, row_limits(function, "tokens", tokens, self.batch_size, MAX_TOKENS))

    def pages_for(self, tokens: Sequence[int]) -> int:
        """Pages that all layers and heads hold once row b holds tokens[b] tokens."""
        limits = np.array(tokens, dtype=np.int64)
        return int(self._open("PagedCache.pages_for").entries_for(limits).sum(dtype=np.int64))

    def crop(self, n: int | Tensor) -> None:
        """Takes all tokens behind the first n seen from every row in every layer; who has seen no more stays as it is.

        So layers of unequal length, after a step that ended in the middle of the model, become equal again. Kept tokens
        of a page that is cut return to the tail with the values that the page had, and encode to the same bytes. What
        the queries of the taken tokens added to a policy's scores of other keys stays.

        In coded formats (fp8 and integers) a page is not cut, or its tokens would be coded twice: n ends at a whole
        page or in the tail, or takes back no more than the last append, whose tail is still known.

        Args:
            n: one number or (batch,) int64 or int32.

        Raises:
            ValueError: n would cut a coded page, or a token at position n or behind has been evicted, so that the state
                after n tokens is not known any more; n = 0, an empty cache, always is. Nothing has changed.
        """
        slots = self._open("PagedCache.crop")
        crop("PagedCache.crop", slots, row_limits("PagedCache.crop", "n", n, self.batch_size))

    def evict(self, layer: int, keep: Tensor) -> None:
        """Drops tokens from the middle of a layer: the others move together and keep their bits.

        Their positions too, unless the cache holds keys before RoPE (`rope`): then they are their new places.

        Pages that become free go back to the pool, `trim` gives them to the system. Pages shared with a fork are copied
        before they change.

        Args:
            keep: (batch, kv_heads, tokens) bool, which of the held tokens stay; tokens is the largest of `lengths`.

        Raises:
            MemoryError: there is no room for the copies; nothing has changed. ValueError: also where pages are coded
            (fp8 and integers) and one is kept in parts: its tokens would have to be coded twice.
        """
        slots = self._layer("PagedCache.evict", layer)
        mask = check_keep(slots.layers[layer].host_lengths, keep)
        coded = not slots.layout.stores_values
        if coded:
            check_pages(slots, layer, mask)
        evict("PagedCache.evict", slots, layer, mask, whole_pages=coded)

    def trim(self, spare_pages: int = 0) -> None:
        """Gives free pages but `spare_pages` back to the system; `stats()["bytes"]` is then what the tokens need.

        The pool moves to a smaller tensor, for a moment both are held. Raises MemoryError when there is no room for it.
        """
        slots = self._open("PagedCache.trim")
        check_int("PagedCache.trim", "spare_pages", spare_pages, 0)
        slots.pool.trim("PagedCache.trim", spare_pages)
