"""Room for more tokens: wider tables and a longer pool, both or neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from lcore.cache.pool import new_tensor

if TYPE_CHECKING:
    from lcore.cache.slots import Slots

# A table that is not reserved grows to half more than it was.
_GROWTH = 1.5


def reserve(function: str, slots: Slots, tokens: NDArray[np.int64]) -> None:
    """Room for every slot of row b to hold tokens[b] tokens, and no more than that."""
    entries = slots.entries_for(tokens)
    missing = (entries - slots.entries()).clip(min=0).sum()
    make_room(function, slots, int(entries.max()), int(missing), exact=True)


def make_room(function: str, slots: Slots, width: int, pages: int, *, exact: bool = False) -> None:
    """Room for `width` entries in every slot's table and for `pages` more pages in the pool: all or MemoryError."""
    pool = slots.pool
    with pool.lock:
        widening = max(0, width - slots.table.shape[-1]) * slots.lengths.nbytes
        pool.make_free(pages, beside=widening)
        missing = pool.missing_bytes(pages)
        if widening + missing > 0:
            pool.check_budget(function, widening + missing, f"for {pages} pages of {slots.layout.page_size} tokens")
        free = pool.free_bytes
        table = _wider(function, slots, width, None if free is None else free - missing, exact)
        added = 0 if table is None else table.nbytes - slots.table.nbytes
        data = pool.grown(function, pages, exact=exact, reserved_bytes=added)
        if data is not None:
            pool.adopt(data)
        pool.back(function, pages)
        if table is not None:
            slots.replace_table(table)


def _wider(function: str, slots: Slots, width: int, free: int | None, exact: bool) -> torch.Tensor | None:
    """A copy of the table with this width, or with half more than now where `free` bytes allow; None if it fits."""
    now = slots.table.shape[-1]
    if width <= now:
        return None
    generous = max(width, int(now * _GROWTH))
    if not exact and (free is None or (generous - now) * slots.lengths.nbytes <= free):
        width = generous
    table = new_tensor(function, (*slots.lengths.shape, width), torch.int32)
    table[..., :now] = slots.table
    return table
