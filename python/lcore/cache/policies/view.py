"""What a policy sees of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from lcore.cache.key_rope import turned_keys
from lcore.cache.policies._scores import key_chunks, key_mass_of
from lcore.cache.slots import Slots
from lcore.ops.hadamard import hadamard
from lcore.positions import Rotation


class LayerView:
    """One layer of a cache after the attention of its last tokens.

    index, num_layers: which layer of how many.
    lengths: (batch, kv_heads) int64, keys that each slot holds; `keys` is the largest of them.
    seen: (batch,) int64, tokens ever appended to each row.
    new: (batch,) int64, those of them that this call's queries belong to; 0 in rows that take no part in it.
    page_size: tokens a page.
    """

    def __init__(
        self,
        slots: Slots,
        index: int,
        q: Tensor,
        lse: Callable[[], Tensor],
        counts: Tensor | None,
        softmax_scale: float,
        softcap: float,
        *,
        rotated: bool = False,
        rope: Rotation | None = None,
    ) -> None:
        self.index, self.num_layers = index, len(slots.layers)
        self.lengths = slots.layers[index].lengths.long()
        self.keys = int(self.lengths.max())
        self.seen = slots.seen[index]
        self.new = torch.full_like(self.seen, q.shape[1]) if counts is None else counts
        self.page_size = slots.layout.page_size
        self.remembered = dict(slots.scores.layers[index])
        self._slots, self._q, self._all_lse = slots, q, lse
        self._scoring = (softmax_scale, softcap)
        self._rotated, self._rope = rotated, rope

    @cached_property
    def _lse(self) -> Tensor:
        """Over all keys that the layer holds, whatever the call itself has read of them."""
        return self._all_lse()

    @property
    def valid(self) -> Tensor:
        """(batch, kv_heads, keys) bool: where a slot holds a key."""
        return torch.arange(self.keys) < self.lengths[..., None]

    def mass(self, window: int | None = None) -> Tensor:
        """(batch, kv_heads, keys) float32: attention that each key gets from this call's queries.

        Summed over the heads of the group and over the row's last `window` queries, or all. A query gives 1 in all to
        the keys that it sees. Behind a selection it is that without one, for which all keys are read.
        """
        q, lse, counts = self._q, self._lse, self.new
        if window is not None and window < q.shape[1]:
            rows = (counts - window).clamp(min=0)[:, None] + torch.arange(window)
            rows = rows.clamp(max=q.shape[1] - 1)
            q = q.gather(1, rows[..., None, None].expand(-1, -1, *q.shape[2:]))
            lse = lse.gather(2, rows[:, None].expand(-1, lse.shape[1], -1))
            counts = counts.clamp(max=window)
        return key_mass_of(self._slots, self.index, q, lse, counts, *self._scoring, self._rope)

    def per_key(self, score: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(batch, kv_heads, keys) float32: score(k, v) of keys and values (batch, kv_heads, n, dim), n at a time."""
        parts = [score(k, v) for k, v in self.plain_chunks()]
        return torch.cat(parts, dim=-1) if parts else torch.zeros(self.valid.shape)

    def chunks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Keys and values in order: index of the first, k and v (batch, kv_heads, n, dim) float32, 0 where invalid.

        As they are stored: under the Hadamard transform where the cache rotates, before RoPE where it has rope.
        """
        return key_chunks(self._slots, self.index)

    def plain_chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same k and v as attention means them: before the Hadamard transform, after RoPE."""
        for first, k, v in self.chunks():
            if self._rotated:
                yield hadamard(k, inverse=True), hadamard(v, inverse=True)
            else:
                yield k if self._rope is None else turned_keys(k, first, self._rope), v

    def recall(self, name: str) -> Tensor:
        """(batch, kv_heads, keys) float32: what was remembered of each key, 0 for keys that are new since."""
        values = self.remembered.get(name)
        if values is None:
            return torch.zeros(self.valid.shape)
        return torch.nn.functional.pad(values, (0, self.keys - values.shape[-1]))

    def remember(self, name: str, values: Tensor) -> None:
        """Keeps a number of each key until it is evicted: (batch, kv_heads, keys). Forks take a copy along."""
        self.remembered[name] = values.float().masked_fill(~self.valid, 0)
