"""Signed Hadamard transform, as its formula."""

from __future__ import annotations

import torch
from torch import Tensor


def _sign(channel: int) -> int:
    """The lowest bit of MurmurHash3's finalizer of channel + 1."""
    h = channel + 1
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    return -1 if (h ^ (h >> 16)) & 1 else 1


def matrix(dim: int) -> Tensor:
    """(dim, dim) float64: y = matrix @ x."""
    block = dim & -dim
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    whole = torch.block_diag(*[h / block**0.5] * (dim // block))
    return whole * torch.tensor([_sign(c) for c in range(dim)], dtype=torch.float64)


def hadamard(x: Tensor, *, inverse: bool = False) -> Tensor:
    """What lcore.hadamard computes, with its arguments, by a matrix in float32 (float64 when x is)."""
    work = torch.promote_types(x.dtype, torch.float32)
    m = matrix(x.shape[-1]).to(work)
    return (x.to(work) @ (m if inverse else m.T)).to(x.dtype)
