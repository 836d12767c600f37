"""The recurrence of RWKV-6."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore.errors import check_number, check_tensor
from lcore.ops._linear_attention import composite
from lcore.ops.linear_attention_checks import check_decay, check_state, check_tokens, check_update
from lcore.ops.recurrent_checks import dtypes_beside, wide_dtype

_NAME = "rwkv6"
_UPDATE = "rwkv6_update"


@overload
def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, *, scale: float = 1.0, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def rwkv6(
    r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, *, scale: float = 1.0, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A decaying state that is read before its token is taken in; the token itself counts with a bonus.

    Formula: out_t = scale r_t^T (S_(t-1) + diag(u) k_t v_t^T); S_t = diag(e^g_t) S_(t-1) + k_t v_t^T.
        RWKV-6's decay w is e^g: g = -e^w' of the projection w'.

    Args:
        r, k, v, g, initial_state, cu_seqlens, return_final_state: as q and the rest of `lcore.gated_linear_attention`.
        u: bonus of a token's own key, (heads_v, key_dim), any dtype (float64 with float64 alone).
        scale: of r; the model has none.

    Returns:
        out: v's shape and dtype; and with return_final_state the state, as `lcore.gated_linear_attention`.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: gradients for r, k, v, g, u and initial_state; no double backward. As `lcore.gated_linear_attention`.

    Source: Peng et al. 2024, Eagle and Finch, arXiv:2404.05892, section 4.2.
    """
    sequences = check_tokens(_NAME, r, k, v, cu_seqlens, names=("r", "k", "v"))
    check_decay(_NAME, g, r, v, "batch, len, " if cu_seqlens is None else "tokens, ")
    _check_bonus(_NAME, u, r, v)
    check_number(_NAME, "scale", scale)
    if initial_state is not None:
        shape = (sequences, v.shape[-2], r.shape[-1], v.shape[-1])
        check_state(_NAME, "initial_state", initial_state, r, shape, "sequences, heads_v, key_dim, value_dim")
    out, state = torch.ops.lcore.rwkv6(r, k, v, g, u, scale, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def _check_bonus(name: str, u: Any, r: Tensor, v: Tensor) -> None:
    check_tensor(name, "u", u, dtypes=dtypes_beside(r), device=r.device, shape=(v.shape[-2], r.shape[-1]),
                 names="heads_v, key_dim")  # fmt: skip


@composite(
    _NAME,
    "(Tensor r, Tensor k, Tensor v, Tensor g, Tensor u, float scale=1.0, Tensor? initial_state=None,"
    " Tensor? cu_seqlens=None) -> (Tensor out, Tensor final_state)",
)
def _rwkv6(
    r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, scale: float = 1.0, initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if g.dim() == 1:
        g = g.expand(v.shape[:-1])
    state = None if initial_state is None else initial_state.contiguous()
    bonus = u.to(wide_dtype(r)).contiguous()
    return torch.ops.lcore._linear_attention(r, k, v, g, scale, state, cu_seqlens, bonus=bonus)


def rwkv6_update(
    state: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `rwkv6` for each row of a batch; its state is updated in place.

    Formula: out = scale r^T (state + diag(u) k v^T); state <- diag(e^g) state + k v^T.

    Args:
        state, r, k, v, g, state_indices: as state, q and the rest of `lcore.gated_linear_attention_update`.
        u, scale: as `rwkv6`.

    Returns:
        out: v's shape and dtype.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: no gradients.

    Source: as `rwkv6`.
    """
    check_update(_UPDATE, state, r, k, v, state_indices, names=("r", "k", "v"))
    check_decay(_UPDATE, g, r, v, "batch, ")
    _check_bonus(_UPDATE, u, r, v)
    check_number(_UPDATE, "scale", scale)
    return torch.ops.lcore.rwkv6_update(state, r, k, v, g, u, scale, state_indices)


@composite(
    _UPDATE,
    "(Tensor(a!) state, Tensor r, Tensor k, Tensor v, Tensor g, Tensor u, float scale=1.0,"
    " Tensor? state_indices=None) -> Tensor",
)
def _update(
    state: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, scale: float = 1.0,
    state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if g.dim() == 1:
        g = g.expand(v.shape[:-1])
    bonus = u.to(wide_dtype(r)).contiguous()
    return torch.ops.lcore._linear_attention_update(state, r, k, v, g, scale, state_indices, bonus=bonus)
