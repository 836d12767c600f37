"""One step of the selective scan, on states in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_kernel, check_tensor, require
from lcore.ops.recurrent_checks import check_flag, check_parameter, check_slots, dtypes_beside
from lcore.ops.selective_scan import check_projection, check_rates

_NAME = "selective_state_update"


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next step of `lcore.selective_scan` for every row of a batch; the states are moved on in place.

    Formula: that of `lcore.selective_scan` for one step, with x for u and dt for delta.

    Args:
        state: (batch, dim, states), or (slots, dim, states) with state_indices; contiguous, float32, float16 or
            bfloat16 (float64 with float64 x). Written.
        x, dt, z: (batch, dim), any strides; dtypes as for `lcore.selective_scan`.
        A: (dim, states); B, C: (batch, groups, states) or (batch, states); D, dt_bias: (dim,).
        state_indices: (batch,) int64, the slot of each row, no slot twice; a row with a negative one is left out.
        With heads, as Mamba-2 has them, state is (batch or slots, heads, head_dim, states), x, dt and z are
        (batch, heads, head_dim), A (heads, head_dim, states), D and dt_bias (heads, head_dim); groups divides heads.

    Returns:
        The shape and dtype of x, contiguous; 0 in rows that are left out.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: complex A; no kernel for the device.

    Notes:
        No gradients: the result never requires grad. The bits are those of `lcore.selective_scan` with a float32
        state. A state of 16 bits is rounded at every step: small changes of a large state are lost.

    Source: Gu & Dao 2023, Mamba, arXiv:2312.00752, eq. 2.
    """
    check_tensor(_NAME, "x", x)
    require(x.dim() in (2, 3), _NAME, "x", "have shape (batch, dim) or (batch, heads, head_dim)", tuple(x.shape))
    check_kernel(_NAME, x)
    shape, inner = x.shape, x.shape[1:]
    names = "dim" if x.dim() == 2 else "heads, head_dim"
    for argument, value in (("dt", dt), ("z", z)):
        if argument == "dt" or value is not None:
            check_tensor(_NAME, argument, value, dtypes=dtypes_beside(x), device=x.device, shape=shape,
                         names=f"batch, {names}")  # fmt: skip
    A = check_rates(_NAME, A, x, inner)
    states = A.shape[-1]
    rows = "*" if state_indices is not None else shape[0]
    lead = "slots" if state_indices is not None else "batch"
    check_tensor(_NAME, "state", state, dtypes=dtypes_beside(x), device=x.device, shape=(rows, *inner, states),
                 names=f"{lead}, {names}, states")  # fmt: skip
    require(state.is_contiguous(), _NAME, "state", "be contiguous", f"strides {state.stride()}")
    B, C = (check_projection(_NAME, name, value, x, (states,)) for name, value in (("B", B), ("C", C)))
    check_tensor(_NAME, "C", C, dtypes=dtypes_beside(x), shape=B.shape, names="batch, groups, states")
    D = None if D is None else check_parameter(_NAME, "D", D, x, inner, names)
    dt_bias = None if dt_bias is None else check_parameter(_NAME, "dt_bias", dt_bias, x, inner, names)
    check_flag(_NAME, "dt_softplus", dt_softplus)
    if state_indices is not None:
        check_slots(_NAME, state_indices, x, state.shape[0])
    flat = [None if t is None else t.flatten(1) for t in (x, dt, z)]
    wide = [None if t is None else t.flatten() for t in (D, dt_bias)]
    out = torch.ops.lcore.selective_state_update(
        state.flatten(1, -2), flat[0], flat[1], A.flatten(0, -2), B, C, wide[0], flat[2], wide[1], dt_softplus,
        state_indices,
    )  # fmt: skip
    return out.view(shape)


@torch.library.register_fake("lcore::selective_state_update")
def _fake(state: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x.new_empty(x.shape)
