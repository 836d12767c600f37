"""What a cache does not share with its forks: which pages each (layer, sequence, kv head) has, and its tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from lcore.cache.checks import MAX_TOKENS
from lcore.cache.formats import PageLayout
from lcore.cache.kernels import append_
from lcore.cache.pool import Ids, PagePool, new_tensor
from lcore.errors import message

# A table that is not reserved grows to half more than it was.
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
    """Page tables, lengths and tails of all layers, over a pool; a slot is one (layer, sequence, kv head).

    Token t of a slot is token t % page_size of page table[t // page_size], or, from the last multiple of page_size on,
    of the tail. Entries of the table and of the tail beyond the length hold anything and are never read. Full pages are
    never written again, so that other slots may name them too.
    """

    def __init__(
        self,
        pool: PagePool,
        layout: PageLayout,
        table: torch.Tensor,
        lengths: torch.Tensor,
        tail_k: torch.Tensor,
        tail_v: torch.Tensor,
    ) -> None:
        self.pool = pool
        self.layout = layout
        self.table = table  # (layers, batch, kv_heads, width) int32
        self.lengths = lengths  # (layers, batch, kv_heads) int32, tokens of the tail included
        self.tail_k = tail_k  # (layers, batch, kv_heads, page_size, head_dim), the model's dtype
        self.tail_v = tail_v
        self.layers = self._views()
        self.intact = np.ones(lengths.shape[1], dtype=np.bool_)  # (batch,): nothing was ever taken out of the row
        pool.member_bytes += self.nbytes

    @staticmethod
    def empty(
        function: str, pool: PagePool, layout: PageLayout, shape: Sequence[int], dtype: torch.dtype, width: int = 0
    ) -> Slots:
        """(layers, batch, kv_heads) slots without tokens, whose tables have room for `width` pages."""
        values = math.prod(shape) * layout.page_size * (layout.head_dim + layout.head_dim_v)
        more = values * dtype.itemsize + math.prod(shape) * (1 + width) * torch.int32.itemsize
        pool.check_budget(function, more, "for tables and tails, before any page")
        return Slots(
            pool,
            layout,
            new_tensor(function, (*shape, width), torch.int32),
            new_tensor(function, tuple(shape), torch.int32).zero_(),
            new_tensor(function, (*shape, layout.page_size, layout.head_dim), dtype),
            new_tensor(function, (*shape, layout.page_size, layout.head_dim_v), dtype),
        )

    @property
    def tail_bytes(self) -> int:
        return self.tail_k.untyped_storage().nbytes() + self.tail_v.untyped_storage().nbytes()

    @property
    def table_bytes(self) -> int:
        return self.table.untyped_storage().nbytes() + self.lengths.untyped_storage().nbytes()

    @property
    def nbytes(self) -> int:
        return self.tail_bytes + self.table_bytes

    def stats(self) -> dict[str, int | float]:
        """As `PagedCache.stats`."""
        pool_bytes = self.pool.data.untyped_storage().nbytes()
        return {
            "bytes": pool_bytes + self.nbytes,
            "pool_bytes": pool_bytes,
            "tail_bytes": self.tail_bytes,
            "table_bytes": self.table_bytes,
            "tokens": int(self.lengths.amax((0, 2)).sum()),
            "pages": int(self.full_pages().sum()),
            "page_bytes": self.layout.page_bytes,
            "free_pages": self.pool.allocator.free_count,
            "bits_per_value": self.layout.bits_per_value,
        }

    def full_pages(self) -> NDArray[np.int32]:
        """(layers, batch, kv_heads): pages that each slot holds."""
        return self.lengths.numpy() // self.layout.page_size

    def append(self, function: str, layer: int, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor | None) -> None:
        """Appends counts[b] tokens (all, for None) of row b. All pages that will fill up are taken before any write."""
        new = k.shape[1] if counts is None else counts.numpy()[:, None]
        lengths = self.layers[layer].host_lengths
        total = lengths.astype(np.int64) + new
        if total.max() > MAX_TOKENS:
            rule = f"bring no head over {MAX_TOKENS} tokens"
            raise ValueError(message(function, "k", rule, f"{k.shape[1]} on top of {lengths.max()}"))
        before = lengths // self.layout.page_size
        after = total // self.layout.page_size
        with self.pool.lock:
            ids = self._take_pages(function, layer, before, after)
            try:
                append_(self.pool.data, self.layers[layer], k, v, self.layout, counts)
            except BaseException:
                # The kernel has moved the lengths if it ran: then Ctrl-C came after it, and the pages are in use.
                if ids is not None and np.array_equal(lengths // self.layout.page_size, before):
                    self.pool.allocator.release(ids)
                raise

    def _take_pages(self, function: str, layer: int, before: NDArray[np.int32], after: NDArray[np.int64]) -> Ids | None:
        """Enters new pages before .. after - 1 of a layer's slots into the table; None when there are none."""
        count = int((after - before).sum())
        if count == 0:
            return None
        first, last = int(before.min()), int(after.max())
        self._make_room(function, last, count)
        ids = self.pool.allocator.allocate(count)
        columns = self.layers[layer].host_table[..., first:last]
        columns[_between(before - first, after - first, last - first)] = ids
        return ids

    def reserve(self, function: str, tokens: NDArray[np.int64]) -> None:
        """Room for every slot of row b to hold tokens[b] tokens, and no more than that."""
        pages = tokens[None, :, None] // self.layout.page_size
        self._make_room(function, int(pages.max()), int((pages - self.full_pages()).clip(min=0).sum()), exact=True)

    def hold(self, pages: Sequence[Ids]) -> None:
        """Begins row b, still empty, with the full pages `pages[b]` (n, layers * kv_heads): one reference more each."""
        layers, _, heads = self.lengths.shape
        with self.pool.lock:
            self.pool.allocator.retain(np.concatenate([held.ravel() for held in pages]))
            for row, held in enumerate(pages):
                self.table.numpy()[:, row, :, : len(held)] = held.reshape(-1, layers, heads).transpose(1, 2, 0)
                self.lengths[:, row] = len(held) * self.layout.page_size

    def row_pages(self, row: int, count: int) -> Ids:
        """The first `count` pages of a row, as `hold` takes them."""
        return np.ascontiguousarray(self.table.numpy()[:, row, :, :count].transpose(2, 0, 1)).reshape(count, -1)

    def _make_room(self, function: str, width: int, pages: int, *, exact: bool = False) -> None:
        """Room for `width` pages in every slot's table and for `pages` more pages in the pool: all or MemoryError."""
        pool = self.pool
        with pool.lock:
            widening = max(0, width - self.table.shape[-1]) * self.lengths.nbytes
            pool.make_free(pages, beside=widening)
            missing = pool.missing_bytes(pages)
            if widening + missing == 0:
                return
            pool.check_budget(function, widening + missing, f"for {pages} pages of {self.layout.page_size} tokens")
            free = pool.free_bytes
            table = self._wider(function, width, None if free is None else free - missing, exact)
            added = 0 if table is None else table.nbytes - self.table.nbytes
            data = pool.grown(function, pages, exact=exact, reserved_bytes=added)
            if table is not None:
                self.table = table
                self.layers = self._views()
                pool.member_bytes += added
            if data is not None:
                pool.adopt(data)

    def _wider(self, function: str, width: int, free: int | None, exact: bool) -> torch.Tensor | None:
        """A copy of the table with this width, or with half more than now where `free` bytes allow; None if it fits."""
        now = self.table.shape[-1]
        if width <= now:
            return None
        generous = max(width, int(now * _GROWTH))
        if not exact and (free is None or (generous - now) * self.lengths.nbytes <= free):
            width = generous
        table = new_tensor(function, (*self.lengths.shape, width), torch.int32)
        table[..., :now] = self.table
        return table

    def fork(self, function: str) -> Slots:
        """A copy that shares the full pages: one reference more for each."""
        with self.pool.lock:
            self.pool.check_budget(function, self.nbytes, "for the fork's tables and tails")
            own = (self.table, self.lengths, self.tail_k, self.tail_v)
            copies = [new_tensor(function, tuple(x.shape), x.dtype).copy_(x) for x in own]
            self.pool.allocator.retain(self._ids(0, self.full_pages()))
            fork = Slots(self.pool, self.layout, *copies)
            fork.intact[:] = self.intact
            return fork

    def crop(self, limits: NDArray[np.int64]) -> None:
        """Keeps at most limits[b] tokens in every slot of row b. Tokens kept from a page that is cut go to the tail."""
        page_size = self.layout.page_size
        lengths = self.lengths.numpy()
        after = np.minimum(lengths, limits[None, :, None]).astype(np.int32)
        held, kept = lengths // page_size, after // page_size
        with self.pool.lock:
            cut = (kept < held) & (after % page_size > 0)
            if cut.any():
                ids = torch.from_numpy(self.table.numpy()[cut, kept[cut]])
                where = torch.from_numpy(cut)
                self.tail_k[where], self.tail_v[where] = self.layout.decode(self.pool.data[ids], self.tail_k.dtype)
            released = self._ids(kept, held)
            self.intact &= (after == lengths).all(axis=(0, 2))
            lengths[...] = after
            self.pool.allocator.release(released)

    def release(self) -> None:
        """Gives every page and the budget back."""
        with self.pool.lock:
            self.pool.allocator.release(self._ids(0, self.full_pages()))
            self.pool.member_bytes -= self.nbytes

    def _ids(self, first: NDArray[np.int32] | int, last: NDArray[np.int32]) -> Ids:
        """Ids of the pages first .. last - 1 of every slot."""
        table = self.table.numpy()
        return table[_between(np.broadcast_to(first, last.shape), last, table.shape[-1])]

    def _views(self) -> list[Layer]:
        return [
            Layer(*tensors, tensors[0].numpy(), tensors[1].numpy())
            for tensors in zip(self.table, self.lengths, self.tail_k, self.tail_v, strict=True)
        ]


def _between(first: NDArray[np.integer], last: NDArray[np.integer], width: int) -> NDArray[np.bool_]:
    """Mask (..., width): columns first .. last - 1 of each slot."""
    columns = np.arange(width, dtype=np.int32)
    return (columns >= first[..., None]) & (columns < last[..., None])
