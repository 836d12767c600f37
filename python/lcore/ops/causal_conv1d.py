"""Short causal convolutions along a sequence."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.errors import check_tensor, require
from lcore.ops.recurrent_checks import check_activation, check_packing, check_parameter, check_slots, dtypes_beside

_NAME = "causal_conv1d"
_UPDATE = "causal_conv1d_update"
MAX_WIDTH = 8
Activation = Literal["silu", "swish"]


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation | None = None,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation | None = None,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A short convolution of every channel along a sequence, each step seeing itself and those before it.

    Formula: out_t = act(bias + sum over w < width of weight[w] x_(t - width + 1 + w)); act is silu or nothing. Before
        the first step stand those of initial_state, or zeros.

    Args:
        x: (batch, dim, len), any strides; float32, float64, float16 or bfloat16.
        weight: (dim, width), width 1 to 8; bias: (dim,). Taken as float32 (float64 with float64 x).
        activation: None, or "silu" or "swish", which are one.
        initial_state: (batch, dim, width - 1), x's dtype: the steps before the first, the last one last.
        cu_seqlens: (sequences + 1,) int32 from 0: batch is 1 and sequence i is steps cu_seqlens[i] to
            cu_seqlens[i + 1]; states are then (sequences, dim, width - 1). A sequence may be empty.
        return_final_state: return the last width - 1 steps too, with those of initial_state in a shorter sequence.

    Returns:
        out: the shape, dtype and, where it is dense, the strides of x; 0 behind the last packed sequence. With
        return_final_state (out, final_state), the latter as initial_state.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for x, weight, bias and initial_state, from out and final_state; no double backward. Computed in
        float32. The bits do not depend on the strides, on the batch, on the number of threads, or on how a sequence
        is cut into calls; those of the gradients of weight and bias depend on strides and cuts.

    Source: Gu & Dao 2023, Mamba, arXiv:2312.00752, section 3.4.
    """
    check_activation(_NAME, "x", x)
    weight, bias = _check_taps(_NAME, x, weight, bias)
    silu = _is_silu(_NAME, activation)
    sequences = check_packing(_NAME, x, cu_seqlens)
    if initial_state is not None:
        shape = (sequences, x.shape[1], weight.shape[1] - 1)
        names = f"{'batch' if cu_seqlens is None else 'sequences'}, dim, width - 1"
        check_tensor(_NAME, "initial_state", initial_state, dtypes=(x.dtype,), device=x.device, shape=shape,
                     names=names)  # fmt: skip
        initial_state = initial_state.contiguous()
    out, final_state = torch.ops.lcore.causal_conv1d(x, weight, bias, silu, initial_state, cu_seqlens)
    return (out, final_state) if return_final_state else out


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """The next steps of `lcore.causal_conv1d` for every row of a batch; the states are moved on in place.

    Formula: that of `lcore.causal_conv1d`, with the state before the first step.

    Args:
        x: (batch, dim) for one step, or (batch, dim, len); any strides.
        state: (batch, dim, width - 1), or (slots, dim, width - 1) with state_indices; contiguous, float32, float16 or
            bfloat16 (float64 with float64 x). Written.
        weight, bias, activation: as for `lcore.causal_conv1d`.
        state_indices: (batch,) int64, the slot of each row, no slot twice; a row with a negative one is left out.

    Returns:
        The shape and dtype of x; 0 in rows that are left out.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: no gradients: the result never requires grad. The bits are those of `lcore.causal_conv1d`.

    Source: as `lcore.causal_conv1d`.
    """
    check_tensor(_UPDATE, "x", x)
    require(x.dim() in (2, 3), _UPDATE, "x", "have shape (batch, dim) or (batch, dim, len)", tuple(x.shape))
    steps = x if x.dim() == 3 else x.unsqueeze(-1)
    check_activation(_UPDATE, "x", steps)
    weight, bias = _check_taps(_UPDATE, steps, weight, bias)
    silu = _is_silu(_UPDATE, activation)
    rows = "*" if state_indices is not None else x.shape[0]
    names = f"{'slots' if state_indices is not None else 'batch'}, dim, width - 1"
    check_tensor(_UPDATE, "state", state, dtypes=dtypes_beside(x), device=x.device,
                 shape=(rows, x.shape[1], weight.shape[1] - 1), names=names)  # fmt: skip
    require(state.is_contiguous(), _UPDATE, "state", "be contiguous", f"strides {state.stride()}")
    if state_indices is not None:
        check_slots(_UPDATE, state_indices, x, state.shape[0])
    out = torch.ops.lcore.causal_conv1d_update(steps, state, weight, bias, silu, state_indices)
    return out.view(x.shape)


def _check_taps(name: str, x: Tensor, weight: Any, bias: Any) -> tuple[Tensor, Tensor | None]:
    dim = x.shape[1]
    weight = check_parameter(name, "weight", weight, x, (dim, "*"), "dim, width")
    require(1 <= weight.shape[1] <= MAX_WIDTH, name, "weight", f"have a width of 1 to {MAX_WIDTH}", weight.shape[1])
    return weight, None if bias is None else check_parameter(name, "bias", bias, x, (dim,), "dim")


def _is_silu(name: str, activation: Any) -> bool:
    known = activation in (None, "silu", "swish")
    require(known, name, "activation", 'be None, "silu" or "swish"', repr(activation))
    return activation is not None


@torch.library.register_fake("lcore::causal_conv1d")
def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = False, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return torch.empty_like(x), x.new_empty((sequences, x.shape[1], weight.shape[1] - 1))


@torch.library.register_fake("lcore::causal_conv1d_backward")
def _backward_fake(
    dout: Tensor, dfinal: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dim, width = weight.shape
    dinitial = x.new_empty((0 if initial_state is None else initial_state.shape[0], dim, width - 1))
    return (
        torch.empty_like(x),
        weight.new_empty((dim, width)),
        weight.new_empty((0 if bias is None else dim,)),
        dinitial,
    )


@torch.library.register_fake("lcore::causal_conv1d_update")
def _update_fake(x: Tensor, state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.silu, initial_state, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def _backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dfinal is None:
        return (None,) * 6
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dinitial = torch.ops.lcore.causal_conv1d_backward(
        torch.zeros_like(x) if dout is None else dout, None if dfinal is None else dfinal.contiguous(), x, weight, bias,
        ctx.silu, initial_state, cu_seqlens,
    )  # fmt: skip
    return dx, dweight, None if bias is None else dbias, None, None if initial_state is None else dinitial, None


torch.library.register_autograd("lcore::causal_conv1d", _backward, setup_context=_save)


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "lcore.causal_conv1d: no second derivative; use lcore.reference.causal_conv1d, which is plain torch"
    )


torch.library.register_autograd("lcore::causal_conv1d_backward", _no_double_backward)
