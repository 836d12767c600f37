"""A rotation as plain numbers: what `lcore.rope` needs beside the positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lcore.errors import check_number, require, require_type
from lcore.positions.frequencies import rope_frequencies
from lcore.positions.rope_config import RopeConfig


@dataclass(frozen=True)
class Rotation:
    """How RoPE turns a head; see `lcore.rope` for the formula. Equal ones turn alike, to the bit.

    Args:
        inv_freq: radians a position of each rotary pair, numbers or a 1-D tensor; kept as a tuple of float32 values.
        attention_scaling: factor on cos and sin.
        interleaved: pairs are neighbours (2m, 2m + 1) instead of halves (m, m + rotary_dim / 2).

    Raises: TypeError or ValueError for a bad argument.
    """

    inv_freq: tuple[float, ...] | Tensor
    attention_scaling: float = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        name, rule = "positions.Rotation", "be a tensor or a sequence of numbers"
        try:
            values = torch.as_tensor(self.inv_freq, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            require_type(False, name, "inv_freq", rule, repr(self.inv_freq))
        require(values.dim() == 1 and len(values) > 0, name, "inv_freq", "have one dimension", tuple(values.shape))
        require(bool(values.isfinite().all()), name, "inv_freq", "be finite", values.tolist())
        check_number(name, "attention_scaling", self.attention_scaling)
        require_type(isinstance(self.interleaved, bool), name, "interleaved", "be a bool", repr(self.interleaved))
        object.__setattr__(self, "inv_freq", tuple(values.tolist()))
        object.__setattr__(self, "attention_scaling", float(self.attention_scaling))

    @classmethod
    def of(cls, rope: RopeConfig | Mapping[str, Any], head_dim: int) -> Rotation:
        """That of a model's rotary settings, as `rope_frequencies` has them."""
        return cls(*rope_frequencies(rope, head_dim))

    @cached_property
    def frequencies(self) -> Tensor:
        """inv_freq as a float32 tensor, (rotary_dim / 2,)."""
        return torch.tensor(self.inv_freq, dtype=torch.float32, device="cpu")
