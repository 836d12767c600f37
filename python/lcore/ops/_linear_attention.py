"""Fake kernels and autograd of the op that gated_linear_attention, gated_delta_rule, rwkv6 and ssd run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lcore import _ext  # noqa: F401  (defines torch.ops.lcore)
from lcore.ops.recurrent_checks import wide_dtype

_Function = TypeVar("_Function", bound=Callable[..., Any])


def composite(name: str, schema: str) -> Callable[[_Function], _Function]:
    """Defines ``torch.ops.lcore.<name>`` as what the decorated function does with other ops: autograd and fake kernels
    are theirs.
    """
    torch.library.define(f"lcore::{name}", schema)

    def register(function: _Function) -> _Function:
        torch.library.impl(f"lcore::{name}", "CompositeImplicitAutograd")(function)
        return function

    return register


@torch.library.register_fake("lcore::_linear_attention")
def _fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, weight: Tensor | None,
    bonus: Tensor | None, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, wide: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (_sequences(q, cu_seqlens), v.shape[-2], q.shape[-1], v.shape[-1])
    return v.new_empty(v.shape, dtype=_out_dtype(v, wide)), q.new_empty(shape, dtype=wide_dtype(q))


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _out_dtype(v: Tensor, wide: bool) -> torch.dtype:
    return wide_dtype(v) if wide else v.dtype


@torch.library.register_fake("lcore::_linear_attention_backward")
def _backward_fake(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
    weight: Tensor | None,
    bonus: Tensor | None, scale: float, initial_state: Tensor | None, cu_seqlens: Tensor | None, wide: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = [x.new_empty(x.shape) for x in (q, k, v, g)]
    gates = [q.new_empty((0,)) if x is None else x.new_empty(x.shape) for x in (beta, weight)]
    own = q.new_empty(
        (_sequences(q, cu_seqlens) if bonus is not None else 0, v.shape[-2], q.shape[-1]), dtype=wide_dtype(q)
    )
    state = q.new_empty((0,), dtype=wide_dtype(q)) if initial_state is None else torch.empty_like(initial_state)
    return (*rows, *gates, own, state)


@torch.library.register_fake("lcore::_linear_attention_update")
def _update_fake(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, weight: Tensor | None,
    bonus: Tensor | None, scale: float, state_indices: Tensor | None, wide: bool,
) -> Tensor:  # fmt: skip
    return v.new_empty(v.shape, dtype=_out_dtype(v, wide))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, g, beta, weight, bonus, scale, initial_state, cu_seqlens, wide = inputs
    ctx.save_for_backward(q, k, v, g, beta, weight, bonus, initial_state, cu_seqlens)
    ctx.scale, ctx.wide = scale, wide
    ctx.set_materialize_grads(False)  # the final state is rarely used


def _backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, g, beta, weight, bonus, initial_state, cu_seqlens = ctx.saved_tensors
    none = (None,) * 11
    if dout is None and dstate is None:
        return none
    dq, dk, dv, dg, dbeta, dweight, dbonus, dinitial = torch.ops.lcore._linear_attention_backward(
        v.new_zeros(v.shape, dtype=_out_dtype(v, ctx.wide)) if dout is None else dout,
        None if dstate is None else dstate.contiguous(),
        q, k, v, g, beta, weight, bonus, ctx.scale, initial_state, cu_seqlens, ctx.wide,
    )  # fmt: skip
    optional = [
        grad if x is not None else None
        for grad, x in (
            (dbeta, beta),
            (dweight, weight),
            (dbonus.sum(0), bonus),
            (None, None),
            (dinitial, initial_state),
        )
    ]
    return dq, dk, dv, dg, *optional, None, None


torch.library.register_autograd("lcore::_linear_attention", _backward, setup_context=_save)


def _no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "lcore: linear attention has no second derivative; use lcore.reference, which is plain torch"
    )


torch.library.register_autograd("lcore::_linear_attention_backward", _no_double_backward)
