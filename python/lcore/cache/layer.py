"""One layer's share of a paged cache: page table, lengths and tails."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lcore.cache.pool import PagePool

_FIRST_WIDTH = 16  # columns of a new page table; it doubles from there


class CacheLayer:
    """Which pages hold this layer's tokens, for every (sequence, kv head).

    table: int32 (batch, kv_heads, width) page ids; lengths: int32 (batch, kv_heads); seen: int64 (batch,);
    tail_k, tail_v: (batch, kv_heads, page_size, dim), the length % page_size tokens behind the last full page.
    The small tensors are read and written through NumPy, whose calls cost a tenth of torch's.
    """

    def __init__(self, pool: PagePool, batch: int, kv_heads: int, dtype: torch.dtype) -> None:
        layout = pool.layout
        self.pool = pool
        self.tail_k = torch.zeros((batch, kv_heads, layout.page_size, layout.head_dim), dtype=dtype)
        self.tail_v = torch.zeros((batch, kv_heads, layout.page_size, layout.head_dim_v), dtype=dtype)
        self._adopt(
            torch.zeros((batch, kv_heads, _FIRST_WIDTH), dtype=torch.int32),
            torch.zeros((batch, kv_heads), dtype=torch.int32),
            torch.zeros(batch, dtype=torch.int64),
        )

    def _adopt(self, table: Tensor, lengths: Tensor, seen: Tensor) -> None:
        self.table, self.lengths, self.seen = table, lengths, seen
        self._table, self._lengths, self._seen = table.numpy(), lengths.numpy(), seen.numpy()

    def __del__(self) -> None:
        # An instance whose __init__ failed has no lengths, and at interpreter exit the allocator may be gone.
        if hasattr(self, "_lengths") and self.pool.allocator is not None:
            self.pool.allocator.release(self._page_ids())

    def _page_ids(self) -> np.ndarray:
        full = self._lengths // self.pool.layout.page_size
        used = np.arange(self._table.shape[2]) < full[..., None]
        return np.ascontiguousarray(self._table[used])

    @property
    def pages(self) -> int:
        return int((self._lengths // self.pool.layout.page_size).sum())

    @property
    def nbytes(self) -> int:
        tensors = (self.table, self.lengths, self.seen, self.tail_k, self.tail_v)
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def shortest(self) -> int:
        return int(self._lengths.min())

    def pages_missing(self, full_pages: int) -> int:
        """Pages still to allocate until every row has this many."""
        return int(np.maximum(full_pages - self._lengths // self.pool.layout.page_size, 0).sum())

    def widen(self, full_pages: int) -> None:
        """Gives the page table at least this many columns."""
        width = self._table.shape[2]
        if full_pages <= width:
            return
        table = torch.zeros((*self.table.shape[:2], max(full_pages, 2 * width)), dtype=torch.int32)
        table[..., :width] = self.table
        self._adopt(table, self.lengths, self.seen)

    def append(self, k: Tensor, v: Tensor, counts: Tensor | None) -> None:
        """Writes new tokens, (batch, new, kv_heads, dim), `counts` of each row or all."""
        page_size = self.pool.layout.page_size
        added = k.shape[1] if counts is None else counts.numpy()[:, None]
        before = self._lengths // page_size
        after = (self._lengths + added) // page_size
        new_pages = int((after - before).sum())
        if new_pages > 0:
            ids = self.pool.allocate(new_pages)  # before anything is written: it may refuse
            self.widen(int(after.max()))
            columns = np.arange(self._table.shape[2])
            self._table[(columns >= before[..., None]) & (columns < after[..., None])] = ids
        layout = self.pool.layout
        torch.ops.lcore.cache_append_(
            self.pool.memory,
            self.table,
            self.lengths,
            self.tail_k,
            self.tail_v,
            k,
            v,
            layout.k_format,
            layout.v_format,
            page_size,
            counts,
        )
        self._lengths += added
        self._seen += added if counts is None else counts.numpy()

    def crop(self, rows: Tensor) -> None:
        """Keeps the first rows[b] tokens of each sequence; cut pages return their kept tokens to the tail."""
        layout = self.pool.layout
        keep = np.minimum(self._lengths, rows.numpy()[:, None])
        released = []
        for b, h in zip(*np.nonzero(keep < self._lengths), strict=True):
            full, rest = divmod(int(keep[b, h]), layout.page_size)
            old_full = int(self._lengths[b, h]) // layout.page_size
            if full < old_full:
                k, v = layout.read(self.pool.memory[self._table[b, h, full]], rest)
                self.tail_k[b, h, :rest] = k
                self.tail_v[b, h, :rest] = v
                released.append(self._table[b, h, full:old_full].copy())
            self._lengths[b, h] = keep[b, h]
        if released:
            self.pool.allocator.release(np.concatenate(released))
        np.minimum(self._seen, rows.numpy(), out=self._seen)

    def fork(self) -> CacheLayer:
        """The same tokens: shared pages, one reference more each; own table, lengths and tails."""
        twin = object.__new__(CacheLayer)
        twin.pool = self.pool
        twin.tail_k, twin.tail_v = self.tail_k.clone(), self.tail_v.clone()
        self.pool.allocator.retain(self._page_ids())
        twin._adopt(self.table.clone(), self.lengths.clone(), self.seen.clone())
        return twin
