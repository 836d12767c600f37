"""Full pages that rows begin with and leave behind: at each place of a text those of all layers and kv heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lcore.cache.layer import between
from lcore.cache.pool import Ids
from lcore.cache.slots import Slots


def hold(slots: Slots, pages: Sequence[Ids]) -> None:
    """Begins row b, still empty, with the pages of places 0 .. n - 1 in `pages[b]`: one reference more each.

    pages: (n, pages of the pool that a place has at most). -1 stands behind those of a place that has fewer: pages of
        values among codes are in parts, and a prefix of them is not as long as the text.
    """
    with slots.pool.lock:
        slots.pool.allocator.retain(np.concatenate([held[held >= 0] for held in pages]))
        for row, held in enumerate(pages):
            layer, head, column, used = _places(slots, len(held))
            slots.host.table[layer[used], row, head[used], column[used]] = held[held >= 0]
            slots.lengths[:, row] = slots.seen[:, row] = len(held) * slots.layout.page_size


def row_pages(slots: Slots, row: int, count: int) -> Ids:
    """The pages of a row's places 0 .. count - 1, as `hold` takes them."""
    layer, head, column, used = _places(slots, count)
    pages = np.full(used.shape, -1, dtype=np.int32)
    first = between(0, used.sum(-1), used.shape[-1])
    pages[first] = slots.host.table[layer[used], row, head[used], column[used]]
    return pages


def _places(
    slots: Slots, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Layer, kv head and entry of the table (count, width) of the pages at each place, and which of them there are."""
    plain, (layers, _, heads) = slots.layout.plain, slots.lengths.shape
    most = [plain.parts if plain.counts[layer] > 0 else 1 for layer in range(layers)]
    layer = np.repeat(np.arange(layers), [heads * parts for parts in most])
    head = np.concatenate([np.repeat(np.arange(heads), parts) for parts in most])
    part = np.concatenate([np.tile(np.arange(parts), heads) for parts in most])
    begin, end = (plain.columns(np.tile(np.arange(count) + i, (layers, 1)))[layer].T for i in (0, 1))
    column = begin + part
    return np.broadcast_to(layer, column.shape), np.broadcast_to(head, column.shape), column, column < end
