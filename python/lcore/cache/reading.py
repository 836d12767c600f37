"""What reads a layer of a `PagedCache`: attention over it, and the attention that its keys receive."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from lcore.cache import kernels
from lcore.cache.checks import CPU, check_heads, check_int, check_places, check_states, row_counts
from lcore.cache.key_rope import KeyRope, layer_rope
from lcore.cache.layer import Layer
from lcore.cache.policies.base import Policy
from lcore.cache.policies.step import after_attention
from lcore.cache.policies.view import LayerView
from lcore.cache.selection import step as selection_step
from lcore.cache.selection.base import Selection
from lcore.cache.slots import Slots
from lcore.cache.space import Space
from lcore.errors import check_tensor, require
from lcore.ops.attention_checks import check_scores
from lcore.ops.hadamard import hadamard
from lcore.ops.key_mass import Reduction, check_reduction
from lcore.ops.page_bounds import check_bound_type
from lcore.positions import Rotation


class LayerReader(Space):
    """The reading half of `PagedCache`."""

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    rotate: bool
    rope: KeyRope
    policy: Policy | None
    _select: Selection | None

    def layer_rope(self, layer: int) -> Rotation | None:
        """What a layer's keys and queries are rotated by when they are read; None where RoPE is the caller's."""
        self._layer("PagedCache.layer_rope", layer)
        return layer_rope(self.rope, layer)

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

        Formula: `lcore.attention` with causal=True over the keys and values as stored; with `rope`, over keys and
            queries rotated to their places in the cache.

        Args:
            q: (batch, new, heads, head_dim), dtype, any strides; heads is a multiple of num_kv_heads. Row i of n real
                rows is the token at place held - n + i.
            lengths: (batch,) int64 or int32, the real rows of q, as given to `append`.
            window_size, softmax_scale, softcap, alibi_slopes, sinks: as `lcore.attention`.
            return_lse: also return lse.

        With a policy, tokens that exceed its budget are dropped once the output is there: attend once after an append.
        A layer that is read with a window or slopes keeps all its tokens. With a selection, only some full pages are
        read, and out and lse are those of their keys; with a window or slopes all are.

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
        scores = (window_size, scale, softcap, alibi_slopes)
        rope = layer_rope(self.rope, layer)
        if self._select is not None and window_size[0] < 0 and alibi_slopes is None:
            call = selection_step.Call(name, slots, layer, q, counts, scale, softcap, sinks)
            out, lse = selection_step.attend(self._select, call)
        else:
            out, lse = kernels.attend(pages, view, q, slots.layout, counts, *scores, sinks, rope)
        # The tokens that a window or a slope measures distances to must all stay.
        if self.policy is not None and window_size[0] < 0 and alibi_slopes is None and view.host_lengths.any():
            seen = LayerView(slots, layer, q, lse, counts, scale, softcap, rotated=self.rotate, rope=rope)
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

        Formula: `lcore.key_mass` with causal=True over the keys as `attend` reads them. Nothing of size new x held is
            allocated.

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
        q, lse, rope = self._rotated(q.detach()), lse.detach().contiguous(), layer_rope(self.rope, layer)
        return kernels.key_mass(pages, view, q, slots.layout, counts, *scores, lse, reduction, rope)

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

        Raises: NotImplementedError: keys before RoPE, whose channels no query is multiplied with.
        """
        name = "PagedCache.page_bounds"
        slots = self._layer(name, layer)
        if layer_rope(self.rope, layer) is not None:
            raise NotImplementedError(
                f"lcore.{name}: no bounds of keys that are stored before RoPE, for channels change when they are "
                "rotated; use key_mass, or a cache without rope"
            )
        pages, view = slots.snapshot(layer)
        most = int(view.host_lengths.max()) // slots.layout.page_size
        last = most if last is None else last
        check_int(name, "last", last, 0, most)
        check_int(name, "first", first, 0, last)
        check_bound_type(name, dtype)
        return kernels.page_bounds(pages, view, slots.layout, first, last, dtype)

    def dropped_mass(self, layer: int) -> Tensor:
        """(batch, heads, new) float32: the largest part of its attention that each query of the last `attend` of a
        layer can have missed because of the selection, an upper bound; 0 where all pages were read.

        Formula: D / (1 + D) with D = sum over pages p not read of page_size exp(u_p - lse), u_p from `page_scores`.
            Keys count as they are stored; the bound is exact but for the rounding of lse, for which D is raised by 1e-4
            of itself.

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
        seen, thinned = slots.seen.numpy()[layer], slots.thinned.numpy()[layer]
        check_places(name, q.shape[1], counts, view.host_lengths, seen, thinned, window_size, alibi_slopes)
        return pages, view

    def _rotated(self, q: Tensor) -> Tensor:
        return hadamard(q) if self.rotate else q

    def _scale(self, softmax_scale: float | None) -> float:
        return 1 / math.sqrt(self.head_dim) if softmax_scale is None else softmax_scale
