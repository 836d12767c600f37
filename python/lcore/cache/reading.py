"""What reads a layer of a `PagedCache`: attention over it, and the attention that its keys receive."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from lcore.cache import kernels, parts
from lcore.cache.access import LayerAccess
from lcore.cache.checks import CPU, check_heads
from lcore.cache.key_rope import layer_rope
from lcore.cache.policies.base import Policy
from lcore.cache.policies.step import after_attention
from lcore.cache.policies.view import LayerView
from lcore.cache.selection import step as selection_step
from lcore.errors import check_tensor
from lcore.ops.attention_checks import check_scores
from lcore.ops.hadamard import hadamard
from lcore.ops.key_mass import Reduction, check_reduction


class LayerReader(LayerAccess):
    """The reading half of `PagedCache`."""

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
        separately: bool = ...,
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
        separately: bool = ...,
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
        separately: bool = False,
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
            separately: with a selection, each of several queries reads the pages that it would read alone, as if no
                token came behind it; none of those may fill a page. Without one it has no effect.

        With a policy, tokens that exceed its budget are dropped once the output is there: attend once after an append.
        A layer that is read with a window or slopes keeps all its tokens. With a selection, only some full pages are
        read, and out and lse are those of their keys; with a window or slopes all are. With both, the policy decides by
        the attention over all keys, as without the selection: where it asks for that, all of them are read once more.

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
        rope = layer_rope(self.rope, layer)

        def kernel(part: parts.Queries) -> tuple[Tensor, Tensor]:
            scores = (window_size, scale, softcap, part.alibi_slopes)
            return kernels.attend(pages, part.view, part.q, slots.layout, part.counts, *scores, part.sinks, rope)

        queries = parts.Queries(view, q, counts, alibi_slopes, sinks)
        # Where a window or a slope measures distances, all tokens are read and all must stay.
        far = window_size[0] < 0 and alibi_slopes is None
        whole, call = True, selection_step.Call(name, slots, queries, scale, softcap, rope, kernel)
        if self._select is not None and far:
            out, lse, whole, _ = selection_step.attend(self._select, call, separately=separately and q.shape[1] > 1)
        else:
            out, lse = parts.attend(slots.pool, slots.layout, queries, window_size[0], kernel)
        if self.policy is not None and far and view.host_lengths.any():
            of_all = (lambda: lse) if whole else lambda: call.attend_all()[1]
            seen = LayerView(slots, layer, q, of_all, counts, scale, softcap, rotated=self.rotate, rope=rope)
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
        with slots.using(layer):
            return kernels.key_mass(pages, view, q, slots.layout, counts, *scores, lse, reduction, rope)
