"""State space duality: Mamba-2."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from lcore.errors import check_tensor, require, require_type
from lcore.ops._linear_attention import composite
from lcore.ops.linear_attention_checks import check_state, check_tokens
from lcore.ops.recurrent_checks import dtypes_beside, wide_dtype

_NAME = "ssd"


@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = ...,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = ...,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Mamba-2, by chunks of 64 tokens: linear attention with a decay for each token and head.

    Formula: d_t = clamp(softplus(dt_t + dt_bias), dt_limit), softplus with dt_softplus alone (above 20 the identity);
        h_t = e^(d_t A) h_(t-1) + d_t x_t B_t^T; y_t = h_t C_t + D x_t; out_t = y_t silu(z_t).

    Args:
        x: (batch, len, heads, head_dim), or packed (tokens, heads, head_dim) with cu_seqlens; float32, float64,
            float16 or bfloat16, any strides.
        dt: (batch, len, heads) or packed (tokens, heads); any dtype (float64 with float64 alone), as A, D, dt_bias.
        A: (heads,), below 0 for a state that decays.
        B, C: (batch, len, groups, state_dim) or packed, x's dtype; heads is a multiple of groups, and head h reads
            group h // (heads / groups). head_dim and state_dim up to 512.
        D: (heads,) or (heads, head_dim).
        z: x's shape and dtype.
        dt_bias: (heads,).
        dt_limit: bounds of d_t; beyond them d_t has gradient 0.
        initial_state: (sequences, heads, head_dim, state_dim), float32 (float64 for float64 inputs); default 0.
        cu_seqlens: int32 (sequences + 1,) token offsets of packed sequences, from 0, never falling.
        return_final_state: also return the state behind the last token.

    Returns:
        out: x's shape and dtype; and with return_final_state
        final_state: shaped as initial_state. Tokens behind the last packed sequence get out 0 and gradients 0.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for all tensors but cu_seqlens, through out and through final_state; no double backward. D and z are
        applied where rows are written, in float32; the backward computes y again. Otherwise as
        `lcore.gated_linear_attention`, with q = C, k = B, v = d x, g = d A.

    Source: Dao and Gu 2024, Transformers are SSMs, arXiv:2405.21060.
    """
    sequences = check_tokens(_NAME, C, B, x, cu_seqlens, names=("C", "B", "x"))
    lead = "batch, len, " if cu_seqlens is None else "tokens, "
    heads, head_dim = x.shape[-2:]
    check = partial(check_tensor, _NAME, dtypes=dtypes_beside(x), device=x.device)
    check("dt", dt, shape=x.shape[:-1], names=f"{lead}heads")
    check("A", A, shape=(heads,), names="heads")
    if D is not None:
        check("D", D)
        rule = "have shape (heads,) = {} or (heads, head_dim) = {}"
        fits = D.shape in ((heads,), (heads, head_dim))
        require(fits, _NAME, "D", lambda: rule.format((heads,), (heads, head_dim)), tuple(D.shape))
    if z is not None:
        check_tensor(_NAME, "z", z, dtypes=(x.dtype,), device=x.device, shape=x.shape, names=f"{lead}heads, head_dim")
    if dt_bias is not None:
        check("dt_bias", dt_bias, shape=(heads,), names="heads")
    require_type(isinstance(dt_softplus, bool), _NAME, "dt_softplus", "be a bool", dt_softplus)
    _check_limit(dt_limit)
    if initial_state is not None:
        shape = (sequences, heads, head_dim, C.shape[-1])
        check_state(_NAME, "initial_state", initial_state, x, shape, "sequences, heads, head_dim, state_dim")
    out, state = torch.ops.lcore.ssd(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, list(map(float, dt_limit)), initial_state, cu_seqlens
    )
    return (out, state) if return_final_state else out


def _check_limit(dt_limit: Any) -> None:
    rule = "be two numbers, the second not below the first"
    fits = isinstance(dt_limit, (tuple, list)) and len(dt_limit) == 2
    require_type(fits and all(isinstance(x, (int, float)) for x in dt_limit), _NAME, "dt_limit", rule, dt_limit)
    require(dt_limit[0] <= dt_limit[1], _NAME, "dt_limit", rule, dt_limit)


@composite(
    _NAME,
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, Tensor? dt_bias=None,"
    " bool dt_softplus=False, float[]? dt_limit=None, Tensor? initial_state=None, Tensor? cu_seqlens=None)"
    " -> (Tensor out, Tensor final_state)",
)
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False, dt_limit: list[float] | None = None,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = wide_dtype(x)
    step = dt.to(wide)
    if dt_bias is not None:
        step = step + dt_bias.to(wide)
    if dt_softplus:
        step = F.softplus(step)
    low, high = (0.0, math.inf) if dt_limit is None else dt_limit
    step = step.clamp(low, high)
    state = None if initial_state is None else initial_state.transpose(-1, -2).contiguous()
    skip = None
    if D is not None:
        skip = (D if D.dim() == 2 else D[:, None].expand(x.shape[-2:])).to(wide).contiguous()
    out, state = torch.ops.lcore._linear_attention(
        C, B, x, step * A.to(wide), 1.0, state, cu_seqlens, weight=step, skip=skip, gate=z
    )
    return out, state.transpose(-1, -2).contiguous()
