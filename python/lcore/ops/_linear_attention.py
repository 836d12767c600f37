"""Fake kernels and autograd of the op that gated_linear_attention, gated_delta_rule, rwkv6, rwkv7 and ssd run."""

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
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, *rest: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (sequences_of(q, cu_seqlens), v.shape[-2], q.shape[-1], v.shape[-1])
    return v.new_empty(v.shape), q.new_empty(shape, dtype=wide_dtype(q))


def sequences_of(q: Tensor, cu_seqlens: Tensor | None) -> int:
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.register_fake("lcore::_linear_attention_backward")
def _backward_fake(
    dout: Tensor, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, beta: Tensor | None, weight: Tensor | None,
    bonus: Tensor | None, a: Tensor | None, b: Tensor | None, skip: Tensor | None, gate: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    sequences, heads = sequences_of(q, cu_seqlens), v.shape[-2]

    def rows(x: Tensor | None) -> Tensor:
        return q.new_empty((0,)) if x is None else x.new_empty(x.shape)

    def of_heads(x: Tensor | None, dim: int) -> Tensor:
        return q.new_empty((0 if x is None else sequences, heads, dim), dtype=wide_dtype(q))

    state = q.new_empty((0,), dtype=wide_dtype(q)) if initial_state is None else torch.empty_like(initial_state)
    return (
        *(rows(x) for x in (q, k, v, g, beta, weight)), of_heads(bonus, q.shape[-1]), rows(a), rows(b),
        of_heads(skip, v.shape[-1]), rows(gate), state,
    )  # fmt: skip


@torch.library.register_fake("lcore::_linear_attention_update")
def _update_fake(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, *rest: Tensor | None
) -> Tensor:
    return v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, g, scale, *rest = inputs
    ctx.save_for_backward(q, k, v, g, *rest)
    ctx.scale = scale
    ctx.set_materialize_grads(False)  # the final state is rarely used


def _backward(ctx: Any, dout: Tensor | None, dstate: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None and dstate is None:
        return (None,) * 14
    q, k, v, g, initial_state, cu_seqlens, *optional = ctx.saved_tensors
    dq, dk, dv, dg, dbeta, dweight, dbonus, da, db, dskip, dgate, dinitial = (
        torch.ops.lcore._linear_attention_backward(
            torch.zeros_like(v, memory_format=torch.contiguous_format) if dout is None else dout,
            None if dstate is None else dstate.contiguous(),
            q, k, v, g, ctx.scale, initial_state, cu_seqlens, *optional,
        )
    )  # fmt: skip
    grads = (dbeta, dweight, dbonus.sum(0), da, db, dskip.sum(0), dgate)
    given = [grad if x is not None else None for grad, x in zip(grads, optional, strict=True)]
    return dq, dk, dv, dg, None, None if initial_state is None else dinitial, None, *given


torch.library.register_autograd("lcore::_linear_attention", _backward, setup_context=_save)


def no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "lcore: linear attention has no second derivative; use lcore.reference, which is plain torch"
    )


torch.library.register_autograd("lcore::_linear_attention_backward", no_double_backward)
