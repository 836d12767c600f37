"""`lcore.HybridCache`: pages of a model's attention layers, and states of its recurrent ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lcore.cache.paged import PagedCache
from lcore.cache.states import StateCache
from lcore.errors import require


class HybridCache(PagedCache):
    """A PagedCache of a model's attention layers, with the StateCache of its recurrent layers as `states`.

    Layers of the pages are counted among the attention layers alone, those of the states among the recurrent ones. A
    model's step appends to the pages layer by layer and moves the states on at its end; `seen`, `lengths`, policies and
    all that only pages have is the attention layers'. `fork`, `crop`, `stats`, `save` and `load` are of both: after a
    step that failed in the middle, `crop` brings them together again.

    Args:
        states: of the recurrent layers, that have read nothing; their checkpoints stand at whole pages.
        others: as `PagedCache`, whose batch_size is that of the states; its max_bytes does not count the states, which
            have one size.

    Raises: as `PagedCache`.
    """

    def __init__(self, states: StateCache, num_layers: int, num_kv_heads: int, head_dim: int, **options: Any) -> None:
        rows = options.setdefault("batch_size", states.batch_size)
        rule = f"have the rows of the states, {states.batch_size}"
        require(rows == states.batch_size, "HybridCache", "batch_size", rule, rows)
        super().__init__(num_layers, num_kv_heads, head_dim, **options)
        every, whole = states.checkpoint_every, f"be whole pages of {self.page_size} tokens"
        require(every is None or every % self.page_size == 0, "HybridCache", "checkpoint_every", whole, every)
        self.states = states

    def fork(self) -> HybridCache:
        """A cache with the same content that goes its own way; see `PagedCache.fork` and `StateCache.fork`."""
        fork: Any = super().fork()
        fork.states = self.states.fork()
        return fork

    def crop(self, n: int | Tensor) -> None:
        """Takes all tokens behind the first n seen from every row in every layer, as `PagedCache.crop`.

        Raises: ValueError as there and as `StateCache.crop`, which can go back to some places only; see `crop_point`.
            Nothing has changed.
        """
        way = self.states.way_back(n)  # raises before anything has changed
        super().crop(n)
        self.states.go_back(*way)

    def crop_point(self, n: int | Tensor) -> Tensor:
        """(batch,) int64: the most tokens, n or fewer, that `crop` can go back to; see `StateCache.crop_point`."""
        return self.states.crop_point(n)

    def stats(self) -> dict[str, int | float]:
        """As `PagedCache.stats`, with state_bytes, what `StateCache.stats` counts, in bytes too."""
        pages, states = super().stats(), self.states.stats()["bytes"]
        return {**pages, "bytes": pages["bytes"] + states, "state_bytes": states}
