"""What a cache does not share with its forks: which pages each (layer, sequence, kv head) has, and its tail."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lcore.cache.pool import Ids, new_tensor

_GROWTH = 1.5


class Layer(NamedTuple):
    """One layer of `Slots`: its tensors, and NumPy views of the two that the host computes with."""

    table: torch.Tensor  # (batch, kv_heads, width) int32
    lengths: torch.Tensor  # (batch, kv_heads) int32
    tail_k: torch.Tensor  # (batch, kv_heads, page_size, head_dim)
    tail_v: torch.Tensor
    host_table: NDArray[np.int32]
    host_lengths: NDArray[np.int32]


class Slots:
    """Page tables, lengths and tails of all layers; a slot is one (layer, sequence, kv head).

    Token t of a slot is token t % page_size of page table[t // page_size], or, from the last multiple of page_size on,
    of the tail. Entries of the table and of the tail beyond the length hold anything and are never read.
    """

    def __init__(
        self, table: torch.Tensor, lengths: torch.Tensor, tail_k: torch.Tensor, tail_v: torch.Tensor
    ) -> None:
        self.table = table  # (layers, batch, kv_heads, width) int32
        self.lengths = lengths  # (layers, batch, kv_heads) int32, tokens of the tail included
        self.tail_k = tail_k  # (layers, batch, kv_heads, page_size, head_dim), the model's dtype
        self.tail_v = tail_v
        self.layers = self._views()

    @staticmethod
    def empty(
        function: str, shape: tuple[int, int, int], page_size: int, head_dims: tuple[int, int], dtype: torch.dtype
    ) -> Slots:
        """No tokens in (layers, batch, kv_heads) slots."""
        tails = [new_tensor(function, (*shape, page_size, dim), dtype) for dim in head_dims]
        table = new_tensor(function, (*shape, 0), torch.int32)
        return Slots(table, torch.zeros(shape, dtype=torch.int32), *tails)

    def copy(self) -> Slots:
        return Slots(self.table.clone(), self.lengths.clone(), self.tail_k.clone(), self.tail_v.clone())

    @property
    def page_size(self) -> int:
        return self.tail_k.shape[-2]

    @property
    def width(self) -> int:
        return self.table.shape[-1]

    @property
    def tail_bytes(self) -> int:
        return self.tail_k.untyped_storage().nbytes() + self.tail_v.untyped_storage().nbytes()

    @property
    def table_bytes(self) -> int:
        return self.table.untyped_storage().nbytes() + self.lengths.untyped_storage().nbytes()

    @property
    def nbytes(self) -> int:
        return self.tail_bytes + self.table_bytes

    def widened_by(self, width: int) -> int:
        """Bytes that the table must grow by to have this width."""
        return max(0, width - self.width) * self.lengths.nbytes

    def wider(self, function: str, width: int, free: int | None, *, exact: bool) -> torch.Tensor | None:
        """A copy of the table with at least this width, half more than now if free bytes allow; None if it is so wide."""
        if width <= self.width:
            return None
        generous = int(self.width * _GROWTH)
        if not exact and generous > width and (free is None or self.widened_by(generous) <= free):
            width = generous
        table = new_tensor(function, (*self.lengths.shape, width), torch.int32)
        table[..., : self.width] = self.table
        return table

    def adopt(self, table: torch.Tensor) -> None:
        self.table = table
        self.layers = self._views()

    def ids(self, first: NDArray[np.int32] | int, last: NDArray[np.int32]) -> Ids:
        """Ids of the pages first .. last - 1 of every slot, first and last being (layers, batch, kv_heads)."""
        return self.table.numpy()[between(first, last, self.width)]

    def full_pages(self) -> NDArray[np.int32]:
        """(layers, batch, kv_heads): pages that each slot holds."""
        return self.lengths.numpy() // self.page_size

    def _views(self) -> list[Layer]:
        return [
            Layer(*tensors, tensors[0].numpy(), tensors[1].numpy())
            for tensors in zip(self.table, self.lengths, self.tail_k, self.tail_v, strict=True)
        ]


def between(first: NDArray[np.int32] | int, last: NDArray[np.int32], width: int) -> NDArray[np.bool_]:
    """Mask (..., width): columns first .. last - 1 of each slot."""
    columns = np.arange(width, dtype=np.int32)
    lower = first[..., None] if isinstance(first, np.ndarray) else first
    return (columns >= lower) & (columns < last[..., None])
