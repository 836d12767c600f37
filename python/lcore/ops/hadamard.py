"""Signed Hadamard transform of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_kernel, check_tensor, require

_NAME = "hadamard"


def hadamard(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Spreads what is in a few channels of a head over all of them, and keeps every scalar product.

    Formula: y = H S x / sqrt(b) on blocks of b channels, b the largest power of two that divides dim; H is Sylvester's
        Hadamard matrix, S a diagonal of signs that depend on the channel alone. inverse: S H y / sqrt(b).

    Args:
        x: (batch, seq, heads, dim) or packed (tokens, heads, dim); float32, float64, float16 or bfloat16, any strides.
        inverse: back again.

    Returns:
        The shape and dtype of x, contiguous; computed in float32 (float64 when x is) and rounded once.

    Raises:
        TypeError: dtype. ValueError: shape. NotImplementedError: no kernel for the device.

    Notes: gradient of any order: that of the transform is its inverse.

    Source: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456, section 3.
    """
    check_tensor(_NAME, "x", x)
    rule = "have shape (batch, seq, heads, dim) or (tokens, heads, dim)"
    require(x.dim() in (3, 4), _NAME, "x", rule, tuple(x.shape))
    check_kernel(_NAME, x)
    return torch.ops.lcore.hadamard(x, inverse)


@torch.library.register_fake("lcore::hadamard")
def _fake(x: Tensor, inverse: bool = False) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.inverse = inputs[1]


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    return torch.ops.lcore.hadamard(dout, not ctx.inverse), None


torch.library.register_autograd("lcore::hadamard", _backward, setup_context=_save)
