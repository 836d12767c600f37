"""The selective scan of Mamba."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_tensor, require
from lcore.ops.recurrent_checks import (
    check_activation,
    check_flag,
    check_packing,
    check_parameter,
    check_state,
    dtypes_beside,
    keeps_for_backward,
)

_NAME = "selective_scan"
_CHUNK = 64  # csrc/core/sequences.h
MAX_STATES = 256


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, *, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, *, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The recurrence of Mamba over a sequence of any length, with its state in and out.

    Formula, for each channel over its states n: d_t = delta_t + delta_bias, d_t = softplus(d_t) if delta_softplus;
        h_t[n] = e^(d_t A[n]) h_(t-1)[n] + d_t u_t B_t[n]; y_t = sum_n C_t[n] h_t[n] + D u_t; out_t = y_t silu(z_t).
        h_0 is initial_state or zero. softplus is the identity above 20.

    Args:
        u, delta, z: (batch, dim, len), any strides; float32, float16 or bfloat16 each, or all float64.
        A: (dim, states), real, 1 to 256 states; D, delta_bias: (dim,). Taken as float32 (float64 with float64 u).
        B, C: (batch, groups, states, len) or (batch, states, len); groups divides dim, channel i is of group
            i // (dim / groups).
        initial_state: (batch, dim, states), float32 (float64 with float64 u).
        cu_seqlens: (sequences + 1,) int32 from 0: batch is 1 and sequence i is steps cu_seqlens[i] to
            cu_seqlens[i + 1]; states are then (sequences, dim, states). A sequence may be empty.
        return_final_state: return the state after the last step too.

    Returns:
        out: the shape, dtype and, where it is dense, the strides of u; 0 behind the last packed sequence. With
        return_final_state (out, final_state), the latter as initial_state.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: complex A; no kernel for the device.

    Notes:
        Gradients for every tensor but cu_seqlens, from out and final_state; no double backward. States are computed in
        float32. The bits of out and final_state do not depend on the batch, on the number of threads, or on how a
        sequence is cut into calls; those of the gradients of u, delta, z, B, C and initial_state neither, where it
        is cut at multiples of 64 steps. For a backward the state at the start of every 64th step is kept.

    Source: Gu & Dao 2023, Mamba, arXiv:2312.00752, eq. 2 and section 3.3.
    """
    check_activation(_NAME, "u", u)
    _, dim, steps = u.shape
    check_tensor(_NAME, "delta", delta, dtypes=dtypes_beside(u), device=u.device, shape=u.shape,
                 names="batch, dim, len")  # fmt: skip
    A = check_rates(_NAME, A, u, (dim,))
    states = A.shape[1]
    B, C = (check_projection(_NAME, name, x, u, (states, steps)) for name, x in (("B", B), ("C", C)))
    check_tensor(_NAME, "C", C, dtypes=dtypes_beside(u), shape=B.shape, names="batch, groups, states, len")
    D = None if D is None else check_parameter(_NAME, "D", D, u, (dim,), "dim")
    if z is not None:
        check_tensor(_NAME, "z", z, dtypes=dtypes_beside(u), device=u.device, shape=u.shape, names="batch, dim, len")
    if delta_bias is not None:
        delta_bias = check_parameter(_NAME, "delta_bias", delta_bias, u, (dim,), "dim")
    check_flag(_NAME, "delta_softplus", delta_softplus)
    check_flag(_NAME, "return_final_state", return_final_state)
    sequences = check_packing(_NAME, u, cu_seqlens)
    if initial_state is not None:
        names = "batch, dim, states" if cu_seqlens is None else "sequences, dim, states"
        initial_state = check_state(_NAME, "initial_state", initial_state, u, (sequences, dim, states), names)
    keep = keeps_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state)
    out, final_state, _ = torch.ops.lcore.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, cu_seqlens, keep
    )
    return (out, final_state) if return_final_state else out


def check_rates(name: str, A: Any, x: Tensor, inner: Any) -> Tensor:
    """A real (*inner, states), as the kernels take it."""
    if isinstance(A, Tensor) and A.is_complex():
        raise NotImplementedError(f"lcore.{name}: no kernel for complex A; use a real A")
    names = "dim, states" if len(inner) == 1 else "heads, head_dim, states"
    A = check_parameter(name, "A", A, x, (*inner, "*"), names)
    require(1 <= A.shape[-1] <= MAX_STATES, name, "A", f"have 1 to {MAX_STATES} states", A.shape[-1])
    return A


def check_projection(name: str, argument: str, value: Any, x: Tensor, tail: tuple[Any, ...]) -> Tensor:
    """B or C: (batch, groups, *tail), or without groups; groups divides x's dim, or its heads."""
    grouped = len(tail) + 2
    check_tensor(name, argument, value, dtypes=dtypes_beside(x), device=x.device)
    if value.dim() == grouped - 1:
        value = value.unsqueeze(1)
    names = ", ".join(("batch", "groups", "states", "len")[:grouped])
    check_tensor(name, argument, value, dtypes=dtypes_beside(x), shape=(x.shape[0], "*", *tail), names=names)
    groups, dim = value.shape[1], x.shape[1]
    fits = groups >= 1 and dim % groups == 0
    require(fits, name, argument, lambda: f"have groups that divide dim {dim}", groups)
    return value


def _slots(u: Tensor, cu_seqlens: Tensor | None) -> Any:
    """States kept for a backward: one a chunk of every sequence."""
    chunks = u.shape[2] // _CHUNK
    return u.shape[0] * (chunks + 1) if cu_seqlens is None else chunks + cu_seqlens.shape[0] - 1


@torch.library.register_fake("lcore::selective_scan")
def _fake(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, keep: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sequences = u.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dim, states = A.shape
    final_state = A.new_empty((sequences, dim, states))
    return torch.empty_like(u), final_state, A.new_empty((_slots(u, cu_seqlens) if keep else 0, states, dim))


@torch.library.register_fake("lcore::selective_scan_backward")
def _backward_fake(
    dout: Tensor, dfinal: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, checkpoints: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    dim, states = A.shape
    sequences = 0 if initial_state is None else initial_state.shape[0]
    return (
        torch.empty_like(u),
        torch.empty_like(delta),
        A.new_empty(A.shape),
        B.new_empty(B.shape),
        C.new_empty(C.shape),
        A.new_empty((0 if D is None else dim,)),
        u.new_empty((0,)) if z is None else torch.empty_like(z),
        A.new_empty((0 if delta_bias is None else dim,)),
        A.new_empty((sequences, dim, states)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, delta_softplus, initial_state, cu_seqlens, keep = inputs
    out, _, checkpoints = output
    ctx.mark_non_differentiable(checkpoints)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens, checkpoints)
    ctx.delta_softplus, ctx.keep, ctx.out_shape = delta_softplus, keep, out.shape


def _backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 12
    if dout is None and dfinal is None:
        return none
    if not ctx.keep:
        raise RuntimeError("lcore.selective_scan: a backward needs the states that the forward keeps with keep=True")
    *tensors, initial_state, cu_seqlens, checkpoints = ctx.saved_tensors
    u, _, _, _, _, D, z, delta_bias = tensors
    if dout is None:
        dout = torch.zeros_like(u)
    if dfinal is not None:
        dfinal = dfinal.contiguous()
    du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = torch.ops.lcore.selective_scan_backward(
        dout, dfinal, *tensors, ctx.delta_softplus, initial_state, cu_seqlens, checkpoints
    )
    optional = [g if x is not None else None for g, x in ((dD, D), (dz, z), (dbias, delta_bias))]
    return du, ddelta, dA, dB, dC, *optional, None, dinitial if initial_state is not None else None, None, None


torch.library.register_autograd("lcore::selective_scan", _backward, setup_context=_save)


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "lcore.selective_scan: no second derivative; use lcore.reference.selective_scan, which is plain torch"
    )


torch.library.register_autograd("lcore::selective_scan_backward", _no_double_backward)
