"""Attention over a layer whose pages do not all fit into memory: part by part, the next part on its way meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcore.cache.formats import PageLayout
from lcore.cache.layer import Layer, between
from lcore.cache.pool import Ids, PagePool

_BLOCK = 256  # keys that the kernel reads together, at multiples of so many (forward_tile)
Counts: TypeAlias = NDArray[np.int32]


class Queries(NamedTuple):
    """What attention takes for each row or head, as `lcore.cache.kernels.attend`."""

    view: Layer
    q: Tensor
    counts: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None

    def part(self, rows: slice, heads: slice) -> Queries:
        """That of some rows and kv heads."""
        group = self.q.shape[2] // self.view.host_lengths.shape[1]
        of_q = slice(heads.start * group, heads.stop * group)
        names = ("table", "lengths", "tail_k", "tail_v")
        own = {name: getattr(self.view, name)[rows, heads].contiguous() for name in names}
        host = {f"host_{name}": own[name].numpy() for name in names[:2]}
        if self.view.places is not None:
            own["places"] = self.view.places[rows, heads].contiguous()
        slopes = self.alibi_slopes
        if slopes is not None:
            slopes = (slopes[of_q] if slopes.dim() == 1 else slopes[rows, of_q]).contiguous()
        return Queries(
            self.view._replace(**own, **host),
            self.q[rows, :, of_q],
            None if self.counts is None else self.counts[rows],
            slopes,
            None if self.sinks is None else self.sinks[of_q],
        )


Attend: TypeAlias = Callable[[Queries], tuple[Tensor, Tensor]]


def attend(pool: PagePool, layout: PageLayout, queries: Queries, left: int, kernel: Attend) -> tuple[Tensor, Tensor]:
    """kernel(queries), once its pages are said to be read; part by part where they are more than may be in memory.

    left: tokens before a query that it sees, as in window_size; -1 for all.
    """
    hot = pool.hot_bytes
    if hot is None:
        return kernel(queries)
    first, last = _entries(queries, layout, left)
    room = hot // pool.page_bytes
    if (last - first).sum() <= room:
        with pool.using(_ids(queries.view, first, last)):
            return kernel(queries)
    # Half the room: one part is read by the kernel, the other from the disk.
    parts = list(_parts(last - first, room // 2))
    ids = [_ids(queries.view, first, last, part) for part in parts]
    heads: list[tuple[Tensor, Tensor]] = []
    rows: list[tuple[Tensor, Tensor]] = []
    for i, part in enumerate(parts):
        ends = i + 1 == len(parts)
        ahead = [] if ends or len(ids[i]) + len(ids[i + 1]) > room else [ids[i + 1]]
        with pool.using(ids[i], *ahead):
            heads.append(kernel(queries.part(*part)))
        if ends or parts[i + 1][0] != part[0]:
            outs, lses = zip(*heads, strict=True)
            rows.append((torch.cat(outs, 2), torch.cat(lses, 1)))
            heads = []
    outs, lses = zip(*rows, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _entries(queries: Queries, layout: PageLayout, left: int) -> tuple[Counts, Counts]:
    """(batch, kv_heads): the entries first .. last - 1 of each slot's table whose pages are read."""
    lengths, size = queries.view.host_lengths, layout.page_size
    unseen = np.zeros_like(lengths) if left < 0 else (lengths - queries.q.shape[1] - left).clip(min=0)
    last = lengths // size
    first = np.minimum(unseen // _BLOCK * _BLOCK // size, last)
    return layout.plain.columns(first, queries.view.number), layout.plain.columns(last, queries.view.number)


def _parts(pages: Counts, room: int) -> Iterator[tuple[slice, slice]]:
    """Rows and kv heads whose pages fit into `room`, as far as those of one slot do."""
    batch, heads = pages.shape
    together = bool((pages.sum(0) <= room).all())
    for rows in [slice(0, batch)] if together else [slice(row, row + 1) for row in range(batch)]:
        begin, held = 0, 0
        for head, more in enumerate(pages[rows].sum(0).tolist()):
            if head > begin and held + more > room:
                yield rows, slice(begin, head)
                begin, held = head, 0
            held += more
        yield rows, slice(begin, heads)


def _ids(view: Layer, first: Counts, last: Counts, part: tuple[slice, slice] = (slice(None), slice(None))) -> Ids:
    table = view.host_table[part]
    return table[between(first[part], last[part], table.shape[-1])]
