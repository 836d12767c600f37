"""The matrix memory of xLSTM: linear attention with an exponential input gate and a normaliser."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lcore.errors import check_tensor, require, require_type
from lcore.ops import _mlstm  # noqa: F401  (registers fakes and autograd)
from lcore.ops._linear_attention import composite
from lcore.ops.gated_linear_attention import default_scale
from lcore.ops.linear_attention_checks import check_scale, check_state, check_tokens, check_update
from lcore.ops.recurrent_checks import dtypes_beside

_NAME = "mlstm"
_UPDATE = "mlstm_update"
State = tuple[Tensor, Tensor, Tensor]


@overload
def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, scale: float | None = None,
    initial_state: State | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def mlstm(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, *, scale: float | None = None,
    initial_state: State | None = None, cu_seqlens: Tensor | None = None, return_final_state: Literal[True],
) -> tuple[Tensor, State]: ...  # fmt: skip


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    initial_state: State | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_state: bool = False,
) -> Tensor | tuple[Tensor, State]:
    """A matrix state with an exponential input gate, a forget gate and a normaliser, by chunks of 64 tokens.

    Formula: with l_t = log sigmoid(f_t), m_t = max(l_t + m_(t-1), i_t):
        C_t = e^(l_t + m_(t-1) - m_t) C_(t-1) + e^(i_t - m_t) k_t v_t^T; n_t the same with k_t for k_t v_t^T;
        out_t = scale C_t^T q_t / max(|scale n_t^T q_t|, e^-m_t).

    Args:
        q, k: (batch, len, heads, key_dim), or packed (tokens, heads, key_dim) with cu_seqlens; float32, float64,
            float16 or bfloat16, any strides.
        v: (batch, len, heads_v, value_dim) or packed, their dtype; heads_v is a multiple of heads. key_dim and
            value_dim up to 512.
        i, f: input and forget gates before any activation, (batch, len, heads_v) or packed (tokens, heads_v); any dtype
            (float64 with float64 alone).
        scale: of q, default 1 / sqrt(key_dim).
        initial_state: C (sequences, heads_v, key_dim, value_dim), n (sequences, heads_v, key_dim) and
            m (sequences, heads_v), float32 (float64 for float64 inputs); default 0. It stands for e^m C and e^m n.
        cu_seqlens: int32 (sequences + 1,) token offsets of packed sequences, from 0, never falling.
        return_final_state: also return the state behind the last token.

    Returns:
        out: v's shape and dtype; and with return_final_state
        (C, n, m), shaped as initial_state. That of a sequence without tokens is its initial state. Tokens behind the
        last packed sequence get out 0 and gradients 0.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes:
        Gradients for q, k, v, i, f and the three of initial_state, through out and through the final C, n and m; no
        double backward. No exponential exceeds 1, and no gate overflows. The output does not depend on m, so m's own
        rounding does not reach it. There is no epsilon in the divisor (the mlstm_kernels package adds 1e-6). Otherwise
        as `lcore.gated_linear_attention`.

    Source: Beck et al. 2024, xLSTM, arXiv:2405.04517, eqs. 19-27 and appendix A.3.
    """
    sequences = check_tokens(_NAME, q, k, v, cu_seqlens)
    _check_gates(_NAME, q, v, i, f, "batch, len, " if cu_seqlens is None else "tokens, ")
    check_scale(_NAME, scale)
    state: State | tuple[None, None, None] = (None, None, None)
    if initial_state is not None:
        state = _check_state(_NAME, "initial_state", initial_state, q, v, sequences, "sequences")
    out, *final = torch.ops.lcore.mlstm(q, k, v, i, f, scale, *state, cu_seqlens)
    return (out, tuple(final)) if return_final_state else out


def _check_gates(name: str, q: Tensor, v: Tensor, i: Any, f: Any, lead: str) -> None:
    for argument, gate in (("i", i), ("f", f)):
        check_tensor(name, argument, gate, dtypes=dtypes_beside(q), device=q.device, shape=v.shape[:-1],
                     names=f"{lead}heads_v")  # fmt: skip


def _check_state(name: str, argument: str, state: Any, q: Tensor, v: Tensor, rows: Any, lead: str) -> State:
    fits = isinstance(state, (tuple, list)) and len(state) == 3
    require_type(fits, name, argument, "be a tuple of C, n and m", type(state).__name__)
    check = partial(check_state, name, x=q)
    heads, key_dim, value_dim = v.shape[-2], q.shape[-1], v.shape[-1]
    c, n, m = state
    check(f"C of {argument}", c, shape=(rows, heads, key_dim, value_dim), names=f"{lead}, heads_v, key_dim, value_dim")
    check(f"n of {argument}", n, shape=(rows, heads, key_dim), names=f"{lead}, heads_v, key_dim")
    check(f"m of {argument}", m, shape=(rows, heads), names=f"{lead}, heads_v")
    return c, n, m


@composite(
    _NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, float? scale=None, Tensor? initial_c=None,"
    " Tensor? initial_n=None, Tensor? initial_m=None, Tensor? cu_seqlens=None)"
    " -> (Tensor out, Tensor c, Tensor n, Tensor m)",
)
def _composite(
    q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, scale: float | None = None, initial_c: Tensor | None = None,
    initial_n: Tensor | None = None, initial_m: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    state = [None if x is None else x.contiguous() for x in (initial_c, initial_n, initial_m)]
    return torch.ops.lcore._mlstm(q, k, v, i, f, default_scale(scale, q), *state, cu_seqlens)


def mlstm_update(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    *,
    scale: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One token of `mlstm` for each row of a batch; its state is updated in place.

    Formula: that of `mlstm` for one token.

    Args:
        state: C (slots, heads_v, key_dim, value_dim), n (slots, heads_v, key_dim) and m (slots, heads_v), contiguous
            float32 (float64 for float64 inputs), written.
        q, k: (batch, heads, key_dim); v: (batch, heads_v, value_dim); i, f: (batch, heads_v), as `mlstm`.
        scale: default 1 / sqrt(key_dim).
        state_indices: as `lcore.gated_linear_attention_update`.

    Returns:
        out: v's shape and dtype.

    Raises:
        TypeError: dtypes. ValueError: shapes and values. NotImplementedError: no kernel for the device.

    Notes: no gradients. Reads and writes the state once.

    Source: as `mlstm`.
    """
    c = state[0] if isinstance(state, (tuple, list)) and len(state) == 3 else state
    check_update(_UPDATE, c, q, k, v, state_indices)
    _check_gates(_UPDATE, q, v, i, f, "batch, ")
    check_scale(_UPDATE, scale)
    c, n, m = _check_state(_UPDATE, "state", state, q, v, c.shape[0], "slots")
    for argument, x in (("n", n), ("m", m)):
        require(x.is_contiguous(), _UPDATE, f"{argument} of state", "be contiguous", f"strides {x.stride()}")
    return torch.ops.lcore.mlstm_update(c, n, m, q, k, v, i, f, scale, state_indices)


@composite(
    _UPDATE,
    "(Tensor(a!) c, Tensor(b!) n, Tensor(c!) m, Tensor q, Tensor k, Tensor v, Tensor i, Tensor f, float? scale=None,"
    " Tensor? state_indices=None) -> Tensor",
)
def _update(
    c: Tensor, n: Tensor, m: Tensor, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, scale: float | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return torch.ops.lcore._mlstm_update(c, n, m, q, k, v, i, f, default_scale(scale, q), state_indices)
