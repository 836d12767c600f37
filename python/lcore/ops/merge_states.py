"""Merging attention over disjoint sets of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_kernel, check_tensor, require

_NAME = "merge_states"


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each.

    Formula: lse = ln(e^lse_a + e^lse_b); out = e^(lse_a - lse) out_a + e^(lse_b - lse) out_b.
        (0, -inf) is the neutral element, also against itself.

    Args:
        out_a, out_b: (batch, seq, heads, head_dim) or packed (tokens, heads, head_dim), one dtype of float32, float64,
            float16 or bfloat16.
        lse_a, lse_b: natural log, (batch, heads, seq) or (heads, tokens), float32 (float64 with float64 outputs).

    Returns:
        out in out_a's dtype and lse, shaped as the inputs.

    Raises:
        TypeError: dtypes. ValueError: shapes. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for all four; no double backward. Computes in float32.

    Source: Dao et al. 2023, Flash-Decoding; Ye et al. 2025, FlashInfer, arXiv:2501.01005, section 2.2.
    """
    check_tensor(_NAME, "out_a", out_a)
    rule = "have shape (batch, seq, heads, head_dim) or (tokens, heads, head_dim)"
    require(out_a.dim() in (3, 4), _NAME, "out_a", rule, tuple(out_a.shape))
    check_kernel(_NAME, out_a)
    names = "batch, seq, heads, head_dim" if out_a.dim() == 4 else "tokens, heads, head_dim"
    check_tensor(_NAME, "out_b", out_b, dtypes=(out_a.dtype,), device=out_a.device, shape=out_a.shape, names=names)
    dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    shape = (*out_a.shape[:-3], out_a.shape[-2], out_a.shape[-3])
    names = "batch, heads, seq" if out_a.dim() == 4 else "heads, tokens"
    for argument, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_tensor(_NAME, argument, lse, dtypes=(dtype,), device=out_a.device, shape=shape, names=names)
    out, lse = torch.ops.lcore.merge_states(out_a, lse_a, out_b, lse_b)
    return out, lse


@torch.library.register_fake("lcore::merge_states")
def _fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.register_fake("lcore::merge_states_backward")
def _backward_fake(
    dout: Tensor, dlse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = _fake(out_a, lse_a, out_b, lse_b)
    return out, lse, out_b.new_empty(out_b.shape), lse_b.new_empty(lse_b.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.lcore.merge_states_backward(dout, dlse, *ctx.saved_tensors)


torch.library.register_autograd("lcore::merge_states", _backward, setup_context=_save)


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "lcore.merge_states: no second derivative; use lcore.reference.merge_states, which is plain torch"
    )


torch.library.register_autograd("lcore::merge_states_backward", _no_double_backward)
