"""`lcore.PrefixCache`: pages and recurrent states of texts that were read before, for texts that begin the same."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from lcore._runtime import PageAllocator, PrefixIndex
from lcore.cache.checks import check_int
from lcore.cache.overflow import Folder, Overflow, overflow_folder
from lcore.cache.paged import PagedCache
from lcore.cache.pool import PagePool
from lcore.cache.prefix_keys import namespace_of, runs_of
from lcore.cache.shared_pages import hold, row_pages
from lcore.cache.slots import Slots
from lcore.cache.snapshots import Snapshots
from lcore.cache.states import StateCache, states_of
from lcore.errors import require

_STATES_PART = 4  # of max_bytes, that the states beside pages may take


@dataclass(frozen=True)
class _Shelf:
    """A pool and the index over its pages: replaced together, so that no page id meets another pool."""

    pool: PagePool
    index: PrefixIndex


class PrefixCache:
    """An index over the full pages of caches that share one pool, so that a text is read once however often it begins.

    `start` moves an empty cache into the pool and gives each row the pages of the longest known beginning of its
    prompt; `insert` remembers the pages of a row that has read a text. A page is found by all tokens from the start of
    the text to its end, compared one by one, within a namespace: every setting of the cache (format, page size, heads,
    layers, dtype, ...) and what the caller adds, which must tell models and positions apart.

        prefixes = lcore.PrefixCache()
        cache = model.new_cache()
        [known] = prefixes.start(cache, [ids])
        model(ids[None, known:], cache)
        prefixes.insert(cache, 0, ids)

    Of a cache with recurrent states a row begins where they are known too: at a checkpoint (`StateCache`), of a hybrid
    one with all pages before it. Those used last are kept.

    Args:
        max_bytes: limit on what the pool, tables and tails of all caches in it hold in memory together; None for no
            limit. States are part of it: beside pages up to a fourth. Without a limit 64 states are kept.
        overflow: as `PagedCache`, for the pool.

    Memory: pages in the index have one reference from it. When the pool lacks room it grows to max_bytes, then pages
        that no cache holds are given up, the longest unused first, and only then does a call fail. Without max_bytes
        they are given up before it grows: the index takes no more room than caches took at one time. Pages that a cache
        holds stay valid for it whatever happens here.
    Threads: any number may use it.
    Raises: TypeError or ValueError for a bad max_bytes.
    """

    def __init__(self, max_bytes: int | None = None, overflow: Folder = None) -> None:
        if max_bytes is not None:
            check_int("PrefixCache", "max_bytes", max_bytes, 0)
        self.max_bytes = max_bytes
        self.overflow = overflow_folder("PrefixCache", overflow, max_bytes)
        self._lock = threading.Lock()  # for replacing the shelf; what stands on it is guarded by its pool's lock
        self._shelf: _Shelf | None = None
        self._snapshots = Snapshots(max_bytes)

    def start(self, cache: PagedCache | StateCache, prompts: Sequence[Tensor], namespace: bytes = b"") -> list[int]:
        """Moves an empty cache into the pool, its rows beginning with the known pages of their prompts.

        Args:
            cache: without tokens and without max_bytes: that of the pool holds for it.
            prompts: one for each row, (tokens,) int64 or int32. The last token is never taken from the index: somebody
                needs its logits.

        Returns: how many tokens each row begins with, multiples of page_size where there are pages.
        Raises: ValueError for a cache that holds tokens or has pages of another size than the pool; MemoryError when
            its tables and tails do not fit. The cache is then as it was.
        """
        name = "PrefixCache.start"
        if isinstance(cache, StateCache):
            return self._start_states(name, cache, prompts, namespace)
        slots = cache._open(name)
        require(not slots.lengths.any(), name, "cache", "hold no tokens", f"lengths {cache.seen().tolist()}")
        require(cache.max_bytes is None, name, "cache", "have max_bytes None", cache.max_bytes)
        require(len(prompts) == cache.batch_size, name, "prompts", f"have {cache.batch_size} rows", len(prompts))
        runs = [runs_of(name, "prompts", tokens, len(tokens) - 1, cache.page_size) for tokens in prompts]
        states = states_of(cache)
        shelf = self._shelf_for(name, slots.layout.page_bytes, beside_states=states is not None)
        pool, index = shelf.pool, shelf.index
        key = namespace_of(cache, namespace)
        with pool.lock:
            pages = [index.match(key, run) for run in runs]
            if states is not None:
                found = self._snapshots.find(key, prompts, [len(held) * cache.page_size for held in pages])
                pages = [held[: n // cache.page_size] for held, (n, _) in zip(pages, found, strict=True)]
            width = int(slots.entries_for(np.array([len(held) * cache.page_size for held in pages])).max())
            moved = Slots.empty(name, pool, slots.layout, slots.lengths.shape, cache.dtype, width)
            hold(moved, pages)
        cache.close()
        cache._slots, cache.max_bytes, cache.overflow = moved, pool.max_bytes, self.overflow
        if states is not None:
            states.begin_rows(found)
        return [len(held) * cache.page_size for held in pages]

    def _start_states(self, name: str, cache: StateCache, prompts: Sequence[Tensor], namespace: bytes) -> list[int]:
        require(not cache.seen().any(), name, "cache", "hold no tokens", f"lengths {cache.seen().tolist()}")
        require(len(prompts) == cache.batch_size, name, "prompts", f"have {cache.batch_size} rows", len(prompts))
        for tokens in prompts:
            runs_of(name, "prompts", tokens, len(tokens), 1)
        found = self._snapshots.find(namespace_of(cache, namespace), prompts, [len(tokens) for tokens in prompts])
        cache.begin_rows(found)
        return [n for n, _ in found]

    def insert(self, cache: PagedCache | StateCache, row: int, tokens: Tensor, namespace: bytes = b"") -> int:
        """Remembers the full pages of `tokens`, which are the first that a row of a cache has read.

        Nothing is remembered of a cache outside the pool, or of a row that was cropped or holds less than these tokens
        in some layer or head: its pages are not those that reading the text gives.

        Returns: how many pages, of all layers and heads, are new in the index; of a StateCache how many states.
        """
        name = "PrefixCache.insert"
        if isinstance(cache, StateCache):
            runs_of(name, "tokens", tokens, len(tokens), 1)
            return self._snapshots.keep(namespace_of(cache, namespace), cache, row, tokens)
        slots = cache._open(name)
        check_int(name, "row", row, 0, cache.batch_size - 1)
        runs, shelf = runs_of(name, "tokens", tokens, len(tokens), cache.page_size), self._shelf
        if shelf is None or slots.pool is not shelf.pool or len(runs) == 0:
            return 0
        pool, index = shelf.pool, shelf.index
        with pool.lock:
            whole = slots.intact[row] and (slots.full_pages()[:, row] >= len(runs)).all()
            if not whole or pool.reclaim is None:  # None: another thread has put this shelf away
                return 0
            pages = row_pages(slots, row, len(runs))
            held = pages >= 0
            pool.allocator.retain(pages[held])  # first: the index must never name a page that it does not hold
            try:
                known = index.insert(namespace_of(cache, namespace), runs, pages)
            except BaseException:
                pool.allocator.release(pages[held])
                raise
            pool.allocator.release(pages[:known][held[:known]])
        states = states_of(cache)
        if states is not None:
            self._snapshots.keep(namespace_of(cache, namespace), states, row, tokens[: len(runs) * cache.page_size])
        return int(held[known:].sum())

    def make_free(self, cache: PagedCache, pages: int) -> None:
        """Gives up pages that no cache holds until the pool of `cache` has this many free, as far as there are such."""
        pool = cache._open("PrefixCache.make_free").pool
        with pool.lock:
            if pool.reclaim is not None:
                pool.reclaim(max(0, pages - pool.allocator.free_count))

    def clear(self) -> None:
        """Forgets all texts. The pool keeps its size for the caches to come."""
        self._snapshots.clear()
        shelf = self._shelf
        if shelf is not None:
            with shelf.pool.lock:
                shelf.pool.allocator.release(shelf.index.clear())

    def renew(self) -> bool:
        """Forgets all texts and begins a new pool; the memory of the old one goes with the last cache in it.

        With max_bytes only when no cache is in the old pool, for both together could exceed it.

        Returns: whether there is a new pool.
        """
        with self._lock:
            shelf = self._shelf
            if shelf is None or (self.max_bytes is not None and shelf.pool.member_bytes > 0):
                return False
            self._shelf = None
        self._snapshots.clear()
        with shelf.pool.lock:
            shelf.pool.reclaim = None
            shelf.pool.allocator.release(shelf.index.clear())
        return True

    def stats(self) -> dict[str, int]:
        """What the index holds and did since its pool was begun.

        Returns:
            runs: page-sized runs of tokens; pages: of all layers and heads in them; bytes: of these pages, which caches
            may hold too; pool_bytes: of the whole pool; hits, misses: runs of prompts that were found, and were not;
            evictions: runs given up for room; states: that recurrent layers begin with; state_bytes: of these;
            state_hits, state_misses, state_evictions: of prompts and states likewise.
        """
        shelf, kept = self._shelf, self._snapshots
        found = dict.fromkeys(("runs", "pages", "bytes", "pool_bytes", "hits", "misses", "evictions"), 0)
        if shelf is not None:
            pool, index = shelf.pool, shelf.index
            found |= {
                "runs": index.nodes,
                "pages": index.pages,
                "bytes": index.pages * pool.page_bytes,
                "pool_bytes": pool.nbytes,
                "hits": index.hits,
                "misses": index.misses,
                "evictions": index.evictions,
            }
        states = {"hits": kept.hits, "misses": kept.misses, "evictions": kept.evictions, "bytes": kept.nbytes}
        return found | {"states": len(kept), **{f"state_{name}": count for name, count in states.items()}}

    def _shelf_for(self, function: str, page_bytes: int, *, beside_states: bool) -> _Shelf:
        with self._lock:
            if self._shelf is None:
                limit = self.max_bytes
                if limit is not None and beside_states:
                    self._snapshots.max_bytes = limit // _STATES_PART
                    limit -= limit // _STATES_PART
                file = Overflow.of(function, self.overflow, page_bytes)
                pool, index = PagePool(page_bytes, limit, file), PrefixIndex()
                # Not a method of this object: a cycle would keep the pool until the garbage collector finds it.
                pool.reclaim = partial(_reclaim, index, pool.allocator)
                pool.holders.add(index)
                self._shelf = _Shelf(pool, index)
            held = self._shelf.pool.page_bytes
            require(held == page_bytes, function, "cache", f"have pages of the pool's {held} bytes", page_bytes)
            return self._shelf

    def __del__(self) -> None:
        # Nothing to forget after an __init__ that refused; no one to give pages to when the interpreter ends.
        if hasattr(self, "_shelf") and not sys.is_finalizing():
            self.clear()


def _reclaim(index: PrefixIndex, allocator: PageAllocator, pages: int) -> None:
    allocator.release(index.evict(pages, allocator))
