"""What a selection sees of a layer when it summarizes pages."""

from __future__ import annotations

import torch
from torch import Tensor

from lcore.cache import kernels
from lcore.cache.formats import PageLayout
from lcore.cache.layer import Layer
from lcore.cache.page_values import page_values


class LayerPages:
    """Full pages of one layer; what a head does not have or has not filled is 0, or the content of another page.

    page_size: tokens a page.
    """

    def __init__(self, pool: Tensor, layer: Layer, layout: PageLayout, mass: Tensor | None) -> None:
        self.page_size = layout.page_size
        self._pool, self._layer, self._layout, self._mass = pool, layer, layout, mass

    def bounds(self, first: int, last: int) -> Tensor:
        """(batch, kv_heads, last - first, 2, head_dim) bfloat16: least and greatest key channels, rounded outward."""
        return kernels.page_bounds(self._pool, self._layer, self._layout, first, last, torch.bfloat16)

    def keys(self, first: int, last: int) -> Tensor:
        """(batch, kv_heads, last - first, page_size, head_dim) float32, as they are stored."""
        return page_values(self._pool, self._layer, self._layout, first, last - first, torch.float32)[0]

    def mass(self, first: int, last: int) -> Tensor:
        """(batch, kv_heads, last - first, page_size) float32: attention observed so far, for one that `observes`."""
        if self._mass is None:
            return torch.zeros(*self._layer.lengths.shape, last - first, self.page_size)
        part = self._mass[..., first * self.page_size : last * self.page_size]
        missing = (last - first) * self.page_size - part.shape[-1]
        return torch.nn.functional.pad(part, (0, missing)).unflatten(-1, (last - first, self.page_size))
