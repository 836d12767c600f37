"""Rotary position embedding with exact phases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_kernel, check_number, check_tensor, require

_NAME = "rope"
_POSITION_TYPES = (torch.int64, torch.int32, torch.float32, torch.float64)


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    """Rotates the pairs of each head by angles that grow with the position.

    Formula: pair m of a head at position p turns by a = p * inv_freq[m]:
        x' = (x cos a - y sin a) * attention_scaling, y' = (y cos a + x sin a) * attention_scaling.
        With r = 2 * len(inv_freq), pair m is dims (m, m + r/2), or (2m, 2m + 1) when interleaved; dims from r on pass.

    Args:
        x: (batch, seq, heads, head_dim) or packed (tokens, heads, head_dim); float32, float64, float16 or bfloat16.
        positions: (seq,) or (batch, seq), int64, int32, float32 or float64, of any size and sign.
        inv_freq: (r / 2,) float32 or float64, radians a position.
        attention_scaling: factor on cos and sin (YaRN's temperature).
        interleaved: adjacent pairs (GPT-J, DeepSeek) instead of halves (Llama, Qwen).
        inverse: rotates back; rope(rope(x), inverse=True) is x when attention_scaling is 1.

    Returns:
        (batch, seq, heads, head_dim) or (tokens, heads, head_dim), contiguous, x's dtype.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradient for x, of any order; none for positions and inv_freq. The product p * inv_freq[m] is formed exactly
        and reduced in turns, so phases are right to 1e-6 at ten million tokens, where float32 products lose 0.5.

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864, eq. 34.
    """
    check_tensor(_NAME, "x", x)
    rule = "have shape (batch, seq, heads, head_dim) or (tokens, heads, head_dim)"
    require(x.dim() in (3, 4), _NAME, "x", rule, tuple(x.shape))
    check_kernel(_NAME, x)
    check_tensor(_NAME, "positions", positions, dtypes=_POSITION_TYPES, device=x.device)
    seq = x.shape[-3]
    fits = positions.shape == (seq,) or (x.dim() == 4 and positions.shape == (x.shape[0], seq))
    require(fits, _NAME, "positions", lambda: _position_shapes(x), tuple(positions.shape))
    check_tensor(_NAME, "inv_freq", inv_freq, dtypes=(torch.float32, torch.float64), device=x.device,
                 shape=("*",), names="rotary_dim / 2")  # fmt: skip
    half = x.shape[-1] // 2
    fits = inv_freq.shape[0] <= half
    require(fits, _NAME, "inv_freq", lambda: f"have at most head_dim / 2 = {half} entries", inv_freq.shape[0])
    check_number(_NAME, "attention_scaling", attention_scaling)
    return torch.ops.lcore.rope(x, positions, inv_freq.contiguous(), attention_scaling, interleaved, inverse)


def _position_shapes(x: Tensor) -> str:
    seq = x.shape[-3]
    return f"have shape ({seq},)" + (f" or ({x.shape[0]}, {seq})" if x.dim() == 4 else "")


@torch.library.register_fake("lcore::rope")
def _fake(x: Tensor, positions: Tensor, inv_freq: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, inv_freq, *ctx.arguments = inputs
    ctx.save_for_backward(positions, inv_freq)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    attention_scaling, interleaved, inverse = ctx.arguments
    dx = torch.ops.lcore.rope(dout, *ctx.saved_tensors, attention_scaling, interleaved, not inverse)
    return dx, None, None, None, None, None


torch.library.register_autograd("lcore::rope", _backward, setup_context=_save)
