"""Taking the last tokens back."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lcore.cache.slots import Slots, assign
from lcore.errors import message


def crop(function: str, slots: Slots, limits: NDArray[np.int64]) -> None:
    """Takes the tokens behind the first limits[b] seen from every slot of row b, none of which has been evicted.

    Tokens kept from a page that is cut go to the tail.
    """
    page_size = slots.layout.page_size
    lengths, seen, thinned = slots.host.lengths, slots.host.seen, slots.host.thinned
    taken = (seen - limits).clip(min=0)[..., None]
    emptied = np.broadcast_to((limits == 0)[:, None], thinned.shape)
    least = np.where((taken > 0) & ~emptied, thinned, 0).max((0, 2))
    if (limits < least).any():
        rule = f"be 0 or >= {least.tolist()}, where a policy last dropped a token of each row"
        raise ValueError(message(function, "n", rule, limits.tolist()))
    after = np.where(emptied, 0, lengths - taken).astype(np.int32)
    held, kept = lengths // page_size, after // page_size
    with slots.pool.lock:
        cut = (kept < held) & (after % page_size > 0)
        if slots.undo is not None:
            slots.undo.check(cut, after, page_size)
            slots.undo.restore(cut, slots.tail_k, slots.tail_v)
        elif cut.any():
            ids = slots.host.table[cut, kept[cut]]
            with slots.pool.using(ids):
                pages = slots.pool.data[torch.from_numpy(ids)]
            where = torch.from_numpy(cut)
            slots.tail_k[where], slots.tail_v[where] = slots.layout.decode(pages, slots.tail_k.dtype)
        columns = slots.layout.plain.columns
        released = slots.ids(columns(kept), columns(held))
        slots.intact &= (after == lengths).all(axis=(0, 2))
        new = (after, np.minimum(seen, limits), np.where(emptied, 0, thinned))
        assign([slots.lengths, slots.seen, slots.thinned], [torch.from_numpy(x) for x in new])
        slots.pool.allocator.release(released)
        slots.scores.crop(after)
        slots.index.crop(after, page_size)
