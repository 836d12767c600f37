"""Attention over the pages that a selection chooses, and the bound of the attention mass that it leaves out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcore.cache import parts
from lcore.cache.formats import PageLayout
from lcore.cache.layer import Layer
from lcore.cache.selection.base import Selection
from lcore.cache.slots import Slots

_FIRST_PAGES = 16  # read before a mass budget knows the log-sum-exp that it measures against
_SLACK = 1e-4  # relative, above the float32 rounding of the log-sum-exps that a bound is made of

Counts = NDArray[np.int32]  # (batch, kv_heads)


class Call(NamedTuple):
    """One `attend`: its queries over the layer's view, and the kernel that answers them."""

    function: str
    slots: Slots
    queries: parts.Queries
    softmax_scale: float
    softcap: float
    kernel: parts.Attend

    @property
    def layer(self) -> int:
        return self.queries.view.number

    def attend(self, view: Layer) -> tuple[Tensor, Tensor]:
        queries = self.queries._replace(view=view)
        return parts.attend(self.slots.pool, self.slots.layout, queries, -1, self.kernel)


class Pages(NamedTuple):
    """Full pages of a layer: the first `ranked` of `full` may stay unread, `read` of them do not; sinks come first."""

    ranked: Counts
    full: Counts
    read: Counts
    sinks: int


def attend(selection: Selection, call: Call) -> tuple[Tensor, Tensor]:
    """As `kernels.attend`, over the pages that the selection chooses and the tail."""
    slots, layer = call.slots, call.layer
    pages = _pages(selection, call) if selection.selects(layer, call.queries.q.shape[1]) else None
    if pages is None or np.array_equal(pages.read, pages.ranked):
        out, lse = call.attend(call.queries.view)
        slots.index.report(slots.pool, layer, lse.new_zeros(()).expand(lse.shape))
    else:
        out, lse = _attend_some(selection, call, pages)
    if selection.observes:
        scoring = (call.softmax_scale, call.softcap, selection.local_tokens)
        slots.index.observe(call.function, slots, layer, call.queries.q, lse, call.queries.counts, *scoring)
    return out, lse


def _pages(selection: Selection, call: Call) -> Pages:
    size, lengths = call.slots.layout.page_size, call.queries.view.host_lengths
    full = lengths // size
    new = call.queries.q.shape[1] if call.queries.counts is None else call.queries.counts.numpy()[:, None]
    ranked = np.minimum(full - selection.recent, (lengths - new) // size).clip(min=0).astype(np.int32)
    budget = _FIRST_PAGES if isinstance(selection.budget, float) else selection.budget
    sinks = max(selection.sinks, call.slots.layout.plain.prefix)  # the first pages stand first in a table
    read = np.minimum(np.maximum(budget - (full - ranked), sinks), ranked)
    return Pages(ranked, full, read, sinks)


def _attend_some(selection: Selection, call: Call, pages: Pages) -> tuple[Tensor, Tensor]:
    slots, layer, size = call.slots, call.layer, call.slots.layout.page_size
    summaries = slots.index.update(call.function, slots, layer, selection, pages.ranked)
    scores = _scores(selection, call, summaries, pages)
    chosen, unread = _choose(scores, pages)
    view = call.queries.view
    out, lse = call.attend(_as_if_only(view, chosen, pages, slots.layout))
    if isinstance(selection.budget, float):
        enough = np.maximum(pages.read, _pages_for(selection.budget, scores, pages, lse, size))
        if (enough > pages.read).any():
            pages = pages._replace(read=enough)
            chosen, unread = _choose(scores, pages)
            out, lse = call.attend(_as_if_only(view, chosen, pages, slots.layout))
    if selection.certified:
        slots.index.report(slots.pool, layer, _dropped(unread, lse, size))
    return out, lse


def _scores(selection: Selection, call: Call, summaries: Tensor, pages: Pages) -> Tensor:
    """(batch, heads or kv_heads, most ranked pages) float32: of pages as of keys, so softcap is applied to them."""
    summaries = summaries[:, :, : int(pages.ranked.max())]
    ranked = torch.from_numpy(pages.ranked)
    scores = selection.scores(call.queries.q, summaries, ranked, call.queries.counts, call.softmax_scale)
    return scores if call.softcap == 0 else call.softcap * torch.tanh(scores / call.softcap)


def _choose(scores: Tensor, pages: Pages) -> tuple[Tensor, Tensor]:
    """Indices of the ranked pages to read (batch, kv_heads, most), -1 behind the last; and the weight of the others."""
    ranked, read = torch.from_numpy(pages.ranked), torch.from_numpy(pages.read)
    return torch.ops.lcore.select_pages.default(scores, ranked, read, pages.sinks, int(pages.read.max()))


def _as_if_only(view: Layer, chosen: Tensor, pages: Pages, layout: PageLayout) -> Layer:
    """The layer as if it held only these pages, those behind the ranked ones, and the tail."""
    kept, size = pages.read + pages.full - pages.ranked, layout.page_size
    held = kept * size + view.host_lengths % size
    columns = np.arange(int(kept.max()))
    read = pages.read[..., None]
    behind = pages.ranked[..., None] + columns - read
    host = np.pad(chosen.numpy(), ((0, 0), (0, 0), (0, len(columns) - chosen.shape[-1])))
    index = layout.plain.columns(np.where(columns < read, host, behind), view.number)
    if layout.plain.parts > 1:
        index = _with_parts(index, view.plain_pages, layout.plain.parts)
    table = np.take_along_axis(view.host_table, index.clip(max=view.host_table.shape[-1] - 1), axis=-1)
    return view._replace(
        table=torch.from_numpy(table), lengths=torch.from_numpy(held), host_table=table, host_lengths=held
    )


def _with_parts(index: NDArray[np.int32], plain_pages: int, count: int) -> NDArray[np.int32]:
    """All entries of the pages that begin at table entries `index`, of which the first plain_pages are plain."""
    plain = min(plain_pages, index.shape[-1])
    whole = index[..., :plain, None] + np.arange(count, dtype=index.dtype)
    return np.concatenate([whole.reshape(*index.shape[:-1], plain * count), index[..., plain:]], axis=-1)


def _pages_for(mass: float, scores: Tensor, pages: Pages, lse: Tensor, size: int) -> Counts:
    """How many ranked pages each kv head must read so that none of its heads and queries misses more than `mass`.

    lse is over fewer keys, so it is not above the one that the answer leads to.
    """
    heads, kv_heads = scores.shape[1], pages.ranked.shape[1]
    columns = torch.arange(scores.shape[-1])
    behind = columns >= torch.from_numpy(pages.ranked)[..., None]
    best = scores.unflatten(1, (kv_heads, -1)).amax(2).masked_fill(behind, -torch.inf)
    best.masked_fill_((columns < pages.sinks) & ~behind, torch.inf)
    order = best.argsort(dim=-1, descending=True, stable=True).repeat_interleave(heads // kv_heads, 1)
    scores = scores.masked_fill(behind.repeat_interleave(heads // kv_heads, 1), -torch.inf)
    unread = scores.gather(-1, order).flip(-1).logcumsumexp(-1).flip(-1)  # of this page and those behind it
    least = lse.masked_fill(lse == -torch.inf, torch.inf).amin(-1, keepdim=True)
    limit = least + math.log(mass / (1 - mass)) - math.log(size) - 2 * _SLACK
    counts = (~(unread <= limit)).sum(-1).unflatten(1, (kv_heads, -1)).amax(2)
    return np.minimum(counts.numpy(), pages.ranked).astype(np.int32)


def _dropped(unread: Tensor, lse: Tensor, size: int) -> Tensor:
    """(batch, heads, new) float32: upper bound of the attention mass of the pages that were not read."""
    weight = unread[..., None] + (math.log(size) + _SLACK)
    return (weight - lse).sigmoid().nan_to_num(nan=1.0).masked_fill(lse == -torch.inf, 0)
