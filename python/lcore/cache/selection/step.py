"""Attention over the pages that a selection chooses, and the bound of the attention mass that it leaves out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcore.cache import parts
from lcore.cache.key_rope import turned_queries
from lcore.cache.layer import Layer
from lcore.cache.selection.base import Selection
from lcore.cache.slots import Slots
from lcore.errors import require
from lcore.positions import Rotation

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
    rope: Rotation | None
    kernel: parts.Attend

    @property
    def layer(self) -> int:
        return self.queries.view.number

    def attend(self, view: Layer) -> tuple[Tensor, Tensor]:
        queries = self.queries._replace(view=view)
        return parts.attend(self.slots.pool, self.slots.layout, queries, -1, self.kernel)

    def attend_all(self) -> tuple[Tensor, Tensor]:
        return self.attend(self.queries.view)


class Read(NamedTuple):
    """What `attend` found; whole: every page was read; dropped: (batch, heads, new), for one that certifies."""

    out: Tensor
    lse: Tensor
    whole: bool
    dropped: Tensor | None


class Pages(NamedTuple):
    """Full pages of a layer: the first `ranked` of `full` may stay unread, `read` of them do not; sinks come first."""

    ranked: Counts
    full: Counts
    read: Counts
    sinks: int


def attend(selection: Selection, call: Call, *, separately: bool = False) -> Read:
    """As `kernels.attend`, over the pages that the selection chooses and the tail; separately: for each query alone."""
    slots, layer = call.slots, call.layer
    if separately and selection.selects(layer, 1):
        reads = [_attend(selection, alone) for alone in _one_by_one(call)]
        out, lse = torch.cat([read.out for read in reads], 1), torch.cat([read.lse for read in reads], 2)
        bounds = [read.dropped for read in reads if read.dropped is not None]
        dropped = torch.cat(bounds, 2) if len(bounds) == len(reads) else None
        read = Read(out, lse, all(read.whole for read in reads), dropped)
    else:
        read = _attend(selection, call)
    if read.dropped is not None:
        slots.index.report(slots.pool, layer, read.dropped)
    if selection.observes:
        scoring = (call.softmax_scale, call.softcap, selection.local_tokens, call.rope)
        slots.index.observe(call.function, slots, layer, call.queries.q, read.lse, call.queries.counts, *scoring)
    return read


def _one_by_one(call: Call) -> Iterator[Call]:
    """A call for each query of a row, over what the cache held when that token was its last."""
    q, view, counts = call.queries.q, call.queries.view, call.queries.counts
    new = torch.full((q.shape[0],), q.shape[1]) if counts is None else counts
    size, held = call.slots.layout.page_size, view.lengths
    behind = (new - 1).clamp(min=0)[:, None]
    rule = f"hold no token behind the first of a row that fills a page of {size}, where each is read separately"
    fits = torch.equal((held - behind) // size, held // size)
    require(fits, call.function, "q", rule, f"{new.tolist()} tokens up to {held.tolist()}")
    for i in range(q.shape[1]):
        lengths = (held - (behind - i).clamp(min=0)).int()
        alone = view._replace(lengths=lengths, host_lengths=lengths.numpy())
        yield call._replace(queries=call.queries._replace(view=alone, q=q[:, i : i + 1], counts=(new > i).long()))


def _attend(selection: Selection, call: Call) -> Read:
    pages = _pages(selection, call) if selection.selects(call.layer, call.queries.q.shape[1]) else None
    if pages is None or np.array_equal(pages.read, pages.ranked):
        out, lse = call.attend_all()
        return Read(out, lse, True, lse.new_zeros(()).expand(lse.shape))
    return _attend_some(selection, call, pages)


def _pages(selection: Selection, call: Call) -> Pages:
    size, lengths = call.slots.layout.page_size, call.queries.view.host_lengths
    full = lengths // size
    new = call.queries.q.shape[1] if call.queries.counts is None else call.queries.counts.numpy()[:, None]
    ranked = np.minimum(full - selection.recent, (lengths - new) // size).clip(min=0).astype(np.int32)
    budget = _FIRST_PAGES if isinstance(selection.budget, float) else selection.budget
    sinks = max(selection.sinks, call.slots.layout.plain.prefix)  # the first pages stand first in a table
    read = np.minimum(np.maximum(budget - (full - ranked), sinks), ranked)
    return Pages(ranked, full, read, sinks)


def _attend_some(selection: Selection, call: Call, pages: Pages) -> Read:
    slots, layer, size = call.slots, call.layer, call.slots.layout.page_size
    summaries = slots.index.update(call.function, slots, layer, selection, pages.ranked, call.rope)
    scores = _scores(selection, call, summaries, pages)
    chosen, unread = _choose(scores, pages)
    out, lse = call.attend(_as_if_only(call, chosen, pages))
    if isinstance(selection.budget, float):
        enough = np.maximum(pages.read, _pages_for(selection.budget, scores, pages, lse, size))
        if (enough > pages.read).any():
            pages = pages._replace(read=enough)
            chosen, unread = _choose(scores, pages)
            out, lse = call.attend(_as_if_only(call, chosen, pages))
    return Read(out, lse, False, _dropped(unread, lse, size) if selection.certified else None)


def _scores(selection: Selection, call: Call, summaries: Tensor, pages: Pages) -> Tensor:
    """(batch, heads or kv_heads, most ranked pages) float32: of pages as of keys, so softcap is applied to them."""
    summaries = summaries[:, :, : int(pages.ranked.max())]
    q, counts = _read_queries(selection, call)
    scores = selection.scores(q, summaries, torch.from_numpy(pages.ranked), counts, call.softmax_scale)
    return scores if call.softcap == 0 else call.softcap * torch.tanh(scores / call.softcap)


def _read_queries(selection: Selection, call: Call) -> tuple[Tensor, Tensor | None]:
    """The call's queries as they meet keys, and how many of each row are real.

    After RoPE kernels keep them in float32, or round them to bfloat16 for products of pairs. A bound must hold for
    either, so that both are scored.
    """
    q, counts = call.queries.q, call.queries.counts
    if call.rope is None:
        return q, counts
    turned = turned_queries(q, call.queries.view.lengths, counts, call.rope)
    if q.dtype is not torch.bfloat16 or not selection.certified:
        return turned, counts
    both = torch.stack([turned, turned.bfloat16().float()], 2).flatten(1, 2)
    return both, None if counts is None else 2 * counts


def _choose(scores: Tensor, pages: Pages) -> tuple[Tensor, Tensor]:
    """Indices of the ranked pages to read (batch, kv_heads, most), -1 behind the last; and the weight of the others."""
    ranked, read = torch.from_numpy(pages.ranked), torch.from_numpy(pages.read)
    return torch.ops.lcore.select_pages.default(scores, ranked, read, pages.sinks, int(pages.read.max()))


def _as_if_only(call: Call, chosen: Tensor, pages: Pages) -> Layer:
    """The layer as if it held only these pages, those behind the ranked ones, and the tail."""
    view, layout = call.queries.view, call.slots.layout
    kept, size = pages.read + pages.full - pages.ranked, layout.page_size
    held = kept * size + view.host_lengths % size
    columns = np.arange(int(kept.max()) + 1, dtype=np.int32)
    read = pages.read[..., None]
    behind = pages.ranked[..., None] + columns - read
    host = np.pad(chosen.numpy(), ((0, 0), (0, 0), (0, len(columns) - chosen.shape[-1])))
    places = np.where(columns < read, host, behind)  # of the pages, and of the tail
    index = layout.plain.columns(places[..., :-1], view.number)
    if layout.plain.parts > 1:
        index = _with_parts(index, view.plain_pages, layout.plain.parts)
    table = np.take_along_axis(view.host_table, index.clip(max=view.host_table.shape[-1] - 1), axis=-1)
    return view._replace(
        table=torch.from_numpy(table), lengths=torch.from_numpy(held), host_table=table, host_lengths=held,
        places=None if call.rope is None else torch.from_numpy(places),
    )  # fmt: skip


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
