"""What reads a layer of a `PagedCache`: attention over it, and the attention that its keys receive."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from lcore.cache import kernels, parts
from lcore.cache.checks import CPU, check_heads, check_int, check_places, check_states, row_counts
from lcore.cache.layer import Layer
from lcore.cache.policies.base import Policy
from lcore.cache.policies.step import after_attention
from lcore.cache.policies.view import LayerView
from lcore.cache.slots import Slots
from lcore.cache.space import Space
from lcore.errors import check_tensor, require
from lcore.ops.attention_checks import check_scores
from lcore.ops.hadamard import hadamard
from lcore.ops.key_mass import Reduction, check_reduction
from lcore.ops.page_bounds import check_bound_type


class LayerReader(Space):
    """The reading half of `PagedCache`."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    rotate: bool
    page_size: int
    policy: Policy | None

    @overload
    def attend(
        self,
        layer: int,
        q: Tensor,
        lengths: Tensor | None = None,
        *,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def attend(
        self,
        layer: int,
        q: Tensor,
        lengths: Tensor | None = None,
        *,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def attend(
        self,
        layer: int,
        q: Tensor,
        lengths: Tensor | None = None,
        *,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of the last tokens appended to a layer over all that it holds, causal.

        Formula: `lcore.attention` with causal=True over the keys and values as stored.

        Args:
            q: (batch, new, heads, head_dim), dtype, any strides; heads is a multiple of num_kv_heads. Row i of n real
                rows is the token at position held - n + i.
            lengths: (batch,) int64 or int32, the real rows of q, as given to `append`.
            window_size, softmax_scale, softcap, alibi_slopes, sinks: as `lcore.attention`.
            return_lse: also return lse.

        With a policy, tokens that exceed its budget are dropped once the output is there: attend once after an append.
        A layer that is read with a window or slopes keeps all its tokens.

        Returns:
            (batch, new, heads, head_dim_v), dtype; 0 in padding rows; and with return_lse
            lse: natural log, (batch, heads, new), float32; -inf in padding rows.

        Raises:
            ValueError: also when a row has more queries than the layer holds tokens, when one of them has been evicted,
                and for a window or slopes after evictions.
            MemoryError: the policy needs room for copies of shared pages; all tokens are still there.
        """
        name = "PagedCache.attend"
        slots, counts = self._queries(name, layer, q, lengths)
        check_scores(name, window_size, softmax_scale, softcap)
        alibi_slopes, sinks = check_heads(name, alibi_slopes, sinks, self.batch_size, q.shape[2])
        pages, view = self._snapshot(name, slots, layer, q, counts, window_size, alibi_slopes)
        scale, q = self._scale(softmax_scale), self._rotated(q.detach())

        def kernel(part: parts.Queries) -> tuple[Tensor, Tensor]:
            scores = (window_size, scale, softcap, part.alibi_slopes)
            return kernels.attend(pages, part.view, part.q, slots.layout, part.counts, *scores, part.sinks)

        queries = parts.Queries(view, q, counts, alibi_slopes, sinks)
        out, lse = parts.attend(slots.pool, self.page_size, queries, window_size[0], kernel)
        # The tokens that a window or a slope measures distances to must all stay.
        if self.policy is not None and window_size[0] < 0 and alibi_slopes is None and view.host_lengths.any():
            seen = LayerView(slots, layer, q, lse, counts, scale, softcap, rotated=self.rotate)
            after_attention(name, self.policy, slots, seen)
        out = hadamard(out, inverse=True) if self.rotate else out
        return (out, lse) if return_lse else out

    def key_mass(
        self,
        layer: int,
        q: Tensor,
        lse: Tensor,
        lengths: Tensor | None = None,
        *,
        window_size: tuple[int, int] = (-1, -1),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """How much attention each key that a layer holds receives from the last tokens appended to it.

        Formula: `lcore.key_mass` with causal=True over the keys as stored. Nothing of size new x held is allocated.

        Args:
            q, lengths, window_size, softmax_scale, softcap, alibi_slopes: as `attend` for these tokens, or for the last
                of them.
            lse: (batch, heads, new) float32, what `attend` returned for them; sinks are in it already. A query whose
                lse is -inf counts nowhere.
            reduction: "sum" over the queries and the heads that share a kv head, or "max".

        Returns:
            (batch, kv_heads, width) float32, width the tokens of the longest head; 0 behind the tokens of a head.

        Raises:
            ValueError: also when a row has more queries than the layer holds tokens.
        """
        name = "PagedCache.key_mass"
        slots, counts = self._queries(name, layer, q, lengths)
        shape = (self.batch_size, q.shape[2], q.shape[1])
        check_tensor(name, "lse", lse, dtypes=(torch.float32,), shape=shape, names="batch, heads, new", device=CPU)
        check_scores(name, window_size, softmax_scale, softcap)
        alibi_slopes, _ = check_heads(name, alibi_slopes, None, self.batch_size, q.shape[2])
        check_reduction(name, reduction)
        pages, view = self._snapshot(name, slots, layer, q, counts, window_size, alibi_slopes)
        scores = (window_size, self._scale(softmax_scale), softcap, alibi_slopes)
        rotated = self._rotated(q.detach())
        lse = lse.detach().contiguous()
        with slots.using(layer):
            return kernels.key_mass(pages, view, rotated, slots.layout, counts, *scores, lse, reduction)

    def page_bounds(
        self, layer: int, first: int = 0, last: int | None = None, *, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The least and the greatest value of each key channel in full pages of a layer, for `lcore.page_scores`.

        Formula: `lcore.page_bounds` over the keys as stored: rotated where the cache rotates, and so must be the
            queries. A full page never changes, nor do its bounds: after more tokens only those of the new pages have
            to be asked for.

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
            return kernels.page_bounds(pages, view, slots.layout, first, last, dtype)

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
        seen, thinned = slots.seen.numpy()[layer], slots.thinned.numpy()[layer]
        check_places(name, q.shape[1], counts, view.host_lengths, seen, thinned, window_size, alibi_slopes)
        return pages, view

    def _rotated(self, q: Tensor) -> Tensor:
        return hadamard(q) if self.rotate else q

    def _scale(self, softmax_scale: float | None) -> float:
        return 1 / math.sqrt(self.head_dim) if softmax_scale is None else softmax_scale
