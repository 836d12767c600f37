"""Some rows of a cache as a cache of their own, so that those which are done take no part; and rows judged apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lcore.cache import StateCache, states_of

if TYPE_CHECKING:
    from lcore.cache import PagedCache
    from lcore.positions import Rotation


class JudgedApart:
    """A cache, or some rows of one, whose queries each read the pages that they would read alone."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self.batch_size: int = cache.batch_size
        self.layer_rope, self.seen, self.append = cache.layer_rope, cache.seen, cache.append
        self.states = states_of(cache)

    def attend(self, layer: int, q: torch.Tensor, **options: Any) -> torch.Tensor:
        out: torch.Tensor = self._cache.attend(layer, q, separately=True, **options)
        return out


class ActiveRows:
    """What a model needs of a PagedCache, for the rows `index`: batch_size, layer_rope, seen, append, attend and
    states.

    The model computes these rows only. Their keys, values and queries go to the whole cache with length 0 for the other
    rows, whose part of the tensors is neither written nor read.
    """

    def __init__(self, cache: PagedCache, index: Sequence[int]) -> None:
        self._cache = cache
        self._index = torch.tensor(index)
        self.batch_size = len(index)

    @cached_property
    def states(self) -> StateCache | None:
        whole = states_of(self._cache)
        return None if whole is None else whole.rows(self._index)

    def layer_rope(self, layer: int) -> Rotation | None:
        return self._cache.layer_rope(layer)

    def seen(self, layer: int = 0) -> torch.Tensor:
        return self._cache.seen(layer)[self._index]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor, *, lengths: torch.Tensor | None = None) -> None:
        self._cache.append(layer, self._spread(k), self._spread(v), lengths=self._lengths(k, lengths))

    def attend(
        self, layer: int, q: torch.Tensor, *, lengths: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        out = self._cache.attend(layer, self._spread(q), lengths=self._lengths(q, lengths), **options)
        return out[self._index.to(out.device)]

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.new_empty(self._cache.batch_size, *x.shape[1:])
        whole[self._index.to(x.device)] = x
        return whole

    def _lengths(self, x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        whole = torch.zeros(self._cache.batch_size, dtype=torch.int64)
        whole[self._index] = x.shape[1] if lengths is None else lengths.to(whole.dtype)
        return whole


def active_rows(cache: PagedCache, index: Sequence[int]) -> Any:
    """The rows `index` of a cache of either kind, as what a model needs of one."""
    return cache.rows(torch.tensor(index)) if isinstance(cache, StateCache) else ActiveRows(cache, index)
