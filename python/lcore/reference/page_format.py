"""Page formats as what they mean: the values that come back from a page."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_BITS = {"int8": 8, "int4": 4, "int2": 2}
_PLAIN = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_MOST = 65504.0  # the largest float16


def _half(x: Tensor, up: bool) -> Tensor:
    """x as float16 values, rounded up or down; beyond the largest it saturates."""
    near = x.clamp(-_MOST, _MOST).half()
    beyond = torch.from_numpy(np.nextafter(near.numpy(), np.float16(math.inf if up else -math.inf)))
    short = near.double() < x.double() if up else near.double() > x.double()
    return torch.where(short & (x.abs() < _MOST), beyond, near).float()


def _nearest(x: Tensor, levels: int, format: str) -> Tensor:
    """x through the codes of its group, which is the last dimension."""
    finite = x.isfinite().all(-1, keepdim=True)
    x = x.masked_fill(~finite, 0.0)
    if format == "fp8":
        scale = _half((x.abs().amax(-1, keepdim=True) / 448.0), up=True)
        codes = (x / scale.where(scale > 0, 1.0)).to(torch.float8_e4m3fn)
        back = codes.double() * scale.double()
    else:
        zero = _half(x.amin(-1, keepdim=True), up=False)
        scale = _half((x.amax(-1, keepdim=True) - zero).clamp(min=0) / float(levels), up=True)
        codes = ((x - zero) / scale.where(scale > 0, 1.0)).clamp(0, levels).round()
        back = zero.double() + scale.double() * codes.double()
    return back.masked_fill(~finite, torch.nan)


def through_page(x: Tensor, format: str, value: bool) -> Tensor:
    """The values of a page's K, or with `value` of V, as its format brings them back.

    Formula:  plain formats round to nearest even. int8, int4, int2: zero + scale round((x - zero) / scale) with zero =
              min rounded down to float16 and scale = (max - zero) / (2^bits - 1) rounded up. fp8: scale e4m3(x / scale)
              with scale = max |x| / 448 rounded up. Codes are computed in float32. Groups are the channels of K, over
              the page's tokens, and 64 channels of a token of V. A group with a NaN or an infinity comes back as NaN.
    Args:     x (page_size, dim), float32 or narrower.
    Returns:  (page_size, dim) float64.
    Source:   Liu et al. 2024, arXiv:2402.02750 (KIVI), sections 3.1 and 3.2, for the groups.
    """
    if format in _PLAIN:
        return x.to(_PLAIN[format]).double()
    x = x.float()
    levels = (1 << _BITS.get(format, 8)) - 1
    if not value:
        return _nearest(x.T.contiguous(), levels, format).T
    return torch.cat([_nearest(group, levels, format) for group in x.split(64, dim=-1)], dim=-1)
