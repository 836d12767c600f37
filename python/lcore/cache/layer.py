"""One layer of a cache's slots, and masks of their pages."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Layer(NamedTuple):
    """One layer of `Slots`: its tensors, and NumPy views of the two that the host computes with."""

    table: torch.Tensor  # (batch, kv_heads, width) int32
    lengths: torch.Tensor  # (batch, kv_heads) int32
    tail_k: torch.Tensor  # (batch, kv_heads, page_size, head_dim)
    tail_v: torch.Tensor
    host_table: NDArray[np.int32]
    host_lengths: NDArray[np.int32]
    number: int  # which layer
    plain_pages: int  # the first pages of each slot that hold values where the formats are codes
    places: torch.Tensor | None = None  # (batch, kv_heads, pages + 1) int32: which of the slot's pages these are


class Host(NamedTuple):
    """NumPy views of `Slots`: torch's own would not be given out while it traces, when a cache may be collected."""

    table: NDArray[np.int32]
    lengths: NDArray[np.int32]
    seen: NDArray[np.int64]
    thinned: NDArray[np.int64]


def between(first: NDArray[np.integer] | int, last: NDArray[np.integer], width: int) -> NDArray[np.bool_]:
    """Mask (..., width): columns first .. last - 1 of each slot."""
    columns = np.arange(width, dtype=np.int32)
    return (columns >= np.broadcast_to(first, last.shape)[..., None]) & (columns < last[..., None])
