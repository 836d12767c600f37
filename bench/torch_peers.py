"""What lcore is measured against: torch's own attention on (batch, heads, seq, head_dim), contiguous."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import Shape

# torch takes a window as a boolean mask, (seq, seq): no more than 64 MB of it.
MAX_MASKED_SEQ = 8192

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _expanded(sdpa: Attention, group: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))


def sdpa(shape: Shape) -> dict[str | None, Attention]:
    """Ways to call scaled_dot_product_attention, by name: with grouped heads there are two. Empty: it cannot do it."""
    options: dict[str, Any] = {"is_causal": shape.causal}
    if shape.window is not None:
        if shape.seq > MAX_MASKED_SEQ:
            return {}
        distance = torch.arange(shape.seq)[:, None] - torch.arange(shape.seq)
        left, right = shape.bounds
        options = {"attn_mask": (distance <= left) & (distance >= -right)}
    call = partial(F.scaled_dot_product_attention, **options)
    if shape.heads == shape.kv_heads:
        return {None: call}
    # Expanding belongs to the call: a model's keys come with their own number of heads.
    group = shape.heads // shape.kv_heads
    return {"enable_gqa": partial(call, enable_gqa=True), "expanded": partial(_expanded, call, group)}


def flex(shape: Shape) -> Attention:
    """torch.compile(flex_attention) with the shape's mask; what it raises is the caller's to report."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    left, right = shape.bounds

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key <= left) & (key - query <= right)

    mask = create_block_mask(visible, B=None, H=None, Q_LEN=shape.seq, KV_LEN=shape.seq, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, block_mask=mask, enable_gqa=shape.heads != shape.kv_heads)
