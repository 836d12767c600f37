"""What a cache keeps for its selection: summaries of full pages, and attention that keys have been seen to receive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcore.cache import kernels
from lcore.cache.key_scores import gather_kept
from lcore.cache.layer import between
from lcore.cache.layer_pages import LayerPages
from lcore.cache.pool import PagePool, new_tensor

if TYPE_CHECKING:
    from lcore.cache.selection.base import Selection
    from lcore.cache.slots import Slots
    from lcore.positions import Rotation

_GROWTH = 1.5  # as tables grow
_PAGES = 64  # summarized at a time: 2 heads of 128 channels are then 4 MB of float32


class PageIndex:
    """Of every layer: summaries (batch, kv_heads, width, 2, head_dim) bfloat16, of each slot the first `known` pages.

    Derived from pages that never change, so whatever is lost is made again. mass: (batch, kv_heads, tokens) float32,
    where the selection observes. dropped: (batch, heads, new), the bound of the last call; worst: the largest of all.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        layers = shape[0]
        self.summaries: list[Tensor | None] = [None] * layers
        self.mass: list[Tensor | None] = [None] * layers
        self.dropped: list[Tensor | None] = [None] * layers
        self.known = np.zeros(shape, dtype=np.int32)  # (layers, batch, kv_heads)
        self.worst = 0.0

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (*self.summaries, *self.mass, *self.dropped) if x is not None)

    def copy(self) -> PageIndex:
        copy = PageIndex(self.known.shape)
        copy.summaries = [None if x is None else x.clone() for x in self.summaries]
        copy.mass = [None if x is None else x.clone() for x in self.mass]
        copy.known[:] = self.known
        return copy

    def crop(self, lengths: NDArray[np.int32], page_size: int) -> None:
        """Forgets what stands behind the first lengths[layer, batch, kv_head] tokens."""
        np.minimum(self.known, lengths // page_size, out=self.known)
        for mass, kept in zip(self.mass, torch.from_numpy(lengths), strict=True):
            if mass is not None:
                mass.masked_fill_(torch.arange(mass.shape[-1]) >= kept[..., None], 0)

    def evict(self, layer: int, keep: NDArray[np.bool_], page_size: int) -> None:
        """Of a layer's tokens (batch, kv_heads, tokens) only those of `keep` stay, moved together in their order.

        Pages before the first token that goes are what they were; summaries of the others, which hold other tokens
        now or stand at other places, are made again.
        """
        unmoved = np.where(keep.all(-1), keep.shape[-1], keep.argmin(-1))
        np.minimum(self.known[layer], unmoved // page_size, out=self.known[layer])
        mass = self.mass[layer]
        if mass is not None:
            seen = min(mass.shape[-1], keep.shape[-1])
            kept = gather_kept(mass[..., :seen], torch.from_numpy(keep[..., :seen]))
            mass.zero_()
            mass[..., : kept.shape[-1]] = kept

    def report(self, pool: PagePool, layer: int, dropped: Tensor) -> None:
        before = self.nbytes
        self.dropped[layer] = dropped
        pool.member_bytes += self.nbytes - before
        if dropped.numel():
            self.worst = max(self.worst, float(dropped.max()))

    def update(
        self, function: str, slots: Slots, layer: int, selection: Selection, last: NDArray[np.int32],
        rope: Rotation | None,
    ) -> Tensor:  # fmt: skip
        """The summaries of a layer, with the first last[batch, kv_head] pages of each slot among them."""
        known = self.known[layer]
        shape = (*known.shape, int(last.max()), 2, slots.layout.head_dim)
        summaries = self._wide(function, slots.pool, self.summaries, layer, shape, torch.bfloat16)
        begin = int(np.where(known < last, known, shape[2]).min())
        pages = LayerPages(slots, layer, self.mass[layer], rope)
        for first in range(begin, shape[2], _PAGES):
            end = min(first + _PAGES, shape[2])
            new = between(np.maximum(known - first, 0), last - first, end - first)
            part = selection.summarize(pages, first, end)
            if new.all():
                summaries[:, :, first:end] = part
            else:
                where = torch.from_numpy(new)
                summaries[:, :, first:end][where] = part[where].to(summaries.dtype)
        np.maximum(known, last, out=known)
        return summaries

    def observe(
        self,
        function: str,
        slots: Slots,
        layer: int,
        q: Tensor,
        lse: Tensor,
        counts: Tensor | None,
        softmax_scale: float,
        softcap: float,
        window: int,
        rope: Rotation | None,
    ) -> None:
        """Adds the attention that keys got from q, if it stands at most `window` tokens behind them."""
        pool, view = slots.snapshot(layer)
        size = slots.layout.page_size
        first = max(0, int(view.host_lengths.min()) - q.shape[1] - window) // size
        lengths = (view.lengths - first * size).clamp(min=0)
        table = view.table[..., slots.layout.plain.columns(first, layer) :].contiguous()
        near = view._replace(
            table=table, lengths=lengths, host_table=table.numpy(), host_lengths=lengths.numpy(),
            plain_pages=max(0, view.plain_pages - first),
        )  # fmt: skip
        scores = ((window, 0), softmax_scale, softcap, None)
        with slots.using(layer, first):
            # Positions begin with the first page that is read: what counts are distances.
            seen = kernels.key_mass(pool, near, q, slots.layout, counts, *scores, lse.contiguous(), "sum", rope)
        shape = (*view.lengths.shape, int(view.host_lengths.max()))
        mass = self._wide(function, slots.pool, self.mass, layer, shape, torch.float32)
        mass[..., first * size : shape[-1]] += seen

    def _wide(
        self, function: str, pool: PagePool, tensors: list[Tensor | None], layer: int, shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """tensors[layer], grown along its third dimension to hold `shape`; zeros where it is new."""
        old = tensors[layer]
        now = 0 if old is None else old.shape[2]
        if old is not None and now >= shape[2]:
            return old
        row = shape[0] * shape[1] * int(np.prod(shape[3:], dtype=np.int64)) * dtype.itemsize
        with pool.lock:
            pool.check_budget(function, (shape[2] - now) * row, "for what the selection knows of pages")
            free = pool.free_bytes
            width = max(shape[2], int(now * _GROWTH))
            if free is not None and (width - now) * row > free:
                width = shape[2]
            wide = new_tensor(function, (*shape[:2], width, *shape[3:]), dtype)
            wide[:, :, now:] = 0
            if old is not None:
                wide[:, :, :now] = old
            pool.member_bytes += wide.nbytes - (0 if old is None else old.nbytes)
            tensors[layer] = wide
        return wide
