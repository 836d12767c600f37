"""Taking tokens out of the middle of a layer's slots, and giving their pages back."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lcore.cache.checks import CPU
from lcore.cache.kernels import compact_
from lcore.cache.layer import Layer, between
from lcore.cache.pool import Ids
from lcore.cache.room import make_room
from lcore.cache.slots import Slots, assign
from lcore.errors import check_tensor, require

Mask = NDArray[np.bool_]


def evict(function: str, slots: Slots, layer: int, keep: Mask, *, whole_pages: bool) -> None:
    """Keeps the tokens of a layer that `keep` (batch, kv_heads, >= longest slot) names, in their order.

    whole_pages: every page is kept or dropped as one, and the tail is kept: then only the table changes. Otherwise the
    kept tokens move forward, and a page that others hold too gets a copy first. Those pages are all taken before
    anything is written; MemoryError when there is no room for them.
    """
    view = slots.layers[layer]
    held = between(0, view.host_lengths, keep.shape[-1])
    keep = keep & held
    if np.array_equal(keep, held):
        return
    with slots.pool.lock:
        if slots.undo is not None:
            slots.undo.forget(layer)
        slots.index.evict(layer, keep, slots.layout.page_size)
        slots.intact &= (keep == held).all(axis=(1, 2))
        if whole_pages:
            _drop_pages(slots, layer, keep)
        else:
            _compact(function, slots, layer, keep)


def check_keep(lengths: NDArray[np.int32], keep: object) -> Mask:
    """keep of `PagedCache.evict` as a mask."""
    shape = (*lengths.shape, int(lengths.max()))
    names = "batch, kv_heads, tokens"
    check_tensor("PagedCache.evict", "keep", keep, dtypes=(torch.bool,), shape=shape, names=names, device=CPU)
    return keep.numpy()  # type: ignore[attr-defined]


def check_pages(slots: Slots, layer: int, keep: Mask) -> None:
    """ValueError unless keep leaves or takes every page of a layer as one, and leaves the tails."""
    size, lengths = slots.layout.page_size, slots.layers[layer].host_lengths
    held = between(0, lengths, keep.shape[-1])
    in_pages = between(0, lengths // size * size, keep.shape[-1])
    first = np.repeat(keep[..., ::size], size, axis=-1)[..., : keep.shape[-1]]
    prefix = min(slots.layout.plain.prefix * size, keep.shape[-1])
    rule = f"keep the first {prefix} tokens, which are not coded"
    require(bool((keep | ~held)[..., :prefix].all()), "PagedCache.evict", "keep", rule, "some dropped")
    rule = f"keep or drop whole pages of {size} tokens, and keep the tail, where pages are coded"
    fits = np.array_equal(keep & in_pages, first & in_pages) and keep[held & ~in_pages].all()
    require(bool(fits), "PagedCache.evict", "keep", rule, "a page in parts")


def _drop_pages(slots: Slots, layer: int, keep: Mask) -> None:
    view, size, plain = slots.layers[layer], slots.layout.page_size, slots.layout.plain
    full = view.host_lengths // size
    kept_pages = keep[..., ::size] & between(0, full, keep[..., ::size].shape[-1])
    held = between(0, plain.columns(full, layer), view.host_table.shape[-1])
    # Entries of a page of values: all of its parts.
    owners = np.repeat(np.arange(full.max()), np.diff(plain.columns(np.arange(full.max() + 1), layer)))
    kept = np.zeros_like(held)
    kept[..., : len(owners)] = kept_pages[..., owners]
    kept &= held
    dropped = view.host_table[held & ~kept]
    order = np.argsort(~kept, axis=-1, kind="stable")
    values = (
        np.take_along_axis(view.host_table, order, axis=-1),
        view.host_lengths - (full - kept_pages.sum(-1, dtype=np.int32)) * size,
        _thinned(slots, layer, keep),
    )
    try:
        assign([view.table, view.lengths, slots.thinned[layer]], [torch.from_numpy(x) for x in values])
    finally:
        if np.array_equal(view.host_lengths, values[1]):
            slots.pool.allocator.release(dropped)


def _compact(function: str, slots: Slots, layer: int, keep: Mask) -> None:
    size = slots.layout.page_size
    before = slots.layers[layer].host_lengths.copy()
    counts = keep.sum(-1, dtype=np.int32)
    if np.array_equal(counts, before):
        return
    thinned = _thinned(slots, layer, keep)
    fresh, shared = _fresh_pages(function, slots, layer, keep)
    view = slots.layers[layer]
    dropped = view.host_table[shared | between(counts // size, before // size, view.host_table.shape[-1])]
    new_table = view.host_table.copy()
    new_table[shared] = fresh
    offsets = np.concatenate([[0], counts.cumsum(dtype=np.int64)])
    tokens = np.nonzero(keep)[-1].astype(np.int32)
    arguments = [torch.from_numpy(x) for x in (new_table, tokens, offsets)]
    try:
        with slots.using(layer), slots.pool.using(new_table[_written(view, keep, size)], writes=True):
            compact_(slots.pool.data, view, slots.layout, *arguments)
    finally:
        # The kernel has set the lengths if it ran, even when Ctrl-C came after it.
        if np.array_equal(view.host_lengths, counts):
            slots.host.thinned[layer] = thinned
            slots.pool.allocator.release(dropped)
        else:
            slots.pool.allocator.release(fresh)


def _fresh_pages(function: str, slots: Slots, layer: int, keep: Mask) -> tuple[Ids, Mask]:
    """New pages for those that will be written and that others hold too, and a mask of these in the table."""
    view, size = slots.layers[layer], slots.layout.page_size
    shared = _written(view, keep, size)
    shared[shared] = slots.pool.allocator.refcounts(view.host_table[shared]) > 1
    count = int(shared.sum())
    make_room(function, slots, 0, count)
    return slots.pool.allocator.allocate(count), shared


def _written(view: Layer, keep: Mask, size: int) -> Mask:
    """Mask over the table: places whose pages change, from the first token dropped to the last kept full page."""
    unmoved = np.where(keep.all(-1), keep.shape[-1], keep.argmin(-1))
    last = np.where(unmoved == view.host_lengths, 0, keep.sum(-1) // size)
    return between(unmoved // size, last, view.host_table.shape[-1])


def _thinned(slots: Slots, layer: int, keep: Mask) -> NDArray[np.int64]:
    """`Slots.thinned` of a layer once all but `keep` is gone: the last token dropped is so far from the last seen."""
    lengths, thinned = slots.layers[layer].host_lengths, slots.host.thinned[layer]
    dropped = between(0, lengths, keep.shape[-1]) & ~keep
    behind = lengths - keep.shape[-1] + dropped[..., ::-1].argmax(-1)
    seen = slots.host.seen[layer][:, None]
    return np.where(dropped.any(-1), np.maximum(thinned, seen - behind), thinned)
