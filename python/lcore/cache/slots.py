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
from lcore.cache.layer import Host, Layer, between
from lcore.cache.page_index import PageIndex
from lcore.cache.pool import Ids, PagePool, new_tensor
from lcore.cache.room import make_room
from lcore.cache.undo import Undo
from lcore.errors import message


class Slots:
    """Page tables, lengths and tails of all layers, over a pool; a slot is one (layer, sequence, kv head).

    Token t of a slot is token t % page_size of its page t // page_size, named by table[t // page_size], or by `parts`
    entries where a page holds values among codes; or, from the last multiple of page_size on, of the tail. Entries of
    the table and of the tail beyond the length hold anything and are never read. Full pages are never written again, so
    that other slots may name them too.
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
        self.index = PageIndex(tuple(lengths.shape))
        self.host = Host(*(x.numpy() for x in (table, lengths, seen, thinned)))
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
        return self.tail_bytes + self.table_bytes + self.scores.nbytes + self.index.nbytes

    def full_pages(self) -> NDArray[np.int32]:
        """(layers, batch, kv_heads): full pages that each slot has."""
        return self.host.lengths // self.layout.page_size

    def entries(self) -> NDArray[np.int32]:
        """(layers, batch, kv_heads): pages of the pool that each slot holds, the first entries of its table."""
        entries: NDArray[np.int32] = self.layout.plain.columns(self.full_pages())
        return entries

    def entries_for(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """(layers, batch, kv_heads): the same once every slot of row b holds tokens[b] tokens."""
        pages = np.broadcast_to(tokens[None, :, None] // self.layout.page_size, self.lengths.shape)
        entries: NDArray[np.int64] = self.layout.plain.columns(pages)
        return entries

    def append(self, function: str, layer: int, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor | None) -> None:
        """Appends counts[b] tokens (all, for None) of row b. All pages that will fill up are taken before any write."""
        new = k.shape[1] if counts is None else counts.numpy()[:, None]
        lengths = self.layers[layer].host_lengths
        total = lengths.astype(np.int64) + new
        if total.max() > MAX_TOKENS:
            rule = f"bring no head over {MAX_TOKENS} tokens"
            raise ValueError(message(function, "k", rule, f"{k.shape[1]} on top of {lengths.max()}"))
        before, after = lengths // self.layout.page_size, total // self.layout.page_size
        entries = [self.layout.plain.columns(pages, layer) for pages in (before, after)]
        with self.pool.lock:
            ids = self._take_pages(function, layer, *entries)
            if self.undo is not None and ids is not None:
                filling = (after > before) & (lengths % self.layout.page_size > 0)
                self.undo.save(layer, filling, lengths, self.tail_k[layer], self.tail_v[layer])
            try:
                with nullcontext() if ids is None else self.pool.using(ids, writes=True):
                    append_(self.pool.data, self.layers[layer], k, v, self.layout, counts)
            finally:
                # The kernel has moved the lengths if it ran, even if Ctrl-C came after it.
                if np.array_equal(lengths, total):
                    self.host.seen[layer] += k.shape[1] if counts is None else counts.numpy()
                elif ids is not None:
                    self.pool.allocator.release(ids)

    def _take_pages(self, function: str, layer: int, before: NDArray[np.int32], after: NDArray[np.int64]) -> Ids | None:
        """Enters new pages as entries before .. after - 1 of a layer's slots into the table; None for none."""
        count = int((after - before).sum())
        if count == 0:
            return None
        first, last = int(before.min()), int(after.max())
        make_room(function, self, last, count)
        ids = self.pool.allocator.allocate(count)
        columns = self.layers[layer].host_table[..., first:last]
        columns[between(before - first, after - first, last - first)] = ids
        return ids

    def fork(self, function: str) -> Slots:
        """A copy that shares the full pages: one reference more for each."""
        with self.pool.lock:
            self.pool.check_budget(function, self.nbytes, "for the fork's tables and tails")
            own = (self.table, self.lengths, self.tail_k, self.tail_v, self.seen, self.thinned)
            copies = [new_tensor(function, tuple(x.shape), x.dtype).copy_(x) for x in own]
            self.pool.allocator.retain(self.ids(0, self.entries()))
            undo = None if self.undo is None else self.undo.copy(function)
            fork = Slots(self.pool, self.layout, *copies, scores=self.scores.copy(), undo=undo)
            fork.intact[:] = self.intact
            fork.index = self.index.copy()
            self.pool.member_bytes += fork.index.nbytes
            return fork

    def forget_index(self) -> None:
        """Drops what a selection knows of pages."""
        with self.pool.lock:
            self.pool.member_bytes -= self.index.nbytes
            self.index = PageIndex(self.index.known.shape)

    def release(self) -> None:
        """Gives every page and the budget back."""
        with self.pool.lock:
            self.pool.holders.discard(self)
            self.pool.allocator.release(self.ids(0, self.entries()))
            self.pool.member_bytes -= self.nbytes

    def renumber(self, ids: Ids) -> None:
        """As `Holder`. The table is a new one, as wide as needed: who reads by the old one has the old pool too."""
        full = self.entries()
        width = int(full.max())
        table = new_tensor("PagedCache.trim", (*full.shape, width), torch.int32).copy_(self.table[..., :width])
        used, host = between(0, full, width), table.numpy()
        host[used] = ids[host[used]]
        self.replace_table(table)

    def replace_table(self, table: torch.Tensor) -> None:
        """Another one with the same entries in use."""
        self.pool.member_bytes += table.nbytes - self.table.nbytes
        self.table = table
        self.host = self.host._replace(table=table.numpy())
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
        last_pages = full if last is None else full.clip(max=last)
        begin, end = (self.layout.plain.columns(pages, layer) for pages in (first, last_pages))
        return self.pool.using(table[between(begin, end, table.shape[-1])])

    def ids(self, first: NDArray[np.int32] | int, last: NDArray[np.int32]) -> Ids:
        """Ids in the entries first .. last - 1 of every slot."""
        table = self.host.table
        return table[between(first, last, table.shape[-1])]

    def _views(self) -> list[Layer]:
        return [
            Layer(*tensors, tensors[0].numpy(), tensors[1].numpy(), number, plain)
            for number, (tensors, plain) in enumerate(
                zip(
                    zip(self.table, self.lengths, self.tail_k, self.tail_v, strict=True),
                    self.layout.plain.counts,
                    strict=True,
                )
            )
        ]


def assign(tensors: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copies each value into its tensor; Ctrl-C comes before all of it or after."""
    torch._foreach_copy_(tensors, values)
