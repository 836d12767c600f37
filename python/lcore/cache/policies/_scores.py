"""Attention mass of keys, from the log-sum-exp that attention has returned: nothing of size queries x keys is kept."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lcore.cache import kernels
from lcore.cache.page_values import page_values
from lcore.cache.slots import Slots
from lcore.positions import Rotation

_KEYS = 1024  # decoded at a time


def key_chunks(slots: Slots, layer: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Keys and values of a layer in order: the index of the first token, k and v (batch, kv_heads, n, dim), float32.

    Zeros stand behind a slot's last token.
    """
    (pool, view), size = slots.snapshot(layer), slots.layout.page_size
    lengths = view.lengths.long()
    full, width = lengths // size, int(lengths.max())
    step = max(1, _KEYS // size)
    for first in range(0, -(-width // size), step):
        count = min(step, -(-width // size) - first)
        pages = first + torch.arange(count)
        with slots.using(layer, first, first + count):
            k, v = page_values(pool, view, slots.layout, first, count, torch.float32)
        held = (pages[:, None] * size + torch.arange(size)) < lengths[..., None, None]
        is_tail = (pages == full[..., None])[..., None, None]
        sides = []
        for side, tail in ((k, view.tail_k), (v, view.tail_v)):
            # A slot's tail stands where its next page would; what else there is no page for is overwritten with zeros.
            values = torch.where(is_tail, tail[:, :, None].float(), side).masked_fill(~held[..., None], 0)
            sides.append(values.flatten(2, 3)[:, :, : width - first * size])
        yield first * size, sides[0], sides[1]


def key_mass_of(
    slots: Slots,
    layer: int,
    q: Tensor,
    lse: Tensor,
    counts: Tensor,
    softmax_scale: float,
    softcap: float,
    rope: Rotation | None,
) -> Tensor:
    """The attention that each key gets from the last queries of its row, summed over them and a group's heads.

    Formula: mass[b, h, t] = sum over queries i and heads g of exp(softmax_scale q_ig . k_t - lse_ig), for keys t that
        query i sees: query i of n is the token at index held - n + i

    Args:
        q: (batch, new, heads, head_dim); lse: (batch, heads, new) float32; counts: (batch,) real queries of each row.
        rope: what keys that are stored before RoPE, and q, are rotated by.

    Returns: float32 (batch, kv_heads, longest slot), 0 behind a slot's last key.
    """
    pages, view = slots.snapshot(layer)
    scores = ((-1, -1), softmax_scale, softcap, None)
    with slots.using(layer):
        return kernels.key_mass(pages, view, q, slots.layout, counts, *scores, lse.contiguous(), "sum", rope)
