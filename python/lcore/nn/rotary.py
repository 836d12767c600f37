"""Rotary positions as a module: frequencies that survive a change of dtype, and the call to lcore.rope."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lcore.ops.rope import rope as rotate
from lcore.positions import RopeConfig, rope_frequencies


class Rotary(torch.nn.Module):
    """Rotates heads by their positions; see `lcore.rope` for the formula and `rope_frequencies` for the angles.

    Args:     x (batch, seq, heads, head_dim); positions (seq,) or (batch, seq), integer or float.
    Returns:  the shape and dtype of x.
    """

    inv_freq: torch.Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        inv_freq, self.attention_scaling = rope_frequencies(rope, head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
        return rotate(x, positions, self.inv_freq, attention_scaling=self.attention_scaling, inverse=inverse)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Rotary:
        # `.to(torch.bfloat16)` casts buffers: frequencies follow to the device, but stay float32.
        exact = self.inv_freq
        module: Any = super()._apply(fn, recurse)
        module.inv_freq = exact.to(module.inv_freq.device)
        return module
