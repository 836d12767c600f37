"""Coded pages back to values, for whoever is not a kernel: crop, scores in plain torch, tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lcore.cache.formats import Format


def decode_codes(format: Format, side: Tensor, value: bool, page_size: int, dim: int) -> Tensor:
    """Values (n, page_size, dim) float32 of K, or with `value` of V.

    Formula: zero + scale * code
    Args: side: (n, bytes) uint8, one side of n pages as csrc/core/page_format.h lays it out.
    """
    code_end = format.code_bytes(value, page_size, dim)
    scale_bytes = format.scale_bytes(value, page_size, dim)
    scales = _grid(side[:, code_end : code_end + scale_bytes], value, page_size, dim)
    if not format.is_integer:
        codes = side[:, : page_size * dim].contiguous().view(torch.float8_e4m3fn).float()
        return codes.unflatten(-1, (page_size, dim)) * scales
    zeros = _grid(side[:, code_end + scale_bytes : code_end + 2 * scale_bytes], value, page_size, dim)
    return zeros + scales * _integers(format, side[:, :code_end], value, page_size, dim)


def _integers(format: Format, side: Tensor, value: bool, page_size: int, dim: int) -> Tensor:
    """(n, page_size, dim) float32 codes, from words whose codes are neighbours along the summed dimension."""
    summed = page_size if value else dim
    steps = -(-summed // format.step)
    words = side.contiguous().view(torch.int32).view(side.shape[0], -1)
    columns = words.shape[1] // steps if value else page_size
    words = words[:, : steps * columns].view(-1, steps, 1, columns)
    # Code 2 i + h of a word stands in its bits 16 h + bits i.
    shifts = torch.tensor([16 * (c % 2) + format.bits * (c // 2) for c in range(format.step)], dtype=torch.int32)
    codes = (words >> shifts[:, None]) & ((1 << format.bits) - 1)
    if format.bits == 8:
        codes = codes ^ 0x80
    codes = codes.flatten(1, 2)[:, :summed, : dim if value else page_size]
    return (codes if value else codes.transpose(1, 2)).float()


def _grid(halves: Tensor, value: bool, page_size: int, dim: int) -> Tensor:
    """Scales or zeros that broadcast against (n, page_size, dim): one a channel, or one a token and group."""
    grid = halves.contiguous().view(torch.float16).float()
    if not value:
        return grid[:, None, :dim]
    from lcore.cache.formats import VALUE_GROUP

    groups = -(-dim // VALUE_GROUP)
    grid = grid[:, : groups * page_size].view(-1, groups, page_size).transpose(1, 2)
    return grid.repeat_interleave(VALUE_GROUP, -1)[..., :dim]
