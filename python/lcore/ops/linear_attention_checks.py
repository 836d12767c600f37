"""Argument checks that the ops of linear attention share; `name` is the op's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcore.errors import check_kernel, check_number, check_tensor, require
from lcore.ops.attention_checks import check_offsets
from lcore.ops.recurrent_checks import check_slots, dtypes_beside, wide_dtype

_MAX_HEAD_DIM = 512


def check_tokens(
    name: str, q: Any, k: Any, v: Any, cu_seqlens: Tensor | None, *, names: tuple[str, ...] = ("q", "k", "v")
) -> int | torch.SymInt:
    """q and k of one shape and v beside them, (batch, len, heads, dim), packed without a batch; returns the number of
    sequences.
    """
    first, second, third = names
    lead = ("batch, len" if cu_seqlens is None else "tokens") + ", "
    rank = 4 if cu_seqlens is None else 3
    check_tensor(name, first, q, shape=("*",) * rank, names=f"{lead}heads, key_dim")
    check_kernel(name, q)
    check = partial(check_tensor, name, dtypes=(q.dtype,), device=q.device)
    check(second, k, shape=q.shape, names=f"{lead}heads, key_dim")
    check(third, v, shape=(*q.shape[:-2], "*", "*"), names=f"{lead}heads_v, value_dim")
    check_heads(name, q, v, names=names)
    if cu_seqlens is None:
        return q.shape[0]
    check_offsets(name, "cu_seqlens", cu_seqlens, q, None, "")
    return cu_seqlens.shape[0] - 1


def check_heads(name: str, q: Tensor, v: Tensor, *, names: tuple[str, ...] = ("q", "k", "v")) -> None:
    heads, heads_v = q.shape[-2], v.shape[-2]
    fits = heads > 0 and heads_v % heads == 0
    require(fits, name, names[2], lambda: f"have heads a multiple of the {heads} of {names[0]}", heads_v)
    for argument, x in ((names[0], q), (names[2], v)):
        fits = 1 <= x.shape[-1] <= _MAX_HEAD_DIM
        require(fits, name, f"the last size of {argument}", f"lie in [1, {_MAX_HEAD_DIM}]", x.shape[-1])


def check_decay(name: str, g: Any, q: Tensor, v: Tensor, lead: str) -> None:
    """(heads_v,), or a number for each token and head of v, or one for each of its key channels."""
    check_tensor(name, "g", g, dtypes=dtypes_beside(q), device=q.device)
    shapes = ((v.shape[-2],), v.shape[:-1], (*v.shape[:-1], q.shape[-1]))
    fits = any(g.shape == shape for shape in shapes)
    rule = "have shape (heads_v,) = {}, ({}heads_v) = {} or ({}heads_v, key_dim) = {}"
    require(fits, name, "g", lambda: rule.format(shapes[0], lead, tuple(shapes[1]), lead, shapes[2]), tuple(g.shape))


def check_scale(name: str, scale: float | None) -> None:
    if scale is not None:
        check_number(name, "scale", scale)


def check_state(name: str, argument: str, state: Any, x: Tensor, shape: tuple[Any, ...], names: str) -> None:
    check_tensor(name, argument, state, dtypes=(wide_dtype(x),), device=x.device, shape=shape, names=names)


def check_update(
    name: str,
    state: Any,
    q: Any,
    k: Any,
    v: Any,
    state_indices: Tensor | None,
    *,
    names: tuple[str, ...] = ("q", "k", "v"),
) -> None:
    """One token of each row: q and k (batch, heads, key_dim), v (batch, heads_v, value_dim), and the states."""
    check_tensor(name, names[0], q, shape=("*", "*", "*"), names="batch, heads, key_dim")
    check_kernel(name, q)
    check = partial(check_tensor, name, dtypes=(q.dtype,), device=q.device)
    check(names[1], k, shape=q.shape, names="batch, heads, key_dim")
    check(names[2], v, shape=(q.shape[0], "*", "*"), names="batch, heads_v, value_dim")
    check_heads(name, q, v, names=names)
    slots = "*" if state_indices is not None else q.shape[0]
    shape = (slots, v.shape[1], q.shape[2], v.shape[2])
    check_state(name, "state", state, q, shape, "slots, heads_v, key_dim, value_dim")
    require(state.is_contiguous(), name, "state", "be contiguous", _strides(state))
    if state_indices is not None:
        check_slots(name, state_indices, q, state.shape[0])


def _strides(x: Tensor) -> str:
    return f"strides {x.stride()}"
