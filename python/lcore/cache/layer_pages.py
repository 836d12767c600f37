"""What a selection sees of a layer when it summarizes pages."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lcore.cache import kernels
from lcore.cache.key_rope import turned_keys
from lcore.cache.page_values import page_values

if TYPE_CHECKING:
    from lcore.cache.slots import Slots
    from lcore.positions import Rotation


class LayerPages:
    """Full pages of one layer; what a head does not have or has not filled is 0, or the content of another page.

    Keys are as attention reads them: under the Hadamard transform where the cache rotates, after RoPE.

    page_size: tokens a page.
    """

    def __init__(self, slots: Slots, layer: int, mass: Tensor | None, rope: Rotation | None) -> None:
        self._slots, self._layout, self._mass, self._rope = slots, slots.layout, mass, rope
        self._pool, self._layer = slots.snapshot(layer)
        self.page_size = slots.layout.page_size

    def bounds(self, first: int, last: int) -> Tensor:
        """(batch, kv_heads, last - first, 2, head_dim) bfloat16: least and greatest key channels, rounded outward."""
        with self._slots.using(self._layer.number, first, last):
            return kernels.page_bounds(self._pool, self._layer, self._layout, first, last, torch.bfloat16, self._rope)

    def keys(self, first: int, last: int) -> Tensor:
        """(batch, kv_heads, last - first, page_size, head_dim) float32."""
        with self._slots.using(self._layer.number, first, last):
            k, _ = page_values(self._pool, self._layer, self._layout, first, last - first, torch.float32)
        if self._rope is None:
            return k
        return turned_keys(k.flatten(2, 3), first * self.page_size, self._rope).unflatten(2, k.shape[2:4])

    def mass(self, first: int, last: int) -> Tensor:
        """(batch, kv_heads, last - first, page_size) float32: attention observed so far, for one that `observes`."""
        if self._mass is None:
            return torch.zeros(*self._layer.lengths.shape, last - first, self.page_size)
        part = self._mass[..., first * self.page_size : last * self.page_size]
        missing = (last - first) * self.page_size - part.shape[-1]
        return torch.nn.functional.pad(part, (0, missing)).unflatten(-1, (last - first, self.page_size))
