"""The recurrence of RWKV-7: a decay for each channel, and a part of the state that moves from key to key."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore.errors import check_number, check_tensor, require
from lcore.ops._linear_attention import composite
from lcore.ops.linear_attention_checks import check_state, check_tokens, check_update
from lcore.ops.recurrent_checks import dtypes_beside

_NAME = "rwkv7"
_UPDATE = "rwkv7_update"


@overload
def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """A decaying state that also writes under one key what it holds under another, by chunks of 64 tokens.

    Formula: S_t = diag(e^w_t) S_(t-1) + b_t (a_t^T S_(t-1)) + k_t v_t^T; out_t = scale r_t^T S_t.
        RWKV-7 has w = -e^-0.5 sigmoid(w'), a = -kk and b = kk * eta for a normalised key kk and a learning rate eta in
        (0, 1). With a = -beta e^w k, b = k and beta v for v it is `lcore.gated_delta_rule`.

    Args:
        r, k, a, b: (batch, len, heads, key_dim), or packed (tokens, heads, key_dim) with cu_seqlens; float32, float64,
            float16 or bfloat16, any strides. Nothing is normalised: with a and b of other lengths the state may grow.
        w: log-decay of each key channel, r's shape, 0 or below; any dtype (float64 with float64 alone).
        v: (batch, len, heads, value_dim) or packed, r's dtype. key_dim and value_dim up to 512.
        scale: of r; the model has none.
        initial_state, cu_seqlens, return_final_state: as `lcore.gated_linear_attention`; states are
            (sequences, heads, key_dim, value_dim).

    Returns:
        out: v's shape and dtype; and with return_final_state the state, as `lcore.gated_linear_attention`.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for r, w, k, v, a, b and initial_state, through out and through final_state; no double backward. The
        bound on the decay that other kernels need (w > -0.61 for RWKV-7, -5 for "safe gates") is not needed: nothing
        is divided by a decay, and e^w = 0 is as good as any. A chunk's system over tokens is solved by substitution, as
        that of `lcore.gated_delta_rule`.

    Source: Peng et al. 2025, RWKV-7 "Goose", arXiv:2503.14456, section 4.1.
    """
    sequences = check_tokens(_NAME, r, k, v, cu_seqlens, names=("r", "k", "v"))
    _check_keys(_NAME, r, w, v, a, b, "batch, len, " if cu_seqlens is None else "tokens, ")
    check_number(_NAME, "scale", scale)
    if initial_state is not None:
        shape = (sequences, v.shape[-2], r.shape[-1], v.shape[-1])
        check_state(_NAME, "initial_state", initial_state, r, shape, "sequences, heads, key_dim, value_dim")
    out, state = torch.ops.lcore.rwkv7(r, w, k, v, a, b, scale, initial_state, cu_seqlens)
    return (out, state) if return_final_state else out


def _check_keys(name: str, r: Tensor, w: Any, v: Tensor, a: Any, b: Any, lead: str) -> None:
    heads = r.shape[-2]
    require(v.shape[-2] == heads, name, "v", lambda: f"have the {heads} heads of r", v.shape[-2])
    check = partial(check_tensor, name, device=r.device, shape=r.shape, names=f"{lead}heads, key_dim")
    check("w", w, dtypes=dtypes_beside(r))
    check("a", a, dtypes=(r.dtype,))
    check("b", b, dtypes=(r.dtype,))


@composite(
    _NAME,
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, float scale=1.0, Tensor? initial_state=None,"
    " Tensor? cu_seqlens=None) -> (Tensor out, Tensor final_state)",
)
def _rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float = 1.0,
    initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    state = None if initial_state is None else initial_state.contiguous()
    return torch.ops.lcore._linear_attention(r, k, v, w, scale, state, cu_seqlens, a=a, b=b)


def rwkv7_update(
    state: Tensor,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `rwkv7` for each row of a batch; its state is updated in place.

    Formula: state <- diag(e^w) state + b (a^T state) + k v^T; out = scale r^T state.

    Args:
        state, state_indices: as `lcore.gated_linear_attention_update`.
        r, w, k, a, b: (batch, heads, key_dim); v: (batch, heads, value_dim), as `rwkv7`.
        scale: as `rwkv7`.

    Returns:
        out: v's shape and dtype.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: no gradients.

    Source: as `rwkv7`.
    """
    check_update(_UPDATE, state, r, k, v, state_indices, names=("r", "k", "v"))
    _check_keys(_UPDATE, r, w, v, a, b, "batch, ")
    check_number(_UPDATE, "scale", scale)
    return torch.ops.lcore.rwkv7_update(state, r, w, k, v, a, b, scale, state_indices)


@composite(
    _UPDATE,
    "(Tensor(a!) state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, float scale=1.0,"
    " Tensor? state_indices=None) -> Tensor",
)
def _update(
    state: Tensor, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float = 1.0,
    state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.ops.lcore._linear_attention_update(state, r, k, v, w, scale, state_indices, a=a, b=b)
