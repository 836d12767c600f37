"""What a cache does not share with its forks: which pages each (layer, sequence, kv head) has, and its tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from lcore.cache.checks import MAX_TOKENS
from lcore.cache.formats import PageLayout
from lcore.cache.kernels import append_
from lcore.cache.key_scores import KeyScores
from lcore.cache.layer import Layer, between
from lcore.cache.pool import Ids, PagePool, new_tensor
from lcore.cache.undo import Undo
from lcore.errors import message

# A table that is not reserved grows to half more than it was.
_GROWTH = 1.5


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
        seen: torch.Tensor,
        thinned: torch.Tensor,
        *,
        scores: KeyScores,
        undo: Undo | None,
    ) -> None:
        self.pool = pool
        self.layout = layout
        self.table = table  # (layers, batch, kv_heads, width) int32
        self.lengths = lengths  # (layers, batch, kv_heads) int32, tokens of the tail included
        self.tail_k = tail_k  # (layers, batch, kv_heads, page_size, head_dim), the model's dtype
        self.tail_v = tail_v
        self.seen = seen  # (layers, batch) int64: tokens ever appended
        self.thinned = thinned  # (layers, batch, kv_heads) int64: what was evicted stood among the first so many seen
        self.scores = scores
        self.undo = undo  # where pages are coded
        self.layers = self._views()
        # (batch,) 1 where nothing was ever taken out of the row; not bool, of which a file keeps one bit of eight.
        self.intact = np.ones(lengths.shape[1], dtype=np.uint8)
        pool.member_bytes += self.nbytes
        with pool.using():  # what is left for pages is less now
            pass
        pool.holders.add(self)

    @staticmethod
    def empty(
        function: str, pool: PagePool, layout: PageLayout, shape: Sequence[int], dtype: torch.dtype, width: int = 0
    ) -> Slots:
        """(layers, batch, kv_heads) slots without tokens, whose tables have room for `width` pages."""
        values = math.prod(shape) * layout.page_size * (layout.head_dim + layout.head_dim_v)
        coded, slots = not layout.stores_values, math.prod(shape)
        more = (1 + coded) * values * dtype.itemsize + slots * (12 + 4 * coded + 4 * width) + math.prod(shape[:2]) * 8
        pool.check_budget(function, more, "for tables and tails, before any page")
        tail_k = new_tensor(function, (*shape, layout.page_size, layout.head_dim), dtype)
        tail_v = new_tensor(function, (*shape, layout.page_size, layout.head_dim_v), dtype)
        return Slots(
            pool,
            layout,
            new_tensor(function, (*shape, width), torch.int32),
            new_tensor(function, tuple(shape), torch.int32).zero_(),
            tail_k,
            tail_v,
            new_tensor(function, tuple(shape[:2]), torch.int64).zero_(),
            new_tensor(function, tuple(shape), torch.int64).zero_(),
            scores=KeyScores(shape[0]),
            undo=Undo.beside(function, tail_k, tail_v) if coded else None,
        )

    @property
    def tail_bytes(self) -> int:
        tails = self.tail_k.untyped_storage().nbytes() + self.tail_v.untyped_storage().nbytes()
        return tails + (0 if self.undo is None else self.undo.nbytes)

    @property
    def table_bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.table, self.lengths, self.seen, self.thinned))

    @property
    def nbytes(self) -> int:
        return self.tail_bytes + self.table_bytes + self.scores.nbytes

    def stats(self) -> dict[str, int | float]:
        """As `PagedCache.stats`."""
        pool_bytes, overflow = self.pool.nbytes, self.pool.overflow
        return {
            "bytes": pool_bytes + self.nbytes,
            "pool_bytes": pool_bytes,
            "file_bytes": 0 if overflow is None else overflow.file_bytes,
            "tail_bytes": self.tail_bytes,
            "table_bytes": self.table_bytes,
            "score_bytes": self.scores.nbytes,
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
        before, after = lengths // self.layout.page_size, total // self.layout.page_size
        with self.pool.lock:
            ids = self._take_pages(function, layer, before, after)
            if self.undo is not None and ids is not None:
                filling = (after > before) & (lengths % self.layout.page_size > 0)
                self.undo.save(layer, filling, lengths, self.tail_k[layer], self.tail_v[layer])
            try:
                with nullcontext() if ids is None else self.pool.using(ids, writes=True):
                    append_(self.pool.data, self.layers[layer], k, v, self.layout, counts)
            finally:
                # The kernel has moved the lengths if it ran, even if Ctrl-C came after it.
                if np.array_equal(lengths, total):
                    self.seen.numpy()[layer] += k.shape[1] if counts is None else counts.numpy()
                elif ids is not None:
                    self.pool.allocator.release(ids)

    def _take_pages(self, function: str, layer: int, before: NDArray[np.int32], after: NDArray[np.int64]) -> Ids | None:
        """Enters new pages before .. after - 1 of a layer's slots into the table; None when there are none."""
        count = int((after - before).sum())
        if count == 0:
            return None
        first, last = int(before.min()), int(after.max())
        self.make_room(function, last, count)
        ids = self.pool.allocator.allocate(count)
        columns = self.layers[layer].host_table[..., first:last]
        columns[between(before - first, after - first, last - first)] = ids
        return ids

    def reserve(self, function: str, tokens: NDArray[np.int64]) -> None:
        """Room for every slot of row b to hold tokens[b] tokens, and no more than that."""
        pages = tokens[None, :, None] // self.layout.page_size
        self.make_room(function, int(pages.max()), int((pages - self.full_pages()).clip(min=0).sum()), exact=True)

    def hold(self, pages: Sequence[Ids]) -> None:
        """Begins row b, still empty, with the full pages `pages[b]` (n, layers * kv_heads): one reference more each."""
        layers, _, heads = self.lengths.shape
        with self.pool.lock:
            self.pool.allocator.retain(np.concatenate([held.ravel() for held in pages]))
            for row, held in enumerate(pages):
                self.table.numpy()[:, row, :, : len(held)] = held.reshape(-1, layers, heads).transpose(1, 2, 0)
                self.lengths[:, row] = self.seen[:, row] = len(held) * self.layout.page_size

    def row_pages(self, row: int, count: int) -> Ids:
        """The first `count` pages of a row, as `hold` takes them."""
        return np.ascontiguousarray(self.table.numpy()[:, row, :, :count].transpose(2, 0, 1)).reshape(count, -1)

    def make_room(self, function: str, width: int, pages: int, *, exact: bool = False) -> None:
        """Room for `width` pages in every slot's table and for `pages` more pages in the pool: all or MemoryError."""
        pool = self.pool
        with pool.lock:
            widening = max(0, width - self.table.shape[-1]) * self.lengths.nbytes
            pool.make_free(pages, beside=widening)
            missing = pool.missing_bytes(pages)
            if widening + missing > 0:
                pool.check_budget(function, widening + missing, f"for {pages} pages of {self.layout.page_size} tokens")
            free = pool.free_bytes
            table = self._wider(function, width, None if free is None else free - missing, exact)
            added = 0 if table is None else table.nbytes - self.table.nbytes
            data = pool.grown(function, pages, exact=exact, reserved_bytes=added)
            if data is not None:
                pool.adopt(data)
            pool.back(function, pages)
            if table is not None:
                self.table = table
                self.layers = self._views()
                pool.member_bytes += added

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
            own = (self.table, self.lengths, self.tail_k, self.tail_v, self.seen, self.thinned)
            copies = [new_tensor(function, tuple(x.shape), x.dtype).copy_(x) for x in own]
            self.pool.allocator.retain(self._ids(0, self.full_pages()))
            undo = None if self.undo is None else self.undo.copy(function)
            fork = Slots(self.pool, self.layout, *copies, scores=self.scores.copy(), undo=undo)
            fork.intact[:] = self.intact
            return fork

    def crop(self, function: str, limits: NDArray[np.int64]) -> None:
        """Takes the tokens behind the first limits[b] seen from every slot of row b, none of which has been evicted.

        Tokens kept from a page that is cut go to the tail.
        """
        page_size = self.layout.page_size
        lengths, seen, thinned = self.lengths.numpy(), self.seen.numpy(), self.thinned.numpy()
        taken = (seen - limits).clip(min=0)[..., None]
        emptied = np.broadcast_to((limits == 0)[:, None], thinned.shape)
        least = np.where((taken > 0) & ~emptied, thinned, 0).max((0, 2))
        if (limits < least).any():
            rule = f"be 0 or >= {least.tolist()}, where a policy last dropped a token of each row"
            raise ValueError(message(function, "n", rule, limits.tolist()))
        after = np.where(emptied, 0, lengths - taken).astype(np.int32)
        held, kept = lengths // page_size, after // page_size
        with self.pool.lock:
            cut = (kept < held) & (after % page_size > 0)
            if self.undo is not None:
                self.undo.check(cut, after, page_size)
                self.undo.restore(cut, self.tail_k, self.tail_v)
            elif cut.any():
                ids = self.table.numpy()[cut, kept[cut]]
                with self.pool.using(ids):
                    pages = self.pool.data[torch.from_numpy(ids)]
                where = torch.from_numpy(cut)
                self.tail_k[where], self.tail_v[where] = self.layout.decode(pages, self.tail_k.dtype)
            released = self._ids(kept, held)
            self.intact &= (after == lengths).all(axis=(0, 2))
            new = (after, np.minimum(seen, limits), np.where(emptied, 0, thinned))
            assign([self.lengths, self.seen, self.thinned], [torch.from_numpy(x) for x in new])
            self.pool.allocator.release(released)
            self.scores.crop(after)

    def release(self) -> None:
        """Gives every page and the budget back."""
        with self.pool.lock:
            self.pool.holders.discard(self)
            self.pool.allocator.release(self._ids(0, self.full_pages()))
            self.pool.member_bytes -= self.nbytes

    def renumber(self, ids: Ids) -> None:
        """As `Holder`. The table is a new one, as wide as needed: who reads by the old one has the old pool too."""
        full = self.full_pages()
        width = int(full.max())
        table = new_tensor("PagedCache.trim", (*full.shape, width), torch.int32).copy_(self.table[..., :width])
        used, host = between(0, full, width), table.numpy()
        host[used] = ids[host[used]]
        self.pool.member_bytes += table.nbytes - self.table.nbytes
        self.table = table
        self.layers = self._views()

    def snapshot(self, layer: int) -> tuple[torch.Tensor, Layer]:
        """The pool's pages, and a layer that names them."""
        with self.pool.lock:
            return self.pool.data, self.layers[layer]

    def using(self, layer: int, first: int = 0, last: int | None = None) -> AbstractContextManager[None]:
        """`PagePool.using` for reading the pages first .. last - 1 of a layer's slots, up to the last by default."""
        if self.pool.overflow is None:
            return nullcontext()
        table, full = self.layers[layer].host_table, self.layers[layer].host_lengths // self.layout.page_size
        return self.pool.using(table[between(first, full if last is None else full.clip(max=last), table.shape[-1])])

    def _ids(self, first: NDArray[np.int32] | int, last: NDArray[np.int32]) -> Ids:
        """Ids of the pages first .. last - 1 of every slot."""
        table = self.table.numpy()
        return table[between(first, last, table.shape[-1])]

    def _views(self) -> list[Layer]:
        return [
            Layer(*tensors, tensors[0].numpy(), tensors[1].numpy())
            for tensors in zip(self.table, self.lengths, self.tail_k, self.tail_v, strict=True)
        ]


def assign(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copies each value into its tensor; Ctrl-C comes before all of it or after."""
    torch._foreach_copy_(tensors, values)
