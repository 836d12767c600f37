"""Pages back to values, for whoever is not a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from lcore.cache.formats import PageLayout
from lcore.cache.layer import Layer


def page_values(
    pool: Tensor, view: Layer, layout: PageLayout, first: int, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K and V (batch, kv_heads, count, page_size, dim) of pages first .. first + count - 1 of a layer's slots.

    Pages that a slot does not have, or has not filled, come back as those of others, or as 0.
    """
    shape = (*view.lengths.shape, count, layout.page_size)
    k, v = (torch.zeros(*shape, dim, dtype=dtype) for dim in (layout.head_dim, layout.head_dim_v))
    if count == 0 or view.table.shape[-1] == 0:
        return k, v
    plain, parts = view.plain_pages, layout.plain.parts
    pages = torch.arange(first, first + count)
    full = torch.from_numpy(view.host_lengths // layout.page_size)[..., None]
    begins = torch.from_numpy(layout.plain.columns(pages.numpy(), view.number)).long()
    width = view.table.shape[-1]
    is_plain = (pages < plain).tolist()
    values = sum(is_plain)  # plain pages come first
    if values:
        columns = (begins[:values, None] + torch.arange(parts)).flatten()
        held = (pages[:values] < full).repeat_interleave(parts, -1)
        if held.any():
            ids = _held_ids(view.table[..., columns.clamp(max=width - 1)], held)
            sides = layout.decode_parts(pool[ids.flatten()], dtype)
            for out, side in zip((k, v), sides, strict=True):
                out[:, :, :values] = side.unflatten(0, (*ids.shape[:2], values, parts)).flatten(3, 4)
    held = pages[values:] < full
    if held.any():
        ids = _held_ids(view.table[..., begins[values:].clamp(max=width - 1)], held)
        for out, side in zip((k, v), layout.decode(pool[ids.flatten()], dtype), strict=True):
            out[:, :, values:] = side.unflatten(0, ids.shape)
    return k, v


def _held_ids(table: Tensor, held: Tensor) -> Tensor:
    """Entries of a table; where a slot does not have a page, one that another has."""
    return table.long().where(held, int(table[held][0]))
