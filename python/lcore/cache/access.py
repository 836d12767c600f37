"""Layers of a `PagedCache` as their readers find them, and what is known of their pages."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lcore.cache import kernels
from lcore.cache.checks import check_int, check_places, check_states, row_counts
from lcore.cache.key_rope import KeyRope, layer_rope
from lcore.cache.layer import Layer
from lcore.cache.selection.base import Selection
from lcore.cache.slots import Slots
from lcore.cache.space import Space
from lcore.errors import require
from lcore.ops.hadamard import hadamard
from lcore.ops.page_bounds import check_bound_type
from lcore.positions import Rotation


class LayerAccess(Space):
    """What the calls that read a layer share."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    rotate: bool
    rope: KeyRope
    _select: Selection | None

    def layer_rope(self, layer: int) -> Rotation | None:
        """What a layer's keys and queries are rotated by when they are read; None where RoPE is the caller's."""
        self._layer("PagedCache.layer_rope", layer)
        return layer_rope(self.rope, layer)

    def page_bounds(
        self, layer: int, first: int = 0, last: int | None = None, *, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The least and the greatest value of each key channel in full pages of a layer, for `lcore.page_scores`.

        Formula: `lcore.page_bounds` over the keys as `attend` reads them: under the Hadamard transform where the cache
            rotates, and with `rope` after RoPE at their places in the cache; and so must be the queries. A full page
            never changes, nor do its bounds as long as nothing before it is evicted: after more tokens only those of
            the new pages have to be asked for.

        Args:
            first, last: pages first .. last - 1 of each head; last up to the full pages of the longest head, the
                default.
            dtype: of the result, bfloat16, rounded outward, or float32.

        Returns:
            (batch, kv_heads, last - first, 2, head_dim), dtype; 0 for pages that a head does not have or that are not
            full.
        """
        name = "PagedCache.page_bounds"
        slots = self._layer(name, layer)
        pages, view = slots.snapshot(layer)
        most = int(view.host_lengths.max()) // slots.layout.page_size
        last = most if last is None else last
        check_int(name, "last", last, 0, most)
        check_int(name, "first", first, 0, last)
        check_bound_type(name, dtype)
        with slots.using(layer, first, last):
            return kernels.page_bounds(pages, view, slots.layout, first, last, dtype, layer_rope(self.rope, layer))

    def dropped_mass(self, layer: int) -> Tensor:
        """(batch, heads, new) float32: the largest part of its attention that each query of the last `attend` of a
        layer can have missed because of the selection, an upper bound; 0 where all pages were read.

        Formula: D / (1 + D) with D = sum over pages p not read of page_size exp(u_p - lse), u_p from `page_scores`.
            Keys count as they are stored, and those that were evicted do not count; the bound is exact but for the
            rounding of lse, for which D is raised by 1e-4 of itself.

        Raises: ValueError without a selection whose scores are bounds, as `lcore.selection.Quest`, and before `attend`.
        """
        slots = self._layer("PagedCache.dropped_mass", layer)
        certified = self._select is not None and self._select.certified
        require(certified, "PagedCache.dropped_mass", "select", "be one whose scores are bounds", repr(self._select))
        dropped = slots.index.dropped[layer]
        if dropped is None:
            raise ValueError(f"lcore.PagedCache.dropped_mass: layer must have been attended to, got {layer}")
        return dropped.clone()

    def _queries(self, name: str, layer: int, q: Tensor, lengths: Tensor | None) -> tuple[Slots, Tensor | None]:
        """Checks q, the last tokens of a layer's rows; the slots, and the real rows of q."""
        slots = self._layer(name, layer)
        shape = (self.batch_size, "*", "*", self.head_dim)
        check_states(name, "q", q, self.dtype, shape, "batch, new, heads, head_dim")
        new, heads = q.shape[1], q.shape[2]
        rule = f"have heads a positive multiple of num_kv_heads {self.num_kv_heads}"
        require(heads > 0 and heads % self.num_kv_heads == 0, name, "q", rule, heads)
        return slots, row_counts(name, lengths, self.batch_size, new)

    def _snapshot(
        self,
        name: str,
        slots: Slots,
        layer: int,
        q: Tensor,
        counts: Tensor | None,
        window_size: tuple[int, int],
        alibi_slopes: Tensor | None,
    ) -> tuple[Tensor, Layer]:
        """The pages and the layer to read, once it is known to hold what q, the window and the slopes refer to."""
        pages, view = slots.snapshot(layer)
        seen, thinned = slots.host.seen[layer], slots.host.thinned[layer]
        check_places(name, q.shape[1], counts, view.host_lengths, seen, thinned, window_size, alibi_slopes)
        return pages, view

    def _rotated(self, q: Tensor) -> Tensor:
        return hadamard(q) if self.rotate else q

    def _scale(self, softmax_scale: float | None) -> float:
        return 1 / math.sqrt(self.head_dim) if softmax_scale is None else softmax_scale
