"""The pool of pages that a cache shares with its forks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol
from weakref import WeakSet

import numpy as np
import psutil
import torch
from numpy import int32
from numpy.typing import NDArray

from lcore._runtime import PageAllocator
from lcore.cache.overflow import Overflow

Ids = NDArray[int32]

# A pool that is not reserved grows to half more than it was: few copies, and at most a third of it unused.
_GROWTH = 1.5
_NO_IDS: Ids = np.empty(0, dtype=np.int32)


class Holder(Protocol):
    """Whoever keeps ids of pages."""

    def renumber(self, ids: Ids) -> None:
        """Page i is page ids[i] from now on; ids[i] is -1 where nobody holds it."""


class PagePool:
    """One uint8 tensor of pages, the allocator of its pages, and the budget of all caches that share it.

    data: (num_pages, page_bytes). Growing replaces it by a longer copy, so it is read from here for every call. lock is
    held while pages are taken and written: no page is written into a tensor that has just been replaced. It is
    reentrant because the garbage collector may close another cache meanwhile. reclaim(pages), where set, gives back up
    to that many pages that no cache holds; it is called with the lock held.

    overflow: the file that holds the pages, of which those used last are in memory, in what max_bytes leaves. Then data
    is its memory: it grows without a copy, and whoever reads or writes pages does so inside `using`.
    """

    def __init__(self, page_bytes: int, max_bytes: int | None, overflow: Overflow | None = None) -> None:
        self.lock = threading.RLock()
        self.overflow = overflow
        self.data = self._tensor("PagedCache", 0, page_bytes)
        self.allocator = PageAllocator(0)
        self.max_bytes = max_bytes
        self.member_bytes = 0  # tables, tails and scores of the caches that share this pool
        self.holders: WeakSet[Holder] = WeakSet()
        self.reclaim: Callable[[int], None] | None = None

    @property
    def page_bytes(self) -> int:
        return self.data.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the pages, in memory."""
        return self.data.untyped_storage().nbytes() if self.overflow is None else self.overflow.resident_bytes

    @property
    def free_bytes(self) -> int | None:
        """What is left of max_bytes, with overflow beside no pages at all; None without a limit."""
        pages = self.data.nbytes if self.overflow is None else 0
        return None if self.max_bytes is None else self.max_bytes - self.member_bytes - pages

    def check_budget(self, function: str, more: int, purpose: str) -> None:
        """MemoryError when `more` bytes would exceed max_bytes."""
        free = self.free_bytes
        if free is None or more <= free:
            return
        raise MemoryError(
            f"lcore.{function}: max_bytes={self.max_bytes:,} leaves {max(free, 0):,} bytes free, {more:,} are needed "
            f"{purpose}; max_bytes={self.max_bytes - free + more:,} would fit"  # type: ignore[operator]
        )

    def grown(self, function: str, pages: int, *, exact: bool, reserved_bytes: int = 0) -> torch.Tensor | None:
        """A longer tensor, with room for `pages` more pages than are in use now; None when there is room already.

        Not exact: half more than now, unless what max_bytes leaves beside reserved_bytes is less. The caller has
        checked that the pages fit. `adopt` puts the tensor into use.
        """
        missing = pages - self.allocator.free_count
        if missing <= 0:
            return None
        count = self.data.shape[0] + missing
        if not exact:
            count = max(count, int(self.data.shape[0] * _GROWTH))
            free = self.free_bytes
            if free is not None and self.overflow is None:
                count = min(count, self.data.shape[0] + (free - reserved_bytes) // self.page_bytes)
        data = self._tensor(function, count, self.page_bytes)
        if self.overflow is None:
            data[: self.data.shape[0]] = self.data
        return data

    def adopt(self, data: torch.Tensor) -> None:
        self.allocator.grow(data.shape[0])
        self.data = data

    def trim(self, function: str, spare: int) -> None:
        """Gives all free pages but `spare` back: moves the last pages to the places of free ones, shrinks the tensor.

        For a moment both tensors are held. MemoryError when the system has no room for the smaller one. With overflow
        nothing moves: the file gets holes where pages are free.
        """
        with self.lock:
            if self.overflow is not None:
                free = self.allocator.allocate(self.allocator.free_count)
                self.overflow.discard(free[spare:])
                self.allocator.release(free)
                return
            used = self.allocator.num_pages - self.allocator.free_count
            if used + spare >= self.data.shape[0]:
                return
            ids = self.allocator.packed()
            data = new_tensor(function, (used + spare, self.page_bytes), torch.uint8)
            data[:used] = self.data[:used]
            moved = np.flatnonzero(ids[used:] >= 0) + used
            data[torch.from_numpy(ids[moved]).long()] = self.data[torch.from_numpy(moved)]
            self.allocator.pack()
            self.allocator.grow(used + spare)
            for holder in self.holders:
                holder.renumber(ids)
            self.data = data

    def make_free(self, pages: int, beside: int = 0) -> None:
        """Has pages reclaimed when fewer than this many are free and max_bytes, less `beside`, has no room for others.

        Without max_bytes, and with overflow, nothing is kept at the price of growing.
        """
        missing = pages - self.allocator.free_count
        if self.free_bytes is not None and self.overflow is None:
            missing -= max(0, self.free_bytes - beside) // self.page_bytes
        if missing > 0 and self.reclaim is not None:
            self.reclaim(missing)

    def missing_bytes(self, pages: int) -> int:
        """Bytes of memory that the pool must grow by to have this many pages free."""
        return 0 if self.overflow is not None else max(0, pages - self.allocator.free_count) * self.page_bytes

    def back(self, function: str, pages: int) -> None:
        """With overflow, disk space under the next `pages` pages to be taken; OSError when there is too little."""
        if self.overflow is not None and pages > 0:
            ids = self.allocator.allocate(pages)
            try:
                self.overflow.back(function, ids)
            finally:
                self.allocator.release(ids)

    @property
    def hot_bytes(self) -> int | None:
        """How much of the pages may be in memory; None for all of them."""
        return None if self.overflow is None or self.max_bytes is None else max(0, self.max_bytes - self.member_bytes)

    def using(self, ids: Ids = _NO_IDS, ahead: Ids = _NO_IDS, *, writes: bool = False) -> AbstractContextManager[None]:
        """Pages that are read or written inside; with overflow they are fetched, and others dropped beyond hot_bytes.

        Inside, pages of this call stay, even where they alone are more than that. ahead: pages that are read next.
        """
        hot = self.hot_bytes
        if self.overflow is None or hot is None:
            return nullcontext()
        return self.overflow.using(ids, ahead, hot, writes=writes)

    def _tensor(self, function: str, pages: int, page_bytes: int) -> torch.Tensor:
        if self.overflow is not None:
            return self.overflow.tensor(function, pages)
        return new_tensor(function, (pages, page_bytes), torch.uint8)


def new_tensor(function: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """torch.empty on the CPU; MemoryError with the bytes needed and free when the system refuses.

    Never an inference tensor: a cache made in inference mode is written to outside of it too.
    """
    try:
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        needed = torch.Size(shape).numel() * dtype.itemsize
        free = psutil.virtual_memory().available
        raise MemoryError(
            f"lcore.{function}: {needed:,} bytes are needed and {free:,} are free; "
            "use fewer tokens, a smaller kv_format, or max_bytes to be told before the system is"
        ) from error
