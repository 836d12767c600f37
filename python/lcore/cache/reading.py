"""What reads a layer of a `PagedCache`: attention over it, and the attention that its keys receive."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from lcore.cache import kernels
from lcore.cache.checks import CPU, check_heads, check_int, check_states, row_counts
from lcore.cache.slots import Layer, Slots
from lcore.errors import check_tensor, require
from lcore.ops.attention_checks import check_scores
from lcore.ops.key_mass import Reduction, check_reduction
from lcore.ops.page_bounds import check_bound_type


class LayerReader:
    """The reading half of `PagedCache`."""

    batch_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    _slots: Slots | None

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

        Returns:
            (batch, new, heads, head_dim_v), dtype; 0 in padding rows; and with return_lse
            lse: natural log, (batch, heads, new), float32; -inf in padding rows.

        Raises:
            ValueError: also when a row has more queries than the layer holds tokens.
        """
        name = "PagedCache.attend"
        slots, view, counts = self._queries(name, layer, q, lengths)
        check_scores(name, window_size, softmax_scale, softcap)
        alibi_slopes, sinks = check_heads(name, alibi_slopes, sinks, self.batch_size, q.shape[2])
        scores = (window_size, self._scale(softmax_scale), softcap, alibi_slopes)
        out, lse = kernels.attend(slots.pool.data, view, q.detach(), slots.layout, counts, *scores, sinks)
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
        slots, view, counts = self._queries(name, layer, q, lengths)
        shape = (self.batch_size, q.shape[2], q.shape[1])
        check_tensor(name, "lse", lse, dtypes=(torch.float32,), shape=shape, names="batch, heads, new", device=CPU)
        check_scores(name, window_size, softmax_scale, softcap)
        alibi_slopes, _ = check_heads(name, alibi_slopes, None, self.batch_size, q.shape[2])
        check_reduction(name, reduction)
        scores = (window_size, self._scale(softmax_scale), softcap, alibi_slopes)
        return kernels.key_mass(
            slots.pool.data, view, q.detach(), slots.layout, counts, *scores, lse.detach().contiguous(), reduction
        )

    def page_bounds(
        self, layer: int, first: int = 0, last: int | None = None, *, dtype: torch.dtype = torch.bfloat16
    ) -> Tensor:
        """The least and the greatest value of each key channel in full pages of a layer, for `lcore.page_scores`.

        Formula: `lcore.page_bounds` over the keys as stored. A full page never changes, nor do its bounds: after more
            tokens only those of the new pages have to be asked for.

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
        view = slots.layers[layer]
        most = int(view.host_lengths.max()) // slots.layout.page_size
        last = most if last is None else last
        check_int(name, "last", last, 0, most)
        check_int(name, "first", first, 0, last)
        check_bound_type(name, dtype)
        return kernels.page_bounds(slots.pool.data, view, slots.layout, first, last, dtype)

    def _queries(self, name: str, layer: int, q: Tensor, lengths: Tensor | None) -> tuple[Slots, Layer, Tensor | None]:
        """Checks q, the last tokens of a layer's rows; the layer, and the real rows of q."""
        slots = self._layer(name, layer)
        shape = (self.batch_size, "*", "*", self.head_dim)
        check_states(name, "q", q, self.dtype, shape, "batch, new, heads, head_dim")
        new, heads = q.shape[1], q.shape[2]
        rule = f"have heads a positive multiple of num_kv_heads {self.num_kv_heads}"
        require(heads > 0 and heads % self.num_kv_heads == 0, name, "q", rule, heads)
        counts = row_counts(name, lengths, self.batch_size, new)
        view = slots.layers[layer]
        held = view.host_lengths.min(axis=1)
        fits = (held >= (new if counts is None else counts.numpy())).all()
        require(fits, name, "q", f"have at most the {held.tolist()} tokens held by each row", new)
        return slots, view, counts

    def _scale(self, softmax_scale: float | None) -> float:
        return 1 / math.sqrt(self.head_dim) if softmax_scale is None else softmax_scale

    def _open(self, function: str) -> Slots:
        if self._slots is None:
            raise ValueError(f"lcore.{function}: the cache must be open, got a closed one")
        return self._slots

    def _layer(self, function: str, layer: int) -> Slots:
        """The slots, once layer is known to exist."""
        slots = self._open(function)
        check_int(function, "layer", layer, 0, self.num_layers - 1)
        return slots
